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
const PATIENCE: Duration = Duration::from_secs(60);

pub const ENTER: &str = "\r";
pub const UP: &str = "\x1b[A";
pub const CTRL_C: &str = "\x03";
pub const CTRL_D: &str = "\x04";

/// A terminal in which a command runs. Its state and its configuration are in the directory where it runs.
pub struct Terminal {
    parser: Arc<Mutex<Parser>>,
    keys: Box<dyn Write + Send>,
    child: Box<dyn Child + Send + Sync>,
    /// Hangs up when it is dropped.
    _master: Box<dyn MasterPty + Send>,
}

impl Terminal {
    /// `sharpi` with these arguments, on lines of 100 columns.
    pub fn start(dir: &Dir, args: &[&str]) -> Self {
        Self::with(dir, args, 100, &[])
    }

    /// The same with as many columns, and with these variables.
    pub fn with(dir: &Dir, args: &[&str], columns: u16, variables: &[(&str, &str)]) -> Self {
        let mut command = CommandBuilder::new(env!("CARGO_BIN_EXE_sharpi"));
        command.args(args);
        Self::run(dir, command, columns, variables)
    }

    /// A line for the shell, in which `$binary` is `sharpi`.
    pub fn shell(dir: &Dir, line: &str) -> Self {
        let mut command = CommandBuilder::new("sh");
        command.args(["-c", line]);
        Self::run(dir, command, 100, &[])
    }

    fn run(
        dir: &Dir,
        mut command: CommandBuilder,
        columns: u16,
        variables: &[(&str, &str)],
    ) -> Self {
        // More than any test fills: nothing scrolls away.
        const LINES: u16 = 100;
        let size = PtySize {
            rows: LINES,
            cols: columns,
            ..PtySize::default()
        };
        let pty = native_pty_system().openpty(size).expect("a terminal");
        command.cwd(dir.path());
        command.env_remove("NO_COLOR");
        command.env_remove("SHARPI_MODEL");
        command.env("TERM", "xterm");
        command.env("XDG_CONFIG_HOME", dir.path());
        command.env("XDG_STATE_HOME", dir.path());
        command.env("binary", env!("CARGO_BIN_EXE_sharpi"));
        for (name, value) in variables {
            command.env(name, value);
        }
        let child = pty.slave.spawn_command(command).expect("starting sharpi");
        drop(pty.slave);
        let lines = NonZeroU16::new(LINES).expect("lines");
        let columns = NonZeroU16::new(columns).expect("columns");
        let parser = Arc::new(Mutex::new(Parser::new(lines, columns, 0)));
        let mut output = pty
            .master
            .try_clone_reader()
            .expect("the terminal's output");
        let shown = Arc::clone(&parser);
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            // An error is the end, too: the command has gone.
            while let Ok(len @ 1..) = output.read(&mut bytes) {
                shown.lock().expect("the screen").process(&bytes[..len]);
            }
        });
        Self {
            parser,
            keys: pty.master.take_writer().expect("the terminal's keys"),
            child,
            _master: pty.master,
        }
    }

    pub fn press(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).expect("typing");
        self.keys.flush().expect("typing");
    }

    /// Types a line once the prompt is there, and waits for the next prompt.
    #[track_caller]
    pub fn enter(&mut self, line: &str) {
        self.wait_for_prompt();
        self.enter_more(&format!("{line}{ENTER}"));
    }

    /// Presses keys that bring the prompt on another line.
    #[track_caller]
    pub fn enter_more(&mut self, keys: &str) {
        let row = self.look(|screen| screen.cursor_position().0);
        self.press(keys);
        self.wait(&format!("a prompt after {keys:?}"), |screen| {
            is_prompt(screen) && screen.cursor_position().0 > row
        });
    }

    /// Waits for the prompt, with nothing behind it.
    #[track_caller]
    pub fn wait_for_prompt(&self) {
        self.wait("the prompt", is_prompt);
    }

    #[track_caller]
    pub fn wait_for(&self, text: &str) {
        self.wait(&format!("{text:?}"), |screen| {
            screen.contents().contains(text)
        });
    }

    #[track_caller]
    pub fn wait(&self, what: &str, there: impl Fn(&Screen) -> bool) {
        let start = Instant::now();
        while !self.look(&there) {
            assert!(
                start.elapsed() < PATIENCE,
                "waiting for {what}:\n{}",
                self.look(Screen::contents)
            );
            thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn look<T>(&self, look: impl FnOnce(&Screen) -> T) -> T {
        look(self.parser.lock().expect("the screen").screen())
    }

    pub fn text(&self) -> String {
        self.look(Screen::contents)
    }

    /// Waits until the command ends, and returns its exit code.
    #[track_caller]
    pub fn end(mut self) -> u32 {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("asking for its state") {
                return status.exit_code();
            }
            assert!(
                start.elapsed() < PATIENCE,
                "waiting for the end:\n{}",
                self.text()
            );
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // Of a test that failed.
        let _ = self.child.kill();
    }
}

fn is_prompt(screen: &Screen) -> bool {
    current_line(screen) == ">" && screen.cursor_position().1 == 2
}

/// The line that the cursor is on, without blanks behind it.
fn current_line(screen: &Screen) -> String {
    let (row, _) = screen.cursor_position();
    let (_, columns) = screen.size();
    let line = screen.rows(0, columns.get()).nth(row.into());
    line.expect("a row").trim_end().to_owned()
}
