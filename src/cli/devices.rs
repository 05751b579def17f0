//! `sharpi devices`: what this binary can compute on here.

use std::io::{self, Write};

use anyhow::{Context, Result};
use indicatif::HumanBytes;

use super::{exit::Outcome, system};
use crate::{cpu, cuda};

pub fn run() -> Result<Outcome> {
    write(&mut io::stdout().lock()).context("writing to standard output")?;
    Ok(Outcome::Done)
}

/// One device a line, as `--device` names it, then what it is.
fn write(out: &mut impl Write) -> io::Result<()> {
    write!(out, "cpu   {}", cpu::describe_processor())?;
    if let Some(bytes) = system::total_memory_bytes() {
        write!(out, ", {} of memory", HumanBytes(bytes))?;
    }
    writeln!(out)?;
    match cuda::list() {
        Ok(gpus) => {
            for gpu in gpus {
                let (major, minor) = gpu.compute_capability;
                writeln!(
                    out,
                    "cuda:{} {}, {} of memory, compute capability {major}.{minor}, kernels for {}",
                    gpu.ordinal,
                    gpu.name,
                    HumanBytes(gpu.memory_bytes as u64),
                    cuda::ARCHS
                )?;
            }
        }
        Err(error) => writeln!(out, "cuda  none: {error:#}")?,
    }
    out.flush()
}
