//! The Jinja chat template that a file carries.
//!
//! A control token (`<|im_start|>`) in the rendered text is one only where the template itself wrote all of it. Every
//! letter of a rendered text remembers whether it came in through messages or tools; those stay plain text, however the
//! template cuts, trims or joins them, so no input can forge a turn.

use std::ops::Range;

use anyhow::{Context, Result};
use jiff::{
    ZonedDateTime,
    civil::DateTime,
    fmt::strtime::{BrokenDownTime, Config},
};
use serde::{Deserialize, Serialize, de::Error as _};
use serde_json::{Map, Value};

use super::{
    gguf::Gguf,
    jinja,
    tokenizer::{SpecialTokens, Tokenizer},
};

/// Roles that a template may join into control tokens, such as `<|user|>`. Any other comes from the user alone.
const ROLES: [&str; 12] = [
    "system",
    "developer",
    "user",
    "assistant",
    "tool",
    "function",
    "ipython",
    "observation",
    "environment",
    "model",
    "context",
    "document",
];

/// Stands behind a text that is to be continued while a template runs. Some templates cut blanks off: those of the mark, too.
const END_MARK: &str = "CONTINUED_BY_THE_MODEL ";

/// One turn of a conversation: an object with a `role`, most often with a `content` that is a text or a list of parts
/// (`{"type":"text","text":"..."}`), and with what else a template asks for, such as `tool_calls`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Message(Map<String, Value>);

impl Message {
    pub fn new(role: &str, content: impl Into<String>) -> Self {
        let entries = [
            ("role", role.into()),
            ("content", Value::String(content.into())),
        ];
        Self(
            entries
                .map(|(key, value)| (key.to_owned(), value))
                .into_iter()
                .collect(),
        )
    }

    /// The same with what went before it: what the model thought. Whether that is read again is the template's decision.
    pub fn with_reasoning(mut self, reasoning: impl Into<String>) -> Self {
        let reasoning = Value::String(reasoning.into());
        self.0.insert("reasoning_content".to_owned(), reasoning);
        self
    }

    /// The content, where it is one text.
    pub fn text(&self) -> Option<&str> {
        self.0.get("content").and_then(Value::as_str)
    }

    pub fn role(&self) -> &str {
        self.0
            .get("role")
            .and_then(Value::as_str)
            .unwrap_or_default()
    }

    /// The content, or those parts of it that are texts.
    fn texts(&self) -> impl Iterator<Item = &str> {
        let content = self.0.get("content");
        let parts = content.and_then(Value::as_array).into_iter().flatten();
        let texts = parts.filter_map(|part| part["text"].as_str());
        content.and_then(Value::as_str).into_iter().chain(texts)
    }

    /// Puts [`END_MARK`] behind the text, the last one of several parts, and returns that text.
    fn mark_end(&mut self) -> Result<String> {
        let text = match self.0.get_mut("content") {
            Some(Value::String(text)) => Some(text),
            Some(Value::Array(parts)) => {
                parts
                    .iter_mut()
                    .rev()
                    .find_map(|part| match part.get_mut("text") {
                        Some(Value::String(text)) => Some(text),
                        _ => None,
                    })
            }
            _ => None,
        };
        let text = text.context("the last turn, the assistant's, has no text to continue")?;
        let said = text.clone();
        text.push_str(END_MARK);
        Ok(said)
    }

    /// The message as transformers hands it to a template: without what is null, and with its reasoning under each of
    /// the names that templates know it by.
    fn normalized(&self) -> Self {
        const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];
        let mut fields = self.0.clone();
        fields.retain(|_, value| !value.is_null());
        let reasoning = REASONING.iter().find_map(|name| fields.get(*name)).cloned();
        if let Some(reasoning) = reasoning {
            let first = ("thinking".to_owned(), reasoning.clone());
            fields = [first].into_iter().chain(fields).collect();
            fields.insert("reasoning_content".to_owned(), reasoning);
        }
        Self(fields)
    }

    /// The message for templates that know texts alone: parts of text as their lines, nothing as an empty text, and
    /// the arguments of calls, which OpenAI's interface writes as JSON in a text, as what that JSON says.
    fn simplified(&self) -> Self {
        let mut fields = self.0.clone();
        let text = match fields.get("content") {
            None | Some(Value::Null) => Some(String::new()),
            Some(Value::Array(parts)) => {
                let texts: Option<Vec<_>> =
                    parts.iter().map(|part| part["text"].as_str()).collect();
                texts.map(|texts| texts.join("\n"))
            }
            Some(_) => None,
        };
        if let Some(text) = text {
            fields.insert("content".to_owned(), text.into());
        }
        let calls = fields.get_mut("tool_calls").and_then(Value::as_array_mut);
        for call in calls.into_iter().flatten() {
            if let Some(arguments) = call.pointer_mut("/function/arguments")
                && let Some(Ok(parsed)) = arguments.as_str().map(serde_json::from_str)
            {
                *arguments = parsed;
            }
        }
        Self(fields)
    }
}

/// An object whose `role` is a text, and whose `content` is a text, a list of objects that each name their `type`, or
/// null.
impl<'de> Deserialize<'de> for Message {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let fields = Map::deserialize(deserializer)?;
        if !fields.get("role").is_some_and(Value::is_string) {
            return Err(D::Error::custom(
                "a message lacks its role, which is a text",
            ));
        }
        match fields.get("content") {
            None if !fields.contains_key("tool_calls") => {
                return Err(D::Error::missing_field("content"));
            }
            None | Some(Value::Null | Value::String(_)) => {}
            Some(Value::Array(parts)) if parts.iter().all(|part| part["type"].is_string()) => {
                let text = |part: &Value| part["type"] != "text" || part["text"].is_string();
                if !parts.iter().all(text) {
                    return Err(D::Error::custom("a part of type text has no text"));
                }
            }
            Some(_) => {
                return Err(D::Error::custom(
                    r#"a message's content is neither a text nor a list of parts such as {"type":"text","text":"..."}"#,
                ));
            }
        }
        Ok(Self(fields))
    }
}

/// What a template is told besides the messages.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TemplateOptions {
    /// Reaches the template only where it is given.
    pub enable_thinking: Option<bool>,
    /// Descriptions of the tools that the model may call: a list, as OpenAI's interface has it.
    pub tools: Option<Vec<Value>>,
    /// The local time that the template is told. `None`: the clock's.
    pub date: Option<DateTime>,
    /// Whether the prompt ends with the text of the last message, for the model to go on with.
    pub continue_last: bool,
}

/// Text ready for the tokenizer, and what in it stands for control tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    text: String,
    /// In order. `None` where every control token's text stands for the token.
    control_tokens: Option<Vec<ControlToken>>,
    depends_on_clock: bool,
    ignored: Vec<Ignored>,
}

/// What a template was told and did not use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ignored {
    /// [`TemplateOptions::enable_thinking`]
    Thinking,
    /// [`TemplateOptions::tools`]
    Tools,
    /// [`TemplateOptions::date`]
    Date,
    /// The text of a system message, no matter where it would have put it.
    System,
}

/// Where a control token stands in a prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ControlToken {
    /// The bytes of the prompt's text that spell the token.
    pub(super) range: Range<usize>,
    pub(super) id: u32,
}

impl Prompt {
    /// A prompt taken as it is, in which a control token's text stands for the token.
    pub fn raw(text: impl Into<String>) -> Self {
        Self {
            text: text.into(),
            control_tokens: None,
            depends_on_clock: false,
            ignored: Vec::new(),
        }
    }

    /// A text in which what spells a control token is text like any other.
    pub fn text_alone(text: impl Into<String>) -> Self {
        Self {
            control_tokens: Some(Vec::new()),
            ..Self::raw(text)
        }
    }

    /// The text, byte for byte what the tokens will stand for.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Whether the template asked for the time, which nobody had fixed.
    pub fn depends_on_clock(&self) -> bool {
        self.depends_on_clock
    }

    /// What of its input has no effect on the prompt.
    pub fn ignored(&self) -> &[Ignored] {
        &self.ignored
    }

    pub(super) fn control_tokens(&self) -> Option<&[ControlToken]> {
        self.control_tokens.as_deref()
    }
}

/// A file's chat template.
pub struct ChatTemplate {
    /// What messages call the file.
    file: String,
    source: String,
    /// What the file has in its place for conversations with tools.
    tool_use: Option<String>,
    /// `bos_token` and others, with their texts.
    named_tokens: Vec<(&'static str, String)>,
    control_tokens: SpecialTokens,
}

impl ChatTemplate {
    /// The file's `tokenizer.chat_template`, if there is one. It is compiled when it is rendered: a file
    /// with a broken template still takes raw prompts.
    pub fn from_gguf(gguf: &Gguf, tokenizer: &Tokenizer) -> Result<Option<Self>> {
        let Some(source) = gguf.str("tokenizer.chat_template")? else {
            return Ok(None);
        };
        let named = tokenizer.variables().iter();
        let named = named.map(|&(name, id)| (name, tokenizer.piece(id).to_owned()));
        Ok(Some(Self {
            file: gguf.name().to_owned(),
            source: source.to_owned(),
            tool_use: gguf
                .str("tokenizer.chat_template.tool_use")?
                .map(str::to_owned),
            named_tokens: named.collect(),
            control_tokens: tokenizer.control_tokens().clone(),
        }))
    }

    /// Renders a conversation up to the point where the assistant speaks, or goes on speaking, as `apply_chat_template` of
    /// Hugging Face transformers does. Where the template fails on parts of text, on missing content or on the arguments of calls,
    /// it is given plainer ones.
    ///
    /// # Errors
    ///
    /// The template does not compile, fails, refuses the conversation, or takes too long; the last turn is to be continued and
    /// has no text, or not in the prompt. The error names the file and, where known, the template's line.
    pub fn render(&self, messages: &[Message], options: &TemplateOptions) -> Result<Prompt> {
        let mut messages: Vec<_> = messages.iter().map(Message::normalized).collect();
        let said = match messages.last_mut() {
            Some(last) if options.continue_last => Some(last.mark_end()?),
            _ => None,
        };
        let rendered = self.render_letters(&messages, options).or_else(|error| {
            let simplified: Vec<_> = messages.iter().map(Message::simplified).collect();
            if simplified == messages {
                return Err(error);
            }
            self.render_letters(&simplified, options).map_err(|_| error)
        });
        let rendered = rendered.with_context(|| {
            format!(
                "{}: the chat template failed; --raw runs the model without it",
                self.file
            )
        })?;
        let end = match said {
            Some(said) => end_of_text(&rendered.letters, &said).with_context(|| {
                format!(
                    "{}: the chat template changes the text of the last turn, the assistant's, which cannot be continued then: \
                     end with another turn, or give the prompt as the model is to read it, with --raw",
                    self.file
                )
            })?,
            None => rendered.letters.len(),
        };
        let prompt = self.find_control_tokens(&rendered.letters[..end]);
        Ok(Prompt {
            depends_on_clock: rendered.asked_time && options.date.is_none(),
            ignored: ignored(&prompt.text, &rendered, &messages, options),
            ..prompt
        })
    }

    fn render_letters(
        &self,
        messages: &[Message],
        options: &TemplateOptions,
    ) -> Result<jinja::Rendered> {
        let messages = messages
            .iter()
            .map(|message| Value::Object(message.0.clone()));
        let tools = options.tools.clone().map_or(Value::Null, Value::Array);
        let mut given = vec![
            ("messages", messages.collect()),
            ("tools", tools),
            ("documents", Value::Null),
            ("add_generation_prompt", Value::Bool(!options.continue_last)),
        ];
        given.extend(
            options
                .enable_thinking
                .map(|value| ("enable_thinking", Value::Bool(value))),
        );
        let for_tools = self.tool_use.as_ref().filter(|_| options.tools.is_some());
        jinja::render(
            for_tools.unwrap_or(&self.source),
            &jinja::Input {
                written: (self.named_tokens.iter())
                    .map(|(name, text)| (*name, text.as_str()))
                    .collect(),
                given: given.iter().map(|(name, value)| (*name, value)).collect(),
                trusted_roles: &ROLES,
                now: &|format| format_time(options.date, format),
            },
        )
    }

    /// The rendered text, with the control tokens that the template alone wrote.
    fn find_control_tokens(&self, letters: &[jinja::Letter]) -> Prompt {
        let mut text = String::with_capacity(letters.len());
        let mut control_tokens = Vec::new();
        for run in letters.chunk_by(|a, b| a.is_given() == b.is_given()) {
            let start = text.len();
            text.extend(run.iter().map(|letter| letter.char()));
            if !run[0].is_given() {
                let found = self.control_tokens.find_iter(&text[start..]);
                control_tokens.extend(found.map(|(range, id)| ControlToken {
                    range: start + range.start..start + range.end,
                    id,
                }));
            }
        }
        Prompt {
            control_tokens: Some(control_tokens),
            ..Prompt::raw(text)
        }
    }
}

/// The end of `said` in a rendered conversation, where [`END_MARK`] stood behind it; `None` where the template made something
/// else of it. As transformers has it: blanks at its end stay where the template keeps those of the mark.
fn end_of_text(letters: &[jinja::Letter], said: &str) -> Option<usize> {
    let spells = |letters: &[jinja::Letter], text: &str| {
        letters.iter().map(|letter| letter.char()).eq(text.chars())
    };
    let name = END_MARK.trim_end();
    let mut marks = (letters.windows(name.len()).enumerate())
        .filter_map(|(at, window)| spells(window, name).then_some(at));
    let (Some(at), None) = (marks.next(), marks.next()) else {
        return None;
    };
    let blanks = |letters: &[jinja::Letter]| {
        let blanks = letters.iter().rev();
        blanks.take_while(|letter| letter.is_space()).count()
    };
    let trimmed = at - blanks(&letters[..at]);
    let text = said.trim_matches(jinja::is_space);
    let start = trimmed.checked_sub(text.chars().count())?;
    if !spells(&letters[start..trimmed], text) {
        return None;
    }
    let keeps_blanks = letters.get(at + name.len()).map(|letter| letter.char()) == Some(' ');
    Some(if keeps_blanks { at } else { trimmed })
}

/// What is not among the names that the template looked at, or not in what it wrote.
fn ignored(
    prompt: &str,
    rendered: &jinja::Rendered,
    messages: &[Message],
    options: &TemplateOptions,
) -> Vec<Ignored> {
    let unread = |name: &str| !rendered.read.contains(name);
    let mut systems = messages.iter().filter(|m| m.role() == "system");
    let is_lost = |message: &Message| message.texts().any(|text| !prompt.contains(text.trim()));
    [
        (
            Ignored::Thinking,
            options.enable_thinking.is_some() && unread("enable_thinking"),
        ),
        (Ignored::Tools, options.tools.is_some() && unread("tools")),
        (
            Ignored::Date,
            options.date.is_some() && !rendered.asked_time,
        ),
        (Ignored::System, systems.any(is_lost)),
    ]
    .into_iter()
    .filter_map(|(what, is_ignored)| is_ignored.then_some(what))
    .collect()
}

/// Python's `strftime` of the local time.
fn format_time(date: Option<DateTime>, format: &str) -> Result<String, String> {
    let time = match date {
        Some(date) => BrokenDownTime::from(date),
        None => BrokenDownTime::from(&ZonedDateTime::now()),
    };
    // A conversion that is unknown stays as it is, as glibc leaves it.
    let text = time.to_string_with_config(&Config::new().lenient(true), format);
    text.map_err(|error| format!("strftime_now({format:?}): {error}"))
}
