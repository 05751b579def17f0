//! Progress on standard error, for a person who waits at a terminal.

use std::{
    borrow::Cow,
    env,
    io::{self, IsTerminal},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

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

/// A step whose length is known. It shows itself once it takes a while, and disappears when it is done.
pub struct CountBar {
    wanted: bool,
    started: Instant,
    style: ProgressStyle,
    bar: Option<ProgressBar>,
}

impl CountBar {
    /// Counts `things` while `doing`.
    pub fn new(wanted: bool, doing: &str, things: &str) -> Self {
        Self::with_template(
            wanted,
            &format!("{doing} {{wide_bar}} {{pos}}/{{len}} {things}, {{per_sec}}, {{eta}} left"),
        )
    }

    /// Counts bytes while `doing`.
    pub fn bytes(wanted: bool, doing: &str) -> Self {
        Self::with_template(
            wanted,
            &format!("{doing} {{wide_bar}} {{bytes}}/{{total_bytes}}, {{bytes_per_sec}}"),
        )
    }

    fn with_template(wanted: bool, template: &str) -> Self {
        Self {
            wanted,
            started: Instant::now(),
            style: ProgressStyle::with_template(template).expect("the template is well-formed"),
            bar: None,
        }
    }

    /// `done` of `total` are done.
    pub fn update(&mut self, done: usize, total: usize) {
        if done == total {
            self.clear();
        } else if self.wanted {
            // Hidden at first, but there from the start: the rate that it shows is reckoned from every update.
            let bar = self.bar.get_or_insert_with(|| {
                ProgressBar::with_draw_target(Some(total as u64), ProgressDrawTarget::hidden())
                    .with_style(self.style.clone())
            });
            if bar.is_hidden() && self.started.elapsed() > PATIENCE {
                bar.set_draw_target(ProgressDrawTarget::stderr());
            }
            bar.set_position(done as u64);
        }
    }

    pub fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}
