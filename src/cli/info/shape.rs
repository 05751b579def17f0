//! A model's hyper-parameters.

use std::{
    fmt::{self, Display},
    io::{self, Write},
};

use anyhow::Result;
use indicatif::HumanCount;
use serde::Serialize;

use super::row;
use crate::model::{
    Decoder, Gguf,
    decoder::{KeyValues, Layer},
};

#[derive(Serialize)]
pub struct HyperParameters {
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
    pub fn new(gguf: &Gguf, decoder: &Decoder) -> Result<Self> {
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

    pub fn write_rows(&self, out: &mut impl Write) -> io::Result<()> {
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
