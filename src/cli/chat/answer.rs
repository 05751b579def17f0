//! An answer on its way to the screen.

use std::io::{self, IsTerminal, Write};

use anstream::{AutoStream, ColorChoice};
use anyhow::{Context, Result};

use crate::{
    cli::{
        args::ReasoningPlace,
        escape::escaped_layout,
        interrupt::Interrupt,
        messages,
        output::WRITING,
        progress::{CountBar, Spinner},
    },
    engine::{Observer, TokenEvent},
};

const DIM: &str = "\x1b[2m";
const NOT_DIM: &str = "\x1b[22m";

/// Collects what a model writes, and shows it.
pub struct Answer<'a> {
    pub ids: Vec<u32>,
    pub reasoning: String,
    pub text: String,
    page: Page,
    place: ReasoningPlace,
    show_progress: bool,
    reading: CountBar,
    /// While there is reasoning that is not before the answer: what says so.
    aside: Option<Spinner>,
    interrupt: &'a Interrupt,
}

impl<'a> Answer<'a> {
    pub fn new(place: ReasoningPlace, show_progress: bool, interrupt: &'a Interrupt) -> Self {
        Self {
            ids: Vec::new(),
            reasoning: String::new(),
            text: String::new(),
            page: Page::new(),
            place,
            show_progress,
            reading: CountBar::new(show_progress, "reading", "tokens"),
            aside: None,
            interrupt,
        }
    }

    /// Leaves the screen in good order, however the answer ended.
    pub fn finish(&mut self) -> Result<()> {
        self.reading.clear();
        self.end_aside();
        // The terminal shows ^C where the text stopped.
        self.page.in_line |= self.interrupt.requested();
        self.page.finish().context(WRITING)
    }

    fn show_answer(&mut self, text: &str) -> io::Result<()> {
        if !text.is_empty() {
            self.end_aside();
        }
        self.page.write(text, false)
    }

    fn show_reasoning(&mut self, text: &str) -> io::Result<()> {
        match self.place {
            ReasoningPlace::Show => return self.page.write(text, true),
            ReasoningPlace::Stderr => messages::reasoning(text),
            ReasoningPlace::Hide => {}
        }
        // A line on standard error, too, would be in its way.
        let wanted = self.show_progress && self.place == ReasoningPlace::Hide;
        self.aside
            .get_or_insert_with(|| Spinner::new(wanted, "thinking"));
        Ok(())
    }

    /// Ends reasoning that is not before the answer.
    fn end_aside(&mut self) {
        if self.aside.take().is_some() && self.place == ReasoningPlace::Stderr {
            messages::reasoning("\n");
        }
    }
}

impl Observer for Answer<'_> {
    fn interrupted(&self) -> bool {
        self.interrupt.requested()
    }

    fn prefill_progress(&mut self, done: usize, total: usize) {
        self.reading.update(done, total);
    }

    fn token(&mut self, event: &TokenEvent) -> Result<()> {
        self.show_answer(event.answer).context(WRITING)?;
        self.text += event.answer;
        if event.reasoning {
            let reasoning = &event.text[event.answer.len()..];
            self.show_reasoning(reasoning).context(WRITING)?;
            self.reasoning += reasoning;
        }
        self.ids.push(event.id);
        Ok(())
    }
}

/// Standard output. Where it is a terminal, what would command it is escaped, and reasoning is dim.
struct Page {
    out: io::Stdout,
    is_terminal: bool,
    dims: bool,
    in_reasoning: bool,
    /// Whether the last character written was something else than a newline.
    in_line: bool,
    is_empty: bool,
}

impl Page {
    fn new() -> Self {
        let out = io::stdout();
        let is_terminal = out.is_terminal();
        let colours = AutoStream::choice(&out) != ColorChoice::Never;
        Self {
            out,
            is_terminal,
            dims: is_terminal && colours,
            in_reasoning: false,
            in_line: false,
            is_empty: true,
        }
    }

    fn write(&mut self, text: &str, reasoning: bool) -> io::Result<()> {
        let Some(last) = text.chars().last() else {
            return Ok(());
        };
        if reasoning != self.in_reasoning {
            self.change(reasoning)?;
        }
        self.in_line = last != '\n';
        self.is_empty = false;
        match self.is_terminal {
            true => self.out.write_all(escaped_layout(text).as_bytes())?,
            false => self.out.write_all(text.as_bytes())?,
        }
        self.out.flush()
    }

    /// Goes over to reasoning, or, after a blank line, from there to the answer.
    fn change(&mut self, reasoning: bool) -> io::Result<()> {
        self.in_reasoning = reasoning;
        if self.dims {
            let code = if reasoning { DIM } else { NOT_DIM };
            self.out.write_all(code.as_bytes())?;
        }
        if !reasoning {
            let end = if self.in_line { "\n\n" } else { "\n" };
            self.out.write_all(end.as_bytes())?;
        }
        Ok(())
    }

    fn finish(&mut self) -> io::Result<()> {
        if self.in_reasoning && self.dims {
            self.out.write_all(NOT_DIM.as_bytes())?;
        }
        if self.in_line || self.is_empty {
            self.out.write_all(b"\n")?;
        }
        self.out.flush()
    }
}
