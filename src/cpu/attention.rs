//! Causal attention with grouped queries over a float32 KV cache.

use super::simd::{Buffer, LANES, Lanes, vectorized};
use crate::{math::exp, model::Config, quant::vectorize_inside};

/// Blocks of positions, or lanes of a head, that are summed at once.
const TILE: usize = 4;

/// Keys and values of every position so far.
pub struct KvCache {
    /// (LANES positions, head_dim, blocks of positions, head_count_kv, layers): keys that sixteen positions share a
    /// [`Lanes`], one score in each lane
    keys: Buffer,
    /// (head_dim padded to lanes, positions, head_count_kv, layers)
    values: Buffer,
    head_count_kv: usize,
    head_dim: usize,
    /// Positions, a multiple of [`LANES`].
    positions: usize,
}

impl KvCache {
    /// Room for `context_len` positions, or `None` where there is no memory for it.
    pub fn new(config: &Config, context_len: usize) -> Option<Self> {
        let positions = context_len.checked_next_multiple_of(LANES)?;
        let heads = config.head_count_kv * config.block_count;
        let keys = (heads * config.head_dim).checked_mul(positions / LANES)?;
        let values = (heads * config.head_dim.div_ceil(LANES)).checked_mul(positions)?;
        Some(Self {
            keys: Buffer::zeros(keys)?,
            values: Buffer::zeros(values)?,
            head_count_kv: config.head_count_kv,
            head_dim: config.head_dim,
            positions,
        })
    }

    /// Stores the key and value (head_dim, head_count_kv) of one position.
    pub fn store(&mut self, layer: usize, position: usize, key: &[f32], value: &[f32]) {
        let heads = key
            .chunks_exact(self.head_dim)
            .zip(value.chunks_exact(self.head_dim));
        for (head, (key, value)) in heads.enumerate() {
            let head = layer * self.head_count_kv + head;
            let block = (head * self.positions + position) / LANES;
            let keys = &mut self.keys.lanes_mut()[block * self.head_dim..][..self.head_dim];
            for (lanes, key) in keys.iter_mut().zip(key) {
                lanes.0[position % LANES] = *key;
            }
            let stride = self.head_dim.div_ceil(LANES);
            let values = &mut self.values.lanes_mut()
                [(head * self.positions + position) * stride..][..stride];
            bytemuck::cast_slice_mut(values)[..self.head_dim].copy_from_slice(value);
        }
    }

    /// Attends with one head's `query` (head_dim) over the first `positions` positions of a key/value head:
    /// `out = softmax(query · keys / sqrt(head_dim)) · values`. `scores` has room for a number per position.
    pub fn attend(
        &self,
        layer: usize,
        head_kv: usize,
        positions: usize,
        query: &[f32],
        scores: &mut [Lanes],
        out: &mut [f32],
    ) {
        let head = layer * self.head_count_kv + head_kv;
        let keys = self.positions / LANES * self.head_dim;
        let values = self.positions * self.head_dim.div_ceil(LANES);
        attend(
            query,
            &self.keys.lanes()[head * keys..][..keys],
            &self.values.lanes()[head * values..][..values],
            positions,
            &mut scores[..positions.div_ceil(LANES)],
            out,
        );
    }
}

vectorized! {
    fn attend(
        query: &[f32],
        keys: &[Lanes],
        values: &[Lanes],
        positions: usize,
        scores: &mut [Lanes],
        out: &mut [f32],
    ) {
        let scale = 1.0 / (query.len() as f32).sqrt();
        let mut keys = keys.chunks_exact(query.len());
        let (tiles, rest) = scores.as_chunks_mut::<TILE>();
        for scores in tiles {
            score(query, scale, &mut keys, scores);
        }
        for scores in rest {
            score(query, scale, &mut keys, std::array::from_mut(scores));
        }
        // Lanes beyond the last position hold what is no key of ours.
        bytemuck::cast_slice_mut::<Lanes, f32>(scores)[positions..].fill(f32::NEG_INFINITY);

        let mut greatest = Lanes([f32::NEG_INFINITY; LANES]);
        for scores in scores.iter() {
            vectorize_inside();
            greatest.keep_greater(scores);
        }
        let greatest = greatest.0.into_iter().fold(f32::NEG_INFINITY, f32::max);
        let mut sums = Lanes::ZERO;
        for scores in scores.iter_mut() {
            vectorize_inside();
            for (score, sum) in scores.0.iter_mut().zip(&mut sums.0) {
                *score = exp(*score - greatest);
                *sum += *score;
            }
        }
        let weights = &bytemuck::cast_slice::<Lanes, f32>(scores)[..positions];
        let scale = 1.0 / sums.sum();
        let stride = query.len().div_ceil(LANES);
        for (start, out) in (0..stride).step_by(TILE).zip(out.chunks_mut(TILE * LANES)) {
            let values = values.chunks_exact(stride).map(|value| &value[start..]);
            if stride - start >= TILE {
                average::<TILE>(weights, values, scale, out);
            } else {
                for (lane, out) in out.chunks_mut(LANES).enumerate() {
                    average::<1>(weights, values.clone().map(|value| &value[lane..]), scale, out);
                }
            }
        }
    }
}

/// `query · key * scale` for `B` blocks of positions.
#[inline(always)]
fn score<'a, const B: usize>(
    query: &[f32],
    scale: f32,
    keys: &mut impl Iterator<Item = &'a [Lanes]>,
    scores: &mut [Lanes; B],
) {
    let keys: [&[Lanes]; B] =
        std::array::from_fn(|_| keys.next().expect("a block of keys for each of scores"));
    let keys = keys.map(|keys| &keys[..query.len()]);
    let mut registers = [Lanes::ZERO; B];
    for (i, query) in query.iter().enumerate() {
        for block in 0..B {
            registers[block].add_scaled(*query, &keys[block][i]);
        }
    }
    *scores = registers.map(|lanes| Lanes(lanes.0.map(|score| score * scale)));
}

/// The first `out.len()` of `L` lanes of the values, weighted, summed and scaled.
#[inline(always)]
fn average<'a, const L: usize>(
    weights: &[f32],
    values: impl Iterator<Item = &'a [Lanes]>,
    scale: f32,
    out: &mut [f32],
) {
    let mut registers = [Lanes::ZERO; L];
    for (weight, value) in weights.iter().zip(values) {
        let value = &value[..L];
        for lane in 0..L {
            registers[lane].add_scaled(*weight, &value[lane]);
        }
    }
    for (out, sum) in out
        .iter_mut()
        .zip(registers.iter().flat_map(|lanes| &lanes.0))
    {
        *out = sum * scale;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::simd::tests::{assert_same_bits, noise};

    #[test]
    fn the_vector_width_changes_no_bit() {
        const HEAD_DIM: usize = 90;
        const POSITIONS: usize = 77;
        let lanes = |count: usize| -> Vec<Lanes> {
            let noise = noise(count * LANES);
            noise.as_chunks().0.iter().copied().map(Lanes).collect()
        };
        let keys = lanes(POSITIONS.div_ceil(LANES) * HEAD_DIM);
        let values = lanes(POSITIONS * HEAD_DIM.div_ceil(LANES));
        assert_same_bits("attend", || {
            let mut scores = vec![Lanes::ZERO; POSITIONS.div_ceil(LANES)];
            let mut out = vec![0.0; HEAD_DIM];
            attend(
                &noise(HEAD_DIM),
                &keys,
                &values,
                POSITIONS,
                &mut scores,
                &mut out,
            );
            out
        });
    }
}
