//! Whether a model would run on a device, and with how much of its memory: what `sharpi run` would take without flags.

use std::{fmt, thread};

use anyhow::Result;
use indicatif::{HumanBytes, HumanCount};
use serde::Serialize;

use crate::{
    backend::KvOptions,
    cli::{context::CacheSize, system},
    cpu,
    cuda::{self, DeviceInfo, DoesNotFit, Gpus, Needs},
    model::{Decoder, Gguf},
};

/// A device, and what a run would take there.
#[derive(Serialize)]
pub struct Place {
    /// As `--device` names it.
    pub device: String,
    /// What it is.
    name: String,
    /// Why it would not run there.
    cannot_run: Option<String>,
    /// What it would take; `None` where that cannot be told.
    memory: Option<Memory>,
}

#[derive(Serialize)]
struct Memory {
    /// Tokens that there would be room for.
    context_length: usize,
    /// On the CPU mapped from the file, not copied.
    weights_bytes: u64,
    kv_cache_bytes: u64,
    /// `None` on the CPU, where it is at most 150 MB.
    scratch_bytes: Option<u64>,
    free_bytes: Option<u64>,
}

/// The CPU, and each GPU.
pub fn places(gguf: &Gguf, decoder: &Decoder) -> Vec<Place> {
    let gpus = match cuda::list() {
        Ok(Gpus::Here(gpus)) => gpus,
        // `sharpi devices` says why.
        Ok(Gpus::Absent(_)) | Err(_) => Vec::new(),
    };
    // Opening a GPU takes a while.
    let on_gpus = thread::scope(|scope| {
        let asked: Vec<_> = gpus
            .iter()
            .map(|gpu| scope.spawn(|| on_gpu(gpu, decoder)))
            .collect();
        let answers = asked.into_iter().filter_map(|thread| thread.join().ok());
        answers.collect::<Vec<_>>()
    });
    [on_cpu(gguf, decoder)].into_iter().chain(on_gpus).collect()
}

fn on_cpu(gguf: &Gguf, decoder: &Decoder) -> Place {
    let size = CacheSize::new(decoder, KvOptions::default());
    let context_length = size.automatic(decoder);
    Place {
        device: "cpu".to_owned(),
        name: cpu::describe_processor(),
        cannot_run: None,
        memory: Some(Memory {
            context_length,
            weights_bytes: gguf.file_bytes(),
            kv_cache_bytes: size.bytes(context_length),
            scratch_bytes: None,
            free_bytes: system::available_memory_bytes(),
        }),
    }
}

fn on_gpu(gpu: &DeviceInfo, decoder: &Decoder) -> Place {
    let place = |cannot_run, memory| Place {
        device: format!("cuda:{}", gpu.ordinal),
        name: gpu.name.clone(),
        cannot_run,
        memory,
    };
    match plan(gpu.ordinal, decoder) {
        Ok(plan) => place(
            None,
            Some(Memory::of_needs(&plan.needs, plan.context_len, plan.free)),
        ),
        Err(error) => match error.downcast_ref::<DoesNotFit>() {
            Some(full) => place(
                Some("its memory is too small".to_owned()),
                Some(Memory::of_needs(&full.needs, full.context_len, full.free)),
            ),
            None => place(Some(format!("{error:#}")), None),
        },
    }
}

fn plan(ordinal: usize, decoder: &Decoder) -> Result<cuda::Plan> {
    let device = cuda::Device::open(ordinal)?;
    cuda::plan(&device, decoder, &cuda::Options::default())
}

impl Memory {
    fn of_needs(needs: &Needs, context_length: usize, free: usize) -> Self {
        Self {
            context_length,
            weights_bytes: needs.weights as u64,
            kv_cache_bytes: needs.kv_bytes(context_length) as u64,
            scratch_bytes: Some(needs.scratch as u64),
            free_bytes: Some(free as u64),
        }
    }

    fn bytes(&self) -> u64 {
        let scratch = self.scratch_bytes.unwrap_or_default();
        let parts = [self.weights_bytes, self.kv_cache_bytes, scratch];
        parts.into_iter().fold(0, u64::saturating_add)
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { device, name, .. } = self;
        write!(f, "{device}: ")?;
        if device != "cpu" {
            write!(f, "{name}, ")?;
        }
        if let Some(reason) = &self.cannot_run {
            write!(f, "no, {reason}")?;
        }
        let Some(memory) = &self.memory else {
            return Ok(());
        };
        if self.cannot_run.is_some() {
            f.write_str(": ")?;
        }
        write!(
            f,
            "{} for {} tokens of context (weights {}, KV cache {}",
            HumanBytes(memory.bytes()),
            HumanCount(memory.context_length as u64),
            HumanBytes(memory.weights_bytes),
            HumanBytes(memory.kv_cache_bytes)
        )?;
        if let Some(scratch) = memory.scratch_bytes {
            write!(f, ", scratch {}", HumanBytes(scratch))?;
        }
        f.write_str(")")?;
        match memory.free_bytes {
            Some(free) if self.device == "cpu" && memory.bytes() > free => write!(
                f,
                "; {} are free: weights would be read from the disk again and again",
                HumanBytes(free)
            ),
            Some(free) => write!(f, "; {} are free", HumanBytes(free)),
            None => Ok(()),
        }
    }
}
