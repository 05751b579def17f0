//! Standard error: what the program says about its work, as tracing events in few words.
//!
//! `info!` is for everyone, `debug!` shows under `-v`, and `-q` leaves errors only. Colours are clap's, where its own messages
//! have some.

use std::{
    fmt,
    io::{self, Write},
};

use clap::builder::styling::{AnsiColor, Style, Styles};
use tracing::{Event, Level, Subscriber, level_filters::LevelFilter};
use tracing_subscriber::{
    filter::Targets,
    fmt::{FmtContext, FormatEvent, FormatFields, format::Writer},
    layer::SubscriberExt,
    registry::LookupSpan,
    util::SubscriberInitExt,
};

use super::{args::VerbosityArgs, escape::escaped_layout, progress};

/// Sends this crate's events to standard error from here on; those of other crates would be noise.
pub fn init(verbosity: &VerbosityArgs) {
    let level = match verbosity {
        VerbosityArgs { quiet: true, .. } => LevelFilter::ERROR,
        VerbosityArgs { verbose: true, .. } => LevelFilter::DEBUG,
        _ => LevelFilter::INFO,
    };
    let lines = tracing_subscriber::fmt::layer()
        .event_format(Line)
        .with_writer(|| StandardError)
        // It would report a closed standard error with a macro that panics on a closed standard error.
        .log_internal_errors(false);
    tracing_subscriber::registry()
        .with(Targets::new().with_target(env!("CARGO_CRATE_NAME"), level))
        .with(lines)
        .init();
}

/// Standard error above all progress. Where it is no terminal that shows colours, or `NO_COLOR` is set, they are left out.
pub struct StandardError;

impl Write for StandardError {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        progress::above(|| anstream::stderr().write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        anstream::stderr().flush()
    }
}

/// `text` in a style.
pub fn styled(text: &str, style: Style) -> String {
    format!("{style}{text}{style:#}")
}

/// What an error begins with.
pub fn error_mark() -> String {
    styled("error:", *Styles::styled().get_error()) + " "
}

/// One line an event, marked with its level unless that is plain information.
struct Line;

impl<S, N> FormatEvent<S, N> for Line
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        writer.write_str(&match *event.metadata().level() {
            Level::ERROR => error_mark(),
            Level::WARN => styled("warning:", AnsiColor::Yellow.on_default().bold()) + " ",
            Level::INFO => String::new(),
            Level::DEBUG => styled("debug:", Style::new().dimmed()) + " ",
            Level::TRACE => styled("trace:", Style::new().dimmed()) + " ",
        })?;
        context.format_fields(writer.by_ref(), event)?;
        writeln!(writer)
    }
}

/// Shows a piece of a model's reasoning, as it comes: dimmed on a terminal with colours. What it would do to the terminal is
/// escaped.
pub fn reasoning(text: &str) {
    let dimmed = styled(&escaped_layout(text), Style::new().dimmed());
    // A standard error that cannot be written to is no reason to end.
    let _ = StandardError.write_all(dimmed.as_bytes());
}
