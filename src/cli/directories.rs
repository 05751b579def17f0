//! Where this program keeps a person's files (XDG Base Directory Specification).

use std::{
    env,
    path::{Path, PathBuf},
};

/// The configuration: below `$XDG_CONFIG_HOME`, by default below `~/.config`.
pub fn config(file: &str) -> Option<PathBuf> {
    below("XDG_CONFIG_HOME", ".config", file)
}

/// What is kept from one run to the next: below `$XDG_STATE_HOME`, by default below `~/.local/state`.
pub fn state(file: &str) -> Option<PathBuf> {
    below("XDG_STATE_HOME", ".local/state", file)
}

fn below(variable: &str, default: &str, file: &str) -> Option<PathBuf> {
    let directory = match env::var_os(variable) {
        // The specification has relative ones ignored.
        Some(directory) if Path::new(&directory).is_absolute() => PathBuf::from(directory),
        _ => env::home_dir()?.join(default),
    };
    Some(directory.join("sharpi").join(file))
}
