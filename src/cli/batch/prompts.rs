//! The input of a batch, line by line as it comes.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Seek},
    path::Path,
};

use anyhow::{Context, Result};

use crate::cli::resolve::{is_stdin, say_typing};

/// The lines that are not blank.
pub struct Prompts {
    reader: Box<dyn BufRead>,
    /// As messages call it.
    pub name: String,
    /// Lines that were read, blank ones included.
    read: usize,
    /// Where they could be counted.
    pub total: Option<usize>,
}

impl Prompts {
    /// Opens `path`, or standard input for `-`. If `count`, the lines of a file are counted.
    pub fn open(path: &Path, count: bool) -> Result<Self> {
        if is_stdin(path) {
            say_typing("--input");
            return Ok(Self {
                reader: Box::new(io::stdin().lock()),
                name: "standard input".to_owned(),
                read: 0,
                total: None,
            });
        }
        let name = path.display().to_string();
        let opened = File::open(path).and_then(|mut file| {
            // A pipe can be read once.
            let count = count && file.metadata()?.is_file();
            let total = count.then(|| count_lines(&mut file)).transpose()?;
            Ok((file, total))
        });
        let (file, total) = opened.with_context(|| format!("--input: reading {name}"))?;
        Ok(Self {
            reader: Box::new(BufReader::new(file)),
            name,
            read: 0,
            total,
        })
    }

    /// The next line and its number, counted from 1.
    pub fn next(&mut self) -> Result<Option<(usize, Vec<u8>)>> {
        let mut line = Vec::new();
        let there = next_line(&mut self.reader, &mut line, &mut self.read);
        match there.with_context(|| format!("--input: reading {}", self.name))? {
            true => Ok(Some((self.read, line))),
            false => Ok(None),
        }
    }
}

fn count_lines(file: &mut File) -> io::Result<usize> {
    let mut reader = BufReader::new(&*file);
    let (mut line, mut count) = (Vec::new(), 0);
    while next_line(&mut reader, &mut line, &mut 0)? {
        count += 1;
    }
    file.rewind()?;
    Ok(count)
}

/// Reads up to the next line that is not blank, if there is one, and counts what it reads.
fn next_line(reader: &mut impl BufRead, line: &mut Vec<u8>, read: &mut usize) -> io::Result<bool> {
    loop {
        line.clear();
        if reader.read_until(b'\n', line)? == 0 {
            return Ok(false);
        }
        *read += 1;
        if !line.trim_ascii().is_empty() {
            return Ok(true);
        }
    }
}
