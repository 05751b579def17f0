//! `sharpi` in a terminal of its own: keys in, a screen out.

use std::{
    io::{Read, Write},
    num::NonZeroU16,
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use portable_pty::{Child, CommandBuilder, MasterPty, PtySize, native_pty_system};
use vt100::{Parser, Screen};

use crate::Dir;

/// What no test may take, on the slowest of machines.
const PATIENCE: Duration = Duration::from_secs(120);

/// More than any test fills: nothing scrolls away.
const LINES: u16 = 100;

pub const ENTER: &str = "\r";
pub const UP: &str = "\x1b[A";
pub const CTRL_C: &str = "\x03";
pub const CTRL_D: &str = "\x04";

/// A terminal in which a command runs. Its configuration and its state are in the directory where it runs.
pub struct Terminal {
    shown: Arc<Mutex<Shown>>,
    keys: Box<dyn Write + Send>,
    child: Box<dyn Child + Send + Sync>,
    master: Box<dyn MasterPty + Send>,
    reader: thread::JoinHandle<()>,
}

struct Shown {
    parser: Parser,
    bytes: Vec<u8>,
}

impl Terminal {
    /// `sharpi` with these arguments and variables, on lines of as many columns.
    pub fn start(dir: &Dir, args: &[&str], columns: u16, variables: &[(&str, &str)]) -> Self {
        let mut command = CommandBuilder::new(env!("CARGO_BIN_EXE_sharpi"));
        command.args(args);
        Self::run(dir, command, columns, variables)
    }

    /// A line for the shell, in which `$sharpi` is the binary.
    pub fn shell(dir: &Dir, line: &str) -> Self {
        let mut command = CommandBuilder::new("sh");
        command.args(["-c", line]);
        let binary = env!("CARGO_BIN_EXE_sharpi");
        Self::run(dir, command, 100, &[("sharpi", binary)])
    }

    fn run(
        dir: &Dir,
        mut command: CommandBuilder,
        columns: u16,
        variables: &[(&str, &str)],
    ) -> Self {
        let pty = native_pty_system();
        let pty = pty.openpty(size(columns)).expect("a terminal");
        command.cwd(dir.path());
        for name in ["NO_COLOR", "CLICOLOR", "CLICOLOR_FORCE", "SHARPI_MODEL"] {
            command.env_remove(name);
        }
        command.env("XDG_CONFIG_HOME", dir.path());
        command.env("XDG_STATE_HOME", dir.path());
        for (name, value) in [&[("TERM", "xterm-256color")], variables].concat() {
            command.env(name, value);
        }
        let child = pty.slave.spawn_command(command).expect("starting sharpi");
        drop(pty.slave);
        let shown = Arc::new(Mutex::new(Shown {
            parser: Parser::new(cells(LINES), cells(columns), 0),
            bytes: Vec::new(),
        }));
        let mut output = pty.master.try_clone_reader().expect("its output");
        let reader = thread::spawn({
            let shown = Arc::clone(&shown);
            move || {
                let mut bytes = [0; 4096];
                // An error is the end, too: the command has gone.
                while let Ok(len @ 1..) = output.read(&mut bytes) {
                    let mut shown = shown.lock().expect("the screen");
                    shown.parser.process(&bytes[..len]);
                    shown.bytes.extend(&bytes[..len]);
                }
            }
        });
        Self {
            shown,
            keys: pty.master.take_writer().expect("its keys"),
            child,
            master: pty.master,
            reader,
        }
    }

    pub fn press(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).expect("typing");
        self.keys.flush().expect("typing");
    }

    /// Types a line once the prompt of a conversation is there, and waits for the next one.
    #[track_caller]
    pub fn enter(&mut self, line: &str) {
        self.wait_for_prompt();
        self.enter_more(&format!("{line}{ENTER}"));
    }

    /// Presses keys that bring the prompt on another line.
    #[track_caller]
    pub fn enter_more(&mut self, keys: &str) {
        let row = |screen: &Screen| screen.cursor_position().0;
        let before = self.look(row);
        self.press(keys);
        self.wait(|screen| (is_prompt(screen) && row(screen) > before).then_some(()));
    }

    /// Waits for the prompt of a conversation, with nothing behind it.
    #[track_caller]
    pub fn wait_for_prompt(&self) {
        self.wait(|screen| is_prompt(screen).then_some(()));
    }

    #[track_caller]
    pub fn wait_for(&self, text: &str) {
        self.wait(|screen| screen.contents().contains(text).then_some(()));
    }

    /// Waits until the screen ends with `text`, and blanks.
    #[track_caller]
    pub fn wait_for_last(&self, text: &str) {
        self.wait(|screen| screen.contents().trim_end().ends_with(text).then_some(()));
    }

    /// Waits until `look` finds on the screen what it looks for.
    #[track_caller]
    pub fn wait<T>(&self, mut look: impl FnMut(&Screen) -> Option<T>) -> T {
        let start = Instant::now();
        loop {
            if let Some(found) = self.look(&mut look) {
                return found;
            }
            let text = self.text();
            assert!(
                start.elapsed() < PATIENCE,
                "not what was looked for:\n{text}"
            );
            thread::sleep(Duration::from_millis(10));
        }
    }

    pub fn look<T>(&self, look: impl FnOnce(&Screen) -> T) -> T {
        look(self.shown.lock().expect("the screen").parser.screen())
    }

    pub fn text(&self) -> String {
        self.look(Screen::contents)
    }

    pub fn resize(&self, columns: u16) {
        let mut shown = self.shown.lock().expect("the screen");
        self.master.resize(size(columns)).expect("another size");
        let screen = shown.parser.screen_mut();
        screen.set_size(cells(LINES), cells(columns));
    }

    /// Waits for the end, and returns the exit code, the screen and all bytes that were sent to it.
    pub fn end(mut self) -> (u32, String, Vec<u8>) {
        let status = self.child.wait().expect("its end");
        drop((self.keys, self.master));
        self.reader.join().expect("reading to the end");
        let shown = self.shown.lock().expect("the screen");
        let bytes = shown.bytes.clone();
        (status.exit_code(), shown.parser.screen().contents(), bytes)
    }
}

fn size(columns: u16) -> PtySize {
    PtySize {
        rows: LINES,
        cols: columns,
        ..PtySize::default()
    }
}

fn cells(count: u16) -> NonZeroU16 {
    count.try_into().expect("one or more")
}

fn is_prompt(screen: &Screen) -> bool {
    let (row, column) = screen.cursor_position();
    let (_, columns) = screen.size();
    let line = screen.rows(0, columns.get()).nth(row.into());
    column == 2 && line.expect("a row").trim_end() == ">"
}
