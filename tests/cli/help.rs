//! `--help` is a screen that begins with an example; `sharpi help` has everything.

use crate::{Dir, Ran, sharpi};

const LINES: usize = 24;
const COLUMNS: usize = 80;

/// What `sharpi --help` lists.
fn commands() -> Vec<String> {
    let help = sharpi(&["--help"]);
    let list = help
        .stdout()
        .lines()
        .skip_while(|line| !line.starts_with("Usage:"));
    let entries = list.filter(|line| line.starts_with("  "));
    let names = entries.filter_map(|line| line.split_whitespace().next());
    let names: Vec<String> = names.map(str::to_owned).collect();
    assert!(
        names.iter().any(|name| name == "run") && names.len() > 10,
        "{names:?}"
    );
    names
}

/// The long flags of a command, as they are told to a shell.
fn flags(command: &str) -> Vec<String> {
    let script = sharpi(&["completions", "fish"]);
    let of_command = format!("__fish_sharpi_using_subcommand {command}\"");
    let lines = script
        .stdout()
        .lines()
        .filter(|line| line.contains(&of_command));
    let flags = lines.filter_map(|line| line.split(" -l ").nth(1)?.split_whitespace().next());
    let flags: Vec<String> = flags.map(|flag| format!("--{flag}")).collect();
    assert!(flags.contains(&"--help".to_owned()), "{command}: {flags:?}");
    flags
}

fn help_on(columns: usize, args: &[&str]) -> String {
    let dir = Dir::new();
    let mut command = dir.command(args);
    let output = command.env("COLUMNS", columns.to_string()).output();
    Ran::from(output.expect("starting sharpi"))
        .stdout()
        .to_owned()
}

#[test]
fn the_help_of_every_command_fits_a_screen_and_begins_with_an_example() {
    for name in commands().iter().map(String::as_str).chain([""]) {
        let args: Vec<&str> = [name].into_iter().filter(|name| !name.is_empty()).collect();
        let of = |flag| [&args[..], &[flag]].concat();
        for columns in [COLUMNS, 200] {
            let help = help_on(columns, &of("--help"));
            assert!(
                help.lines().count() <= LINES,
                "{} lines: {help}",
                help.lines().count()
            );
            let widest = help.lines().map(|line| line.chars().count()).max();
            assert!(widest <= Some(COLUMNS), "{widest:?} columns: {help}");
            assert_eq!(help, help_on(columns, &of("-h")));
            let mut lines = help.lines().skip(1);
            let example = lines.next().expect("an example");
            assert!(
                example.starts_with("  ") && example.contains("sharpi"),
                "{help}"
            );
            assert!(
                lines.any(|line| line.starts_with("Usage: sharpi")),
                "{help}"
            );
            assert!(help.contains("`sharpi "), "where the rest is: {help}");
        }
    }
}

#[test]
fn what_a_screen_has_no_room_for_is_in_the_long_help() {
    for name in commands() {
        let help = sharpi(&["help", &name]);
        let help = help.stdout();
        assert!(help.contains(&format!("Usage: sharpi {name}")), "{help}");
        assert!(help.contains("Examples:"), "{help}");
        for flag in flags(&name) {
            assert!(help.contains(&flag), "{flag} of {name}");
        }
    }
    let all = sharpi(&["help"]);
    assert!(all.stdout().contains("Exit status:"), "{all:?}");
    assert!(sharpi(&["help", "nonsense"]).error(2).contains("nonsense"));
    let run = sharpi(&["run", "--help"]);
    assert!(
        run.stdout().contains("--prompt") && !run.stdout.contains("--kv-budget"),
        "{run:?}"
    );
}
