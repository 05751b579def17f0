//! Hyper-parameters: one typed struct, read once from a file's metadata.

use anyhow::Result;

use super::gguf::Gguf;

/// The dense decoder architectures that sharpi runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    Llama,
    Qwen2,
    Qwen3,
}

/// Which pairs of a head's values a rotation turns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopeStyle {
    /// `(2i, 2i + 1)`: ggml's NORMAL, used by llama.
    Interleaved,
    /// `(i, i + rope_dimension_count / 2)`: NEOX, used by qwen.
    Neox,
}

/// The shape of a model. Lengths count values unless a name says otherwise.
#[derive(Debug, Clone)]
pub struct Config {
    pub architecture: Architecture,
    /// Tokens that the model was trained to attend over.
    pub context_length: usize,
    pub block_count: usize,
    pub hidden_size: usize,
    pub feed_forward_length: usize,
    pub vocab_size: usize,
    pub head_count: usize,
    /// Divides `head_count`.
    pub head_count_kv: usize,
    /// Values of one head, the same for queries, keys and values. Even.
    pub head_dim: usize,
    pub rms_norm_epsilon: f32,
    pub rope_style: RopeStyle,
    pub rope_freq_base: f32,
    /// Leading values of a head that are rotated. Even, at most `head_dim`.
    pub rope_dimension_count: usize,
    /// What positions are multiplied with: 1, or `1 / factor` of linear scaling.
    pub rope_position_scale: f32,
}

impl Config {
    /// Reads and checks the hyper-parameters.
    pub fn from_gguf(_gguf: &Gguf) -> Result<Self> {
        todo!()
    }
}
