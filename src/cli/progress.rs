//! Progress on standard error, for a person who waits at a terminal.

use std::{
    borrow::Cow,
    env,
    io::{self, IsTerminal},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};

use super::args::VerbosityArgs;

/// What is over sooner than this needs no progress bar.
const PATIENCE: Duration = Duration::from_millis(300);

/// Whether to show progress at all: to a person, on a terminal that can move its cursor, and not between the
/// lines of `-v`.
pub fn wanted(verbosity: &VerbosityArgs) -> bool {
    let set = |name| env::var_os(name).is_some_and(|value| !value.is_empty());
    io::stderr().is_terminal()
        && !verbosity.quiet
        && !verbosity.verbose
        && !set("NO_COLOR")
        && env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// A step of unknown length. It disappears when dropped.
pub struct Spinner(ProgressBar);

impl Spinner {
    pub fn new(wanted: bool, message: impl Into<Cow<'static, str>>) -> Self {
        let bar = if wanted {
            ProgressBar::new_spinner()
        } else {
            ProgressBar::hidden()
        };
        bar.set_message(message);
        if wanted {
            bar.enable_steady_tick(PATIENCE);
        }
        Self(bar)
    }
}

impl Drop for Spinner {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

/// The reading of a prompt, token by token. It disappears when the last one has been read.
pub struct PromptBar {
    wanted: bool,
    started: Instant,
    bar: Option<ProgressBar>,
}

impl PromptBar {
    pub fn new(wanted: bool) -> Self {
        Self {
            wanted,
            started: Instant::now(),
            bar: None,
        }
    }

    /// `done` of `total` tokens have been read.
    pub fn update(&mut self, done: usize, total: usize) {
        if done == total {
            self.clear();
        } else if self.wanted && self.started.elapsed() > PATIENCE {
            self.bar
                .get_or_insert_with(|| prompt_bar(total))
                .set_position(done as u64);
        }
    }

    pub fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

fn prompt_bar(total: usize) -> ProgressBar {
    let style = ProgressStyle::with_template(
        "reading the prompt {wide_bar} {pos}/{len} tokens, {per_sec}, {eta} left",
    )
    .expect("the template is well-formed");
    ProgressBar::new(total as u64).with_style(style)
}
