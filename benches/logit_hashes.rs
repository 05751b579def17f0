//! Hashes of every bit of the logits of many models: `cargo bench --bench logit_hashes [-- model.gguf...]`.
//!
//! A change that is meant to change no logit prints the same lines before and after, on one machine: each golden prompt
//! and each random model read in chunks and then decoded, on the CPU and, where there is one, on the GPU. Of the files
//! named, the launches of a decoded token as well.

#[path = "../tests/common/mod.rs"]
mod common;

use std::{
    hash::{DefaultHasher, Hasher},
    path::Path,
    sync::Arc,
};

use anyhow::Result;
use common::gguf_writer::RandomModel;
use sharpi::{
    backend::{Backend, Batch, Want},
    cpu::CpuBackend,
    cuda::{CudaBackend, Device, Options},
    engine::made_up_tokens,
    model::{Gguf, Model},
    quant::TensorType,
};

const CONTEXT_LEN: usize = 1024;
/// Of a prompt, no more than this many tokens are read.
const PROMPT_LEN: usize = 600;
/// Tokens that are decoded after a prompt.
const DECODED: usize = 20;

fn main() -> Result<()> {
    let device = Device::open(0);
    if let Err(error) = &device {
        eprintln!("the CPU only: {error:#}");
    }
    let device = device.ok();
    let stories = include_str!("../tests/data/stories-10m-golden.json");
    hash_golden("stories-10m", Model::demo()?, stories, device.as_ref())?;
    if let Some(path) = common::smollm2_path() {
        let golden = include_str!("../tests/data/smollm2-golden.json");
        hash_golden("smollm2", Model::open(&path)?, golden, device.as_ref())?;
    }
    for architecture in ["llama", "qwen2", "qwen3"] {
        for &tensor_type in TensorType::ALL {
            let random = RandomModel::new(architecture, tensor_type);
            let name = format!("{architecture} {}", tensor_type.name());
            let gguf = Gguf::from_bytes(&name, random.file().to_bytes())?;
            let model = Model::from_gguf(gguf)?;
            let prompt = made_up_tokens(60, model.decoder.vocab_size);
            hash(&name, &Arc::new(model), &[prompt], device.as_ref(), true)?;
        }
    }
    for path in std::env::args().skip(1).filter(|a| !a.starts_with("--")) {
        let model = Arc::new(Model::open(Path::new(&path))?);
        let prompt = made_up_tokens(PROMPT_LEN, model.decoder.vocab_size);
        hash(&path, &model, &[prompt], device.as_ref(), false)?;
        if let Some(device) = &device {
            for launch in on_gpu(device, &model, 512)?.decode_launches() {
                println!("{launch}");
            }
        }
    }
    Ok(())
}

fn hash_golden(name: &str, model: Model, golden: &str, device: Option<&Arc<Device>>) -> Result<()> {
    let golden: Vec<serde_json::Value> = serde_json::from_str(golden)?;
    let prompts: Vec<Vec<u32>> = golden
        .iter()
        .map(|case| serde_json::from_value(case["prompt_ids"].clone()))
        .collect::<Result<_, _>>()?;
    hash(name, &Arc::new(model), &prompts, device, true)
}

fn on_gpu(device: &Arc<Device>, model: &Arc<Model>, chunk_len: usize) -> Result<CudaBackend> {
    let options = Options {
        context_len: Some(CONTEXT_LEN),
        chunk_len: Some(chunk_len),
        ..Options::default()
    };
    CudaBackend::new(
        device.clone(),
        model.decoder.clone(),
        &options,
        &mut |_, _| {},
    )
}

/// Prints a line for each backend and chunk length.
fn hash(
    name: &str,
    model: &Arc<Model>,
    prompts: &[Vec<u32>],
    device: Option<&Arc<Device>>,
    on_cpu: bool,
) -> Result<()> {
    if on_cpu {
        let mut cpu = CpuBackend::new(model.decoder.clone(), CONTEXT_LEN, 0)?;
        for chunk_len in [1, 33, 128] {
            let hash = hash_logits(&mut cpu, prompts, chunk_len)?;
            println!("{name}, cpu, chunks of {chunk_len}: {hash:016x}");
        }
    }
    let Some(device) = device else {
        return Ok(());
    };
    for chunk_len in [1, 17, 512] {
        match on_gpu(device, model, chunk_len) {
            Ok(mut cuda) => {
                let hash = hash_logits(&mut cuda, prompts, chunk_len)?;
                println!("{name}, cuda, chunks of {chunk_len}: {hash:016x}");
            }
            Err(error) => println!("{name}, cuda: {error:#}"),
        }
    }
    Ok(())
}

/// Of the logits after each chunk of each prompt, and after each of the tokens decoded behind it.
fn hash_logits(backend: &mut dyn Backend, prompts: &[Vec<u32>], chunk_len: usize) -> Result<u64> {
    let mut hasher = DefaultHasher::new();
    for prompt in prompts {
        let prompt = &prompt[..prompt.len().min(PROMPT_LEN)];
        let limits = backend.limits();
        let mut compute = |batch: Batch| {
            let logits = backend.compute(batch)?.logits;
            hasher.write(bytemuck::cast_slice(logits));
            anyhow::Ok(())
        };
        for (i, chunk) in prompt.chunks(chunk_len).enumerate() {
            compute(Batch::prompt(chunk, i * chunk_len, Want::Last))?;
        }
        for (i, token) in made_up_tokens(DECODED, limits.vocab_size)
            .iter()
            .enumerate()
        {
            compute(Batch::decode(token, prompt.len() + i))?;
        }
        if chunk_len <= limits.results_len {
            let tokens = &prompt[..prompt.len().min(chunk_len)];
            compute(Batch::prompt(tokens, 0, Want::All))?;
        }
    }
    Ok(hasher.finish())
}
