//! `sharpi info`: what a model file holds, also one that cannot be run.

use std::{
    collections::BTreeMap,
    fmt::{self, Display},
    io::{self, Write},
};

use anyhow::{Context, Result};
use indicatif::{HumanBytes, HumanCount};
use serde::Serialize;

use super::{
    escape::escaped,
    exit::Outcome,
    output::{WRITING, write_json_line},
    resolve::ModelSource,
};
use crate::{
    model::{
        Decoder, Gguf, RopeOptions, Tokenizer, arch,
        decoder::{KeyValues, Layer},
    },
    quant::TensorType,
};

#[derive(Serialize)]
struct Info<'a> {
    file: &'a str,
    file_bytes: u64,
    name: Option<&'a str>,
    architecture: &'a str,
    parameter_count: u64,
    /// `None` where the file is no model that can be run.
    hyper_parameters: Option<HyperParameters>,
    /// Why not.
    cannot_run: Option<String>,
    tensor_types: Vec<TypeCount>,
    tokenizer: TokenizerInfo<'a>,
    chat_template: bool,
    /// The file's own `general.sampling.*`, keys without that prefix.
    sampling: BTreeMap<&'a str, &'a serde_json::Value>,
}

#[derive(Serialize)]
struct HyperParameters {
    context_length: usize,
    block_count: usize,
    hidden_size: usize,
    feed_forward_length: PerLayer<usize>,
    vocab_size: usize,
    head_count: PerLayer<usize>,
    head_count_kv: PerLayer<usize>,
    head_dim: PerLayer<usize>,
    rms_norm_epsilon: f32,
    rope_freq_base: PerLayer<f32>,
    rope_dimension_count: PerLayer<usize>,
    /// Tokens that a token attends over, of layers that do not see all.
    sliding_window: PerLayer<Option<usize>>,
    /// Layers that read the keys and values of others.
    shared_kv_layers: usize,
    /// Values that a token gives to each layer.
    token_input_length: Option<usize>,
}

impl HyperParameters {
    fn write_rows(&self, out: &mut impl Write) -> io::Result<()> {
        let count = |n: usize| HumanCount(n as u64);
        row(out, "context length", count(self.context_length))?;
        row(out, "layers", self.block_count)?;
        row(out, "hidden size", count(self.hidden_size))?;
        row(
            out,
            "feed-forward length",
            self.feed_forward_length.map(count),
        )?;
        row(
            out,
            "attention heads",
            format_args!(
                "{} of {} values, {} for keys and values",
                self.head_count, self.head_dim, self.head_count_kv
            ),
        )?;
        row(
            out,
            "rotary embedding",
            format_args!(
                "{} values of a head, base {}",
                self.rope_dimension_count, self.rope_freq_base
            ),
        )?;
        let sliding = self.sliding_window.values(self.block_count);
        let windows: Vec<usize> = sliding.flatten().collect();
        if let Some(window) = windows.first() {
            let (sliding, all) = (windows.len(), self.block_count);
            let window = format!("{} tokens, in {sliding} of {all} layers", count(*window));
            row(out, "sliding window", window)?;
        }
        if self.shared_kv_layers > 0 {
            let sharing = format!("those of others in {} layers", self.shared_kv_layers);
            row(out, "keys and values", sharing)?;
        }
        if let Some(len) = self.token_input_length {
            row(
                out,
                "inputs of tokens",
                format!("{} values a layer", count(len)),
            )?;
        }
        row(
            out,
            "RMS norm epsilon",
            format_args!("{:e}", self.rms_norm_epsilon),
        )
    }

    fn new(gguf: &Gguf, decoder: &Decoder) -> Result<Self> {
        let layers = &decoder.layers[..];
        let architecture = gguf.str("general.architecture")?.unwrap_or_default();
        let epsilon = format!("{architecture}.attention.layer_norm_rms_epsilon");
        Ok(Self {
            context_length: decoder.context_length,
            block_count: layers.len(),
            hidden_size: decoder.hidden_size,
            feed_forward_length: PerLayer::new(layers, |layer| {
                layer.feed_forward.gate.weights.rows()
            }),
            vocab_size: decoder.vocab_size,
            head_count: PerLayer::new(layers, |layer| layer.attention.head_count),
            head_count_kv: PerLayer::new(layers, |layer| layer.attention.head_count_kv),
            head_dim: PerLayer::new(layers, |layer| layer.attention.head_dim),
            rms_norm_epsilon: gguf.f64(&epsilon)?.unwrap_or_default() as f32,
            rope_freq_base: PerLayer::new(layers, |layer| layer.attention.rope.base),
            rope_dimension_count: PerLayer::new(layers, |layer| layer.attention.rope.dimensions),
            sliding_window: PerLayer::new(layers, |layer| layer.attention.window),
            shared_kv_layers: layers
                .iter()
                .filter(|layer| matches!(layer.attention.kv, KeyValues::SharedWith(_)))
                .count(),
            token_input_length: layers
                .iter()
                .find_map(|layer| Some(layer.token_input.as_ref()?.gate.weights.rows())),
        })
    }
}

/// One value where all layers have it, else that of each. Shown, it tells how many layers have which.
#[derive(Serialize)]
#[serde(untagged)]
enum PerLayer<T> {
    Same(T),
    Each(Vec<T>),
}

impl<T: Copy + PartialEq> PerLayer<T> {
    fn new(layers: &[Layer], value: impl Fn(&Layer) -> T) -> Self {
        let values: Vec<T> = layers.iter().map(value).collect();
        match values.first() {
            Some(&first) if values.iter().all(|&value| value == first) => Self::Same(first),
            _ => Self::Each(values),
        }
    }
}

impl<T: Copy> PerLayer<T> {
    fn values(&self, layers: usize) -> impl Iterator<Item = T> {
        (0..layers).map(|layer| match self {
            Self::Same(value) => *value,
            Self::Each(values) => values[layer],
        })
    }

    fn map<U>(&self, f: impl Fn(T) -> U) -> PerLayer<U> {
        match self {
            Self::Same(value) => PerLayer::Same(f(*value)),
            Self::Each(values) => PerLayer::Each(values.iter().copied().map(f).collect()),
        }
    }
}

impl<T: Display> Display for PerLayer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Same(value) => value.fmt(f),
            Self::Each(values) => {
                let mut counts: Vec<(String, usize)> = Vec::new();
                for value in values.iter().map(T::to_string) {
                    match counts.iter_mut().find(|(other, _)| *other == value) {
                        Some((_, count)) => *count += 1,
                        None => counts.push((value, 1)),
                    }
                }
                let counts = counts
                    .iter()
                    .map(|(value, count)| format!("{value} (in {count})"));
                f.write_str(&counts.collect::<Vec<_>>().join(" or "))
            }
        }
    }
}

/// All tensors of one type.
#[derive(Serialize)]
struct TypeCount {
    #[serde(rename = "type")]
    tensor_type: &'static str,
    tensors: usize,
    bytes: u64,
}

#[derive(Serialize)]
struct TokenizerInfo<'a> {
    model: &'a str,
    pre: Option<&'a str>,
    vocab_size: usize,
    end_of_generation: Vec<Piece<'a>>,
}

#[derive(Serialize)]
struct Piece<'a> {
    id: u32,
    piece: &'a str,
}

pub fn run(source: &ModelSource, json: bool) -> Result<Outcome> {
    let gguf = source.open_gguf()?;
    let tokenizer = Tokenizer::from_gguf(&gguf);
    // Of a model with a rotation for long contexts, that one.
    let rope = source.rope(Some(usize::MAX));
    let info = Info::new(&gguf, &tokenizer, &rope)?;
    let mut out = io::stdout().lock();
    let written = match json {
        true => write_json_line(&mut out, &info),
        false => info.write_table(&mut out),
    };
    written.context(WRITING)?;
    Ok(Outcome::Done)
}

impl<'a> Info<'a> {
    fn new(gguf: &'a Gguf, tokenizer: &'a Result<Tokenizer>, rope: &RopeOptions) -> Result<Self> {
        let decoder = arch::describe(gguf, arch::ALL, rope);
        let cannot_run = decoder.as_ref().err().or(tokenizer.as_ref().err());
        let ends = |tokenizer: &'a Tokenizer| {
            let ends = tokenizer.end_of_generation().iter();
            let piece = |&id| Piece {
                id,
                piece: tokenizer.piece(id),
            };
            ends.map(piece).collect()
        };
        let sampling = gguf
            .metadata()
            .filter_map(|(key, value)| Some((key.strip_prefix("general.sampling.")?, value)));
        Ok(Self {
            file: gguf.name(),
            file_bytes: gguf.file_bytes(),
            name: gguf.str("general.name")?,
            architecture: gguf.str("general.architecture")?.unwrap_or_default(),
            parameter_count: gguf
                .tensors()
                .map(|tensor| (tensor.row_len() * tensor.rows()) as u64)
                .sum(),
            cannot_run: cannot_run.map(|error| format!("{error:#}")),
            hyper_parameters: decoder
                .as_ref()
                .ok()
                .map(|decoder| HyperParameters::new(gguf, decoder))
                .transpose()?,
            tensor_types: count_types(gguf),
            tokenizer: TokenizerInfo {
                model: gguf.str("tokenizer.ggml.model")?.unwrap_or_default(),
                pre: gguf.str("tokenizer.ggml.pre")?,
                vocab_size: gguf.array("tokenizer.ggml.tokens")?.map_or(0, <[_]>::len),
                end_of_generation: tokenizer.as_ref().map_or_else(|_| Vec::new(), ends),
            },
            chat_template: gguf.str("tokenizer.chat_template")?.is_some(),
            sampling: sampling.collect(),
        })
    }

    fn write_table(&self, out: &mut impl Write) -> io::Result<()> {
        let tokenizer = &self.tokenizer;
        row(out, "file", self.file)?;
        row(out, "size", HumanBytes(self.file_bytes))?;
        row(out, "name", self.name.unwrap_or("-"))?;
        row(out, "architecture", self.architecture)?;
        row(out, "parameters", HumanCount(self.parameter_count))?;
        if let Some(shape) = &self.hyper_parameters {
            shape.write_rows(out)?;
        }
        if let Some(reason) = &self.cannot_run {
            row(out, "cannot be run", reason)?;
        }
        for (index, kind) in self.tensor_types.iter().enumerate() {
            let label = if index == 0 { "tensors" } else { "" };
            row(
                out,
                label,
                format_args!(
                    "{:<5} {:>5}  {}",
                    kind.tensor_type,
                    kind.tensors,
                    HumanBytes(kind.bytes)
                ),
            )?;
        }
        row(
            out,
            "tokenizer",
            format_args!(
                "{} ({}), {} tokens",
                tokenizer.model,
                tokenizer.pre.unwrap_or("no pre-tokenizer named"),
                HumanCount(tokenizer.vocab_size as u64)
            ),
        )?;
        let ends: Vec<_> = tokenizer
            .end_of_generation
            .iter()
            .map(|end| format!("{} ({})", end.piece, end.id))
            .collect();
        row(out, "end of generation", ends.join(", "))?;
        row(
            out,
            "chat template",
            if self.chat_template {
                "yes"
            } else {
                "no: `run` takes --raw prompts only"
            },
        )?;
        for (key, value) in &self.sampling {
            row(out, "sampling", format_args!("{key} {value}"))?;
        }
        out.flush()
    }
}

/// Tensors and bytes by type, the types in ggml's order.
fn count_types(gguf: &Gguf) -> Vec<TypeCount> {
    let mut counts: BTreeMap<TensorType, (usize, u64)> = BTreeMap::new();
    for tensor in gguf.tensors() {
        let (tensors, bytes) = counts.entry(tensor.tensor_type()).or_default();
        *tensors += 1;
        *bytes += tensor.bytes().len() as u64;
    }
    let counts = counts.into_iter();
    counts
        .map(|(kind, (tensors, bytes))| TypeCount {
            tensor_type: kind.name(),
            tensors,
            bytes,
        })
        .collect()
}

fn row(out: &mut impl Write, label: &str, value: impl Display) -> io::Result<()> {
    writeln!(out, "{label:<20} {}", escaped(&value.to_string()))
}
