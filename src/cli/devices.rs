//! `sharpi devices`: what this binary can compute on here.

use std::io::{self, Write};

use anyhow::{Context, Result};
use indicatif::HumanBytes;

use super::{exit::Outcome, output::WRITING, system};
use crate::{
    cpu,
    cuda::{self, Gpus},
};

pub fn run() -> Result<Outcome> {
    write(&mut io::stdout().lock()).context(WRITING)?;
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
        Ok(Gpus::Here(gpus)) => {
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
        Ok(Gpus::Absent(why)) => writeln!(out, "cuda  none: {why}")?,
        Err(error) => writeln!(out, "cuda  the driver fails: {error:#}")?,
    }
    out.flush()
}
