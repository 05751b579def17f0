//! The tensors of a dense decoder by role. Shapes stand contiguous dimension first and are checked here.

use anyhow::{Context, Result, ensure};

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
    /// (rope_dimension_count / 2): radians that each pair of a head's values turns by from one position to the next
    pub rope_frequencies: Vec<f64>,
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
    /// Finds every tensor that `config` calls for and checks its shape. An error names the tensor and both shapes.
    pub fn from_gguf(gguf: &Gguf, config: &Config) -> Result<Self> {
        let embedding_shape = [config.hidden_size, config.vocab_size];
        let token_embd = matrix(gguf, "token_embd.weight", embedding_shape)?;
        let output = match gguf.tensor("output.weight") {
            Some(_) => matrix(gguf, "output.weight", embedding_shape)?,
            None => token_embd.clone(),
        };
        let layers = (0..config.block_count)
            .map(|layer| LayerWeights::from_gguf(gguf, config, layer))
            .collect::<Result<_>>()?;
        Ok(Self {
            token_embd,
            layers,
            output_norm: vector(gguf, "output_norm.weight", config.hidden_size)?,
            output,
            rope_frequencies: rope_frequencies(gguf, config)?,
        })
    }
}

impl Weights {
    /// Bytes of the matrices that decoding one token reads: all but the embedding, unless that is the output matrix too.
    pub fn bytes_per_token(&self) -> u64 {
        let layers = self.layers.iter().flat_map(LayerWeights::matrices);
        layers
            .chain([&self.output])
            .map(|matrix| matrix.bytes().len() as u64)
            .sum()
    }
}

impl Weights {
    /// Multiplications and additions of all matrices with `tokens` tokens, the output matrix with the last alone.
    pub fn operations(&self, tokens: usize) -> f64 {
        let values = |matrix: &Tensor| (matrix.rows() * matrix.row_len()) as f64;
        let layers = self.layers.iter().flat_map(LayerWeights::matrices);
        2.0 * (tokens as f64 * layers.map(values).sum::<f64>() + values(&self.output))
    }
}

impl LayerWeights {
    /// All matrices: queries, keys, values and output of attention, then gate, up and down of the feed-forward.
    pub fn matrices(&self) -> [&Tensor; 7] {
        [
            &self.attn_q,
            &self.attn_k,
            &self.attn_v,
            &self.attn_output,
            &self.ffn_gate,
            &self.ffn_up,
            &self.ffn_down,
        ]
    }

    fn from_gguf(gguf: &Gguf, config: &Config, layer: usize) -> Result<Self> {
        let traits = config.architecture.traits();
        let hidden = config.hidden_size;
        let q_dim = config.head_count * config.head_dim;
        let kv_dim = config.head_count_kv * config.head_dim;
        let ffn = config.feed_forward_length;
        let matrix = |name: &str, shape| matrix(gguf, &format!("blk.{layer}.{name}.weight"), shape);
        let norm = |name: &str, len| vector(gguf, &format!("blk.{layer}.{name}.weight"), len);
        let bias = |name: &str, len| vector(gguf, &format!("blk.{layer}.{name}.bias"), len);
        let qk_norm = |name| {
            traits
                .qk_norm
                .then(|| norm(name, config.head_dim))
                .transpose()
        };
        let qkv_bias = |name, len| traits.qkv_bias.then(|| bias(name, len)).transpose();
        Ok(Self {
            attn_norm: norm("attn_norm", hidden)?,
            attn_q: matrix("attn_q", [hidden, q_dim])?,
            attn_k: matrix("attn_k", [hidden, kv_dim])?,
            attn_v: matrix("attn_v", [hidden, kv_dim])?,
            attn_q_bias: qkv_bias("attn_q", q_dim)?,
            attn_k_bias: qkv_bias("attn_k", kv_dim)?,
            attn_v_bias: qkv_bias("attn_v", kv_dim)?,
            attn_q_norm: qk_norm("attn_q_norm")?,
            attn_k_norm: qk_norm("attn_k_norm")?,
            attn_output: matrix("attn_output", [q_dim, hidden])?,
            ffn_norm: norm("ffn_norm", hidden)?,
            ffn_gate: matrix("ffn_gate", [hidden, ffn])?,
            ffn_up: matrix("ffn_up", [hidden, ffn])?,
            ffn_down: matrix("ffn_down", [ffn, hidden])?,
        })
    }
}

/// `rope_freq_base^(-2i / rope_dimension_count)`, times the scale of positions, divided by the file's own factor for each
/// frequency where the architecture has them: Su et al., "RoFormer", <https://arxiv.org/abs/2104.09864>.
fn rope_frequencies(gguf: &Gguf, config: &Config) -> Result<Vec<f64>> {
    const FACTORS: &str = "rope_freqs.weight";
    let count = config.rope_dimension_count;
    let factors = match config.architecture.traits().rope_factors && gguf.tensor(FACTORS).is_some()
    {
        true => vector(gguf, FACTORS, count / 2)?,
        false => vec![1.0; count / 2],
    };
    let frequency = |(i, factor): (usize, f32)| {
        let exponent = -((2 * i) as f64) / count as f64;
        f64::from(config.rope_position_scale) * f64::from(config.rope_freq_base).powf(exponent)
            / f64::from(factor)
    };
    Ok(factors.into_iter().enumerate().map(frequency).collect())
}

fn matrix(gguf: &Gguf, name: &str, shape: [usize; 2]) -> Result<Tensor> {
    find(gguf, name, &shape).cloned()
}

fn vector(gguf: &Gguf, name: &str, len: usize) -> Result<Vec<f32>> {
    find(gguf, name, &[len]).map(Tensor::to_f32)
}

/// The tensor called `name`, whose shape must be `shape`; further dimensions of 1 do not count.
fn find<'a>(gguf: &'a Gguf, name: &str, shape: &[usize]) -> Result<&'a Tensor> {
    let tensor = gguf
        .tensor(name)
        .with_context(|| format!("the tensor \"{name}\" is missing"))?;
    let found = tensor.shape();
    ensure!(
        found.starts_with(shape) && found[shape.len()..].iter().all(|&extra| extra == 1),
        "tensor \"{name}\" has the shape {found:?}, expected {shape:?} by the metadata"
    );
    Ok(tensor)
}
