//! Causal attention with grouped queries: up to [`QUERIES`] of one key/value head share a reading of its keys and values.
//!
//! Which queries are computed side by side changes the bits of none: each of its sums has an order of its own.

use std::ops::Range;

use super::{
    elementwise,
    products::{Columns, Factors, add_products},
    simd::{LANES, Lanes, vectorized},
    tiles::{HeadTiles, TileScratch},
};
use crate::{
    math::exp,
    model::decoder::Attention,
    quant::{kv_tile::rotate, vectorize_inside},
};

/// Queries that share a reading, at most: enough for arithmetic to take longer than reading from any cache.
pub const QUERIES: usize = 8;

/// Values that are read for some queries before they are for the others.
const VALUES_AT_ONCE: usize = 64;

/// Keys and values of one head.
pub struct Head<'a> {
    pub head_dim: usize,
    /// (LANES slots, head_dim, blocks of slots)
    pub keys: &'a [Lanes],
    /// (head_dim padded to lanes, slots)
    pub values: &'a [Lanes],
    /// Where there are any, keys and values are rotated.
    pub tiles: Option<HeadTiles<'a>>,
}

/// A query that attends.
pub struct Query<'a> {
    /// (head_dim)
    pub numbers: &'a [f32],
    /// All that it sees.
    pub places: Range<usize>,
    /// The first of these that lies in a slot: those before it lie in whole tiles.
    pub first_in_slot: usize,
}

/// What came of a query.
pub struct Attended<'a> {
    /// (head_dim): `softmax(softcap(scale * query · keys)) · values`
    pub out: &'a [f32],
    /// The softmax of all that it sees: to be multiplied with `weight_scale`, they add up to 1.
    pub weights: &'a [f32],
    pub weight_scale: f32,
}

/// How a score comes from a query and a key.
#[derive(Clone, Copy)]
pub struct Scoring {
    pub scale: f32,
    pub softcap: Option<f32>,
}

/// What attention needs of a worker's memory.
pub struct AttentionScratch {
    /// (head_dim, QUERIES)
    queries: Vec<f32>,
    tiles: TileScratch,
    /// (context_len padded to lanes, QUERIES): scores, which become weights
    scores: Vec<Lanes>,
    /// (head_dim padded to lanes, QUERIES): values, weighted and summed
    sums: Vec<Lanes>,
    /// Of each query.
    seen: Vec<Seen>,
}

/// What a query sees, as [`Query`] has it.
pub struct Seen {
    places: Range<usize>,
    pub first_in_slot: usize,
    /// [`Attended::weight_scale`]
    weight_scale: f32,
}

impl Scoring {
    /// That of a layer.
    pub fn of(attention: &Attention) -> Self {
        Self {
            scale: attention.scale,
            softcap: attention.softcap,
        }
    }
}

impl AttentionScratch {
    /// For heads of up to `head_dim` values and a context of `context_len` tokens, or `None` where there is no memory for it.
    pub fn new(head_dim: usize, context_len: usize) -> Option<Self> {
        let scores = context_len.div_ceil(LANES).checked_mul(QUERIES)?;
        Some(Self {
            queries: vec![0.0; head_dim * QUERIES],
            tiles: TileScratch::new(head_dim),
            scores: bytemuck::try_zeroed_vec(scores).ok()?,
            sums: vec![Lanes::ZERO; head_dim.div_ceil(LANES) * QUERIES],
            seen: Vec::with_capacity(QUERIES),
        })
    }
}

impl Head<'_> {
    /// Attends with `queries`, one to [`QUERIES`], of tokens in the order of the text.
    pub fn attend<'q, 's>(
        self,
        queries: impl Iterator<Item = Query<'q>>,
        scoring: Scoring,
        scratch: &'s mut AttentionScratch,
    ) -> impl Iterator<Item = Attended<'s>> {
        let dim = self.head_dim;
        let AttentionScratch {
            queries: rows,
            tiles,
            scores,
            sums,
            seen,
        } = scratch;
        seen.clear();
        for query in queries {
            let row = &mut rows[seen.len() * dim..][..dim];
            row.copy_from_slice(query.numbers);
            if self.tiles.is_some() {
                rotate(row);
            }
            seen.push(Seen {
                places: query.places,
                first_in_slot: query.first_in_slot,
                weight_scale: 0.0,
            });
        }
        let queries = &rows[..seen.len() * dim];

        // What the first query sees begins first, and what the last one sees ends last. A row of scores begins with a whole
        // block of slots, or a tile.
        let first_block = seen[0].first_in_slot / LANES;
        let first = seen[0].places.start / LANES * LANES;
        let end = seen[seen.len() - 1].places.end;
        let row_lanes = (end - first).div_ceil(LANES);
        let scores = &mut scores[..seen.len() * row_lanes];
        self.score_slots(
            queries,
            first_block..end.div_ceil(LANES),
            &mut scores[first_block - first / LANES..],
            row_lanes,
        );
        if let Some(of_head) = self.tiles {
            of_head.score(queries, seen, tiles, scores, row_lanes);
        }
        for (scores, seen) in scores.chunks_exact_mut(row_lanes).zip(&mut *seen) {
            seen.weight_scale = softmax(scores, seen.in_row(first), scoring);
        }

        let weights = bytemuck::cast_slice(scores);
        let sums = &mut sums[..seen.len() * dim.div_ceil(LANES)];
        sums.fill(Lanes::ZERO);
        if let Some(of_head) = self.tiles {
            of_head.add_values(weights, row_lanes * LANES, seen, tiles, sums);
        }
        self.add_slots(weights, row_lanes * LANES, first, seen, sums);
        let stride = dim.next_multiple_of(LANES);
        let sums: &mut [f32] = bytemuck::cast_slice_mut(sums);
        for (sums, seen) in sums.chunks_exact_mut(stride).zip(&*seen) {
            let out = &mut sums[..dim];
            out.iter_mut().for_each(|sum| *sum *= seen.weight_scale);
            if self.tiles.is_some() {
                rotate(out);
            }
        }
        let rows = weights.chunks_exact(row_lanes * LANES);
        rows.zip(sums.chunks_exact(stride))
            .zip(&*seen)
            .map(move |((weights, out), seen)| Attended {
                out: &out[..dim],
                weights: &weights[seen.in_row(first)],
                weight_scale: seen.weight_scale,
            })
    }

    fn slots(&self) -> usize {
        self.keys.len() / self.head_dim * LANES
    }

    /// Adds `query · key` for the places in `blocks` of sixteen to `scores`, whose rows begin `row_lanes` apart.
    fn score_slots(
        &self,
        queries: &[f32],
        blocks: Range<usize>,
        scores: &mut [Lanes],
        row_lanes: usize,
    ) {
        let first = blocks.start;
        let all = self.slots() / LANES;
        for blocks in pieces(blocks, all, usize::MAX) {
            add_products(
                Factors {
                    numbers: queries,
                    row_len: self.head_dim,
                    len: self.head_dim,
                },
                Columns {
                    lanes: &self.keys[blocks.start % all * self.head_dim..],
                    count: blocks.len(),
                    spacing: self.head_dim,
                    step: 1,
                },
                &mut scores[blocks.start - first..],
                row_lanes,
                true,
            );
        }
    }

    /// Adds the values of slots that are seen, weighted, to `sums`. Rows of `weights` begin with that of place `first`.
    fn add_slots(
        &self,
        weights: &[f32],
        row_len: usize,
        first: usize,
        seen: &[Seen],
        sums: &mut [Lanes],
    ) {
        let stride = self.head_dim.div_ceil(LANES);
        let slots = self.slots();
        let mut add = |rows: Range<usize>, places: Range<usize>| {
            for places in pieces(places, slots, VALUES_AT_ONCE) {
                add_products(
                    Factors {
                        numbers: &weights[rows.start * row_len + places.start - first..],
                        row_len,
                        len: places.len(),
                    },
                    Columns {
                        lanes: &self.values[places.start % slots * stride..],
                        count: stride,
                        spacing: 1,
                        step: stride,
                    },
                    &mut sums[rows.start * stride..rows.end * stride],
                    stride,
                    false,
                );
            }
        };
        // All queries see the same but for what lies at the ends. There, a weight of zero would not do: a value that one does
        // not see may be infinite.
        let start = seen[seen.len() - 1].first_in_slot;
        let end = seen[0].places.end.max(start);
        for (row, seen) in seen.iter().enumerate() {
            add(row..row + 1, seen.first_in_slot..start.min(seen.places.end));
        }
        add(0..seen.len(), start..end);
        for (row, seen) in seen.iter().enumerate() {
            add(row..row + 1, end.max(seen.first_in_slot)..seen.places.end);
        }
    }
}

impl Seen {
    /// Where, in a row of scores that begins with place `first`.
    fn in_row(&self, first: usize) -> Range<usize> {
        self.places.start - first..self.places.end - first
    }
}

/// `range` in pieces of up to `most` that lie together in a ring of `len`.
fn pieces(range: Range<usize>, len: usize, most: usize) -> impl Iterator<Item = Range<usize>> {
    let Range { mut start, end } = range;
    std::iter::from_fn(move || {
        let piece = start..end.min(start + most.min(len - start % len));
        start = piece.end.max(start);
        (!piece.is_empty()).then_some(piece)
    })
}

vectorized! {
    /// Makes of `query · key`, of which those in `seen` count, what values are to be weighted with, and returns what the sum of
    /// these is to be multiplied with.
    fn softmax(scores: &mut [Lanes], seen: Range<usize>, scoring: Scoring) -> f32 {
        let first = seen.start / LANES;
        let scores = &mut scores[first..seen.end.div_ceil(LANES)];
        let seen = seen.start - first * LANES..seen.end - first * LANES;
        for scores in scores.iter_mut() {
            vectorize_inside();
            scores.0.iter_mut().for_each(|score| *score *= scoring.scale);
        }
        // Other lanes hold keys that are not seen, or none.
        let numbers = bytemuck::cast_slice_mut::<Lanes, f32>(scores);
        if let Some(cap) = scoring.softcap {
            elementwise::softcap(&mut numbers[seen.clone()], cap);
        }
        numbers[..seen.start].fill(f32::NEG_INFINITY);
        numbers[seen.end..].fill(f32::NEG_INFINITY);

        let mut greatest = Lanes([f32::NEG_INFINITY; LANES]);
        for scores in scores.iter() {
            vectorize_inside();
            greatest.keep_greater(scores);
        }
        let greatest = greatest.max();
        let mut sums = Lanes::ZERO;
        for scores in scores.iter_mut() {
            vectorize_inside();
            let mut weights = *scores;
            for i in 0..LANES {
                weights.0[i] = exp(weights.0[i] - greatest);
                sums.0[i] += weights.0[i];
            }
            *scores = weights;
        }
        1.0 / sums.sum()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use super::*;
    use crate::cpu::simd::tests::{assert_same_bits, noise};

    const HEAD_DIM: usize = 90;
    const STRIDE: usize = HEAD_DIM.div_ceil(LANES);
    const SCORING: Scoring = Scoring {
        scale: 0.1,
        softcap: Some(2.0),
    };

    /// Keys and values in a ring of slots.
    struct Ring {
        keys: Vec<Lanes>,
        values: Vec<Lanes>,
    }

    impl Ring {
        /// Of what is at `places`; NaN everywhere else.
        fn new(slots: usize, places: Range<usize>) -> Self {
            let mut ring = Self {
                keys: vec![Lanes([f32::NAN; LANES]); slots / LANES * HEAD_DIM],
                values: vec![Lanes([f32::NAN; LANES]); slots * STRIDE],
            };
            for place in places {
                let slot = place % slots;
                let keys = &mut ring.keys[slot / LANES * HEAD_DIM..];
                for (lanes, number) in keys.iter_mut().zip(key(place)) {
                    lanes.0[slot % LANES] = *number;
                }
                let values = bytemuck::cast_slice_mut(&mut ring.values[slot * STRIDE..]);
                values[..HEAD_DIM].copy_from_slice(value(place));
            }
            ring
        }

        /// What comes of queries that see `places`.
        fn attend(&self, places: &[Range<usize>]) -> Vec<f32> {
            let head = Head {
                head_dim: HEAD_DIM,
                keys: &self.keys,
                values: &self.values,
                tiles: None,
            };
            let queries = places.iter().enumerate().map(|(index, places)| Query {
                numbers: query(index),
                places: places.clone(),
                first_in_slot: places.start,
            });
            let mut scratch = AttentionScratch::new(HEAD_DIM, self.values.len() / STRIDE).unwrap();
            let attended = head.attend(queries, SCORING, &mut scratch);
            attended
                .flat_map(|attended| attended.out.to_vec())
                .collect()
        }
    }

    /// One of many rows of numbers.
    fn row(index: usize) -> &'static [f32] {
        static ROWS: LazyLock<Vec<f32>> = LazyLock::new(|| noise(1000 * HEAD_DIM));
        &ROWS[index * HEAD_DIM..][..HEAD_DIM]
    }

    fn key(place: usize) -> &'static [f32] {
        row(3 * place)
    }

    fn value(place: usize) -> &'static [f32] {
        row(3 * place + 1)
    }

    fn query(index: usize) -> &'static [f32] {
        row(3 * index + 2)
    }

    /// One query after the other, each sum in one loop.
    fn textbook(places: &[Range<usize>]) -> Vec<f32> {
        let mut outs = Vec::new();
        for (index, places) in places.iter().enumerate() {
            let query = query(index);
            let score = |place| {
                let products = query.iter().zip(key(place)).map(|(query, key)| query * key);
                products.fold(0.0, |sum, product| sum + product) * SCORING.scale
            };
            let mut weights: Vec<f32> = places.clone().map(score).collect();
            elementwise::softcap(&mut weights, SCORING.softcap.unwrap());
            let greatest = weights.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let mut sums = Lanes::ZERO;
            let mut out = vec![0.0; HEAD_DIM];
            for (place, weight) in places.clone().zip(&mut weights) {
                *weight = exp(*weight - greatest);
                sums.0[place % LANES] += *weight;
                for (out, value) in out.iter_mut().zip(value(place)) {
                    *out += *weight * value;
                }
            }
            let scale = 1.0 / sums.sum();
            outs.extend(out.iter().map(|out| out * scale));
        }
        outs
    }

    #[track_caller]
    fn assert_textbook(ring: &Ring, places: &[Range<usize>]) {
        let bits = |outs: Vec<f32>| -> Vec<u32> { outs.into_iter().map(f32::to_bits).collect() };
        assert!(
            bits(ring.attend(places)) == bits(textbook(places)),
            "{places:?}"
        );
    }

    #[test]
    fn queries_that_share_a_reading_get_the_bits_of_plain_loops() {
        const ALL: usize = 192;
        for first_end in [1, 15, 16, 63, 64, 130, ALL - QUERIES] {
            for window in [ALL, 1, 3, 33] {
                for (queries, group) in [(1, 1), (2, 2), (3, 1), (4, 3), (5, 5), (8, 1), (8, 3)] {
                    let ends = (0..queries).map(|query| first_end + query / group);
                    let places: Vec<_> = ends.map(|end| end.saturating_sub(window)..end).collect();
                    let last_end = places[queries - 1].end;
                    assert_textbook(&Ring::new(ALL, 0..last_end), &places);
                }
            }
        }
    }

    #[test]
    fn a_ring_gives_the_bits_of_a_full_cache() {
        const SLOTS: usize = 96;
        for first_end in [
            50,
            SLOTS - 4,
            SLOTS,
            SLOTS + 1,
            107,
            2 * SLOTS,
            3 * SLOTS - 1,
        ] {
            for window in [1, 3, 16, 33, 48] {
                let ends = first_end..first_end + QUERIES;
                let places: Vec<_> = ends.map(|end| end - window..end).collect();
                let stored = places[0].start..places[QUERIES - 1].end;
                assert_textbook(&Ring::new(SLOTS, stored), &places);
            }
        }
    }

    #[test]
    fn what_a_query_does_not_see_changes_nothing() {
        let places: [_; QUERIES] = std::array::from_fn(|query| query..70 + query);
        let seen = Ring::new(96, 0..80).attend(&places);
        // Now the first is not there for the first query, nor the last for the last one.
        let missing = Ring::new(96, 1..76).attend(&places);
        let inner = HEAD_DIM..(QUERIES - 1) * HEAD_DIM;
        assert_eq!(seen[inner.clone()], missing[inner]);
        assert!(seen.iter().all(|number| number.is_finite()));
        let ends = [&missing[..HEAD_DIM], &missing[(QUERIES - 1) * HEAD_DIM..]].concat();
        assert!(ends.iter().all(|number| number.is_nan()));
    }

    #[test]
    fn the_vector_width_changes_no_bit() {
        for queries in 1..=QUERIES {
            let places: Vec<_> = (0..queries).map(|query| 19 + query..77 + query).collect();
            let ring = Ring::new(96, 19..77 + queries);
            assert_same_bits("attend", || ring.attend(&places));
        }
    }
}
