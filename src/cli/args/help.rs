//! What `--help` shows of a command: what it does, an example, and the flags that are asked for most, on a screen of 24
//! lines of 80 columns. `sharpi help` shows the rest.
//!
//! The example is the first of the command's `after_help`, and flags that are marked with `hide_short_help` wait for
//! `sharpi help`.

use clap::Command;

/// `command` and its subcommands, with such a help.
pub fn on_a_screen(command: Command) -> Command {
    let names = command.get_subcommands().map(|c| c.get_name().to_owned());
    let names: Vec<String> = names.collect();
    let command = names.into_iter().fold(command, |command, name| {
        command.mut_subcommand(name, on_a_screen)
    });
    let template = template(&command);
    command.help_template(template).max_term_width(80)
}

fn template(command: &Command) -> String {
    let is_shown = |arg: &&clap::Arg| !arg.is_hide_short_help_set();
    let mut shown = command.get_arguments().filter(is_shown);
    let list = match shown.next() {
        _ if command.has_subcommands() => "\n\n{subcommands}",
        None => "",
        Some(first) if !first.is_positional() => "\n\n{options}",
        Some(_) if shown.any(|arg| !arg.is_positional()) => "\n\n{positionals}\n{options}",
        Some(_) => "\n\n{positionals}",
    };
    let after_help = command.get_after_help().map(ToString::to_string);
    let examples: Vec<&str> = after_help
        .as_deref()
        .unwrap_or_default()
        .lines()
        .filter(|line| line.starts_with("  "))
        .collect();
    let (most, rest) = match command.has_subcommands() {
        true => (
            1,
            "`sharpi COMMAND --help` shows the flags of one. All take -q (quiet) and -v."
                .to_owned(),
        ),
        false => (
            2,
            format!(
                "`sharpi help {}` has all flags and examples.",
                command.get_name()
            ),
        ),
    };
    let examples = examples[..examples.len().min(most)].join("\n");
    format!("{{about}}\n{examples}\n\n{{usage-heading}} {{usage}}{list}\n\n{rest}\n")
}
