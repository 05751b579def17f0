//! `sharpi completions` and `sharpi man`: what a shell and a reader of manuals are to know of the command line.

use std::io::{self, Write};

use anyhow::{Context, Result};
use clap::CommandFactory;
use clap_complete::Shell;

use super::{
    args::Cli,
    exit::{Outcome, UsageError},
    output::WRITING,
};

/// Prints a script that completes commands and flags in `shell`.
pub fn completions(shell: Shell) -> Result<Outcome> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "sharpi", &mut script);
    print(&script)
}

/// Prints the manual page of `command`, or of all of them in short, in roff.
pub fn manual(command: Option<&str>) -> Result<Outcome> {
    let mut all = Cli::command();
    // Names the commands as they are typed, and gives them the flags that all have.
    all.build();
    let page = match command {
        None => all,
        Some(name) => {
            let command = all.find_subcommand(name).cloned();
            command.ok_or_else(|| {
                UsageError(format!(
                    "there is no command {name:?}: `sharpi --help` lists them"
                ))
            })?
        }
    };
    let mut roff = Vec::new();
    clap_mangen::Man::new(page)
        .source(concat!("sharpi ", env!("CARGO_PKG_VERSION")))
        .render(&mut roff)
        .context("writing the manual page")?;
    print(&roff)
}

fn print(bytes: &[u8]) -> Result<Outcome> {
    let mut out = io::stdout().lock();
    out.write_all(bytes)
        .and_then(|()| out.flush())
        .context(WRITING)?;
    Ok(Outcome::Done)
}
