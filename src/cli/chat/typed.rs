//! What was typed: a message, or a command.

use std::{env, path::PathBuf};

/// Stands at both ends of a message that is taken as it is.
const QUOTES: &str = "\"\"\"";

pub const HELP: &str = "\
/system [TEXT]  show or set the system prompt; \"\" stands for none
/reset          begin anew, with the system prompt
/retry          drop the last answer and ask for another
/edit           edit your last message, drop its answer and ask again
/save FILE      write the conversation to FILE, as `run --messages` reads it
/load FILE      go on with the conversation in FILE
/stats          how full the context is, how fast the last answer was
/exit           end; Ctrl-D does, too

A line that ends with \\ goes on in the next one, and so does all between \"\"\" and \"\"\". //text sends /text.
Ctrl-C stops an answer.";

const COMMANDS: [&str; 9] = [
    "/system", "/reset", "/retry", "/edit", "/save", "/load", "/stats", "/help", "/exit",
];

/// What a line, or several that belong together, asks for.
#[derive(Debug, PartialEq, Eq)]
pub enum Typed {
    Nothing,
    Message(String),
    /// `None`: to show it. An empty one: to have none.
    System(Option<String>),
    Reset,
    Retry,
    Edit,
    Save(PathBuf),
    Load(PathBuf),
    Stats,
    Help,
    Exit,
    /// What to say about it.
    Mistake(String),
}

impl Typed {
    pub fn parse(typed: &str) -> Self {
        if let Some(quoted) = quoted(typed) {
            return Self::Message(quoted.to_owned());
        }
        let typed = typed.trim_end();
        match typed.strip_prefix('/') {
            _ if typed.is_empty() => Self::Nothing,
            None => Self::Message(typed.to_owned()),
            Some(message) if message.starts_with('/') => Self::Message(message.to_owned()),
            Some(_) => Self::command(typed),
        }
    }

    fn command(typed: &str) -> Self {
        let (name, rest) = typed.split_once(char::is_whitespace).unwrap_or((typed, ""));
        let rest = rest.trim();
        let alone = |command: Self| match rest {
            "" => command,
            _ => Self::Mistake(format!("{name} takes nothing behind it")),
        };
        let file = |command: fn(PathBuf) -> Self| match rest {
            "" => Self::Mistake(format!("{name} takes the name of a file")),
            _ => command(in_home(rest)),
        };
        match name {
            "/system" => Self::System(match rest {
                "" => None,
                "\"\"" => Some(String::new()),
                text => Some(quoted(text).unwrap_or(text).to_owned()),
            }),
            "/reset" => alone(Self::Reset),
            "/retry" => alone(Self::Retry),
            "/edit" => alone(Self::Edit),
            "/save" => file(Self::Save),
            "/load" => file(Self::Load),
            "/stats" => alone(Self::Stats),
            "/help" => alone(Self::Help),
            "/exit" => alone(Self::Exit),
            _ => Self::Mistake(match closest(name) {
                Some(command) => format!("there is no {name}: {command}? /help lists the commands"),
                None => {
                    format!("there is no {name}: /help lists the commands, and /{name} sends it")
                }
            }),
        }
    }
}

/// Whether the text goes on until its quotes are closed.
pub fn is_open(typed: &str) -> bool {
    typed.starts_with(QUOTES) && quoted(typed).is_none()
}

/// What has to be typed for `message`.
pub fn to_type(message: &str) -> String {
    let plain = message.trim_end() == message && !message.ends_with('\\') && !message.is_empty();
    if !plain || message.starts_with(QUOTES) {
        return format!("{QUOTES}\n{message}\n{QUOTES}");
    }
    match message.starts_with('/') {
        true => format!("/{message}"),
        false => message.to_owned(),
    }
}

/// What is between quotes, without the line ends next to them.
fn quoted(typed: &str) -> Option<&str> {
    let inner = typed
        .trim_end()
        .strip_prefix(QUOTES)?
        .strip_suffix(QUOTES)?;
    let inner = inner.strip_prefix('\n').unwrap_or(inner);
    Some(inner.strip_suffix('\n').unwrap_or(inner))
}

/// The command that `name` was probably meant to be: the one with the longest beginning in common.
fn closest(name: &str) -> Option<&'static str> {
    let common = |command: &str| {
        let pairs = command.chars().zip(name.chars());
        pairs.take_while(|(a, b)| a == b).count()
    };
    let likeliest = COMMANDS.into_iter().rev().max_by_key(|c| common(c))?;
    // The slash is common to all.
    (common(likeliest) > 1).then_some(likeliest)
}

/// A path in which `~/` stands for the home directory, as in a shell.
fn in_home(path: &str) -> PathBuf {
    match (path.strip_prefix("~/"), env::home_dir()) {
        (Some(rest), Some(home)) => home.join(rest),
        _ => path.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_to_be_typed_for_a_message_is_read_as_that_message() {
        for message in [
            "a",
            "a\nb",
            "  a",
            "a\\",
            "a\\\nb",
            "/a",
            "//a",
            "a ",
            "a\n",
            "\na",
            "\"\"\"",
            "\"\"\"a\"\"\"",
            "a\"\"\"",
            "\n",
            "/system a",
            "",
        ] {
            let typed = to_type(message);
            assert!(!is_open(&typed), "{typed:?}");
            assert_eq!(Typed::parse(&typed), Typed::Message(message.to_owned()));
        }
    }

    #[test]
    fn quotes_are_open_until_they_are_closed_at_the_end_of_a_line() {
        for (typed, open) in [
            ("\"\"\"", true),
            ("\"\"\"\"", true),
            ("\"\"\"\na", true),
            ("\"\"\"a\"\"\" b", true),
            ("\"\"\"a\"\"\"  ", false),
            ("a \"\"\"", false),
        ] {
            assert_eq!(is_open(typed), open, "{typed:?}");
        }
    }

    #[test]
    fn a_command_that_there_is_not_brings_the_one_that_was_meant() {
        let mistake = |typed: &str| match Typed::parse(typed) {
            Typed::Mistake(message) => message,
            other => panic!("{other:?}"),
        };
        for (typed, meant) in [
            ("/rest", "/reset?"),
            ("/restart", "/reset?"),
            ("/sav a", "/save?"),
            ("/e", "/edit?"),
        ] {
            assert!(
                mistake(typed).contains(meant),
                "{typed}: {}",
                mistake(typed)
            );
        }
        for (typed, said) in [
            ("/usr/bin", "//usr/bin sends it"),
            ("/reset now", "/reset takes nothing"),
            ("/load  ", "/load takes the name of a file"),
        ] {
            assert!(mistake(typed).contains(said), "{typed}: {}", mistake(typed));
        }
    }

    #[test]
    fn a_system_prompt_may_have_several_lines() {
        for (typed, text) in [
            ("/system", None),
            ("/system \"\"", Some("")),
            ("/system a b\nc", Some("a b\nc")),
            ("/system \"\"\"\na\n\"\"\"", Some("a")),
        ] {
            assert_eq!(Typed::parse(typed), Typed::System(text.map(str::to_owned)));
        }
    }
}
