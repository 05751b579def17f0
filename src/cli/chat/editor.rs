//! The line editor, in which messages and commands are typed, and what it keeps of them.

use std::{
    borrow::Cow,
    fs,
    io::{self, ErrorKind, IsTerminal},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use rustyline::{
    Behavior, ColorMode, Config, Editor as LineEditor, Helper,
    completion::Completer,
    error::ReadlineError,
    highlight::Highlighter,
    hint::Hinter,
    history::FileHistory,
    validate::{ValidationContext, ValidationResult, Validator},
};

use super::typed::is_open;
use crate::cli::{directories, escape::escaped};

const PROMPT: &str = "> ";
const NEXT_LINE: &str = ". ";
const MOST_ENTRIES: usize = 1000;

pub struct Editor {
    line: LineEditor<Typing, FileHistory>,
    /// `None` where it cannot be kept.
    history: Option<PathBuf>,
}

/// How an input ended.
pub enum Input {
    /// Lines that belong together.
    Typed(String),
    /// With Ctrl-C.
    Interrupted,
    /// With Ctrl-D.
    End,
}

impl Editor {
    pub fn new() -> Result<Self> {
        let config = Config::builder()
            // Where answers go elsewhere, the terminal is where lines are typed.
            .behavior(match io::stdout().is_terminal() {
                true => Behavior::Stdio,
                false => Behavior::PreferTerm,
            })
            // No colours, but without this the text would not pass `Typing::highlight`.
            .color_mode(ColorMode::Forced)
            .max_history_size(MOST_ENTRIES)
            .context("preparing the history")?
            .build();
        let mut line = LineEditor::with_config(config).context("preparing the line editor")?;
        line.set_helper(Some(Typing));
        let mut history = directories::state("history");
        if let Some(path) = &history
            && let Err(error) = line.load_history(path)
            && !is_not_found(&error)
        {
            tracing::warn!("the history in {} cannot be read: {error}", shown(path));
            history = None;
        }
        Ok(Self { line, history })
    }

    /// Reads lines that belong together, beginning with `initial`, to be edited.
    pub fn read(&mut self, initial: &str) -> Result<Input> {
        let mut typed = String::new();
        let mut line = self.line.readline_with_initial(PROMPT, (initial, ""));
        loop {
            match line {
                Ok(line) => typed += &line,
                Err(ReadlineError::Eof) if typed.is_empty() => return Ok(Input::End),
                Err(ReadlineError::Interrupted | ReadlineError::Eof) => {
                    return Ok(Input::Interrupted);
                }
                Err(error) => return Err(error).context("reading what is typed"),
            }
            // Only the last line's backslash: others, in a text that was pasted, are part of it.
            match typed.strip_suffix('\\') {
                Some(before) => typed = format!("{before}\n"),
                None => break,
            }
            line = self.line.readline(NEXT_LINE);
        }
        self.remember(&typed);
        Ok(Input::Typed(typed))
    }

    /// Asks for a yes or a no. What is neither is a no.
    pub fn confirm(&mut self, question: &str) -> Result<bool> {
        match self.line.readline(&format!("{question} [y/N] ")) {
            Ok(answer) => Ok(matches!(answer.trim(), "y" | "Y" | "yes")),
            Err(ReadlineError::Interrupted | ReadlineError::Eof) => Ok(false),
            Err(error) => Err(error).context("reading an answer"),
        }
    }

    /// Keeps `typed` in the history, for this conversation and later ones.
    fn remember(&mut self, typed: &str) {
        let kept = self.line.add_history_entry(typed.trim_end());
        let Some(path) = self.history.take_if(|_| matches!(kept, Ok(true))) else {
            return;
        };
        let written = prepare_directory(&path)
            .map_err(ReadlineError::Io)
            .and_then(|()| self.line.append_history(&path));
        match written {
            Ok(()) => self.history = Some(path),
            // Said once: the path is gone.
            Err(error) => {
                tracing::warn!("the history in {} cannot be kept: {error}", shown(&path));
            }
        }
    }
}

fn is_not_found(error: &ReadlineError) -> bool {
    matches!(error, ReadlineError::Io(error) if error.kind() == ErrorKind::NotFound)
}

fn shown(path: &Path) -> String {
    escaped(&path.display().to_string())
}

fn prepare_directory(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), fs::create_dir_all)
}

/// What the editor asks while a person types.
struct Typing;

impl Helper for Typing {}

impl Completer for Typing {
    type Candidate = String;
}

impl Hinter for Typing {
    type Hint = String;
}

impl Validator for Typing {
    /// Enter begins a new line between open quotes.
    fn validate(&self, context: &mut ValidationContext) -> rustyline::Result<ValidationResult> {
        Ok(match is_open(context.input()) {
            true => ValidationResult::Incomplete,
            false => ValidationResult::Valid(None),
        })
    }
}

impl Highlighter for Typing {
    /// Shows a text that was pasted or loaded without what would command the terminal. The editor takes control characters
    /// for as wide as this: nothing.
    fn highlight<'l>(&self, line: &'l str, _position: usize) -> Cow<'l, str> {
        let commands =
            |character: char| character.is_control() && !matches!(character, '\n' | '\t');
        match line.contains(commands) {
            true => line.replace(commands, "").into(),
            false => line.into(),
        }
    }
}
