//! The text that a model is to read, and the files that hold it.

use std::{
    fs,
    io::{self, IsTerminal, Read},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, anyhow, ensure};
use serde::de::DeserializeOwned;

use super::usage;
use crate::{
    cli::{
        args::{PromptArgs, TemplateArgs},
        escape::escaped,
    },
    model::{ChatTemplate, Ignored, Message, Prompt, TemplateOptions, Vocabulary},
};

/// The text that a model is to read.
pub enum Input {
    /// As it is.
    Raw(String),
    /// Through the model's chat template.
    Chat {
        messages: Vec<Message>,
        options: TemplateOptions,
    },
}

impl Input {
    /// The text's tokens.
    pub fn tokens(&self, vocabulary: &Vocabulary) -> Result<Vec<u32>> {
        let template = vocabulary.chat_template.as_ref();
        let prompt = self.render(template, vocabulary.gguf.name())?;
        Ok(vocabulary.tokenizer.encode(&prompt))
    }

    /// Renders the text with the template of the file called `name`.
    pub fn render(&self, template: Option<&ChatTemplate>, name: &str) -> Result<Prompt> {
        match self {
            Self::Raw(text) => Ok(Prompt::raw(text)),
            Self::Chat { messages, options } => {
                let template = template.with_context(|| {
                    format!(
                        "{name} has no chat template (tokenizer.chat_template): give the prompt as the model is to read it, \
                         to `run` with --raw and to `tokenize` without --chat"
                    )
                })?;
                let prompt = template.render(messages, options)?;
                if prompt.depends_on_clock() {
                    tracing::debug!(
                        "the chat template asks what day it is, so the prompt changes with the day; --date fixes it"
                    );
                }
                for ignored in prompt.ignored() {
                    tracing::warn!("{}", without_effect(*ignored, &escaped(name)));
                }
                Ok(prompt)
            }
        }
    }
}

/// What is said where the template of the file called `name` makes no use of something.
pub fn without_effect(ignored: Ignored, name: &str) -> String {
    match ignored {
        Ignored::Thinking => format!(
            "--no-think has no effect: the chat template of {name} does not ask for enable_thinking in this conversation"
        ),
        Ignored::Tools => {
            format!("--tools has no effect: the chat template of {name} does not look at tools")
        }
        Ignored::Date => {
            format!("--date has no effect: the chat template of {name} does not ask what day it is")
        }
        Ignored::System => {
            format!("the chat template of {name} leaves a system message out of the prompt")
        }
    }
}

pub fn chat(args: PromptArgs) -> Result<Input> {
    let reads_stdin = |path: &Option<PathBuf>| path.as_deref().is_some_and(is_stdin);
    if reads_stdin(&args.template.tools) && (reads_stdin(&args.messages) || reads_stdin(&args.file))
    {
        return Err(usage(
            "standard input can be read once: give --tools, or the prompt, a file",
        ));
    }
    let messages = match &args.messages {
        Some(path) => read_messages(path)?,
        None => {
            let user = Message::new("user", text(&args)?);
            let system = args.template.system.clone();
            system
                .map(|content| Message::new("system", content))
                .into_iter()
                .chain([user])
                .collect()
        }
    };
    Ok(Input::Chat {
        options: TemplateOptions {
            continue_last: is_begun(&messages),
            ..template_options(args.template)?
        },
        messages,
    })
}

/// All but the system message, which is one of the messages.
pub fn template_options(args: TemplateArgs) -> Result<TemplateOptions> {
    Ok(TemplateOptions {
        enable_thinking: args.no_think.then_some(false),
        tools: args.tools.map(|path| read_tools(&path)).transpose()?,
        date: args.date,
        continue_last: false,
    })
}

/// Whether a file's name stands for standard input.
pub fn is_stdin(name: &Path) -> bool {
    name.as_os_str() == "-"
}

/// Whether the prompt, or what belongs to it, is read from standard input.
pub fn reads_stdin(args: &PromptArgs) -> bool {
    let files = [&args.file, &args.messages, &args.template.tools];
    let mut named = files.into_iter().flatten();
    let nowhere = args.prompt.is_none() && args.file.is_none() && args.messages.is_none();
    nowhere || named.any(|name| is_stdin(name))
}

/// The prompt, the file, or both with a blank line between them.
pub fn text(args: &PromptArgs) -> Result<String> {
    match (&args.prompt, &args.file) {
        (Some(prompt), None) => Ok(prompt.clone()),
        (None, Some(path)) => read_text("--file", path),
        (Some(prompt), Some(path)) => Ok(format!("{prompt}\n\n{}", read_text("--file", path)?)),
        (None, None) => {
            let piped = match io::stdin().is_terminal() {
                true => String::new(),
                false => read_text("the prompt", Path::new("-"))?,
            };
            if piped.is_empty() {
                return Err(usage(
                    "no prompt: give one with --prompt TEXT, --file FILE or --messages FILE, or on standard input",
                ));
            }
            Ok(piped)
        }
    }
}

/// Reads the turns of a conversation from the file that `flag` names.
pub fn read_turns(flag: &str, path: &Path) -> Result<Vec<Message>> {
    read_json(flag, path, r#"[{"role":"user","content":"..."}, ...]"#)
}

fn read_messages(path: &Path) -> Result<Vec<Message>> {
    let messages = read_turns("--messages", path)?;
    check_turns(&messages).with_context(|| format!("--messages {}", path.display()))?;
    Ok(messages)
}

/// Refuses a conversation of no turns.
pub fn check_turns(messages: &[Message]) -> Result<()> {
    ensure!(!messages.is_empty(), "the conversation has no turns");
    Ok(())
}

/// Whether the last turn is the answer's beginning, which the model is to go on with.
pub fn is_begun(messages: &[Message]) -> bool {
    messages
        .last()
        .is_some_and(|last| last.role() == "assistant")
}

fn read_tools(path: &Path) -> Result<Vec<serde_json::Value>> {
    let expected = r#"[{"type":"function","function":{"name":"...", ...}}, ...]"#;
    read_json("--tools", path, expected)
}

/// Reads JSON, before which editors of Windows put a byte order mark.
fn read_json<T: DeserializeOwned>(flag: &str, path: &Path, expected: &str) -> Result<T> {
    let json = read_text(flag, path)?;
    serde_json::from_str(json.trim_start_matches('\u{feff}'))
        .with_context(|| format!("{flag} {}: expected {expected}", path.display()))
}

/// Reads `path`, or standard input for `-`, as UTF-8.
pub fn read_text(flag: &str, path: &Path) -> Result<String> {
    let mut bytes = Vec::new();
    let name = if is_stdin(path) {
        say_typing(flag);
        io::stdin()
            .read_to_end(&mut bytes)
            .with_context(|| format!("{flag} -: reading standard input"))?;
        "standard input".to_owned()
    } else {
        bytes = fs::read(path).with_context(|| format!("{flag}: reading {}", path.display()))?;
        path.display().to_string()
    };
    String::from_utf8(bytes).map_err(|error| {
        let offset = error.utf8_error().valid_up_to();
        anyhow!("{flag}: {name} is not UTF-8 text: byte {offset} starts no character; convert it, for example with iconv")
    })
}

/// Tells a person that standard input is the keyboard.
pub fn say_typing(flag: &str) {
    if io::stdin().is_terminal() {
        let end = if cfg!(windows) {
            "Ctrl-Z and Enter"
        } else {
            "Ctrl-D"
        };
        tracing::info!("{flag} -: reading what is typed; {end} on a line of its own ends it");
    }
}
