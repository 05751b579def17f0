//! What an architecture reads: its hyper-parameters and tensors, each checked when it is asked for.
//!
//! Key names: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#llm>

use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::super::{
    decoder::{
        Activation, Attention, Decoder, FeedForward, KeyValues, Layer, Linear, Norm, OwnKeyValues,
        Rope, RopeScaling, RopeStyle, Vector,
    },
    gguf::{Gguf, Tensor, describe, quoted},
    ops,
};

/// No model's length of anything is larger.
const MAX_LEN: usize = 1 << 20;
const MAX_HEAD_DIM: usize = 1 << 12;

/// A model file as one architecture sees it. Keys are given without the architecture's prefix.
pub struct Source<'a> {
    gguf: &'a Gguf,
    prefix: &'a str,
}

/// The hyper-parameters that every decoder has.
pub struct Shape {
    pub context_length: usize,
    pub block_count: usize,
    pub hidden_size: usize,
    pub vocab_size: usize,
    pub head_dim: usize,
    pub norm_epsilon: f32,
    /// (block_count)
    pub head_count: Vec<usize>,
    /// (block_count), each a divisor of the layer's head_count
    pub head_count_kv: Vec<usize>,
    /// (block_count)
    pub feed_forward_length: Vec<usize>,
}

/// The tensors of one layer, named without `blk.N.` and `.weight`.
pub struct LayerSource<'a> {
    gguf: &'a Gguf,
    shape: &'a Shape,
    layer: usize,
}

impl<'a> Source<'a> {
    pub fn new(gguf: &'a Gguf, prefix: &'a str) -> Self {
        Self { gguf, prefix }
    }

    /// Reads and checks the shape. An error names the key, its value and what is expected.
    pub fn shape(&self) -> Result<Shape> {
        self.refuse_other_designs()?;
        let hidden_size = self.size("embedding_length")?;
        let block_count = self.size_up_to("block_count", 1 << 12)?;
        let head_count = self.size_of_each_layer("attention.head_count", block_count)?;
        let head_dim = self.head_dim(hidden_size, head_count[0])?;
        Ok(Shape {
            context_length: self.size_up_to("context_length", 1 << 30)?,
            block_count,
            hidden_size,
            vocab_size: self.vocab_size()?,
            head_dim,
            norm_epsilon: self.norm_epsilon()?,
            head_count_kv: self.head_count_kv(&head_count)?,
            head_count,
            feed_forward_length: self.size_of_each_layer("feed_forward_length", block_count)?,
        })
    }

    /// The rotation of heads of `head_dim` values, without factors.
    pub fn rope(&self, style: RopeStyle, head_dim: usize) -> Result<Rope> {
        Ok(Rope {
            style,
            base: self.rope_base()?,
            dimensions: self.rope_dimensions(head_dim)?,
            factors: None,
            scaling: self.rope_scaling()?,
        })
    }

    /// The tensors of layer `layer`.
    pub fn layer<'b>(&self, shape: &'b Shape, layer: usize) -> LayerSource<'b>
    where
        'a: 'b,
    {
        LayerSource {
            gguf: self.gguf,
            shape,
            layer,
        }
    }

    /// The tensor called `name` in float32, (len), where the file has it.
    pub fn optional_vector(&self, name: &str, len: usize) -> Result<Option<Vec<f32>>> {
        let tensor = self.gguf.tensor(name).is_some();
        tensor
            .then(|| Ok(find(self.gguf, name, &[len])?.to_f32()))
            .transpose()
    }

    /// `layers` between embedding and output in [`ops::pre_norm_order`].
    pub fn pre_norm_decoder(&self, shape: &Shape, layers: Vec<Layer>) -> Result<Decoder> {
        let embedding_shape = [shape.hidden_size, shape.vocab_size];
        let embedding = find(self.gguf, "token_embd.weight", &embedding_shape)?;
        let output = match self.gguf.tensor("output.weight") {
            Some(_) => find(self.gguf, "output.weight", &embedding_shape)?,
            None => embedding,
        };
        let output_norm = Norm {
            weight: vector(self.gguf, "output_norm.weight", shape.hidden_size)?,
            epsilon: shape.norm_epsilon,
        };
        Ok(Decoder {
            context_length: shape.context_length,
            hidden_size: shape.hidden_size,
            vocab_size: shape.vocab_size,
            ops: ops::pre_norm_order(embedding, &layers, &output_norm, output),
            layers,
        })
    }

    fn full(&self, key: &str) -> String {
        format!("{}.{key}", self.prefix)
    }

    /// A positive integer that must be there, no larger than any model's.
    fn size(&self, key: &str) -> Result<usize> {
        self.size_up_to(key, MAX_LEN)
    }

    fn size_up_to(&self, key: &str, max: usize) -> Result<usize> {
        self.optional_size(key, max)?
            .with_context(|| missing(&self.full(key)))
    }

    fn optional_size(&self, key: &str, max: usize) -> Result<Option<usize>> {
        let key = self.full(key);
        let Some(value) = self.gguf.u64(&key)? else {
            return Ok(None);
        };
        match usize::try_from(value) {
            Ok(value) if (1..=max).contains(&value) => Ok(Some(value)),
            _ => bail!("metadata key \"{key}\" is {value}, expected 1 to {max}"),
        }
    }

    /// One positive integer for all layers, or an array with one for each.
    fn size_of_each_layer(&self, key: &str, layers: usize) -> Result<Vec<usize>> {
        let full = self.full(key);
        let Some(Value::Array(sizes)) = self.gguf.get(&full) else {
            return Ok(vec![self.size(key)?; layers]);
        };
        ensure!(
            sizes.len() == layers,
            "metadata key \"{full}\" is an array of {} elements, expected one for each of the {layers} layers",
            sizes.len()
        );
        let size = |(layer, size): (usize, &Value)| match size.as_u64().map(usize::try_from) {
            Some(Ok(size)) if (1..=MAX_LEN).contains(&size) => Ok(size),
            _ => bail!(
                "metadata key \"{full}\" is {} for layer {layer}, expected 1 to {MAX_LEN}",
                describe(size)
            ),
        };
        sizes.iter().enumerate().map(size).collect()
    }

    /// A finite float that `f32` can hold.
    fn float(&self, key: &str) -> Result<Option<f32>> {
        let key = self.full(key);
        let Some(value) = self.gguf.f64(&key)? else {
            return Ok(None);
        };
        let narrowed = value as f32;
        ensure!(
            narrowed.is_finite(),
            "metadata key \"{key}\" is {value}, which is too large"
        );
        Ok(Some(narrowed))
    }

    /// Tokens in the vocabulary; the embedding must have a row for each.
    fn vocab_size(&self) -> Result<usize> {
        const TOKENS: &str = "tokenizer.ggml.tokens";
        const EMBEDDING: &str = "token_embd.weight";
        let tokens = self.gguf.array(TOKENS)?.with_context(|| missing(TOKENS))?;
        let embedding = self
            .gguf
            .tensor(EMBEDDING)
            .with_context(|| format!("the tensor \"{EMBEDDING}\" is missing"))?;
        let (tokens, rows) = (tokens.len(), embedding.rows());
        ensure!(
            tokens == rows,
            "vocabulary and embedding disagree: \"{TOKENS}\" has {tokens} tokens, the tensor \"{EMBEDDING}\" {rows} rows"
        );
        Ok(tokens)
    }

    fn head_count_kv(&self, head_count: &[usize]) -> Result<Vec<usize>> {
        const KEY: &str = "attention.head_count_kv";
        let key = self.full(KEY);
        if self.gguf.get(&key).is_none() {
            return Ok(head_count.to_vec());
        }
        let counts = self.size_of_each_layer(KEY, head_count.len())?;
        for (layer, (heads, count)) in head_count.iter().zip(&counts).enumerate() {
            ensure!(
                heads.is_multiple_of(*count),
                "metadata key \"{key}\" is {count} for layer {layer}, expected a divisor of its {heads} query heads"
            );
        }
        Ok(counts)
    }

    fn head_dim(&self, hidden_size: usize, head_count: usize) -> Result<usize> {
        const KEY: &str = "attention.key_length";
        const VALUE_KEY: &str = "attention.value_length";
        let head_dim = match self.optional_size(KEY, MAX_HEAD_DIM)? {
            Some(head_dim) => head_dim,
            None => {
                ensure!(
                    hidden_size.is_multiple_of(head_count)
                        && hidden_size / head_count <= MAX_HEAD_DIM,
                    "metadata keys \"{}\" and \"{}\" are {hidden_size} and {head_count}, which gives no head length up to {MAX_HEAD_DIM}",
                    self.full("embedding_length"),
                    self.full("attention.head_count"),
                );
                hidden_size / head_count
            }
        };
        ensure!(
            head_dim.is_multiple_of(2),
            "metadata key \"{}\" is {head_dim}, expected an even number (it rotates in pairs)",
            self.full(KEY)
        );
        if let Some(value_length) = self.optional_size(VALUE_KEY, MAX_HEAD_DIM)? {
            ensure!(
                value_length == head_dim,
                "metadata key \"{}\" is {value_length}, expected the key length {head_dim}",
                self.full(VALUE_KEY)
            );
        }
        Ok(head_dim)
    }

    fn norm_epsilon(&self) -> Result<f32> {
        const KEY: &str = "attention.layer_norm_rms_epsilon";
        let epsilon = self.float(KEY)?.with_context(|| missing(&self.full(KEY)))?;
        ensure!(
            (0.0..1.0).contains(&epsilon),
            "metadata key \"{}\" is {epsilon}, expected 0 or more and less than 1",
            self.full(KEY)
        );
        Ok(epsilon)
    }

    fn rope_base(&self) -> Result<f32> {
        const KEY: &str = "rope.freq_base";
        let base = self.float(KEY)?.unwrap_or(10_000.0);
        ensure!(
            base >= 1.0,
            "metadata key \"{}\" is {base}, expected 1 or more",
            self.full(KEY)
        );
        Ok(base)
    }

    fn rope_dimensions(&self, head_dim: usize) -> Result<usize> {
        const KEY: &str = "rope.dimension_count";
        let count = self.optional_size(KEY, usize::MAX)?.unwrap_or(head_dim);
        ensure!(
            count.is_multiple_of(2) && count <= head_dim,
            "metadata key \"{}\" is {count}, expected an even number up to the head length {head_dim}",
            self.full(KEY)
        );
        Ok(count)
    }

    fn rope_scaling(&self) -> Result<RopeScaling> {
        let key = self.full("rope.scaling.type");
        match self.gguf.str(&key)? {
            None | Some("none") => Ok(RopeScaling::None),
            Some("linear") => {
                const KEY: &str = "rope.scaling.factor";
                let factor = self.float(KEY)?.with_context(|| missing(&self.full(KEY)))?;
                ensure!(
                    (1e-3..=1e6).contains(&factor),
                    "metadata key \"{}\" is {factor}, expected 0.001 to 1000000",
                    self.full(KEY)
                );
                Ok(RopeScaling::Linear(factor))
            }
            Some(other) => bail!(
                "metadata key \"{key}\" is {}, supported are none and linear",
                quoted(other)
            ),
        }
    }

    /// Refuses files whose layers compute something that these architectures do not.
    fn refuse_other_designs(&self) -> Result<()> {
        for (key, design) in [
            ("expert_count", "mixtures of experts"),
            ("attention.sliding_window", "sliding-window attention"),
        ] {
            let key = self.full(key);
            if let Some(value) = self.gguf.u64(&key)? {
                ensure!(
                    value == 0,
                    "metadata key \"{key}\" is {value}, and {design} are not supported"
                );
            }
        }
        Ok(())
    }
}

impl LayerSource<'_> {
    /// Attention without biases and without norms of heads, every layer with keys and values of its own.
    pub fn attention(&self, rope: &Arc<Rope>) -> Result<Attention> {
        let shape = self.shape;
        let (hidden, head_dim) = (shape.hidden_size, shape.head_dim);
        let head_count = shape.head_count[self.layer];
        let head_count_kv = shape.head_count_kv[self.layer];
        let (q_dim, kv_dim) = (head_count * head_dim, head_count_kv * head_dim);
        Ok(Attention {
            norm: self.norm("attn_norm", hidden)?,
            q: self.linear("attn_q", [hidden, q_dim])?,
            kv: KeyValues::Own(Box::new(OwnKeyValues {
                k: self.linear("attn_k", [hidden, kv_dim])?,
                v: self.linear("attn_v", [hidden, kv_dim])?,
                k_norm: None,
                v_norm: None,
            })),
            q_norm: None,
            rope: rope.clone(),
            scale: 1.0 / (head_dim as f32).sqrt(),
            window: None,
            head_count,
            head_count_kv,
            head_dim,
            output: self.linear("attn_output", [q_dim, hidden])?,
            output_norm: None,
        })
    }

    /// Gives queries, keys and values their biases.
    pub fn add_qkv_bias(&self, attention: &mut Attention) -> Result<()> {
        let (q_dim, kv_dim) = (attention.q_dim(), attention.kv_dim());
        attention.q.bias = Some(self.bias("attn_q", q_dim)?);
        if let KeyValues::Own(own) = &mut attention.kv {
            own.k.bias = Some(self.bias("attn_k", kv_dim)?);
            own.v.bias = Some(self.bias("attn_v", kv_dim)?);
        }
        Ok(())
    }

    /// Gives the heads of queries and keys their norms.
    pub fn add_qk_norm(&self, attention: &mut Attention) -> Result<()> {
        attention.q_norm = Some(self.norm("attn_q_norm", attention.head_dim)?);
        if let KeyValues::Own(own) = &mut attention.kv {
            own.k_norm = Some(self.norm("attn_k_norm", attention.head_dim)?);
        }
        Ok(())
    }

    pub fn feed_forward(&self, activation: Activation) -> Result<FeedForward> {
        let hidden = self.shape.hidden_size;
        let len = self.shape.feed_forward_length[self.layer];
        Ok(FeedForward {
            norm: self.norm("ffn_norm", hidden)?,
            gate: self.linear("ffn_gate", [hidden, len])?,
            up: self.linear("ffn_up", [hidden, len])?,
            activation,
            down: self.linear("ffn_down", [len, hidden])?,
            output_norm: None,
        })
    }

    /// A matrix (columns, rows), without a bias.
    pub fn linear(&self, name: &str, shape: [usize; 2]) -> Result<Linear> {
        Ok(Linear {
            weights: find(self.gguf, &self.full(name, "weight"), &shape)?.clone(),
            bias: None,
        })
    }

    pub fn bias(&self, name: &str, len: usize) -> Result<Vector> {
        vector(self.gguf, &self.full(name, "bias"), len)
    }

    pub fn norm(&self, name: &str, len: usize) -> Result<Norm> {
        Ok(Norm {
            weight: vector(self.gguf, &self.full(name, "weight"), len)?,
            epsilon: self.shape.norm_epsilon,
        })
    }

    fn full(&self, name: &str, suffix: &str) -> String {
        format!("blk.{}.{name}.{suffix}", self.layer)
    }
}

fn vector(gguf: &Gguf, name: &str, len: usize) -> Result<Vector> {
    Ok(find(gguf, name, &[len])?.to_f32().into())
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

fn missing(key: &str) -> String {
    format!("the metadata key \"{key}\" is missing")
}
