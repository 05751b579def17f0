//! The Jinja that chat templates are written in: what Jinja 3.1 does with them in Python, set up as Hugging Face
//! transformers sets it up, with one thing more: text knows whether the template wrote it or was given it ([`text`]).
//!
//! Nothing in here knows of models or messages. A template is read by [`parser`], which leaves it as
//! [`syntax`] has it, and run by [`interpreter`].

mod access;
mod arithmetic;
mod checks;
mod filters;
mod format;
mod globals;
mod interpreter;
mod json;
mod lexer;
mod methods;
mod parser;
mod syntax;
mod text;
mod text_filters;
mod value;

use std::{fmt, thread};

use anyhow::anyhow;

pub use interpreter::Rendered;
pub use text::{Letter, is_space};

/// Room for as deep a nesting as the parser and the interpreter allow.
const STACK_BYTES: usize = 128 << 20;

/// What a template is given.
pub struct Input<'a> {
    /// Texts of the template's own hand.
    pub written: Vec<(&'a str, &'a str)>,
    /// What came in from outside.
    pub given: Vec<(&'a str, &'a serde_json::Value)>,
    /// Texts which, where they come in under the key `role`, count as the template's own.
    pub trusted_roles: &'a [&'a str],
    /// What `strftime_now` gives for a format.
    pub now: &'a (dyn Fn(&str) -> Result<String, String> + Sync),
}

/// Renders a template.
///
/// # Errors
///
/// The template is not Jinja, fails, raises an exception, or goes on without end; with the line where known.
pub fn render(source: &str, input: &Input) -> anyhow::Result<Rendered> {
    thread::scope(|scope| {
        let rendering = thread::Builder::new()
            .stack_size(STACK_BYTES)
            .spawn_scoped(scope, || {
                let body = parser::parse(source)?;
                interpreter::render(&body, input)
            });
        let rendered = rendering?
            .join()
            .map_err(|_| anyhow!("it cannot be rendered"))?;
        rendered.map_err(|error| anyhow!(error.to_string()))
    })
}

type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, and where.
#[derive(Debug)]
struct Error {
    message: String,
    line: Option<usize>,
}

impl Error {
    fn new(message: impl Into<String>) -> Self {
        let message = message.into();
        Self {
            message,
            line: None,
        }
    }

    /// The error with a line, unless it knows of a more exact one.
    fn at(self, line: usize) -> Self {
        let line = Some(self.line.unwrap_or(line));
        Self { line, ..self }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(f, "line {line}: {}", self.message),
            None => f.write_str(&self.message),
        }
    }
}
