//! Defaults for flags: from `SHARPI_*` variables, then from the configuration file, and what `sharpi config` says of them.
//!
//! A key is a flag's long name. At the top of the file, and as a variable, it holds for the commands that write text, and
//! for all others where it says which model is computed and on what; in a table with a command's name, for that command. A
//! default that excludes a flag that was typed gives way to it.

use std::{
    env,
    ffi::OsString,
    fmt::{self, Display},
    fs,
    io::{self, ErrorKind, Write},
    path::PathBuf,
};

use anyhow::{Context, Result, anyhow, bail};
use clap::{
    Arg, ArgAction, ArgMatches, Args, Command, CommandFactory, FromArgMatches,
    error::{ContextKind, ContextValue},
    parser::ValueSource,
};
use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{
    args::{Cli, MachineArgs, ModelArgs, RopeArgs, VerbosityArgs, on_a_screen},
    directories,
    escape::escaped,
    exit::Outcome,
    output::WRITING,
};

/// The commands that write text, to all of whose flags a key at the top belongs.
const WRITERS: [&str; 3] = ["run", "chat", "batch"];

/// Flags that are about one call.
const OF_ONE_CALL: [&str; 8] = [
    "prompt", "file", "messages", "input", "output", "resume", "help", "version",
];

/// Variables that are 0 where the flag is meant.
const FORBIDDING: [(&str, &str); 2] = [
    ("SHARPI_CUDA_GRAPH", "no-cuda-graph"),
    ("SHARPI_STEP_KERNEL", "no-step-kernel"),
];

/// Variables of building and testing the program.
const OTHER_VARIABLES: [&str; 6] = [
    "SHARPI_CUDA_ARCHS",
    "SHARPI_REQUIRE_CUDA",
    "SHARPI_TEST_SEED",
    "SHARPI_SMOLLM2",
    "SHARPI_GEMMA3",
    "SHARPI_QWEN25_CODER",
];

const PREFIX: &str = "SHARPI_";

/// Reads what was typed, with defaults for what was not.
///
/// # Errors
/// What clap says of it; a configuration file that cannot be read, or with keys or values that mean nothing.
pub fn parse() -> Result<(Cli, Settings)> {
    let typed = on_a_screen(Cli::command()).try_get_matches_from(env::args_os())?;
    let settings = Settings::read()?;
    let mut command = on_a_screen(Cli::command());
    let mut model = None;
    if let Some((name, matches)) = typed.subcommand() {
        let root = Cli::command();
        let found = settings
            .defaults(&root, name, matches)
            .context("reading the defaults of flags")?;
        for (id, setting) in found {
            // Whether one argument is a model or a prompt depends on what was typed.
            if id == "model" {
                model = setting.values.first().map(OsString::from);
                continue;
            }
            let set = |arg: Arg| arg.default_values(setting.values.clone());
            command = match is_global(&command, &id) {
                true => command.mut_arg(&id, set),
                false => command.mut_subcommand(name, |command| command.mut_arg(&id, set)),
            };
        }
    }
    let mut cli = Cli::from_arg_matches(&command.try_get_matches_from(env::args_os())?)?;
    if let Some(args) = cli.command.model_args() {
        args.default = model.map(PathBuf::from);
    }
    Ok((cli, settings))
}

/// Prints the effective values, and where each comes from, as a configuration file.
pub fn print(settings: &Settings) -> Result<Outcome> {
    let mut text = Vec::new();
    settings.write(&mut text)?;
    let mut out = io::stdout().lock();
    out.write_all(&text)
        .and_then(|()| out.flush())
        .context(WRITING)?;
    Ok(Outcome::Done)
}

/// What the environment and the configuration file say.
pub struct Settings {
    /// The file, whether or not it is there.
    path: Option<PathBuf>,
    /// Those that precede others first: variables, tables, the top of the file.
    settings: Vec<Setting>,
    /// Variables that are no flag's.
    unknown_variables: Vec<String>,
}

struct Setting {
    /// The command that it is for, or `None` for a key at the top or a variable.
    table: Option<String>,
    /// A flag's long name.
    key: String,
    values: Vec<String>,
    origin: Origin,
}

#[derive(Clone, PartialEq)]
enum Origin {
    Variable(String),
    Line(usize),
}

impl Settings {
    fn read() -> Result<Self> {
        let path = directories::config("config.toml");
        let mut settings = Vec::new();
        let unknown_variables = read_environment(&mut settings)?;
        if let Some(path) = &path {
            match fs::read_to_string(path) {
                Ok(text) => read_file(&text, &mut settings),
                Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
                Err(error) => Err(error.into()),
            }
            .with_context(|| format!("reading the configuration in {}", path.display()))?;
        }
        Ok(Self {
            path,
            settings,
            unknown_variables,
        })
    }

    /// Warns of variables with the program's prefix that mean nothing.
    pub fn warn(&self) {
        for variable in &self.unknown_variables {
            tracing::warn!("{} means nothing here", escaped(variable));
        }
    }

    /// The defaults of the command called `name`, by the flag's id, that what was typed leaves room for.
    fn defaults(
        &self,
        root: &Command,
        name: &str,
        typed: &ArgMatches,
    ) -> Result<Vec<(String, &Setting)>> {
        let command = subcommand(root, name);
        let given = |id: &str| typed.value_source(id) == Some(ValueSource::CommandLine);
        let args = || command.get_arguments().chain(root.get_arguments());
        let mut taken: Vec<(&Arg, Option<&Setting>)> = args()
            .filter(|arg| typed.try_contains_id(arg.get_id().as_str()).is_ok())
            .filter(|arg| given(arg.get_id().as_str()))
            .map(|arg| (arg, None))
            .collect();
        for setting in &self.settings {
            let Some(arg) = args().find(|arg| arg.get_long() == Some(&setting.key)) else {
                continue;
            };
            let applies = match &setting.table {
                Some(table) => table == name,
                None => takes_from_top(name, arg),
            };
            if !applies
                || taken
                    .iter()
                    .any(|(other, _)| other.get_id() == arg.get_id())
            {
                continue;
            }
            let excluded_by = taken.iter().find(|(other, setting)| {
                setting.is_none_or(Setting::is_on)
                    && (excludes(root, command, arg, other) || excludes(root, command, other, arg))
            });
            match excluded_by.filter(|_| setting.is_on()) {
                None => taken.push((arg, Some(setting))),
                Some((_, Some(other))) if other.rank() == setting.rank() => bail!(
                    "{} ({}) and {} ({}) exclude each other: leave one out",
                    other.key,
                    other.origin,
                    setting.key,
                    setting.origin
                ),
                Some(_) => {}
            }
        }
        let found = taken.into_iter();
        Ok(found
            .filter_map(|(arg, setting)| Some((arg.get_id().to_string(), setting?)))
            .collect())
    }

    fn write(&self, out: &mut impl Write) -> Result<()> {
        let root = Cli::command();
        if let Some(path) = &self.path {
            let there = if path.exists() { "" } else { " (not there)" };
            writeln!(out, "# {}{there}", escaped(&path.display().to_string()))?;
        }
        let mut seen: Vec<&str> = Vec::new();
        for command in writers(&root) {
            for arg in command.get_arguments().chain(root.get_arguments()) {
                let Some(key) = key_of(arg).filter(|key| !seen.contains(key)) else {
                    continue;
                };
                seen.push(key);
                let found = self
                    .settings
                    .iter()
                    .find(|s| s.table.is_none() && s.key == key);
                write_value(out, arg, key, found)?;
            }
        }
        let mut tables: Vec<&str> = self
            .settings
            .iter()
            .filter_map(|s| s.table.as_deref())
            .collect();
        tables.dedup();
        for table in tables {
            writeln!(out, "\n[{table}]")?;
            let command = subcommand(&root, table);
            for setting in self
                .settings
                .iter()
                .filter(|s| s.table.as_deref() == Some(table))
            {
                let arg = find(&root, command, &setting.key);
                let arg = arg.context("a setting is checked when it is read")?;
                // A variable precedes the table.
                let applies = takes_from_top(table, arg);
                let variable = self.settings.iter().find(|other| {
                    other.key == setting.key && matches!(other.origin, Origin::Variable(_))
                });
                let effective = variable.filter(|_| applies).unwrap_or(setting);
                write_value(out, arg, &setting.key, Some(effective))?;
            }
        }
        Ok(())
    }
}

impl Setting {
    /// Of two that are about the same thing, the one with the lower rank counts.
    fn rank(&self) -> u8 {
        match (&self.origin, &self.table) {
            (Origin::Variable(_), _) => 0,
            (Origin::Line(_), Some(_)) => 1,
            (Origin::Line(_), None) => 2,
        }
    }

    /// Whether it is more than a switch that stays off.
    fn is_on(&self) -> bool {
        self.values != ["false"]
    }
}

impl Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Variable(name) => f.write_str(name),
            Self::Line(line) => write!(f, "line {line}"),
        }
    }
}

/// Adds the variables that are a flag's default, and returns the others with the program's prefix.
fn read_environment(settings: &mut Vec<Setting>) -> Result<Vec<String>> {
    let mut unknown = Vec::new();
    let root = Cli::command();
    for (name, value) in env::vars_os() {
        let Some(name) = name.to_str().filter(|name| name.starts_with(PREFIX)) else {
            continue;
        };
        if OTHER_VARIABLES.contains(&name) || value.is_empty() {
            continue;
        }
        let forbidden = FORBIDDING.iter().find(|(variable, _)| *variable == name);
        let (key, value) = match forbidden {
            Some((_, flag)) if value == "0" => ((*flag).to_owned(), OsString::from("true")),
            Some(_) => continue,
            None => (name[PREFIX.len()..].to_lowercase().replace('_', "-"), value),
        };
        let Some((command, arg)) = find_at_top(&root, &key) else {
            unknown.push(name.to_owned());
            continue;
        };
        let value = value
            .into_string()
            .map_err(|_| anyhow!("{name} is not UTF-8 text"))?;
        let value = match (is_switch(arg), value.as_str()) {
            (true, "1") => "true".to_owned(),
            (true, "0") => "false".to_owned(),
            _ => value,
        };
        let values = vec![value];
        check(command, arg, &values).with_context(|| format!("{name} in the environment"))?;
        settings.push(Setting {
            table: None,
            key,
            values,
            origin: Origin::Variable(name.to_owned()),
        });
    }
    Ok(unknown)
}

/// Adds what the file says, tables first.
fn read_file(text: &str, settings: &mut Vec<Setting>) -> Result<()> {
    let line = |span: std::ops::Range<usize>| text[..span.start].matches('\n').count() + 1;
    let root = Cli::command();
    let file = DeTable::parse(text).map_err(|error| {
        let line = error.span().map_or(1, line);
        anyhow!("line {line}: {}", error.message())
    })?;
    let mut top = Vec::new();
    for (key, value) in file.get_ref() {
        let at = line(key.span());
        let name = key.get_ref().as_ref();
        match value.get_ref() {
            DeValue::Table(table) => {
                let Some(command) = root.find_subcommand(name) else {
                    bail!(
                        "line {at}: there is no command {name:?}{}",
                        did_you_mean(&[name])
                    );
                };
                for (key, value) in table {
                    let at = line(key.span());
                    let key = key.get_ref().replace('_', "-");
                    let arg = find(&root, command, &key).filter(|arg| key_of(arg).is_some());
                    let arg = arg.with_context(|| {
                        let similar = did_you_mean(&[name, &format!("--{key}")]);
                        format!("line {at}: {key:?} is no flag of `sharpi {name}` that can have a default{similar}")
                    })?;
                    settings.push(setting(Some(name), (name, arg), key, value, at)?);
                }
            }
            _ => {
                let key = name.replace('_', "-");
                let place = find_at_top(&root, &key);
                let place = place.with_context(|| unknown_at_top(&root, &key, at))?;
                top.push(setting(None, place, key, value, at)?);
            }
        }
    }
    settings.extend(top);
    Ok(())
}

fn setting(
    table: Option<&str>,
    (command, arg): (&str, &Arg),
    key: String,
    value: &Spanned<DeValue>,
    line: usize,
) -> Result<Setting> {
    let values = texts(arg, value.get_ref()).with_context(|| format!("line {line}: {key}"))?;
    check(command, arg, &values).with_context(|| format!("line {line}"))?;
    Ok(Setting {
        table: table.map(str::to_owned),
        key,
        values,
        origin: Origin::Line(line),
    })
}

/// The value as it would be typed, or several of a flag that takes them.
fn texts(arg: &Arg, value: &DeValue) -> Result<Vec<String>> {
    let text = match value {
        DeValue::Boolean(value) if is_switch(arg) => value.to_string(),
        _ if is_switch(arg) => bail!("expected true or false"),
        DeValue::String(text) => text.to_string(),
        DeValue::Integer(number) => i64::from_str_radix(number.as_str(), number.radix())
            .context("the number is too large")?
            .to_string(),
        DeValue::Float(number) => number.as_str().parse::<f64>()?.to_string(),
        DeValue::Array(values) if takes_several(arg) && !values.is_empty() => {
            let texts = values.iter().map(|value| texts(arg, value.get_ref()));
            return Ok(texts.collect::<Result<Vec<_>>>()?.concat());
        }
        other => bail!(
            "expected a text or a number, found {}",
            match other {
                DeValue::Array(values) if values.is_empty() => "an empty list",
                other => other.type_str(),
            }
        ),
    };
    Ok(vec![text])
}

/// Has clap check the values as if they were typed behind `command`.
fn check(command: &str, arg: &Arg, values: &[String]) -> Result<()> {
    let key = arg.get_long().unwrap_or_default();
    let typed = values
        .iter()
        .filter_map(|value| match (is_switch(arg), value.as_str()) {
            (false, value) => Some(format!("--{key}={value}")),
            (true, "true") => Some(format!("--{key}")),
            (true, "false") => None,
            (true, other) => Some(format!("--{key}={other}")),
        });
    let typed = ["sharpi".to_owned(), command.to_owned()]
        .into_iter()
        .chain(typed);
    match Cli::command().try_get_matches_from(typed) {
        // What else a command needs is there or not when it is typed.
        Err(error) if error.kind() != clap::error::ErrorKind::MissingRequiredArgument => {
            let message = error.render().to_string();
            let message = message.split("\n\n").next().unwrap_or_default();
            let words: Vec<&str> = message.split_whitespace().skip(1).collect();
            bail!("{}", words.join(" "))
        }
        _ => Ok(()),
    }
}

/// What clap proposes in place of the last of `typed`.
fn did_you_mean(typed: &[&str]) -> String {
    let typed = ["sharpi"].iter().chain(typed);
    let error = Cli::command().try_get_matches_from(typed).err();
    let similar = error.as_ref().and_then(|error| {
        [ContextKind::SuggestedArg, ContextKind::SuggestedSubcommand]
            .into_iter()
            .find_map(|kind| error.get(kind))
    });
    let similar = match similar {
        Some(ContextValue::String(name)) => name,
        Some(ContextValue::Strings(names)) if !names.is_empty() => &names[0],
        _ => return String::new(),
    };
    format!("; did you mean {:?}?", similar.trim_start_matches("--"))
}

fn unknown_at_top(root: &Command, key: &str, line: usize) -> String {
    let owner = root
        .get_subcommands()
        .find(|command| find(root, command, key).is_some_and(|arg| key_of(arg).is_some()));
    match owner {
        Some(command) => format!(
            "line {line}: {key:?} is not for all commands: put it into the table of one, [{}]",
            command.get_name()
        ),
        None => {
            let similar = did_you_mean(&["run", &format!("--{key}")]);
            format!("line {line}: {key:?} is no flag that can have a default{similar}")
        }
    }
}

fn writers(root: &Command) -> impl Iterator<Item = &Command> {
    let writers = WRITERS.iter();
    writers.filter_map(|name| root.find_subcommand(name))
}

fn subcommand<'a>(root: &'a Command, name: &str) -> &'a Command {
    root.find_subcommand(name).expect("clap knows the command")
}

/// The flag of `command` with the long name `key`.
fn find<'a>(root: &'a Command, command: &'a Command, key: &str) -> Option<&'a Arg> {
    let mut args = command.get_arguments().chain(root.get_arguments());
    args.find(|arg| arg.get_long() == Some(key))
}

/// The flag that `key` at the top, or as a variable, is the default of, and the name of a command that has it.
fn find_at_top<'a>(root: &'a Command, key: &str) -> Option<(&'a str, &'a Arg)> {
    writers(root).find_map(|command| {
        let arg = find(root, command, key).filter(|arg| key_of(arg).is_some())?;
        Some((command.get_name(), arg))
    })
}

/// The name under which a flag can have a default.
fn key_of(arg: &Arg) -> Option<&str> {
    arg.get_long().filter(|key| !OF_ONE_CALL.contains(key))
}

/// Whether a key at the top, or a variable, is the default of this flag of `command`.
fn takes_from_top(command: &str, arg: &Arg) -> bool {
    WRITERS.contains(&command) || is_shared(arg)
}

/// Whether the flag says which model is computed and on what, or how much is said about it.
fn is_shared(arg: &Arg) -> bool {
    let none = Command::new("");
    let shared = VerbosityArgs::augment_args(RopeArgs::augment_args(MachineArgs::augment_args(
        ModelArgs::augment_args(none),
    )));
    shared
        .get_arguments()
        .any(|other| other.get_id() == arg.get_id())
}

fn is_global(root: &Command, id: &str) -> bool {
    root.get_arguments().any(|arg| arg.get_id() == id)
}

fn is_switch(arg: &Arg) -> bool {
    matches!(arg.get_action(), ArgAction::SetTrue)
}

fn takes_several(arg: &Arg) -> bool {
    matches!(arg.get_action(), ArgAction::Append)
}

fn excludes(root: &Command, command: &Command, arg: &Arg, other: &Arg) -> bool {
    let command = if arg.is_global_set() { root } else { command };
    let excluded = command.get_arg_conflicts_with(arg);
    excluded.iter().any(|arg| arg.get_id() == other.get_id())
}

/// One line: the value as TOML and its origin; a comment where there is none.
fn write_value(
    out: &mut impl Write,
    arg: &Arg,
    key: &str,
    found: Option<&Setting>,
) -> io::Result<()> {
    let defaults = arg
        .get_default_values()
        .iter()
        .map(|value| value.to_string_lossy().into_owned());
    let (values, origin) = match found {
        Some(setting) => (setting.values.clone(), setting.origin.to_string()),
        None if is_switch(arg) => (vec!["false".to_owned()], "default".to_owned()),
        None => (defaults.collect(), "default".to_owned()),
    };
    let literal = |value: &String| match value.parse::<f64>() {
        _ if is_switch(arg) => value.clone(),
        Ok(_) => value.clone(),
        Err(_) => toml::Value::from(value.as_str()).to_string(),
    };
    let (line, origin) = match &values[..] {
        [] => {
            let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
            let default = help
                .rsplit_once("[default: ")
                .map(|(_, rest)| rest.trim_end_matches(']'));
            (
                format!("# {key}"),
                default.map_or("not set".to_owned(), |text| format!("default: {text}")),
            )
        }
        [value] if !takes_several(arg) => (format!("{key} = {}", literal(value)), origin),
        several => {
            let literals: Vec<_> = several.iter().map(literal).collect();
            (format!("{key} = [{}]", literals.join(", ")), origin)
        }
    };
    writeln!(out, "{:<40} # {}", escaped(&line), escaped(&origin))
}
