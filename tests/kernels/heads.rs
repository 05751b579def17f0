//! Heads, their rotary embeddings and the KV cache, on the host.

use std::ops::Range;

use anyhow::Result;
use half::f16;

use crate::{
    common::gguf_writer::Random,
    harness::{Buffer, EPSILON, norm_weights, sum_of_squares},
    matrices::Sum,
};

pub const POSITIONS: [usize; 6] = [0, 1, 127, 128, 500, 1023];

pub const HEAD_DIMS: [usize; 4] = [64, 128, 256, 512];

/// How heads are normalized and rotated.
pub struct Rope {
    pub q_norm: Option<Vec<f32>>,
    pub k_norm: Option<Vec<f32>>,
    pub v_norm: Option<Vec<f32>>,
    /// Radians a position.
    pub frequencies: Vec<f64>,
    pub interleaved: bool,
    /// Of the rotated values.
    pub factor: f32,
    /// How far a token's position in the text is behind its place among those that are cached.
    pub evicted: usize,
}

impl Rope {
    pub fn new(random: &mut Random, head_dim: usize) -> Self {
        let choices = random.u64() >> 32;
        let mut norm = || (choices & 1 == 1).then(|| norm_weights(random, head_dim));
        let (q_norm, k_norm) = (norm(), norm());
        let v_norm = (choices & 16 == 16).then(|| norm_weights(random, head_dim));
        let rope_dims = if choices & 2 == 2 {
            head_dim
        } else {
            head_dim * 3 / 4
        };
        let frequency = |i: usize| 10_000f64.powf(-2.0 * i as f64 / rope_dims as f64);
        Self {
            q_norm,
            k_norm,
            v_norm,
            frequencies: (0..rope_dims / 2).map(frequency).collect(),
            interleaved: choices & 4 == 4,
            factor: if choices & 8 == 8 { 1.19 } else { 1.0 },
            evicted: if choices & 32 == 32 { 300 } else { 0 },
        }
    }

    pub fn rope_dims(&self) -> usize {
        2 * self.frequencies.len()
    }

    /// A value head as it is cached, and what float32 arithmetic may add to its rounding.
    pub fn value(&self, head: &[f32]) -> (Vec<f64>, f64) {
        let slack = if self.v_norm.is_some() { 1e-5 } else { 1e-7 };
        (normed(head, self.v_norm.as_ref()), slack)
    }

    pub fn apply(&self, head: &[f32], norm: Option<&Vec<f32>>, place: usize) -> Vec<f64> {
        let mut values = normed(head, norm);
        let half = self.frequencies.len();
        for (i, &frequency) in self.frequencies.iter().enumerate() {
            let (first, second) = match self.interleaved {
                true => (2 * i, 2 * i + 1),
                false => (i, i + half),
            };
            let (sin, cos) = ((place + self.evicted) as f64 * frequency).sin_cos();
            let (a, b) = (values[first], values[second]);
            values[first] = (a * cos - b * sin) * f64::from(self.factor);
            values[second] = (a * sin + b * cos) * f64::from(self.factor);
        }
        values
    }

    pub fn name(&self) -> String {
        format!(
            "norm {}, of values {}, {} dimensions rotated, interleaved {}, times {}",
            self.q_norm.is_some(),
            self.v_norm.is_some(),
            self.rope_dims(),
            self.interleaved,
            self.factor
        )
    }
}

fn normed(head: &[f32], norm: Option<&Vec<f32>>) -> Vec<f64> {
    let mut values: Vec<f64> = head.iter().map(|&v| f64::from(v)).collect();
    if let Some(norm) = norm {
        let mean = sum_of_squares(head) / head.len() as f64;
        let scale = (mean + f64::from(EPSILON)).sqrt().recip();
        for (v, &w) in values.iter_mut().zip(norm) {
            *v *= scale * f64::from(w);
        }
    }
    values
}

/// How far a token sees, and how great its scores become.
#[derive(Clone, Copy)]
pub struct Limits {
    /// Tokens, itself included; 0: all before it, too.
    pub window: usize,
    /// 0: none
    pub softcap: f32,
}

impl Limits {
    /// Of the case of this number: none at all of some, all combinations of others.
    pub fn of_case(count: usize) -> Self {
        Self {
            window: [0, 100, 0, 600, 1][count % 5],
            softcap: if count % 11 < 4 { 2.0 } else { 0.0 },
        }
    }

    /// What the token at `position` sees.
    pub fn seen(&self, position: usize) -> Range<usize> {
        let first = match self.window {
            0 => 0,
            window => (position + 1).saturating_sub(window),
        };
        first..position + 1
    }

    /// Slots of the smallest ring for chunks of `tokens` tokens.
    pub fn ring_len(&self, tokens: usize) -> usize {
        (self.window + tokens).next_multiple_of(128)
    }

    pub fn name(&self) -> String {
        format!("window {}, softcap {}", self.window, self.softcap)
    }
}

/// The address of an optional vector.
pub fn optional(values: &Option<Vec<f32>>) -> Result<(Option<Buffer>, u64)> {
    let buffer = values.as_deref().map(Buffer::new).transpose()?;
    let address = buffer.as_ref().map_or(0, Buffer::address);
    Ok((buffer, address))
}

/// What scores are multiplied with, so that powers of two give the softmax: not what the head size alone would give.
pub fn query_scale(head_dim: usize) -> f64 {
    0.9 * std::f64::consts::LOG2_E / (head_dim as f64).sqrt()
}

/// Random keys or values (head_dim, context, head_count_kv) of the tokens `filled`, NaN of all others.
pub fn random_cache(
    random: &mut Random,
    head_dim: usize,
    context: usize,
    head_count_kv: usize,
    filled: Range<usize>,
) -> Vec<f16> {
    let mut cache = vec![f16::from_bits(0xffff); head_dim * context * head_count_kv];
    for plane in cache.chunks_exact_mut(head_dim * context) {
        for value in &mut plane[filled.start * head_dim..filled.end * head_dim] {
            *value = f16::from_f32(random.centered(1.0));
        }
    }
    cache
}

/// The same cache as a ring of `capacity` slots, with the tokens `kept`, and NaN in all other slots.
pub fn in_ring(
    cache: &[f16],
    head_dim: usize,
    context: usize,
    capacity: usize,
    kept: Range<usize>,
) -> Vec<f16> {
    let planes = cache.chunks_exact(head_dim * context);
    let mut ring = vec![f16::from_bits(0xffff); head_dim * capacity * planes.len()];
    for (from, to) in planes.zip(ring.chunks_exact_mut(head_dim * capacity)) {
        for token in kept.clone() {
            let (slot, token) = (token % capacity * head_dim, token * head_dim);
            to[slot..slot + head_dim].copy_from_slice(&from[token..token + head_dim]);
        }
    }
    ring
}

/// Attention of a query, scaled, at `position` to what it sees of a key/value head.
pub fn attend(
    query: &[f64],
    keys: &[f32],
    values: &[f32],
    position: usize,
    limits: Limits,
) -> Vec<f64> {
    let head_dim = query.len();
    let seen = limits.seen(position);
    let seen = seen.start * head_dim..seen.end * head_dim;
    let (keys, values) = (&keys[seen.clone()], &values[seen]);
    let capped = |score: f64| match f64::from(limits.softcap) {
        0.0 => score,
        softcap => softcap * (score / softcap).tanh(),
    };
    let keys = keys.chunks_exact(head_dim);
    let scores: Vec<f64> = keys.map(|key| capped(Sum::of(key, query).value)).collect();
    let top = scores.iter().copied().fold(f64::MIN, f64::max);
    let (mut out, mut all) = (vec![0.0; head_dim], 0.0);
    for (score, value) in scores.iter().zip(values.chunks_exact(head_dim)) {
        let weight = (score - top).exp2();
        all += weight;
        for (out, &v) in out.iter_mut().zip(value) {
            *out += weight * f64::from(v);
        }
    }
    out.iter().map(|v| v / all).collect()
}

/// Whether two caches, rings of `context` slots, are the same bits but for `tokens`.
pub fn same_but_for(
    before: &[f16],
    after: &[f16],
    head_dim: usize,
    context: usize,
    tokens: Range<usize>,
) -> bool {
    let rows = before
        .chunks_exact(head_dim)
        .zip(after.chunks_exact(head_dim));
    let first = tokens.start % context;
    rows.enumerate()
        .filter(|(row, _)| (row % context + context - first) % context >= tokens.len())
        .all(|(_, (a, b))| same_bits(a, b))
}

pub fn same_bits(a: &[f16], b: &[f16]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}
