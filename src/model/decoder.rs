//! A model as data: what each layer holds and computes with, whatever the architecture. [`super::arch`] makes it from a
//! file, [`super::ops`] puts it in order, and no code below asks for more.
//!
//! Shapes stand contiguous dimension first. `q_dim` is head_count * head_dim, `kv_dim` head_count_kv * head_dim.

use std::sync::Arc;

use super::{
    gguf::Tensor,
    ops::{Op, products},
};

/// A decoder-only transformer.
pub struct Decoder {
    /// Tokens that the model was trained to attend over.
    pub context_length: usize,
    /// Values of a token in the residual stream.
    pub hidden_size: usize,
    pub vocab_size: usize,
    /// Layers may differ from each other in everything but `hidden_size`.
    pub layers: Vec<Layer>,
    /// The forward pass, from a token's id to its logits.
    pub ops: Vec<Op>,
}

/// One layer: attention, then the feed-forward, each added to the residual stream.
pub struct Layer {
    pub attention: Attention,
    pub feed_forward: FeedForward,
    pub token_input: Option<TokenInput>,
    /// What the residual stream is multiplied with behind the layer.
    pub output_scale: Option<f32>,
}

/// Attention with grouped queries.
pub struct Attention {
    /// Of the input, (hidden_size)
    pub norm: Option<Norm>,
    /// (hidden_size, q_dim)
    pub q: Linear,
    pub kv: KeyValues,
    /// Of queries before they are rotated: of each head, (head_dim), or of all heads as one vector, (q_dim)
    pub q_norm: Option<Norm>,
    pub rope: Arc<Rope>,
    /// What `query · key` is multiplied with before the softmax.
    pub scale: f32,
    /// Scores become `softcap * tanh(score / softcap)` before the softmax.
    pub softcap: Option<f32>,
    /// A token attends over this many tokens, itself included; `None`: over all before it.
    pub window: Option<usize>,
    pub head_count: usize,
    /// Divides `head_count`.
    pub head_count_kv: usize,
    /// Values of one head, the same for queries, keys and values. Even.
    pub head_dim: usize,
    /// (q_dim, hidden_size)
    pub output: Linear,
    /// Of the output before it is added, (hidden_size)
    pub output_norm: Option<Norm>,
}

/// Where a layer's keys and values come from.
pub enum KeyValues {
    /// The layer computes and caches them.
    Own(Box<OwnKeyValues>),
    /// It reads those that the layer of this index caches, which has its head size and heads for keys and values.
    SharedWith(usize),
}

/// How a layer computes its keys and values.
pub struct OwnKeyValues {
    /// (hidden_size, kv_dim)
    pub k: Linear,
    /// (hidden_size, kv_dim); `None`: values are what keys are before their norm
    pub v: Option<Linear>,
    /// Of keys before they are rotated: of each head, (head_dim), or of all heads as one vector, (kv_dim)
    pub k_norm: Option<Norm>,
    /// Of each value head, (head_dim)
    pub v_norm: Option<Norm>,
}

/// `down (activation(gate x) * (up x))`
pub struct FeedForward {
    /// Of the input, (hidden_size)
    pub norm: Option<Norm>,
    /// (hidden_size, feed_forward_length)
    pub gate: Linear,
    /// (hidden_size, feed_forward_length)
    pub up: Linear,
    pub activation: Activation,
    /// (feed_forward_length, hidden_size)
    pub down: Linear,
    /// Of the output before it is added, (hidden_size)
    pub output_norm: Option<Norm>,
}

/// What a layer takes of the token itself, behind the feed-forward: the residual stream
/// `+= norm(projection (activation(gate x) * input))`, where `input` is the layer's part of [`TokenInputs`].
pub struct TokenInput {
    /// (hidden_size, width)
    pub gate: Linear,
    pub activation: Activation,
    /// (width, hidden_size)
    pub projection: Linear,
    /// (hidden_size)
    pub norm: Norm,
}

/// What a token gives to every layer, (width, layers): `(sqrt(width) * table[token] + norm(projection x / sqrt(hidden_size)))
/// / sqrt(2)`, with x the token's embedding and a norm of each layer's part. Gemma 3n and 4 call them per-layer embeddings.
pub struct TokenInputs {
    /// (width * layers, vocab_size)
    pub table: Tensor,
    /// (hidden_size, width * layers)
    pub projection: Linear,
    /// (width)
    pub norm: Norm,
}

/// A function of one number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x / (1 + exp(-x))`
    Silu,
    /// `x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x³)))`: Hendrycks and Gimpel, <https://arxiv.org/abs/1606.08415>.
    GeluTanh,
}

/// `W x + bias`
#[derive(Clone)]
pub struct Linear {
    /// (columns, rows)
    pub weights: Tensor,
    /// (rows)
    pub bias: Option<Vector>,
}

/// `x / sqrt(mean(x²) + epsilon) * weight`: Zhang and Sennrich, <https://arxiv.org/abs/1910.07467>.
#[derive(Clone)]
pub struct Norm {
    pub weight: Vector,
    pub epsilon: f32,
}

/// A tensor of one dimension in float32. Clones share the values.
pub type Vector = Arc<[f32]>;

/// Rotary position embedding of the leading values of a head: Su et al., "RoFormer", <https://arxiv.org/abs/2104.09864>.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    pub style: RopeStyle,
    pub base: f32,
    /// Leading values of a head that are rotated. Even, at most head_dim.
    pub dimensions: usize,
    /// What each frequency is divided by, (dimensions / 2); `None`: by nothing
    pub factors: Option<Vec<f32>>,
    pub scaling: RopeScaling,
    /// Multiplies rotated queries and keys, beside what `scaling` asks for.
    pub attn_factor: f32,
}

/// Which pairs of a head's values a rotation turns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopeStyle {
    /// `(2i, 2i + 1)`: ggml's NORMAL, used by llama.
    Interleaved,
    /// `(i, i + dimensions / 2)`: NEOX, used by qwen.
    Neox,
}

/// How positions beyond those of the training are brought into its range.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    None,
    /// Positions are divided by this factor.
    Linear(f32),
    Yarn(Yarn),
}

/// Frequencies that turn often within the original context stay, those that turn seldom are scaled, and between the two
/// lies a ramp: Peng et al., "YaRN", <https://arxiv.org/abs/2309.00071>.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Yarn {
    /// How many times the original context is to be held.
    pub factor: f32,
    /// Tokens that the model was trained on before.
    pub original_context: usize,
    /// Turns within the original context from which on a frequency stays.
    pub beta_fast: f32,
    /// Turns up to which a frequency is scaled in full.
    pub beta_slow: f32,
    /// How much of the ramp counts: 1, or 0 for linear scaling of all frequencies.
    pub ext_factor: f32,
}

impl Rope {
    /// Radians that each pair of a head's values turns by from one position to the next, (dimensions / 2):
    /// `base^(-2i / dimensions)`, scaled and divided by the pair's factor.
    pub fn frequencies(&self) -> Vec<f64> {
        let frequency = |i: usize| {
            let exponent = -((2 * i) as f64) / self.dimensions as f64;
            let factor = self.factors.as_ref().map_or(1.0, |factors| factors[i]);
            let scale = match self.scaling {
                RopeScaling::None => 1.0,
                RopeScaling::Linear(factor) => f64::from(1.0 / factor),
                RopeScaling::Yarn(yarn) => yarn.scale(i, self.base, self.dimensions),
            };
            scale * f64::from(self.base).powf(exponent) / f64::from(factor)
        };
        (0..self.dimensions / 2).map(frequency).collect()
    }

    /// What rotated queries and keys are multiplied with.
    pub fn magnitude(&self) -> f32 {
        match self.scaling {
            RopeScaling::None | RopeScaling::Linear(_) => self.attn_factor,
            RopeScaling::Yarn(yarn) => self.attn_factor * yarn.magnitude(),
        }
    }

    /// What [`Attention::scale`] has of the magnitude. Where all values of a head of `head_dim` are rotated, what multiplies
    /// both sides of a score multiplies the score, and the rotation leaves it out.
    pub fn score_factor(&self, head_dim: usize) -> f32 {
        match self.dimensions == head_dim {
            true => self.magnitude().powi(2),
            false => 1.0,
        }
    }

    /// What is left of the magnitude for the rotation.
    pub fn rotation_factor(&self, head_dim: usize) -> f32 {
        match self.dimensions == head_dim {
            true => 1.0,
            false => self.magnitude(),
        }
    }
}

impl Yarn {
    /// What frequency `i` is multiplied with.
    fn scale(&self, i: usize, base: f32, dimensions: usize) -> f64 {
        // The frequency, a real number, that turns this often within the original context.
        let turning = |turns: f32| {
            let turn = 2.0 * std::f64::consts::PI * f64::from(turns);
            dimensions as f64 * (self.original_context as f64 / turn).ln()
                / (2.0 * f64::from(base).ln())
        };
        let low = turning(self.beta_fast).floor().max(0.0);
        let high = turning(self.beta_slow).ceil().min(dimensions as f64 - 1.0);
        let ramp = ((i as f64 - low) / (high - low).max(0.001)).clamp(0.0, 1.0);
        let kept = (1.0 - ramp) * f64::from(self.ext_factor);
        (1.0 - kept) / f64::from(self.factor) + kept
    }

    fn magnitude(&self) -> f32 {
        // Without the ramp it is linear scaling, which asks for nothing.
        match self.ext_factor == 0.0 || self.factor <= 1.0 {
            true => 1.0,
            false => 1.0 + 0.1 * self.factor.ln(),
        }
    }
}

impl Attention {
    pub fn q_dim(&self) -> usize {
        self.head_count * self.head_dim
    }

    pub fn kv_dim(&self) -> usize {
        self.head_count_kv * self.head_dim
    }

    /// Query heads that share a key/value head.
    pub fn group(&self) -> usize {
        self.head_count / self.head_count_kv
    }
}

impl Decoder {
    /// Bytes of the matrices that decoding one token reads: all that it is multiplied with.
    pub fn bytes_per_token(&self) -> u64 {
        let weights = self.ops.iter().filter_map(Op::weights);
        weights.map(|weights| weights.bytes().len() as u64).sum()
    }

    /// Multiplications and additions of all matrices with `tokens` tokens, of which the last alone gets logits.
    pub fn operations(&self, tokens: usize) -> f64 {
        2.0 * products(&self.ops, tokens, 1)
    }
}
