//! The CPU backend: float32 activations on exactly dequantized weights.

use std::sync::Arc;

use anyhow::Result;

use crate::{engine::Backend, model::Model};

/// Computes logits on the host.
pub struct CpuBackend {}

impl CpuBackend {
    /// Allocates the KV cache for `context_len` tokens (float32) and all scratch, and starts `threads` workers
    /// (0: one per core).
    pub fn new(_model: Arc<Model>, _context_len: usize, _threads: usize) -> Result<Self> {
        todo!()
    }
}

impl Backend for CpuBackend {
    fn name(&self) -> &'static str {
        "cpu"
    }

    fn device(&self) -> &str {
        todo!()
    }

    fn context_len(&self) -> usize {
        todo!()
    }

    fn chunk_len(&self) -> usize {
        todo!()
    }

    fn forward(&mut self, _tokens: &[u32], _position: usize) -> Result<&[f32]> {
        todo!()
    }

    fn forward_all(&mut self, _tokens: &[u32], _position: usize) -> Result<&[f32]> {
        todo!()
    }
}
