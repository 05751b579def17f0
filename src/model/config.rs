//! Hyper-parameters: one typed struct, read once from a file's metadata.
//!
//! Key names: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#llm>

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::gguf::{Gguf, describe, quoted};

/// The dense decoder architectures that sharpi runs. A new one is a variant here and its row of [`Traits`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    Llama,
    Qwen2,
    Qwen3,
}

/// What sets one architecture apart from the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Traits {
    /// `general.architecture` and the prefix of every hyper-parameter's key.
    pub name: &'static str,
    pub rope_style: RopeStyle,
    /// Queries and keys are normalized per head before the rotation.
    pub qk_norm: bool,
    /// Query, key and value projections add a bias.
    pub qkv_bias: bool,
    /// The file may divide each rotation frequency by a factor of its own (`rope_freqs.weight`).
    pub rope_factors: bool,
}

/// Which pairs of a head's values a rotation turns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopeStyle {
    /// `(2i, 2i + 1)`: ggml's NORMAL, used by llama.
    Interleaved,
    /// `(i, i + rope_dimension_count / 2)`: NEOX, used by qwen.
    Neox,
}

impl Architecture {
    pub const ALL: [Self; 3] = [Self::Llama, Self::Qwen2, Self::Qwen3];

    /// What this architecture does and the others may not.
    pub const fn traits(self) -> Traits {
        match self {
            Self::Llama => Traits {
                name: "llama",
                rope_style: RopeStyle::Interleaved,
                qk_norm: false,
                qkv_bias: false,
                rope_factors: true,
            },
            Self::Qwen2 => Traits {
                name: "qwen2",
                rope_style: RopeStyle::Neox,
                qk_norm: false,
                qkv_bias: true,
                rope_factors: false,
            },
            Self::Qwen3 => Traits {
                name: "qwen3",
                rope_style: RopeStyle::Neox,
                qk_norm: true,
                qkv_bias: false,
                rope_factors: false,
            },
        }
    }

    fn from_gguf(gguf: &Gguf) -> Result<Self> {
        const KEY: &str = "general.architecture";
        let name = gguf.str(KEY)?.with_context(|| missing(KEY))?;
        Self::ALL
            .into_iter()
            .find(|architecture| architecture.traits().name == name)
            .with_context(|| {
                let supported = Self::ALL.map(|architecture| architecture.traits().name);
                format!(
                    "the architecture {} is not supported, only {} are",
                    quoted(name),
                    supported.join(", ")
                )
            })
    }
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
    /// Reads and checks the hyper-parameters. An error names the key, its value and what is expected.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self> {
        let architecture = Architecture::from_gguf(gguf)?;
        let traits = architecture.traits();
        let keys = Keys {
            gguf,
            prefix: traits.name,
        };
        keys.refuse_other_designs()?;

        let hidden_size = keys.size("embedding_length")?;
        let head_count = keys.size("attention.head_count")?;
        let head_count_kv = keys.head_count_kv(head_count)?;
        let head_dim = keys.head_dim(hidden_size, head_count)?;
        Ok(Self {
            architecture,
            context_length: keys.size_up_to("context_length", 1 << 30)?,
            block_count: keys.size_up_to("block_count", 1 << 12)?,
            hidden_size,
            feed_forward_length: keys.size("feed_forward_length")?,
            vocab_size: vocab_size(gguf)?,
            head_count,
            head_count_kv,
            head_dim,
            rms_norm_epsilon: keys.rms_norm_epsilon()?,
            rope_style: traits.rope_style,
            rope_freq_base: keys.rope_freq_base()?,
            rope_dimension_count: keys.rope_dimension_count(head_dim)?,
            rope_position_scale: keys.rope_position_scale()?,
        })
    }
}

/// Tokens in the vocabulary; the embedding must have a row for each.
fn vocab_size(gguf: &Gguf) -> Result<usize> {
    const TOKENS: &str = "tokenizer.ggml.tokens";
    const EMBEDDING: &str = "token_embd.weight";
    let tokens = gguf.array(TOKENS)?.with_context(|| missing(TOKENS))?.len();
    let rows = gguf
        .tensor(EMBEDDING)
        .with_context(|| format!("the tensor \"{EMBEDDING}\" is missing"))?
        .rows();
    ensure!(
        tokens == rows,
        "vocabulary and embedding disagree: \"{TOKENS}\" has {tokens} tokens, the tensor \"{EMBEDDING}\" {rows} rows"
    );
    Ok(tokens)
}

/// The hyper-parameters of one architecture; keys are given without its prefix.
struct Keys<'a> {
    gguf: &'a Gguf,
    prefix: &'static str,
}

impl Keys<'_> {
    fn full(&self, key: &str) -> String {
        format!("{}.{key}", self.prefix)
    }

    /// A positive integer that must be there, no larger than any model's.
    fn size(&self, key: &str) -> Result<usize> {
        self.size_up_to(key, 1 << 20)
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

    /// One number, or an array with the same number for every layer.
    fn head_count_kv(&self, head_count: usize) -> Result<usize> {
        let key = self.full("attention.head_count_kv");
        let value = match self.gguf.get(&key) {
            None => return Ok(head_count),
            Some(Value::Array(per_layer)) => {
                let first = per_layer
                    .first()
                    .with_context(|| format!("metadata key \"{key}\" is an empty array"))?;
                if let Some((layer, other)) = per_layer
                    .iter()
                    .enumerate()
                    .find(|(_, other)| *other != first)
                {
                    bail!(
                        "metadata key \"{key}\" is {} for layer 0 and {} for layer {layer}; \
                         layers that differ are not supported",
                        describe(first),
                        describe(other)
                    );
                }
                first
            }
            Some(value) => value,
        };
        match value.as_u64().map(usize::try_from) {
            Some(Ok(count)) if count > 0 && head_count.is_multiple_of(count) => Ok(count),
            _ => bail!(
                "metadata key \"{key}\" is {}, expected a divisor of the {head_count} query heads",
                describe(value)
            ),
        }
    }

    fn head_dim(&self, hidden_size: usize, head_count: usize) -> Result<usize> {
        const MAX: usize = 1 << 12;
        let head_dim = match self.optional_size("attention.key_length", MAX)? {
            Some(head_dim) => head_dim,
            None => {
                ensure!(
                    hidden_size.is_multiple_of(head_count) && hidden_size / head_count <= MAX,
                    "metadata keys \"{}\" and \"{}\" are {hidden_size} and {head_count}, which gives no head length up to {MAX}",
                    self.full("embedding_length"),
                    self.full("attention.head_count"),
                );
                hidden_size / head_count
            }
        };
        let key = self.full("attention.key_length");
        ensure!(
            head_dim.is_multiple_of(2),
            "metadata key \"{key}\" is {head_dim}, expected an even number (it rotates in pairs)"
        );
        let value_length = self.optional_size("attention.value_length", MAX)?;
        if let Some(value_length) = value_length {
            ensure!(
                value_length == head_dim,
                "metadata key \"{}\" is {value_length}, expected the key length {head_dim}",
                self.full("attention.value_length")
            );
        }
        Ok(head_dim)
    }

    fn rms_norm_epsilon(&self) -> Result<f32> {
        const KEY: &str = "attention.layer_norm_rms_epsilon";
        let epsilon = self.float(KEY)?.with_context(|| missing(&self.full(KEY)))?;
        ensure!(
            (0.0..1.0).contains(&epsilon),
            "metadata key \"{}\" is {epsilon}, expected 0 or more and less than 1",
            self.full(KEY)
        );
        Ok(epsilon)
    }

    fn rope_freq_base(&self) -> Result<f32> {
        const KEY: &str = "rope.freq_base";
        let base = self.float(KEY)?.unwrap_or(10_000.0);
        ensure!(
            base >= 1.0,
            "metadata key \"{}\" is {base}, expected 1 or more",
            self.full(KEY)
        );
        Ok(base)
    }

    fn rope_dimension_count(&self, head_dim: usize) -> Result<usize> {
        const KEY: &str = "rope.dimension_count";
        let count = self.optional_size(KEY, usize::MAX)?.unwrap_or(head_dim);
        ensure!(
            count.is_multiple_of(2) && count <= head_dim,
            "metadata key \"{}\" is {count}, expected an even number up to the head length {head_dim}",
            self.full(KEY)
        );
        Ok(count)
    }

    fn rope_position_scale(&self) -> Result<f32> {
        let key = self.full("rope.scaling.type");
        match self.gguf.str(&key)? {
            None | Some("none") => Ok(1.0),
            Some("linear") => {
                const KEY: &str = "rope.scaling.factor";
                let factor = self.float(KEY)?.with_context(|| missing(&self.full(KEY)))?;
                ensure!(
                    (1e-3..=1e6).contains(&factor),
                    "metadata key \"{}\" is {factor}, expected 0.001 to 1000000",
                    self.full(KEY)
                );
                Ok(1.0 / factor)
            }
            Some(other) => bail!(
                "metadata key \"{key}\" is {}, supported are none and linear",
                quoted(other)
            ),
        }
    }

    /// Refuses files whose layers compute something that sharpi does not.
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

fn missing(key: &str) -> String {
    format!("the metadata key \"{key}\" is missing")
}
