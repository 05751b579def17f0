//! The tensors of a dense decoder by role. Shapes stand contiguous dimension first and are checked here.

use anyhow::Result;

use super::{
    config::Config,
    gguf::{Gguf, Tensor},
};

/// All weights of a model.
pub struct Weights {
    /// (hidden_size, vocab_size)
    pub token_embd: Tensor,
    pub layers: Vec<LayerWeights>,
    /// (hidden_size)
    pub output_norm: Vec<f32>,
    /// (hidden_size, vocab_size); the embedding itself where the file ties the two
    pub output: Tensor,
    /// (rope_dimension_count / 2): what each rotation frequency is divided by, all 1 where the file has no `rope_freqs`
    pub rope_factors: Vec<f32>,
}

/// The weights of one layer. `q_dim` is head_count * head_dim, `kv_dim` head_count_kv * head_dim.
pub struct LayerWeights {
    /// (hidden_size)
    pub attn_norm: Vec<f32>,
    /// (hidden_size, q_dim)
    pub attn_q: Tensor,
    /// (hidden_size, kv_dim)
    pub attn_k: Tensor,
    /// (hidden_size, kv_dim)
    pub attn_v: Tensor,
    /// (q_dim), qwen2
    pub attn_q_bias: Option<Vec<f32>>,
    /// (kv_dim), qwen2
    pub attn_k_bias: Option<Vec<f32>>,
    /// (kv_dim), qwen2
    pub attn_v_bias: Option<Vec<f32>>,
    /// (head_dim), qwen3
    pub attn_q_norm: Option<Vec<f32>>,
    /// (head_dim), qwen3
    pub attn_k_norm: Option<Vec<f32>>,
    /// (q_dim, hidden_size)
    pub attn_output: Tensor,
    /// (hidden_size)
    pub ffn_norm: Vec<f32>,
    /// (hidden_size, feed_forward_length)
    pub ffn_gate: Tensor,
    /// (hidden_size, feed_forward_length)
    pub ffn_up: Tensor,
    /// (feed_forward_length, hidden_size)
    pub ffn_down: Tensor,
}

impl Weights {
    /// Finds every tensor that `config` calls for and checks its shape.
    pub fn from_gguf(_gguf: &Gguf, _config: &Config) -> Result<Self> {
        todo!()
    }
}
