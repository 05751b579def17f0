//! The command line: flags in, text and messages out.
//!
//! `args` holds what was typed, `resolve` turns it into what a command needs, then one file carries out each command.
//! `exit` alone decides about exit codes; `output` alone writes generated text; `messages` and `progress` own
//! standard error.

mod args;
mod backend;
mod batch;
mod bench;
mod chat;
mod config;
mod context;
mod devices;
mod directories;
mod download;
mod escape;
mod exit;
mod figures;
#[cfg(unix)]
mod file_limit;
mod info;
mod interrupt;
mod messages;
mod models;
mod output;
mod perplexity;
mod progress;
mod prompt_cache;
mod pull;
mod resolve;
mod run;
mod shell;
mod stdout;
mod system;
mod tokenize;
#[cfg(unix)]
mod truncation;
mod verify;

use std::process::ExitCode;

use anyhow::Result;

use exit::Outcome;
use resolve::Request;

/// Runs the command that the process was started with.
pub fn main() -> ExitCode {
    exit::code(dispatch())
}

fn dispatch() -> Result<Outcome> {
    let (cli, settings) = config::parse()?;
    messages::init(&cli.verbosity);
    settings.warn();
    let request = resolve::resolve(cli.command, &cli.verbosity)?;
    stdout::check()?;
    #[cfg(unix)]
    {
        truncation::catch()?;
        file_limit::survive();
    }
    match request {
        Request::Run(request) => run::run(*request),
        Request::Chat(request) => chat::run(*request),
        Request::Batch(request) => batch::run(*request),
        Request::Info(request) => info::run(&request),
        Request::Tokenize(request) => tokenize::run(&request),
        Request::Bench(request) => bench::run(&request),
        Request::Perplexity(request) => perplexity::run(&request),
        Request::Verify(request) => verify::run(&request),
        Request::Pull(request) => pull::run(&request),
        Request::Models(format) => models::run(format),
        Request::Devices => devices::run(),
        Request::Config => config::print(&settings),
        Request::Completions(shell) => shell::completions(shell),
        Request::Man(command) => shell::manual(command.as_deref()),
        Request::Help(command) => shell::help(command.as_deref()),
    }
}
