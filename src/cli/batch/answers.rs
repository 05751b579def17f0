//! The output of a batch: standard output, or a file that can be gone on with wherever the process ended.

use std::{
    fs::{File, OpenOptions, TryLockError},
    io::{self, BufRead, BufReader, ErrorKind, Seek, SeekFrom},
    path::Path,
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::Serialize;
use serde_json::{Map, Value};

use super::prompts::Prompts;
use crate::cli::{
    output::{WRITING, write_json_line},
    progress,
    resolve::is_stdin,
};

/// Takes a line for each that is answered.
pub struct Answers<'a> {
    path: &'a Path,
    /// `None`: standard output, or a file that is not there yet.
    file: Option<File>,
    /// Whether it is one on a disk, which keeps what is written, and no pipe or device.
    keeps: bool,
}

/// Lines that an output holds already.
#[derive(Default)]
pub struct Held {
    pub lines: usize,
    /// Those of them that say what was wrong.
    pub errors: usize,
}

impl<'a> Answers<'a> {
    /// Opens `path`, or standard output for `-`. A file that is not there is left so until [`Answers::create`].
    ///
    /// # Errors
    /// A file that is there, unless to `resume`; one that another process writes to.
    pub fn open(path: &'a Path, resume: bool) -> Result<Self> {
        let mut answers = Self {
            path,
            file: None,
            keeps: !is_stdin(path),
        };
        match path.metadata() {
            _ if is_stdin(path) => return Ok(answers),
            Ok(metadata) => answers.keeps = metadata.is_file(),
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(answers),
            Err(error) => return Err(error).with_context(|| answers.opening()),
        }
        if answers.keeps && !resume {
            bail!(
                "--output {}: the file is there already: --resume goes on behind what it holds; else remove it, or give \
                 another name",
                path.display()
            );
        }
        let mut options = OpenOptions::new();
        let file = options.read(answers.keeps).write(true).open(path);
        let file = file.with_context(|| answers.opening())?;
        if answers.keeps {
            lock(&file).with_context(|| answers.opening())?;
        }
        answers.file = Some(file);
        Ok(answers)
    }

    /// Checks that the file's lines answer the first of `prompts`, which are read thereby, and cuts off a last one that was
    /// not written to its end.
    ///
    /// # Errors
    /// A line that answers another prompt, by the id that `id_of` finds in a prompt's number and line, or none.
    pub fn resume(
        &mut self,
        prompts: &mut Prompts,
        id_of: impl Fn(usize, &[u8]) -> Option<Value>,
    ) -> Result<Held> {
        let mut held = Held::default();
        let Some(file) = self.file.as_mut().filter(|_| self.keeps) else {
            return Ok(held);
        };
        let name = self.path.display();
        let reading = || format!("--resume: reading {name}");
        let mut reader = BufReader::new(&*file);
        let (mut line, mut end) = (Vec::new(), 0);
        loop {
            line.clear();
            reader.read_until(b'\n', &mut line).with_context(reading)?;
            if line.pop() != Some(b'\n') {
                break;
            }
            end += line.len() as u64 + 1;
            held.lines += 1;
            let answer: Option<Map<String, Value>> = serde_json::from_slice(&line).ok();
            let answer = answer.filter(|a| a.contains_key("text") || a.contains_key("error"));
            let answer = answer.with_context(|| {
                format!(
                    "--resume: line {} of {name} is no line of a batch",
                    held.lines
                )
            })?;
            let Some((number, prompt)) = prompts.next()? else {
                bail!(
                    "--resume: {name} has {} lines or more, and {} not so many prompts",
                    held.lines,
                    prompts.name
                );
            };
            let (answered, asked) = (answer.get("id"), id_of(number, &prompt));
            ensure!(
                answered == asked.as_ref(),
                "--resume: line {} of {name} answers {}, where line {number} of {} is {}: go on with the input that the \
                 output was begun with",
                held.lines,
                shown(answered),
                prompts.name,
                shown(asked.as_ref())
            );
            held.errors += usize::from(answer.contains_key("error"));
        }
        file.set_len(end)
            .and_then(|()| file.seek(SeekFrom::Start(end)))
            .with_context(|| format!("--resume: cutting {name} behind its last whole line"))?;
        Ok(held)
    }

    /// Makes the file, where it is not there yet.
    pub fn create(&mut self) -> Result<()> {
        if self.file.is_none() && self.keeps {
            let file = File::create_new(self.path).with_context(|| self.opening())?;
            lock(&file).with_context(|| self.opening())?;
            self.file = Some(file);
        }
        Ok(())
    }

    /// Writes a line, in one piece.
    pub fn write(&mut self, line: &impl Serialize) -> Result<()> {
        match &mut self.file {
            Some(file) => write_json_line(file, line)
                .with_context(|| format!("--output: writing {}", self.path.display())),
            None => {
                progress::above(|| write_json_line(&mut io::stdout().lock(), line)).context(WRITING)
            }
        }
    }

    /// Waits until all lines are on the disk.
    pub fn sync(&self) -> Result<()> {
        match &self.file {
            Some(file) if self.keeps => file
                .sync_all()
                .with_context(|| format!("--output: writing {}", self.path.display())),
            _ => Ok(()),
        }
    }

    fn opening(&self) -> String {
        format!("--output: opening {}", self.path.display())
    }
}

/// Keeps other batches from the file until this process ends.
fn lock(file: &File) -> Result<()> {
    match file.try_lock() {
        Ok(()) => Ok(()),
        Err(TryLockError::WouldBlock) => Err(anyhow!("another process writes to it")),
        // Not all file systems have locks.
        Err(TryLockError::Error(error)) if error.kind() == ErrorKind::Unsupported => Ok(()),
        Err(TryLockError::Error(error)) => Err(error.into()),
    }
}

fn shown(id: Option<&Value>) -> String {
    id.map_or("a line without an id".to_owned(), |id| format!("id {id}"))
}
