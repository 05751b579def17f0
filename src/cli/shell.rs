//! `sharpi completions`, `man` and `help`: what a shell and a reader of manuals are to know of the command line.

use std::io::{self, Write};

use anyhow::{Context, Result};
use clap::{Arg, Command, CommandFactory, builder::PossibleValuesParser};
use clap_complete::Shell;

use super::{
    args::Cli,
    exit::{Outcome, UsageError},
    output::WRITING,
};

/// Prints a script that completes commands and flags in `shell`.
pub fn completions(shell: Shell) -> Result<Outcome> {
    let mut all = Cli::command();
    let names = all.get_subcommands().map(|c| c.get_name().to_owned());
    let names = PossibleValuesParser::new(names.collect::<Vec<_>>());
    for command in ["man", "help"] {
        let known = |arg: Arg| arg.value_parser(names.clone());
        all = all.mut_subcommand(command, |it| it.mut_arg("command", known));
    }
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut all, "sharpi", &mut script);
    print(&script)
}

/// Prints the manual page of `command`, or of all of them in short, in roff.
pub fn manual(command: Option<&str>) -> Result<Outcome> {
    // What `--help` has no room for loses its description here.
    let page = find(command)?.mut_args(|arg| arg.hide_short_help(false));
    let mut roff = Vec::new();
    clap_mangen::Man::new(page)
        .source(concat!("sharpi ", env!("CARGO_PKG_VERSION")))
        .render(&mut roff)
        .context("writing the manual page")?;
    print(&roff)
}

/// Prints all that there is to say of `command`, or of all of them in short.
pub fn help(command: Option<&str>) -> Result<Outcome> {
    let printed = find(command)?.print_long_help();
    printed
        .and_then(|()| io::stdout().flush())
        .context(WRITING)?;
    Ok(Outcome::Done)
}

/// The command of this name, or what all belong to.
fn find(name: Option<&str>) -> Result<Command> {
    let mut all = Cli::command();
    // Names the commands as they are typed, and gives them the flags that all have.
    all.build();
    let Some(name) = name else {
        return Ok(all);
    };
    let command = all.find_subcommand(name).cloned();
    command.ok_or_else(|| {
        UsageError(format!(
            "there is no command {name:?}: `sharpi --help` lists them"
        ))
        .into()
    })
}

fn print(bytes: &[u8]) -> Result<Outcome> {
    let mut out = io::stdout().lock();
    out.write_all(bytes)
        .and_then(|()| out.flush())
        .context(WRITING)?;
    Ok(Outcome::Done)
}
