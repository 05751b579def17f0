//! What writes the files that the fuzz targets and their seeds need: that of the tests.

#[path = "../tests/common/gguf_writer.rs"]
mod gguf_writer;

pub use gguf_writer::*;
