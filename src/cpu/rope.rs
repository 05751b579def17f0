//! Rotary position embedding: Su et al., "RoFormer", <https://arxiv.org/abs/2104.09864>.

use super::simd::Matrix;
use crate::model::decoder::{Rope, RopeStyle};

/// The rotations of each position of a chunk.
pub struct Rotations {
    style: RopeStyle,
    /// (dimensions / 2)
    frequencies: Vec<f64>,
    /// What the rotated values are multiplied with.
    factor: f64,
    /// (dimensions / 2, tokens)
    cosines: Matrix,
    sines: Matrix,
}

impl Rotations {
    /// For chunks of up to `tokens` tokens, or `None` where there is no memory for them.
    pub fn new(rope: &Rope, head_dim: usize, tokens: usize) -> Option<Self> {
        let frequencies = rope.frequencies();
        Some(Self {
            style: rope.style,
            factor: f64::from(rope.rotation_factor(head_dim)),
            cosines: Matrix::zeros(frequencies.len(), tokens)?,
            sines: Matrix::zeros(frequencies.len(), tokens)?,
            frequencies,
        })
    }

    /// Prepares the rotations of `tokens` positions from `position` on.
    pub fn seek(&mut self, position: usize, tokens: usize) {
        for token in 0..tokens {
            let angles = self
                .frequencies
                .iter()
                .map(|frequency| (position + token) as f64 * frequency);
            let rows = self
                .cosines
                .row_mut(token)
                .iter_mut()
                .zip(self.sines.row_mut(token));
            for ((cosine, sine), angle) in rows.zip(angles) {
                let scaled = |value: f64| (self.factor * value) as f32;
                (*sine, *cosine) = (scaled(angle.sin()), scaled(angle.cos()));
            }
        }
    }

    /// Turns the leading values of one head, for the chunk's token number `token`.
    pub fn rotate(&self, token: usize, head: &mut [f32]) {
        let pairs = self.frequencies.len();
        for (i, (cosine, sine)) in self
            .cosines
            .row(token)
            .iter()
            .zip(self.sines.row(token))
            .enumerate()
        {
            let (a, b) = match self.style {
                RopeStyle::Interleaved => (2 * i, 2 * i + 1),
                RopeStyle::Neox => (i, i + pairs),
            };
            (head[a], head[b]) = (
                head[a] * cosine - head[b] * sine,
                head[a] * sine + head[b] * cosine,
            );
        }
    }
}
