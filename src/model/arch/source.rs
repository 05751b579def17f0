//! What an architecture reads: its hyper-parameters and tensors, each checked when it is asked for.
//!
//! Key names: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#llm>

use std::{cell::RefCell, collections::BTreeSet, sync::Arc};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::Value;

use super::super::{
    decoder::{
        Activation, Attention, Decoder, FeedForward, KeyValues, Layer, Linear, Norm, OwnKeyValues,
        Rope, RopeScaling, RopeStyle, TokenInput, TokenInputs, Vector, Yarn,
    },
    gguf::{Gguf, Tensor, describe, quoted},
    ops::{self, Ends},
};
use super::unused::{self, Unused};

/// No model's length of anything is larger.
const MAX_LEN: usize = 1 << 20;
const MAX_HEAD_DIM: usize = 1 << 12;
const MAX_CONTEXT: usize = 1 << 30;

/// A model file as one architecture sees it. Keys are given without the architecture's prefix.
pub struct Source<'a> {
    gguf: &'a Gguf,
    prefix: &'a str,
    rope: &'a RopeOptions,
    used: RefCell<Used>,
}

/// What was asked for.
#[derive(Default)]
struct Used {
    keys: BTreeSet<String>,
    tensors: BTreeSet<String>,
}

/// What takes the place of a file's own rotation; `None`: the file's, or its architecture's default.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RopeOptions {
    /// Tokens of context that are asked for: LongRoPE has factors of its own for long ones.
    pub context_len: Option<usize>,
    pub scaling: Option<RopeScalingType>,
    /// How many times the original context is to be held.
    pub scale: Option<f32>,
    pub freq_base: Option<f32>,
    pub yarn_orig_ctx: Option<usize>,
    pub yarn_ext_factor: Option<f32>,
    pub yarn_attn_factor: Option<f32>,
    pub yarn_beta_fast: Option<f32>,
    pub yarn_beta_slow: Option<f32>,
}

/// The name of a [`RopeScaling`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopeScalingType {
    None,
    Linear,
    Yarn,
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
    source: &'a Source<'a>,
    shape: &'a Shape,
    layer: usize,
}

impl<'a> Source<'a> {
    pub fn new(gguf: &'a Gguf, prefix: &'a str, rope: &'a RopeOptions) -> Self {
        Self {
            gguf,
            prefix,
            rope,
            used: RefCell::default(),
        }
    }

    /// Reads and checks the shape. An error names the key, its value and what is expected.
    pub fn shape(&self) -> Result<Shape> {
        self.refuse_experts()?;
        let hidden_size = self.size("embedding_length")?;
        let block_count = self.size_up_to("block_count", 1 << 12)?;
        let head_count = self.size_of_each_layer("attention.head_count", block_count)?;
        let head_dim = self.head_dim(["attention.key_length", "attention.value_length"], || {
            let head_count = head_count[0];
            ensure!(
                hidden_size.is_multiple_of(head_count) && hidden_size / head_count <= MAX_HEAD_DIM,
                "metadata keys \"{}\" and \"{}\" are {hidden_size} and {head_count}, which gives no head length up to {MAX_HEAD_DIM}",
                self.full("embedding_length"),
                self.full("attention.head_count"),
            );
            Ok(hidden_size / head_count)
        })?;
        Ok(Shape {
            context_length: self.size_up_to("context_length", MAX_CONTEXT)?,
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
        let scaling = self.rope_scaling()?;
        Ok(Rope {
            style,
            base: self.rope_base("rope.freq_base", self.rope.freq_base)?,
            dimensions: self.rope_dimensions("rope.dimension_count", head_dim)?,
            factors: None,
            scaling,
            attn_factor: self.attn_factor(scaling)?.unwrap_or(1.0),
        })
    }

    /// Gives `rope` the factors of LongRoPE, where the file has them: those for long contexts where more is asked for than
    /// the original context, else those for short ones, with the original context as the model's. What scaling multiplies
    /// queries and keys with is the same for both. Ding et al., <https://arxiv.org/abs/2402.13753>.
    pub fn add_long_rope(&self, shape: &mut Shape, rope: &mut Rope) -> Result<()> {
        const ORIGINAL: &str = "rope.scaling.original_context_length";
        let count = rope.dimensions / 2;
        let Some(long) = self.optional_vector("rope_factors_long.weight", count)? else {
            return Ok(());
        };
        let short = self.tensor("rope_factors_short.weight", &[count])?.to_f32();
        let original = self.size_up_to(ORIGINAL, MAX_CONTEXT)?;
        if self.attn_factor(rope.scaling)?.is_none() && shape.context_length > original {
            let stretch = (shape.context_length as f32 / original as f32).ln();
            rope.attn_factor = (1.0 + stretch / (original as f32).ln()).sqrt();
        }
        let is_long = self.rope.context_len.is_some_and(|asked| asked > original);
        rope.factors = Some(if is_long { long } else { short });
        if !is_long && shape.context_length > original {
            tracing::debug!(
                "positions are scaled for the original context of {original} tokens; for up to {} where more is asked for",
                shape.context_length
            );
            shape.context_length = original;
        }
        Ok(())
    }

    /// Tokens that a token of a sliding layer attends over; `None`: over all that the context holds.
    pub fn window(&self, shape: &Shape) -> Result<Option<usize>> {
        let window = self.gguf.u64(&self.full("attention.sliding_window"))?;
        let window = window.and_then(|window| usize::try_from(window).ok());
        let context_len = self.rope.context_len.unwrap_or(shape.context_length);
        Ok(window.filter(|window| (1..context_len).contains(window)))
    }

    /// Of each layer, whether it has a sliding window: by an array in the file, or all but every `period`th. The file's own
    /// period, 0 for windows in all layers, goes before `period`. None has where the file names no window.
    pub fn sliding_layers(&self, shape: &Shape, period: usize) -> Result<Vec<bool>> {
        const KEY: &str = "attention.sliding_window_pattern";
        let key = self.full(KEY);
        let layers = shape.block_count;
        let window = self.gguf.u64(&self.full("attention.sliding_window"))?;
        let sliding = match self.gguf.get(&key) {
            Some(Value::Array(sliding)) => {
                ensure!(
                    sliding.len() == layers,
                    "metadata key \"{key}\" is an array of {} elements, expected one for each of the {layers} layers",
                    sliding.len()
                );
                let is_sliding = |(layer, value): (usize, &Value)| match (value, value.as_u64()) {
                    (Value::Bool(sliding), _) => Ok(*sliding),
                    (_, Some(number @ (0 | 1))) => Ok(number == 1),
                    _ => bail!(
                        "metadata key \"{key}\" is {} for layer {layer}, expected true or false",
                        describe(value)
                    ),
                };
                sliding
                    .iter()
                    .enumerate()
                    .map(is_sliding)
                    .collect::<Result<_>>()?
            }
            _ => {
                let period = match self.gguf.u64(&key)? {
                    Some(period) => usize::try_from(period).unwrap_or(usize::MAX),
                    None => period,
                };
                let is_sliding = |layer: usize| !(layer + 1).is_multiple_of(period);
                (0..layers).map(is_sliding).collect()
            }
        };
        Ok(match window {
            None | Some(0) => vec![false; layers],
            Some(_) => sliding,
        })
    }

    /// The rotation of sliding layers, whose heads have `head_dim` values: that of the others with a base of its own and
    /// positions as they are, since a window needs no scaling.
    pub fn sliding_rope(&self, rope: &Rope, head_dim: usize) -> Result<Rope> {
        Ok(Rope {
            style: rope.style,
            base: self.rope_base("rope.freq_base_swa", None)?,
            dimensions: self.rope_dimensions("rope.dimension_count_swa", head_dim)?,
            factors: None,
            scaling: RopeScaling::None,
            attn_factor: 1.0,
        })
    }

    /// What scores are multiplied with by the file, or `usual`; a rotation's factor comes on top.
    pub fn attention_scale(&self, usual: f32) -> Result<f32> {
        Ok(self.nonzero("attention.scale")?.unwrap_or(usual))
    }

    /// How many of the last layers have no keys and values of their own.
    pub fn shared_kv_layers(&self, shape: &Shape) -> Result<usize> {
        let key = self.full("attention.shared_kv_layers");
        let sharing = self.gguf.u64(&key)?.unwrap_or(0);
        match usize::try_from(sharing) {
            Ok(sharing) if sharing < shape.block_count => Ok(sharing),
            _ => bail!(
                "metadata key \"{key}\" is {sharing}, expected less than the {} layers",
                shape.block_count
            ),
        }
    }

    /// Gives `ends` what a token gives to every layer, where the file has it.
    pub fn add_token_inputs(&self, shape: &Shape, ends: &mut Ends) -> Result<()> {
        let Some(width) = self.token_input_width()? else {
            return Ok(());
        };
        let all = width * shape.block_count;
        ends.token_inputs = Some(TokenInputs {
            table: self
                .tensor("per_layer_token_embd.weight", &[all, shape.vocab_size])?
                .clone(),
            projection: Linear {
                weights: self
                    .tensor("per_layer_model_proj.weight", &[shape.hidden_size, all])?
                    .clone(),
                bias: None,
            },
            norm: Norm {
                weight: self.vector("per_layer_proj_norm.weight", width)?,
                epsilon: shape.norm_epsilon,
            },
        });
        Ok(())
    }

    /// Values that a token gives to a layer; 0 stands for none.
    fn token_input_width(&self) -> Result<Option<usize>> {
        const KEY: &str = "embedding_length_per_layer_input";
        match self.gguf.u64(&self.full(KEY))? {
            None | Some(0) => Ok(None),
            Some(_) => self.optional_size(KEY, MAX_LEN),
        }
    }

    /// A number that is not 0, which converters write for none.
    pub fn nonzero(&self, key: &str) -> Result<Option<f32>> {
        Ok(self.float(key)?.filter(|number| *number != 0.0))
    }

    /// The tensor called `name` in float32, (len), where the file has it.
    pub fn optional_vector(&self, name: &str, len: usize) -> Result<Option<Vec<f32>>> {
        let tensor = self.gguf.tensor(name).is_some();
        tensor
            .then(|| Ok(self.tensor(name, &[len])?.to_f32()))
            .transpose()
    }

    /// The tensor called `name`, whose shape must be `shape`; further dimensions of 1 do not count.
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<&'a Tensor> {
        let tensor = self
            .gguf
            .tensor(name)
            .with_context(|| format!("the tensor \"{name}\" is missing"))?;
        let found = tensor.shape();
        ensure!(
            found.starts_with(shape) && found[shape.len()..].iter().all(|&extra| extra == 1),
            "tensor \"{name}\" has the shape {found:?}, expected {shape:?} by the metadata"
        );
        self.used.borrow_mut().tensors.insert(name.to_owned());
        Ok(tensor)
    }

    fn vector(&self, name: &str, len: usize) -> Result<Vector> {
        Ok(self.tensor(name, &[len])?.to_f32().into())
    }

    /// Embedding, output norm and output, which is the embedding where the file has none of its own.
    pub fn ends(&self, shape: &Shape) -> Result<Ends> {
        let embedding_shape = [shape.hidden_size, shape.vocab_size];
        let embedding = self.tensor("token_embd.weight", &embedding_shape)?;
        let output = match self.gguf.tensor("output.weight") {
            Some(_) => self.tensor("output.weight", &embedding_shape)?,
            None => embedding,
        };
        Ok(Ends {
            embedding: embedding.clone(),
            embedding_scale: None,
            token_inputs: None,
            output_norm: Norm {
                weight: self.vector("output_norm.weight", shape.hidden_size)?,
                epsilon: shape.norm_epsilon,
            },
            output: output.clone(),
            softcap: None,
            suppressed: [].into(),
        })
    }

    /// Tokens that the model never gives. Who reads the vocabulary warns of others that a file names.
    pub fn suppressed_tokens(&self, shape: &Shape) -> Arc<[u32]> {
        let tokens = self.gguf.array("tokenizer.ggml.suppress_tokens");
        let tokens = tokens.ok().flatten().unwrap_or_default().iter();
        let known = |token: &Value| {
            let id = token.as_u64().filter(|id| *id < shape.vocab_size as u64);
            id.map(|id| id as u32)
        };
        tokens.filter_map(known).collect()
    }

    /// What `layer` says of each layer, between `ends` in [`ops::residual_order`].
    pub fn decoder(
        &self,
        shape: &Shape,
        ends: &Ends,
        layer: impl Fn(&LayerSource) -> Result<Layer>,
    ) -> Result<Decoder> {
        let read = |index| {
            layer(&LayerSource {
                source: self,
                shape,
                layer: index,
            })
        };
        let layers = (0..shape.block_count)
            .map(read)
            .collect::<Result<Vec<_>>>()?;
        Ok(Decoder {
            context_length: shape.context_length,
            hidden_size: shape.hidden_size,
            vocab_size: shape.vocab_size,
            ops: ops::residual_order(&layers, ends),
            layers,
        })
    }

    /// A key with its prefix, of which nothing is left to be said once it was asked for.
    fn full(&self, key: &str) -> String {
        let full = format!("{}.{key}", self.prefix);
        self.used.borrow_mut().keys.insert(full.clone());
        full
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

    /// Values of a head, the same for keys and values: by the first of these keys, or `default`.
    fn head_dim(
        &self,
        [key, value_key]: [&str; 2],
        default: impl FnOnce() -> Result<usize>,
    ) -> Result<usize> {
        let head_dim = match self.optional_size(key, MAX_HEAD_DIM)? {
            Some(head_dim) => head_dim,
            None => default()?,
        };
        ensure!(
            head_dim.is_multiple_of(2),
            "metadata key \"{}\" is {head_dim}, expected an even number (it rotates in pairs)",
            self.full(key)
        );
        if let Some(value_length) = self.optional_size(value_key, MAX_HEAD_DIM)? {
            ensure!(
                value_length == head_dim,
                "metadata key \"{}\" is {value_length}, expected the key length {head_dim}",
                self.full(value_key)
            );
        }
        Ok(head_dim)
    }

    /// Values of a head of sliding layers.
    pub fn sliding_head_dim(&self) -> Result<usize> {
        const KEY: &str = "attention.key_length_swa";
        self.head_dim([KEY, "attention.value_length_swa"], || {
            Err(anyhow!(missing(&self.full(KEY))))
        })
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

    /// `asked`, or else the file's.
    fn rope_base(&self, key: &str, asked: Option<f32>) -> Result<f32> {
        let base = self.float(key)?.unwrap_or(10_000.0);
        if let Some(base) = asked {
            return Ok(base);
        }
        ensure!(
            base >= 1.0,
            "metadata key \"{}\" is {base}, expected 1 or more",
            self.full(key)
        );
        Ok(base)
    }

    fn rope_dimensions(&self, key: &str, head_dim: usize) -> Result<usize> {
        let count = self.optional_size(key, usize::MAX)?.unwrap_or(head_dim);
        ensure!(
            count.is_multiple_of(2) && count <= head_dim,
            "metadata key \"{}\" is {count}, expected an even number up to the head length {head_dim}",
            self.full(key)
        );
        Ok(count)
    }

    /// Its type defaults to linear, as far as there is a factor, which has an older name as well: llama.cpp's rules.
    fn rope_scaling(&self) -> Result<RopeScaling> {
        let key = self.full("rope.scaling.type");
        let named = match self.gguf.str(&key)? {
            None => None,
            Some("none") => Some(RopeScalingType::None),
            Some("linear") => Some(RopeScalingType::Linear),
            Some("yarn") => Some(RopeScalingType::Yarn),
            // All of it is in the factors, which the architecture must use.
            Some("longrope") if self.gguf.tensor("rope_factors_long.weight").is_some() => {
                Some(RopeScalingType::None)
            }
            Some(other) => bail!(
                "metadata key \"{key}\" is {}, supported are none, linear, yarn, and longrope with its tensors",
                quoted(other)
            ),
        };
        let factor = self.factor("rope.scaling.factor", named)?;
        let older = self.factor("rope.scale_linear", named)?;
        let factor = self.rope.scale.or(factor).or(older);
        let original_context =
            self.optional_size("rope.scaling.original_context_length", MAX_CONTEXT)?;
        let [ext_factor, beta_fast, beta_slow] = ["ext_factor", "beta_fast", "beta_slow"]
            .map(|name| self.float(&format!("rope.scaling.yarn_{name}")));
        let named = self.rope.scaling.or(named);
        Ok(match (named, factor) {
            (Some(RopeScalingType::None), _) | (None, None) => RopeScaling::None,
            (Some(_), None) => return Err(anyhow!(missing(&self.full("rope.scaling.factor")))),
            (None | Some(RopeScalingType::Linear), Some(factor)) => RopeScaling::Linear(factor),
            (Some(RopeScalingType::Yarn), Some(factor)) => RopeScaling::Yarn(Yarn {
                factor,
                original_context: match self.rope.yarn_orig_ctx.or(original_context) {
                    Some(context) => context,
                    None => self.size_up_to("context_length", MAX_CONTEXT)?,
                },
                beta_fast: self.rope.yarn_beta_fast.or(beta_fast?).unwrap_or(32.0),
                beta_slow: self.rope.yarn_beta_slow.or(beta_slow?).unwrap_or(1.0),
                ext_factor: self.rope.yarn_ext_factor.or(ext_factor?).unwrap_or(1.0),
            }),
        })
    }

    /// Of rotated queries and keys. What is YaRN's by name counts with it alone.
    fn attn_factor(&self, scaling: RopeScaling) -> Result<Option<f32>> {
        let of_yarn = self.nonzero("rope.scaling.yarn_attn_factor")?;
        let of_any = self.nonzero("rope.scaling.attn_factor")?;
        Ok(match scaling {
            RopeScaling::Yarn(_) => self.rope.yarn_attn_factor.or(of_yarn).or(of_any),
            RopeScaling::None | RopeScaling::Linear(_) => of_any,
        })
    }

    /// A factor of positions. Where no type of scaling is named, 0 stands for none.
    fn factor(&self, key: &str, named: Option<RopeScalingType>) -> Result<Option<f32>> {
        let Some(factor) = self.float(key)? else {
            return Ok(None);
        };
        if factor == 0.0 && named.is_none() {
            return Ok(None);
        }
        ensure!(
            (1e-3..=1e6).contains(&factor),
            "metadata key \"{}\" is {factor}, expected 0.001 to 1000000",
            self.full(key)
        );
        Ok(Some(factor))
    }

    /// Refuses what is left of the file and may change the result, and warns of keys that nobody knows.
    pub fn account(&self, architecture: &str) -> Result<()> {
        let used = self.used.borrow();
        let unused = |tensor: &&Tensor| {
            !used.tensors.contains(tensor.name()) && !unused::is_harmless_tensor(tensor.name())
        };
        if let Some(tensor) = self.gguf.tensors().find(unused) {
            bail!(
                "the tensor {} is in the file, and nothing in the architecture {architecture} uses it: without it the text \
                 would be wrong",
                quoted(tensor.name())
            );
        }
        let prefix = format!("{}.", self.prefix);
        for (key, value) in self.gguf.metadata() {
            let Some(name) = key.strip_prefix(&prefix) else {
                continue;
            };
            if used.keys.contains(key) {
                continue;
            }
            match unused::weigh_key(name, value) {
                Unused::Harmless => {}
                Unused::ChangesResult => bail!(
                    "metadata key \"{key}\" is {}, which changes the result and which sharpi does not do for the \
                     architecture {architecture}",
                    describe(value)
                ),
                Unused::Unknown => tracing::warn!(
                    "{}: metadata key {} is not known: where it changes what the model computes, the text is wrong",
                    self.gguf.name(),
                    quoted(key)
                ),
            }
        }
        Ok(())
    }

    /// Mixtures of experts are named before the tensors that they lack.
    fn refuse_experts(&self) -> Result<()> {
        let key = self.full("expert_count");
        let experts = self.gguf.u64(&key)?.unwrap_or(0);
        ensure!(
            experts == 0,
            "metadata key \"{key}\" is {experts}, and mixtures of experts are not supported"
        );
        Ok(())
    }
}

impl LayerSource<'_> {
    /// Which of the layers it is, from 0.
    pub fn index(&self) -> usize {
        self.layer
    }

    /// Attention with the biases that the file has and without norms, with keys and values of its own.
    pub fn attention(&self, rope: &Arc<Rope>) -> Result<Attention> {
        let shape = self.shape;
        let (hidden, head_dim) = (shape.hidden_size, shape.head_dim);
        let head_count = shape.head_count[self.layer];
        let head_count_kv = shape.head_count_kv[self.layer];
        let (q_dim, kv_dim) = (head_count * head_dim, head_count_kv * head_dim);
        let fused = self.source.gguf.tensor(&self.full("attn_qkv", "weight"));
        let [q, k, v] = match fused.is_some() {
            true => self.fused("attn_qkv", hidden, [q_dim, kv_dim, kv_dim])?,
            false => [
                self.linear("attn_q", [hidden, q_dim])?,
                self.linear("attn_k", [hidden, kv_dim])?,
                self.linear("attn_v", [hidden, kv_dim])?,
            ],
        };
        let own = OwnKeyValues {
            k,
            v: Some(v),
            k_norm: None,
            v_norm: None,
        };
        self.attention_over(KeyValues::Own(Box::new(own)), q, rope, head_dim)
    }

    /// Attention with heads of `head_dim` values over `kv`, without norms.
    pub fn attention_over(
        &self,
        kv: KeyValues,
        q: Linear,
        rope: &Arc<Rope>,
        head_dim: usize,
    ) -> Result<Attention> {
        let head_count = self.shape.head_count[self.layer];
        let output_shape = [head_count * head_dim, self.shape.hidden_size];
        Ok(Attention {
            norm: None,
            q,
            kv,
            q_norm: None,
            rope: rope.clone(),
            scale: rope.score_factor(head_dim) / (head_dim as f32).sqrt(),
            softcap: None,
            window: None,
            head_count,
            head_count_kv: self.shape.head_count_kv[self.layer],
            head_dim,
            output: self.linear("attn_output", output_shape)?,
            output_norm: None,
        })
    }

    /// Gives queries, keys and values their biases.
    pub fn add_qkv_bias(&self, attention: &mut Attention) -> Result<()> {
        let (q_dim, kv_dim) = (attention.q_dim(), attention.kv_dim());
        attention.q.bias = Some(self.bias("attn_q", q_dim)?);
        if let KeyValues::Own(own) = &mut attention.kv {
            own.k.bias = Some(self.bias("attn_k", kv_dim)?);
            if let Some(v) = &mut own.v {
                v.bias = Some(self.bias("attn_v", kv_dim)?);
            }
        }
        Ok(())
    }

    /// Gives queries and keys norms of `q_len` and `k_len` values.
    pub fn add_qk_norm(&self, attention: &mut Attention, q_len: usize, k_len: usize) -> Result<()> {
        attention.q_norm = Some(self.norm("attn_q_norm", q_len)?);
        if let KeyValues::Own(own) = &mut attention.kv {
            own.k_norm = Some(self.norm("attn_k_norm", k_len)?);
        }
        Ok(())
    }

    /// The feed-forward without norms.
    pub fn feed_forward(&self, activation: Activation) -> Result<FeedForward> {
        let hidden = self.shape.hidden_size;
        let len = self.shape.feed_forward_length[self.layer];
        let up = self.source.gguf.tensor(&self.full("ffn_up", "weight"));
        let [gate, up] = match up.is_some_and(|up| up.rows() == 2 * len) {
            true => self.fused("ffn_up", hidden, [len, len])?,
            false => [
                self.linear("ffn_gate", [hidden, len])?,
                self.linear("ffn_up", [hidden, len])?,
            ],
        };
        Ok(FeedForward {
            norm: None,
            gate,
            up,
            activation,
            down: self.linear("ffn_down", [len, hidden])?,
            output_norm: None,
        })
    }

    /// A layer that norms what each of its branches reads.
    pub fn pre_norm(&self, attention: Attention, feed_forward: FeedForward) -> Result<Layer> {
        Ok(Layer {
            attention: Attention {
                norm: Some(self.norm("attn_norm", self.shape.hidden_size)?),
                ..attention
            },
            feed_forward: FeedForward {
                norm: Some(self.norm("ffn_norm", self.shape.hidden_size)?),
                ..feed_forward
            },
            token_input: None,
            output_scale: None,
        })
    }

    /// A layer that norms what each of its branches adds to the residual stream.
    pub fn post_norm(&self, layer: Layer) -> Result<Layer> {
        Ok(Layer {
            attention: Attention {
                output_norm: Some(self.norm("post_attention_norm", self.shape.hidden_size)?),
                ..layer.attention
            },
            feed_forward: FeedForward {
                output_norm: Some(self.norm("post_ffw_norm", self.shape.hidden_size)?),
                ..layer.feed_forward
            },
            ..layer
        })
    }

    /// What the layer takes of the token itself, where the file has it.
    pub fn token_input(&self, activation: Activation) -> Result<Option<TokenInput>> {
        let Some(width) = self.source.token_input_width()? else {
            return Ok(None);
        };
        let hidden = self.shape.hidden_size;
        Ok(Some(TokenInput {
            gate: self.linear("inp_gate", [hidden, width])?,
            activation,
            projection: self.linear("proj", [width, hidden])?,
            norm: self.norm("post_norm", hidden)?,
        }))
    }

    /// A number in a tensor of its own, where the file has it.
    pub fn optional_scalar(&self, name: &str) -> Result<Option<f32>> {
        let name = self.full(name, "weight");
        let scalar = self.source.optional_vector(&name, 1)?;
        Ok(scalar.map(|scalar| scalar[0]))
    }

    /// Leaves tensors aside that the file may have and the layer has no use for.
    pub fn ignore(&self, names: &[&str]) {
        let names = names.iter().map(|name| self.full(name, "weight"));
        self.source.used.borrow_mut().tensors.extend(names);
    }

    /// Matrices (columns, rows of each) that lie one after another in one.
    fn fused<const N: usize>(
        &self,
        name: &str,
        columns: usize,
        rows: [usize; N],
    ) -> Result<[Linear; N]> {
        let all = self.linear(name, [columns, rows.iter().sum()])?;
        let mut end = 0;
        Ok(rows.map(|rows| {
            let range = end..end + rows;
            end = range.end;
            Linear {
                weights: all.weights.part(range.clone()),
                bias: all.bias.as_ref().map(|bias| bias[range].into()),
            }
        }))
    }

    /// A matrix (columns, rows), with a bias (rows) where the file has one.
    pub fn linear(&self, name: &str, shape: [usize; 2]) -> Result<Linear> {
        Ok(Linear {
            weights: self
                .source
                .tensor(&self.full(name, "weight"), &shape)?
                .clone(),
            bias: self.optional_bias(name, shape[1])?,
        })
    }

    /// The matrix, where the file has it.
    pub fn optional_linear(&self, name: &str, shape: [usize; 2]) -> Result<Option<Linear>> {
        let there = self.source.gguf.tensor(&self.full(name, "weight"));
        there.map(|_| self.linear(name, shape)).transpose()
    }

    fn optional_bias(&self, name: &str, len: usize) -> Result<Option<Vector>> {
        let vector = self.source.optional_vector(&self.full(name, "bias"), len)?;
        Ok(vector.map(Vector::from))
    }

    pub fn bias(&self, name: &str, len: usize) -> Result<Vector> {
        self.source.vector(&self.full(name, "bias"), len)
    }

    pub fn norm(&self, name: &str, len: usize) -> Result<Norm> {
        Ok(Norm {
            weight: self.source.vector(&self.full(name, "weight"), len)?,
            epsilon: self.shape.norm_epsilon,
        })
    }

    fn full(&self, name: &str, suffix: &str) -> String {
        format!("blk.{}.{name}.{suffix}", self.layer)
    }
}

fn missing(key: &str) -> String {
    format!("the metadata key \"{key}\" is missing")
}
