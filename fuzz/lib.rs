//! What the fuzz targets and their seeds share: the tests' own writer of files.

#[path = "../tests/common/gguf_writer.rs"]
mod gguf_writer;

pub use gguf_writer::*;

/// One name for each way to split text.
pub const PRE_TOKENIZERS: [&str; 17] = [
    "qwen2",
    "qwen35",
    "stablelm2",
    "llama-bpe",
    "dbrx",
    "tekken",
    "gpt-4o",
    "gpt-2",
    "mpt",
    "smollm",
    "command-r",
    "default",
    "falcon",
    "deepseek-llm",
    "deepseek-coder",
    "deepseek-v3",
    "viking",
];
