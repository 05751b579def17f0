//! `sharpi models`: what the cache holds.

use std::io::{self, BufWriter, Write};

use anyhow::{Context, Result};
use indicatif::HumanBytes;
use serde::Serialize;

use super::{
    escape::escaped,
    exit::Outcome,
    output::{WRITING, write_json_line},
};
use crate::hub::{Contents, Hub};

/// What goes to standard output.
#[derive(Debug, Clone, Copy)]
pub enum Format {
    Table { paths: bool },
    Json,
}

/// One model as JSON has it, or one file that is not whole.
#[derive(Serialize)]
struct Line {
    model: String,
    quantization: Option<String>,
    bytes: u64,
    complete: bool,
    path: String,
}

pub fn run(format: Format) -> Result<Outcome> {
    let hub = Hub::from_env(true)?;
    let lines = lines(hub.contents()?);
    if lines.is_empty() {
        tracing::info!(
            "there are no models in {}: `sharpi pull hf:OWNER/REPO` fetches one",
            hub.cache_path().display()
        );
    }
    let mut out = BufWriter::new(io::stdout().lock());
    match format {
        Format::Json => lines
            .iter()
            .try_for_each(|line| write_json_line(&mut out, line)),
        Format::Table { paths } => write_table(&mut out, &lines, paths),
    }
    .context(WRITING)?;
    Ok(Outcome::Done)
}

fn lines(contents: Contents) -> Vec<Line> {
    let models = contents.models.into_iter().map(|model| Line {
        model: model.reference.to_string(),
        quantization: model.quantization,
        bytes: model.bytes,
        complete: true,
        path: model.path.display().to_string(),
    });
    let unfinished = contents.unfinished.into_iter().map(|file| Line {
        model: format!("hf:{}", file.repo),
        quantization: None,
        bytes: file.bytes,
        complete: false,
        path: file.path.display().to_string(),
    });
    models.chain(unfinished).collect()
}

/// What to type after `-m`, the quantization, the size and, with `paths`, where it is.
fn write_table(out: &mut impl Write, lines: &[Line], paths: bool) -> io::Result<()> {
    let width = lines.iter().map(|line| line.model.chars().count()).max();
    let width = width.unwrap_or(0);
    for line in lines {
        let quantization = match line.complete {
            true => line.quantization.as_deref().unwrap_or("-"),
            false => "unfinished",
        };
        let size = HumanBytes(line.bytes).to_string();
        write!(out, "{:width$}  {quantization:10}  {size:>10}", line.model)?;
        if paths {
            write!(out, "  {}", escaped(&line.path))?;
        }
        writeln!(out)?;
    }
    out.flush()
}
