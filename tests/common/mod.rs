//! What several test files share. Each uses a part of it.
#![allow(dead_code)]

pub mod gguf_writer;
pub mod gpu;
