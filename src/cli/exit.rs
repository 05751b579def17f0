//! From a command's outcome to one message and an exit code: the only place that knows the codes.

use std::{
    fmt,
    io::{self, ErrorKind, Write},
    process::ExitCode,
};

use anyhow::{Context, Error, Result};

use clap::builder::styling::Styles;

use super::{
    escape::escaped_lines,
    messages::{StandardError, error_mark, styled},
    output::WRITING,
    stdout,
};

pub const FAILURE: u8 = 1;
const USAGE: u8 = 2;
/// 128 + SIGINT, as shells report a command that Ctrl-C ended.
pub const INTERRUPTED: u8 = 130;

/// How a command ended that did not fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Done,
    /// Ctrl-C ended the work early, with everything in order.
    Interrupted,
}

/// Flags that are fine one by one but not together.
#[derive(Debug)]
pub struct UsageError(pub String);

impl fmt::Display for UsageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for UsageError {}

/// Reports an error, if there is one, and says how the process ends.
pub fn code(result: Result<Outcome>) -> ExitCode {
    let error = match result {
        Ok(Outcome::Done) => return ExitCode::SUCCESS,
        Ok(Outcome::Interrupted) => return ExitCode::from(INTERRUPTED),
        Err(error) => error,
    };
    // Rust ignores SIGPIPE, so a reader that has seen enough (`| head -1`) shows up as an error of the next write.
    if is_broken_pipe(&error) {
        return ExitCode::SUCCESS;
    }
    // clap has its own layout, and sends --help and --version this way too.
    if let Some(error) = error.downcast_ref::<clap::Error>() {
        let usage = error.use_stderr();
        let there = if usage { Ok(()) } else { stdout::check() };
        return match there.and_then(|()| error.print().context(WRITING)) {
            Ok(()) => ExitCode::from(if usage { USAGE } else { 0 }),
            Err(error) => code(Err(error)),
        };
    }
    let usage = error.is::<UsageError>();
    let hint = match usage {
        true => {
            let flag = styled("--help", *Styles::styled().get_literal());
            format!("\n\nFor more information, try '{flag}'.")
        }
        false => String::new(),
    };
    // A standard error that cannot be written to is no reason to panic, as eprintln! would.
    let message = escaped_lines(&format!("{error:#}"));
    let text = format!("{}{message}{hint}\n", error_mark());
    let _ = StandardError.write_all(text.as_bytes());
    ExitCode::from(if usage { USAGE } else { FAILURE })
}

/// Whether the reader of a pipe has left.
pub fn is_broken_pipe(error: &Error) -> bool {
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<io::Error>())
        .any(|cause| cause.kind() == ErrorKind::BrokenPipe)
}
