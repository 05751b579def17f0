//! Progress on standard error, for a person who waits at a terminal: one line, below everything else.
//!
//! The cursor rests at the line's start. From there the line is erased whatever the terminal has made of it meanwhile: many
//! break it into several where their window becomes narrower. (indicatif's bars leave the cursor behind the line, and these
//! pieces on the screen.)

use std::{
    env,
    io::{self, IsTerminal},
    sync::{
        Arc, LazyLock, Mutex, MutexGuard, Once, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use console::{Term, measure_text_width, truncate_str};
use indicatif::HumanCount;

use super::{
    args::VerbosityArgs,
    escape::escaped,
    figures::{bytes, three_digits, time},
};

/// What is over sooner than this needs no progress.
const PATIENCE: Duration = Duration::from_millis(300);

/// From one drawing to the next.
const TICK: Duration = Duration::from_millis(100);

/// A bar of fewer columns says nothing.
const SHORTEST_BAR: usize = 8;

/// What erases the line: for signal handlers.
pub const ERASE: &str = "\r\x1b[J";

/// Where there is a line on the screen.
static DRAWN: AtomicBool = AtomicBool::new(false);

static PLACE: LazyLock<Mutex<Place>> = LazyLock::new(|| {
    Mutex::new(Place {
        term: Term::buffered_stderr(),
        lines: Vec::new(),
    })
});

/// Whether to show progress at all: to a person, on a terminal that can move its cursor, and not between the lines of `-v`.
pub fn wanted(verbosity: &VerbosityArgs) -> bool {
    io::stderr().is_terminal()
        && !verbosity.quiet
        && !verbosity.verbose
        && env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// Does `write`, which writes to the terminal, while no progress is on the screen.
pub fn above<R>(write: impl FnOnce() -> R) -> R {
    let place = place();
    place.erase();
    write()
}

/// Erases what there is of progress for good: for one who is about to end the process.
pub fn end() {
    let place = place();
    place.erase();
    // Nobody draws from here on.
    std::mem::forget(place);
}

/// Whether progress is on the screen. May be called in a signal handler.
pub fn is_drawn() -> bool {
    DRAWN.load(Ordering::Relaxed)
}

/// A step of unknown length. It disappears when dropped.
pub struct Spinner {
    /// `None`: it is not wanted.
    doing: Option<Arc<str>>,
}

impl Spinner {
    pub fn new(wanted: bool, doing: impl Into<Arc<str>>) -> Self {
        let doing = wanted.then(|| doing.into());
        if let Some(doing) = &doing {
            show(Line {
                doing: Arc::clone(doing),
                started: Instant::now(),
                count: None,
            });
        }
        Self { doing }
    }

    /// While a model of this name is being loaded.
    pub fn loading(wanted: bool, name: &str) -> Self {
        Self::new(wanted, format!("loading {}", escaped(name)))
    }
}

impl Drop for Spinner {
    fn drop(&mut self) {
        if let Some(doing) = &self.doing {
            hide(doing);
        }
    }
}

/// A step whose length is known. It shows itself once it takes a while, and disappears when it is done, or dropped.
pub struct CountBar {
    wanted: bool,
    doing: Arc<str>,
    unit: Unit,
    /// From the first update on.
    begun: Option<(Instant, Count)>,
}

impl CountBar {
    /// Counts `things` while `doing`.
    pub fn new(wanted: bool, doing: &str, things: &'static str) -> Self {
        Self::of(wanted, doing, Unit::Things(things))
    }

    /// Counts bytes while `doing`.
    pub fn bytes(wanted: bool, doing: &str) -> Self {
        Self::of(wanted, doing, Unit::Bytes)
    }

    fn of(wanted: bool, doing: &str, unit: Unit) -> Self {
        Self {
            wanted,
            doing: doing.into(),
            unit,
            begun: None,
        }
    }

    /// `done` of `total` are done. Those of the first update were done before, and say nothing about the rate.
    pub fn update(&mut self, done: usize, total: usize) {
        if done == total {
            self.clear();
        } else if self.wanted {
            let now = Instant::now();
            let (started, count) = self.begun.get_or_insert((
                now,
                Count {
                    unit: self.unit,
                    first: done,
                    done,
                    total,
                    time: Duration::ZERO,
                },
            ));
            if count.done != done {
                count.done = done;
                count.time = now - *started;
            }
            show(Line {
                doing: self.doing.clone(),
                started: *started,
                count: Some(*count),
            });
        }
    }

    pub fn clear(&mut self) {
        if self.begun.take().is_some() {
            hide(&self.doing);
        }
    }
}

impl Drop for CountBar {
    fn drop(&mut self) {
        self.clear();
    }
}

/// The last line of the screen.
struct Place {
    term: Term,
    /// Of all that is in progress, in the order in which it began. The last is shown.
    lines: Vec<Line>,
}

fn place() -> MutexGuard<'static, Place> {
    PLACE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Shows `line` in the place of what it said before.
fn show(line: Line) {
    let lines = &mut place().lines;
    match lines.iter_mut().find(|shown| shown.is_about(&line.doing)) {
        Some(shown) => *shown = line,
        None => lines.push(line),
    }
    static DRAWING: Once = Once::new();
    DRAWING.call_once(|| {
        let draw = || loop {
            thread::sleep(TICK);
            place().draw();
        };
        // Who cannot be shown progress can still be served.
        let _ = thread::Builder::new().name("progress".into()).spawn(draw);
    });
}

fn hide(doing: &Arc<str>) {
    let mut place = place();
    place.lines.retain(|line| !line.is_about(doing));
    place.erase();
}

impl Place {
    /// A terminal that takes no writes is no reason to stop what is in progress.
    fn draw(&self) {
        let now = Instant::now();
        let Some(line) = self.lines.last() else {
            return;
        };
        if now - line.started < PATIENCE && !is_drawn() {
            return;
        }
        let columns = self.term.size_checked().map_or(80, |(_, columns)| columns);
        let text = line.text(now, columns.into());
        let _ = self.term.clear_to_end_of_screen();
        let _ = self.term.write_str(&text);
        let _ = self.term.write_str("\r");
        let _ = self.term.flush();
        DRAWN.store(true, Ordering::Relaxed);
    }

    fn erase(&self) {
        if DRAWN.swap(false, Ordering::Relaxed) {
            let _ = self.term.clear_to_end_of_screen();
            let _ = self.term.flush();
        }
    }
}

/// What a line says.
struct Line {
    doing: Arc<str>,
    started: Instant,
    /// `None`: nobody knows how far it is.
    count: Option<Count>,
}

#[derive(Clone, Copy)]
struct Count {
    unit: Unit,
    first: usize,
    done: usize,
    total: usize,
    /// From `first` to `done`.
    time: Duration,
}

#[derive(Clone, Copy)]
enum Unit {
    Things(&'static str),
    Bytes,
}

impl Line {
    /// Whether it is this very one's, whatever others say.
    fn is_about(&self, doing: &Arc<str>) -> bool {
        Arc::ptr_eq(&self.doing, doing)
    }

    /// The line in fewer than `columns` columns, so that no terminal breaks it. The fewer these are, the less it says; that it
    /// goes on, it says always.
    fn text(&self, now: Instant, columns: usize) -> String {
        let room = columns.saturating_sub(1);
        let elapsed = now - self.started;
        let Some(count) = &self.count else {
            let behind = format!(", {}", time(elapsed));
            let doing = truncate_str(&self.doing, room.saturating_sub(behind.len()), "…");
            return truncate_str(&format!("{doing}{behind}"), room, "").into_owned();
        };
        let doing = &self.doing;
        let percent = format!("{}%", count.done * 100 / count.total);
        let rate = count.rate().map(|rate| format!(", {rate}"));
        let rate = rate.unwrap_or_default();
        let left = count.left(elapsed).map(time);
        let left = left.map_or(String::new(), |left| format!(", {left} left"));
        let elapsed = time(elapsed);
        for behind in [
            format!(" {}{rate}, {elapsed}{left}", count.counts()),
            format!(" {percent}, {elapsed}{left}"),
        ] {
            let taken = measure_text_width(doing) + 1 + behind.len();
            if taken + SHORTEST_BAR <= room {
                let bar = room - taken;
                let full = bar * count.done / count.total;
                let (full, rest) = ("█".repeat(full), "░".repeat(bar - full));
                return format!("{doing} {full}{rest}{behind}");
            }
        }
        let forms = [
            format!("{doing} {percent}, {elapsed}{left}"),
            format!("{percent}, {elapsed}{left}"),
            format!("{percent}, {elapsed}"),
            elapsed,
        ];
        let mut fitting = forms
            .into_iter()
            .filter(|form| measure_text_width(form) <= room);
        fitting.next().unwrap_or_default()
    }
}

impl Count {
    fn counts(&self) -> String {
        let &Self { done, total, .. } = self;
        match self.unit {
            Unit::Things(things) => {
                let [done, total] = [done, total].map(|count| HumanCount(count as u64));
                format!("{done}/{total} {things}")
            }
            Unit::Bytes => format!("{} of {}", bytes(done as f64), bytes(total as f64)),
        }
    }

    /// A second, so far; `None` before anything was done.
    fn per_second(&self) -> Option<f64> {
        let done = (self.done - self.first) as f64;
        (done > 0.0).then(|| done / self.time.as_secs_f64().max(1e-9))
    }

    fn rate(&self) -> Option<String> {
        let rate = self.per_second()?;
        Some(match self.unit {
            Unit::Things(things) => format!("{} {things}/s", three_digits(rate)),
            Unit::Bytes => format!("{}/s", bytes(rate)),
        })
    }

    /// How long the rest takes, at the rate so far, when `elapsed` is over.
    fn left(&self, elapsed: Duration) -> Option<Duration> {
        let rest = (self.total - self.done) as f64 / self.per_second()?;
        let end = Duration::try_from_secs_f64(self.time.as_secs_f64() + rest).ok()?;
        Some(end.saturating_sub(elapsed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(count: Option<Count>, seconds: u64, columns: usize) -> String {
        let started = Instant::now();
        let line = Line {
            doing: "reading the prompt".into(),
            started,
            count,
        };
        line.text(started + Duration::from_secs(seconds), columns)
    }

    /// 128 of 1,000 tokens, of which 28 were there before, in 10 seconds.
    const COUNT: Count = Count {
        unit: Unit::Things("tokens"),
        first: 28,
        done: 128,
        total: 1000,
        time: Duration::from_secs(10),
    };

    #[test]
    fn a_line_says_less_in_a_narrower_window() {
        let says = [
            (
                80,
                "reading the prompt █░░░░░░░░░░ 128/1,000 tokens, 10.0 tokens/s, 12s, 1m25s left",
            ),
            (
                76,
                "reading the prompt ████░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░ 12%, 12s, 1m25s left",
            ),
            (40, "reading the prompt 12%, 12s, 1m25s left"),
            (39, "12%, 12s, 1m25s left"),
            (20, "12%, 12s"),
            (5, "12s"),
            (3, ""),
        ];
        for (columns, expected) in says {
            assert_eq!(text(Some(COUNT), 12, columns), expected, "{columns}");
        }
        assert_eq!(text(None, 3, 80), "reading the prompt, 3s");
        assert_eq!(text(None, 3, 12), "readin…, 3s");
    }

    #[test]
    fn no_line_reaches_the_last_column() {
        let started = Count {
            done: 28,
            time: Duration::ZERO,
            ..COUNT
        };
        let bytes = Count {
            unit: Unit::Bytes,
            total: 5 << 30,
            ..COUNT
        };
        for count in [None, Some(COUNT), Some(started), Some(bytes)] {
            for columns in 0..200 {
                let text = text(count, 4000, columns);
                let width = measure_text_width(&text);
                assert!(width <= columns.saturating_sub(1), "{columns}: {text}");
            }
        }
    }

    #[test]
    fn what_is_left_counts_down_between_updates() {
        let left = |seconds| COUNT.left(Duration::from_secs(seconds)).map(time);
        assert_eq!(left(10).as_deref(), Some("1m27s"));
        assert_eq!(left(11).as_deref(), Some("1m26s"));
        assert_eq!(left(500).as_deref(), Some("0s"));
    }
}
