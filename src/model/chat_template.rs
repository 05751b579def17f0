//! The Jinja chat template that a file carries.
//!
//! A control token (`<|im_start|>`) in the rendered text is one only where the template itself wrote it:
//! before rendering, every control token's text in the template is put between two characters that occur
//! in no input. Whatever comes in through messages stays plain text, however the template cuts, trims or
//! joins it, so no input can forge a turn.

use std::{collections::HashSet, ops::Range};

use anyhow::{Context, Result, anyhow, ensure};
use minijinja::{Environment, Error, ErrorKind, Value, syntax::SyntaxConfig, value::Kwargs};
use serde::{Deserialize, Serialize};

use super::{
    gguf::Gguf,
    tokenizer::{SpecialTokens, Tokenizer},
};

/// Instructions, and pieces of 64 bytes, that a template may spend on rendering. Real templates spend a few
/// dozen a message; an endless one is stopped within seconds.
const FUEL: u64 = 20_000_000;

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Message {
    pub role: String,
    pub content: String,
}

/// Text ready for the tokenizer, and what in it stands for control tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    text: String,
    /// In order. `None` where every control token's text stands for the token.
    control_tokens: Option<Vec<ControlToken>>,
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
        }
    }

    /// The text, byte for byte what the tokens will stand for.
    pub fn text(&self) -> &str {
        &self.text
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
    bos_token: Option<String>,
    eos_token: Option<String>,
    control_tokens: SpecialTokens,
}

impl ChatTemplate {
    /// The file's `tokenizer.chat_template`, if there is one. It is compiled when it is rendered: a file
    /// with a broken template still takes raw prompts.
    pub fn from_gguf(gguf: &Gguf, tokenizer: &Tokenizer) -> Result<Option<Self>> {
        let source = gguf.str("tokenizer.chat_template")?;
        let text = |id| tokenizer.piece(id).to_owned();
        Ok(source.map(|source| Self {
            file: gguf.name().to_owned(),
            source: source.to_owned(),
            bos_token: tokenizer.bos().map(text),
            eos_token: tokenizer.eos().map(text),
            control_tokens: tokenizer.control_tokens().clone(),
        }))
    }

    /// Renders a conversation up to the point where the assistant speaks. `enable_thinking` reaches the
    /// template only where it is given.
    ///
    /// # Errors
    ///
    /// The template does not compile, fails, refuses the conversation, or takes too long. The error names
    /// the file and, where known, the template's line.
    pub fn render(&self, messages: &[Message], enable_thinking: Option<bool>) -> Result<Prompt> {
        let marks = self.unused_marks(messages)?;
        self.render_marked(messages, enable_thinking, marks)
            .map_err(|error| anyhow!(marks.remove(&render_error(&error))))
            .and_then(|marked| self.read_marks(&marked, marks, messages))
            .with_context(|| {
                format!(
                    "{}: the chat template failed; --raw runs the model without it",
                    self.file
                )
            })
    }

    /// Two characters that occur neither in the template nor in `messages`.
    fn unused_marks(&self, messages: &[Message]) -> Result<Marks> {
        let texts = messages.iter().flat_map(|m| [&m.role, &m.content]);
        let used: HashSet<char> = texts
            .chain([&self.source])
            .flat_map(|t| t.chars())
            .collect();
        // From the noncharacters on: what no text has reason to contain.
        let mut unused = ('\u{fdd0}'..=char::MAX).filter(|c| !used.contains(c));
        let marks = unused.next().zip(unused.next());
        let (open, close) = marks.context("the messages use every character that there is")?;
        Ok(Marks { open, close })
    }

    /// The rendered conversation, with every control token that the template wrote between `marks`.
    fn render_marked(
        &self,
        messages: &[Message],
        enable_thinking: Option<bool>,
        marks: Marks,
    ) -> Result<String, Error> {
        // Set up as Hugging Face transformers sets up Jinja.
        let mut environment = Environment::new();
        environment.set_syntax(
            SyntaxConfig::builder()
                .trim_blocks(true)
                .lstrip_blocks(true)
                .build()?,
        );
        environment.set_fuel(Some(FUEL));
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", tojson);
        environment.add_function(
            "raise_exception",
            |message: String| -> Result<Value, Error> {
                Err(Error::new(ErrorKind::InvalidOperation, message))
            },
        );

        let message = |m: &Message| Value::from_pairs([("role", &m.role), ("content", &m.content)]);
        let mut variables = vec![
            ("messages", messages.iter().map(message).collect()),
            ("add_generation_prompt", Value::from(true)),
        ];
        for (name, token) in [
            ("bos_token", &self.bos_token),
            ("eos_token", &self.eos_token),
        ] {
            variables.extend(token.as_ref().map(|t| (name, self.mark(t, marks).into())));
        }
        variables.extend(enable_thinking.map(|value| ("enable_thinking", value.into())));

        let source = self.mark(&self.source, marks);
        let template = environment.template_from_named_str("chat template", &source)?;
        template.render(Value::from_pairs(variables))
    }

    /// `text` with every control token's text between `marks`.
    fn mark(&self, text: &str, marks: Marks) -> String {
        let mut marked = String::with_capacity(text.len());
        let mut done = 0;
        for (range, _) in self.control_tokens.find_iter(text) {
            marked.push_str(&text[done..range.start]);
            marked.push(marks.open);
            marked.push_str(&text[range.clone()]);
            marked.push(marks.close);
            done = range.end;
        }
        marked + &text[done..]
    }

    /// Takes the marks out of a rendered text and notes what stood between them.
    fn read_marks(&self, marked: &str, marks: Marks, messages: &[Message]) -> Result<Prompt> {
        let mut text = String::with_capacity(marked.len());
        let mut control_tokens = Vec::new();
        for (number, piece) in marked.split(marks.open).enumerate() {
            let (token, plain) = match piece.split_once(marks.close) {
                Some((token, plain)) if number > 0 => (token, plain),
                _ => ("", piece),
            };
            let start = text.len();
            text.push_str(token);
            let found = self.control_tokens.find_iter(token).next();
            if let Some((range, id)) = found.filter(|(range, _)| range.len() == token.len()) {
                control_tokens.push(ControlToken {
                    range: start..start + range.end,
                    id,
                });
            }
            let plain = marks.remove(plain);
            self.check_plain(&plain, messages)?;
            text.push_str(&plain);
        }
        Ok(Prompt {
            text,
            control_tokens: Some(control_tokens),
        })
    }

    /// Refuses a control token's text that is neither the template's own nor in a message: the template put
    /// it together from pieces, and whose pieces they are cannot be told.
    fn check_plain(&self, plain: &str, messages: &[Message]) -> Result<()> {
        for (range, _) in self.control_tokens.find_iter(plain) {
            let token = &plain[range];
            ensure!(
                messages
                    .iter()
                    .any(|m| m.content.contains(token) || m.role.contains(token)),
                "it puts the control token {token} together from pieces, which cannot be told from a forged turn"
            );
        }
        Ok(())
    }
}

/// What stands before and after a control token that the template wrote.
#[derive(Clone, Copy)]
struct Marks {
    open: char,
    close: char,
}

impl Marks {
    fn remove(self, text: &str) -> String {
        text.replace([self.open, self.close], "")
    }
}

/// What went wrong and in which line of the template.
fn render_error(error: &Error) -> String {
    let what = error
        .detail()
        .map_or_else(|| error.kind().to_string(), str::to_owned);
    match error.line() {
        Some(line) => format!("line {line}: {what}"),
        None => what,
    }
}

/// Jinja's `tojson` as transformers defines it: Python's `json.dumps(value, ensure_ascii=False)`, which
/// unlike Jinja's own escapes nothing for HTML.
fn tojson(value: &Value, arguments: Kwargs) -> Result<String, Error> {
    let indent = arguments.get::<Option<usize>>("indent")?;
    arguments.assert_all_used()?;
    let mut json = Vec::new();
    let result = match indent {
        Some(width) => {
            let indent = " ".repeat(width.min(16));
            let style = serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(
                &mut json, style,
            ))
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(
            &mut json,
            PythonStyle,
        )),
    };
    let json = result.map(|()| String::from_utf8_lossy(&json).into_owned());
    json.map_err(|e| Error::new(ErrorKind::InvalidOperation, format!("tojson: {e}")))
}

/// JSON on one line with a blank after each comma and colon.
struct PythonStyle;

impl serde_json::ser::Formatter for PythonStyle {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        self.begin_array_value(writer, first)
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
    ) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}
