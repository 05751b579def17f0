//! The real binary, run on real files in fresh directories.

#[path = "../common/mod.rs"]
mod common;

mod batch;
#[cfg(unix)]
mod chat;
mod commands;
mod config;
mod ends;
mod help;
mod hub;
mod info;
mod json;
mod logits;
mod measure;
mod model;
mod pipes;
mod prompt_cache;
mod structured;
mod templates;
#[cfg(unix)]
mod terminal;
mod text;
mod usage;
mod waiting;

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use tempfile::TempDir;

/// A fresh directory that the binary runs in.
struct Dir(TempDir);

impl Dir {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a temporary directory"))
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path().join(name);
        std::fs::write(&path, content).expect("writing a test file");
        path
    }

    /// `sharpi` with these arguments, both outputs piped and nothing on standard input.
    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sharpi"));
        command
            .args(args)
            .current_dir(self.path())
            .env("XDG_CONFIG_HOME", self.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    fn run(&self, args: &[&str]) -> Ran {
        Ran::from(self.command(args).output().expect("starting sharpi"))
    }

    fn run_with_input(&self, args: &[&str], input: &[u8]) -> Ran {
        feed(self.command(args), input)
    }
}

/// Runs a command with `input` on standard input.
fn feed(mut command: Command, input: &[u8]) -> Ran {
    let mut child = command
        .stdin(Stdio::piped())
        .spawn()
        .expect("starting sharpi");
    let mut stdin = child.stdin.take().expect("standard input is piped");
    stdin.write_all(input).expect("writing to sharpi");
    drop(stdin);
    Ran::from(child.wait_with_output().expect("waiting for sharpi"))
}

/// What a finished process left behind.
#[derive(Debug)]
struct Ran {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        let utf8 = |bytes| String::from_utf8(bytes).expect("output is UTF-8");
        Self {
            code: output.status.code(),
            stdout: utf8(output.stdout),
            stderr: utf8(output.stderr),
        }
    }
}

impl Ran {
    /// The standard output of a run that went well.
    #[track_caller]
    fn stdout(&self) -> &str {
        assert_eq!(self.code, Some(0), "{self:#?}");
        &self.stdout
    }

    /// The error message of a run that ended with `code`, without anything on standard output.
    #[track_caller]
    fn error(&self, code: i32) -> &str {
        assert_eq!(self.code, Some(code), "{self:#?}");
        assert_eq!(self.stdout, "");
        let errors = self
            .stderr
            .lines()
            .filter(|line| line.starts_with("error: "));
        assert_eq!(errors.count(), 1, "one message: {}", self.stderr);
        &self.stderr
    }
}

/// Runs `sharpi` in a fresh directory.
fn sharpi(args: &[&str]) -> Ran {
    Dir::new().run(args)
}
