//! Heads, their rotary embeddings and the KV cache, on the host.

use anyhow::Result;
use half::f16;

use crate::{
    common::gguf_writer::Random,
    harness::{Buffer, EPSILON, norm_weights, sum_of_squares},
    matrices::Sum,
};

pub const POSITIONS: [usize; 6] = [0, 1, 127, 128, 500, 1023];

pub const HEAD_DIMS: [usize; 3] = [64, 128, 256];

/// How heads are normalized and rotated.
pub struct Rope {
    pub q_norm: Option<Vec<f32>>,
    pub k_norm: Option<Vec<f32>>,
    /// Radians a position.
    pub frequencies: Vec<f64>,
    pub interleaved: bool,
    /// Of the rotated values.
    pub factor: f32,
}

impl Rope {
    pub fn new(random: &mut Random, head_dim: usize) -> Self {
        let choices = random.u64() >> 32;
        let mut norm = || (choices & 1 == 1).then(|| norm_weights(random, head_dim));
        let (q_norm, k_norm) = (norm(), norm());
        let rope_dims = if choices & 2 == 2 {
            head_dim
        } else {
            head_dim * 3 / 4
        };
        let frequency = |i: usize| 10_000f64.powf(-2.0 * i as f64 / rope_dims as f64);
        Self {
            q_norm,
            k_norm,
            frequencies: (0..rope_dims / 2).map(frequency).collect(),
            interleaved: choices & 4 == 4,
            factor: if choices & 8 == 8 { 1.19 } else { 1.0 },
        }
    }

    pub fn rope_dims(&self) -> usize {
        2 * self.frequencies.len()
    }

    pub fn apply(&self, head: &[f32], norm: Option<&Vec<f32>>, position: usize) -> Vec<f64> {
        let mut values: Vec<f64> = head.iter().map(|&v| f64::from(v)).collect();
        if let Some(norm) = norm {
            let mean = sum_of_squares(head) / head.len() as f64;
            let scale = (mean + f64::from(EPSILON)).sqrt().recip();
            for (v, &w) in values.iter_mut().zip(norm) {
                *v *= scale * f64::from(w);
            }
        }
        let half = self.frequencies.len();
        for (i, &frequency) in self.frequencies.iter().enumerate() {
            let (first, second) = match self.interleaved {
                true => (2 * i, 2 * i + 1),
                false => (i, i + half),
            };
            let (sin, cos) = (position as f64 * frequency).sin_cos();
            let (a, b) = (values[first], values[second]);
            values[first] = (a * cos - b * sin) * f64::from(self.factor);
            values[second] = (a * sin + b * cos) * f64::from(self.factor);
        }
        values
    }

    pub fn name(&self) -> String {
        format!(
            "norm {}, {} dimensions rotated, interleaved {}, times {}",
            self.q_norm.is_some(),
            self.rope_dims(),
            self.interleaved,
            self.factor
        )
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

/// Random keys or values (head_dim, context, head_count_kv), NaN from token `filled` on.
pub fn random_cache(
    random: &mut Random,
    head_dim: usize,
    context: usize,
    head_count_kv: usize,
    filled: usize,
) -> Vec<f16> {
    let mut cache = vec![f16::from_bits(0xffff); head_dim * context * head_count_kv];
    for plane in cache.chunks_exact_mut(head_dim * context) {
        for value in &mut plane[..filled * head_dim] {
            *value = f16::from_f32(random.centered(1.0));
        }
    }
    cache
}

/// Attention of a query, scaled, to the first `visible` tokens of a key/value head.
pub fn attend(query: &[f64], keys: &[f32], values: &[f32], visible: usize) -> Vec<f64> {
    let head_dim = query.len();
    let keys = keys.chunks_exact(head_dim).take(visible);
    let scores: Vec<f64> = keys.map(|key| Sum::of(key, query).value).collect();
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

/// Whether two caches are the same bits but for `tokens`.
pub fn same_but_for(
    before: &[f16],
    after: &[f16],
    head_dim: usize,
    context: usize,
    tokens: std::ops::Range<usize>,
) -> bool {
    let rows = before
        .chunks_exact(head_dim)
        .zip(after.chunks_exact(head_dim));
    rows.enumerate()
        .filter(|(row, _)| !tokens.contains(&(row % context)))
        .all(|(_, (a, b))| a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits()))
}
