//! Rotary position embedding: Su et al., "RoFormer", <https://arxiv.org/abs/2104.09864>.

use super::simd::Matrix;
use crate::model::{Config, config::RopeStyle};

/// The rotations of each position of a chunk.
pub struct Rope {
    style: RopeStyle,
    /// (rope_dimension_count / 2): radians per position
    frequencies: Vec<f64>,
    /// (rope_dimension_count / 2, tokens)
    cosines: Matrix,
    sines: Matrix,
}

impl Rope {
    /// For chunks of up to `tokens` tokens. `factors` (rope_dimension_count / 2) divide the frequencies
    /// `rope_freq_base^(-2i / rope_dimension_count)`.
    pub fn new(config: &Config, factors: &[f32], tokens: usize) -> Option<Self> {
        let count = config.rope_dimension_count;
        let frequency = |(i, factor): (usize, &f32)| {
            let exponent = -((2 * i) as f64) / count as f64;
            f64::from(config.rope_position_scale) * f64::from(config.rope_freq_base).powf(exponent)
                / f64::from(*factor)
        };
        Some(Self {
            style: config.rope_style,
            frequencies: factors.iter().enumerate().map(frequency).collect(),
            cosines: Matrix::zeros(count / 2, tokens)?,
            sines: Matrix::zeros(count / 2, tokens)?,
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
                (*sine, *cosine) = (angle.sin() as f32, angle.cos() as f32);
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
