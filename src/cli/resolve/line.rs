//! A line of a batch: what its keys say, and where they say nothing, what the flags say.

use std::error::Error as _;

use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::{Arg, Args, Command, FromArgMatches};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::{
    Input, SamplingFlags,
    input::{check_turns, is_begun},
};
use crate::{
    cli::args::{self, SamplingArgs},
    model::{Message, TemplateOptions},
};

/// The keys that are not sampling's, whose are those of its flags.
const KEYS: [&str; 11] = [
    "id",
    "prompt",
    "messages",
    "system",
    "tools",
    "raw",
    "max_tokens",
    "stop",
    "ignore_eos",
    "no_think",
    "date",
];

/// What holds for every line that does not say otherwise.
pub struct LineFlags {
    pub raw: bool,
    pub system: Option<String>,
    pub options: TemplateOptions,
    pub max_tokens: Option<usize>,
    pub stop: Vec<String>,
    pub ignore_eos: bool,
    pub sampling: SamplingArgs,
}

/// A line that was read.
pub struct Line {
    /// A text or a number: its own, or else the line's number. `None` where the line cannot be read so far.
    pub id: Option<Value>,
    /// What is to be done, or what is wrong with the line.
    pub task: Result<Task>,
}

/// A text to generate.
pub struct Task {
    pub input: Input,
    pub max_tokens: Option<usize>,
    pub stop: Vec<String>,
    pub ignore_eos: bool,
    pub sampling: SamplingFlags,
}

impl LineFlags {
    /// Reads the line with this number.
    pub fn read(&self, number: usize, line: &[u8]) -> Line {
        let read = object(line).and_then(|mut fields| {
            let id = take_id(&mut fields)?.unwrap_or_else(|| number.into());
            Ok((id, fields))
        });
        match read {
            Ok((id, fields)) => Line {
                id: Some(id),
                task: self.task(Fields(fields)),
            },
            Err(error) => Line {
                id: None,
                task: Err(error),
            },
        }
    }

    fn task(&self, mut fields: Fields) -> Result<Task> {
        let raw = fields.take("raw")?.unwrap_or(self.raw);
        Ok(Task {
            input: match raw {
                true => fields.raw()?,
                false => self.chat(&mut fields)?,
            },
            max_tokens: fields
                .number("max_tokens", args::count)?
                .or(self.max_tokens),
            stop: fields.stop()?.unwrap_or_else(|| self.stop.clone()),
            ignore_eos: fields.take("ignore_eos")?.unwrap_or(self.ignore_eos),
            sampling: SamplingFlags(fields.sampling(&self.sampling)?),
        })
    }

    /// The conversation of the line. A system message precedes it, unless it begins with its own.
    fn chat(&self, fields: &mut Fields) -> Result<Input> {
        let mut messages: Vec<Message> = match (fields.take("prompt")?, fields.take("messages")?) {
            (Some::<String>(prompt), None) => vec![Message::new("user", prompt)],
            (None, Some(messages)) => messages,
            (None, None) => bail!("there is neither a prompt nor messages"),
            (Some(_), Some(_)) => bail!("prompt and messages exclude each other"),
        };
        check_turns(&messages).context("messages")?;
        let begun = ["system", "developer"].contains(&messages[0].role());
        let system: Option<String> = fields.take("system")?;
        ensure!(
            !begun || system.is_none(),
            "messages begin with a system message, and system is another"
        );
        if let Some(system) = system.or_else(|| self.system.clone()).filter(|_| !begun) {
            messages.insert(0, Message::new("system", system));
        }
        let no_think: Option<bool> = fields.take("no_think")?;
        let date: Option<String> = fields.take("date")?;
        let date = date.map(|date| args::date(&date)).transpose();
        Ok(Input::Chat {
            options: TemplateOptions {
                continue_last: is_begun(&messages),
                enable_thinking: match no_think {
                    Some(no_think) => no_think.then_some(false),
                    None => self.options.enable_thinking,
                },
                tools: fields.take("tools")?.or_else(|| self.options.tools.clone()),
                date: date
                    .map_err(|expected| anyhow!("date: {expected}"))?
                    .or(self.options.date),
            },
            messages,
        })
    }
}

/// The keys of a line that nobody has asked for yet. A value of null is as none.
struct Fields(Map<String, Value>);

impl Fields {
    fn take<T: DeserializeOwned>(&mut self, key: &str) -> Result<Option<T>> {
        let value = self.0.remove(key).unwrap_or_default();
        serde_json::from_value(value).with_context(|| key.to_owned())
    }

    /// A number that `parse` takes as the text of a flag.
    fn number<T>(&mut self, key: &str, parse: fn(&str) -> Result<T, String>) -> Result<Option<T>> {
        let number: Option<serde_json::Number> = self.take(key)?;
        let parsed = number.map(|number| {
            parse(&number.to_string()).map_err(|expected| anyhow!("{key} is {number}: {expected}"))
        });
        parsed.transpose()
    }

    fn raw(&mut self) -> Result<Input> {
        for key in ["messages", "system", "tools", "no_think", "date"] {
            ensure!(
                self.take::<Value>(key)?.is_none(),
                "{key} is for the chat template, and a raw prompt is taken without it"
            );
        }
        let prompt: Option<String> = self.take("prompt")?;
        Ok(Input::Raw(prompt.context("there is no prompt")?))
    }

    fn stop(&mut self) -> Result<Option<Vec<String>>> {
        let texts = match self.take("stop")? {
            None => return Ok(None),
            Some(Value::String(text)) => vec![text],
            Some(list) => serde_json::from_value::<Vec<String>>(list)
                .context("stop: expected a text or a list of texts")?,
        };
        ensure!(
            texts.iter().all(|text| !text.is_empty()),
            "stop: an empty text is in every text"
        );
        Ok(Some(texts))
    }

    /// The keys that are left over `flags`: each takes what the sampling flag of its name takes.
    fn sampling(self, flags: &SamplingArgs) -> Result<SamplingArgs> {
        let command = SamplingArgs::augment_args_for_update(Command::new("").no_binary_name(true));
        let mut sampling = flags.clone();
        for (key, value) in self.0 {
            let flag = key.replace('_', "-");
            let is_named = |arg: &Arg| {
                let aliases = arg.get_all_aliases().unwrap_or_default();
                arg.get_long() == Some(&flag) || aliases.contains(&&*flag)
            };
            if !command.get_arguments().any(is_named) {
                let known = command.get_arguments().map(|arg| arg.get_id().as_str());
                let known: Vec<_> = KEYS.into_iter().chain(known).collect();
                bail!("there is no key {key:?}, only {}", known.join(", "));
            }
            if value.is_null() {
                continue;
            }
            ensure!(value.is_number(), "{key}: expected a number, found {value}");
            let typed = [format!("--{flag}={value}")];
            let matches = command.clone().try_get_matches_from(typed);
            let matches = matches.map_err(|error| match error.source() {
                Some(expected) => anyhow!("{key} is {value}: {expected}"),
                None => anyhow!("{key} is {value}: {error}"),
            })?;
            sampling.update_from_arg_matches(&matches)?;
        }
        Ok(sampling)
    }
}

fn object(line: &[u8]) -> Result<Map<String, Value>> {
    let text = str::from_utf8(line).map_err(|error| {
        let offset = error.valid_up_to();
        anyhow!("not UTF-8 text: byte {offset} of the line starts no character")
    })?;
    // Editors of Windows put a byte order mark before the first line.
    match serde_json::from_str(text.trim_start_matches('\u{feff}')) {
        Ok(Value::Object(fields)) => Ok(fields),
        Ok(_) => bail!(r#"expected an object such as {{"prompt":"..."}}"#),
        Err(error) => {
            let message = error.to_string();
            // The parser saw one line.
            bail!(
                "not JSON: {}",
                message.replace("at line 1 column", "at column")
            )
        }
    }
}

/// Removes the id, which has to come back as it is: of numbers, whole ones alone are sure to.
fn take_id(fields: &mut Map<String, Value>) -> Result<Option<Value>> {
    match fields.remove("id") {
        None | Some(Value::Null) => Ok(None),
        Some(id) if id.is_string() || id.is_i64() || id.is_u64() => Ok(Some(id)),
        Some(id) => bail!("id: expected a text or a whole number of at most 64 bits, found {id}"),
    }
}
