//! Causal attention with grouped queries over a KV cache: float32, or farther behind in tiles of few bits.

use std::ops::Range;

use half::f16;

use super::{
    elementwise,
    simd::{Buffer, LANES, Lanes, vectorized},
    tiles::{ExactHead, HeadTiles, TileCache},
};
use crate::{
    backend::{KvLayer, KvLayout, KvPart, SINKS, Tiles, Written},
    math::exp,
    model::decoder::Attention,
    quant::{
        kv_tile::{TILE, rotate},
        vectorize_inside,
    },
};

/// Blocks of slots, or lanes of a head, that are summed at once.
const AT_ONCE: usize = 4;

/// Keys and values of every token so far, as far as they were not evicted.
pub struct KvCache {
    layout: KvLayout,
    written: Written,
    /// Of each layer that has its own.
    layers: Vec<Option<LayerCache>>,
    /// (2 * head_dim): a key and a value on their way into a cache with tiles
    rotated: Vec<f32>,
}

/// Keys and values of one layer. Its slots are filled up to a multiple of [`LANES`].
pub struct LayerCache {
    /// (LANES slots, head_dim, blocks of slots, head_count_kv): keys that sixteen slots share a [`Lanes`], one score in
    /// each lane
    pub keys: Buffer,
    /// (head_dim padded to lanes, slots, head_count_kv)
    pub values: Buffer,
    pub head_dim: usize,
    pub slots: usize,
    /// Where there are any, all keys and values are rotated, and rounded to float16.
    tiles: Option<TileCache>,
}

/// A query that attends.
#[derive(Clone, Copy)]
pub struct Query<'a> {
    pub layer: usize,
    pub head_kv: usize,
    /// Of its token, which is in the cache, as are all that it sees.
    pub position: usize,
    /// (head_dim)
    pub numbers: &'a [f32],
}

/// What a query gave to the tokens that it sees.
pub struct Weights<'a> {
    /// Of consecutive places up to its own: to be multiplied with `scale`, they add up to 1.
    pub numbers: &'a [f32],
    pub scale: f32,
}

/// How a score comes from a query and a key.
#[derive(Clone, Copy)]
pub struct Scoring {
    pub scale: f32,
    pub softcap: Option<f32>,
}

impl KvCache {
    /// Room for all that the layout names, or `None` where there is no memory for it.
    pub fn new(layout: KvLayout, context_len: usize) -> Option<Self> {
        let layers = layout.layers.iter().enumerate().map(|(index, layer)| {
            let own = layer.owner == index;
            own.then(|| LayerCache::new(layer, context_len)).transpose()
        });
        let widest = layout.layers.iter().map(|layer| layer.head_dim).max();
        Some(Self {
            layers: layers.collect::<Result<_, NoMemory>>().ok()?,
            rotated: vec![0.0; 2 * widest.unwrap_or(0)],
            written: Written::default(),
            layout,
        })
    }

    pub fn layout(&self) -> &KvLayout {
        &self.layout
    }

    pub fn written(&self) -> Written {
        self.written
    }

    /// Notes that tokens at `positions` come next.
    pub fn begin(&mut self, positions: Range<usize>) {
        self.written.add(positions);
    }

    /// Notes that the cache was filled from elsewhere, by [`memory`](Self::memory).
    pub fn set_written(&mut self, written: Written) {
        self.written = written;
    }

    /// The memory of a part of the cache, as far as it was `written`: pieces in an order, and of lengths, that do not depend on
    /// how long the context is.
    pub fn memory(&mut self, part: KvPart, written: Written) -> Vec<&mut [u8]> {
        let mut pieces = Vec::new();
        for (cache, layer) in self.layers.iter_mut().zip(&self.layout.layers) {
            if let Some(cache) = cache {
                cache.memory(layer, part, written, &mut pieces);
            }
        }
        pieces
    }

    /// Stores the key and value (head_dim, head_count_kv) of the token at `position`.
    pub fn store(&mut self, layer: usize, position: usize, key: &[f32], value: &[f32]) {
        let place = self.layout.layers[layer].place(position, self.written.evicted());
        let cache = self.layers[layer].as_mut();
        let cache = cache.expect("a layer that stores has a cache of its own");
        let dim = cache.head_dim;
        let heads = key.chunks_exact(dim).zip(value.chunks_exact(dim));
        let (rotated_key, rest) = self.rotated.split_at_mut(dim);
        let rotated_value = &mut rest[..dim];
        for (head, (key, value)) in heads.enumerate() {
            if cache.tiles.is_none() {
                cache.store(head, place, key, value);
                continue;
            }
            for (rotated, numbers) in [(&mut *rotated_key, key), (&mut *rotated_value, value)] {
                rotated.copy_from_slice(numbers);
                rotate(rotated);
                round(rotated);
            }
            cache.store(head, place, rotated_key, rotated_value);
        }
    }

    /// Keeps of every head of a layer that stores, of its tokens below place `end`, those at the places `kept`,
    /// (tokens, head_count_kv), ascending: they become its first ones. `rows` has room for all that a head keeps,
    /// (2 * head_dim, tokens).
    pub fn keep(&mut self, layer: usize, end: usize, kept: &[u32], rows: &mut [f32]) {
        let heads = self.layout.layers[layer].head_count_kv;
        let cache = self.layers[layer].as_mut();
        let cache = cache.expect("a layer that stores has a cache of its own");
        let dim = cache.head_dim;
        for (head, kept) in kept.chunks_exact(kept.len() / heads).enumerate() {
            let mut rows_of_kept = rows.chunks_exact_mut(2 * dim);
            let kept_places = kept.iter().map(|&place| place as usize);
            cache.read(head, kept_places, end, |key, value| {
                let row = rows_of_kept.next().expect("room for all that is kept");
                row[..dim].copy_from_slice(key);
                row[dim..].copy_from_slice(value);
                if cache.tiles.is_some() {
                    round(row);
                }
            });
            for (place, row) in rows.chunks_exact(2 * dim).take(kept.len()).enumerate() {
                cache.store(head, place, &row[..dim], &row[dim..]);
            }
        }
    }

    /// Notes that every layer that evicts keeps `kept` of the tokens before `position`.
    pub fn evict(&mut self, position: usize, kept: usize) {
        self.written.evict(position, kept);
    }

    /// Calls `each` with the values of all tokens below place `end` of a head of a layer that stores, as it keeps them.
    pub fn for_each_value(
        &self,
        layer: usize,
        head_kv: usize,
        end: usize,
        mut each: impl FnMut(&[f32]),
    ) {
        let cache = self.layers[layer].as_ref();
        let cache = cache.expect("a layer that stores has a cache of its own");
        cache.read(head_kv, 0..end, end, |_, value| each(value));
    }

    /// Attends: `out = softmax(softcap(scale * query · keys)) · values`, and returns the softmax. `scores` has room for a number
    /// for each position, `rotated` for two queries.
    pub fn attend<'s>(
        &self,
        query: Query,
        scoring: Scoring,
        scores: &'s mut [Lanes],
        rotated: &mut [f32],
        out: &mut [f32],
    ) -> Weights<'s> {
        let Query {
            layer,
            head_kv,
            position,
            numbers: query,
        } = query;
        let layer = &self.layout.layers[layer];
        let end = layer.place(position, self.written.evicted()) + 1;
        let cache = self.layers[layer.owner].as_ref();
        let cache = cache.expect("an owner has a cache");
        let keys = cache.slots / LANES * cache.head_dim;
        let values = cache.slots * cache.head_dim.div_ceil(LANES);
        let keys = &cache.keys.lanes()[head_kv * keys..][..keys];
        let values = &cache.values.lanes()[head_kv * values..][..values];
        let Some(tiles) = &cache.tiles else {
            let seen = layer.window.map_or(end, |window| window.min(end));
            let first = layer.slot(end - seen);
            let seen = attend(query, None, keys, values, scoring, first, seen, scores, out);
            return Weights::new(scores, seen);
        };
        let (query_rotated, rest) = rotated.split_at_mut(query.len());
        query_rotated.copy_from_slice(query);
        rotate(query_rotated);
        let seen = SeenTiles {
            tiles: tiles.head(head_kv),
            count: Tiles::seen(end - 1),
            scaled: &mut rest[..query.len()],
        };
        let first = seen.count * TILE;
        let seen = attend(
            query_rotated,
            Some(seen),
            keys,
            values,
            scoring,
            layer.slot(first),
            end - first,
            scores,
            out,
        );
        rotate(out);
        Weights::new(scores, seen)
    }
}

impl<'a> Weights<'a> {
    fn new(scores: &'a [Lanes], (seen, scale): (Range<usize>, f32)) -> Self {
        Self {
            numbers: &bytemuck::cast_slice(scores)[seen],
            scale,
        }
    }
}

/// To float16, as what is rotated is cached.
fn round(numbers: &mut [f32]) {
    numbers
        .iter_mut()
        .for_each(|x| *x = f16::from_f32(*x).to_f32());
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

/// There is no memory for it.
struct NoMemory;

impl LayerCache {
    /// For tiles of up to `context_len` tokens.
    fn new(layer: &KvLayer, context_len: usize) -> Result<Self, NoMemory> {
        let allocate = || {
            let slots = layer.capacity.checked_next_multiple_of(LANES)?;
            let keys = layer.token_len().checked_mul(slots / LANES)?;
            let value_lanes = layer.head_count_kv * layer.head_dim.div_ceil(LANES);
            Some(Self {
                keys: Buffer::zeros(keys)?,
                values: Buffer::zeros(value_lanes.checked_mul(slots)?)?,
                head_dim: layer.head_dim,
                slots,
                tiles: match layer.tiles {
                    Some(bits) => Some(TileCache::new(layer, bits, context_len)?),
                    None => None,
                },
            })
        };
        allocate().ok_or(NoMemory)
    }

    /// Appends the memory of a part of the cache to `pieces`, as far as it was `written`.
    fn memory<'a>(
        &'a mut self,
        layer: &KvLayer,
        part: KvPart,
        written: Written,
        pieces: &mut Vec<&'a mut [u8]>,
    ) {
        if layer.is_ring == (part == KvPart::Rings) {
            let used = layer.slots_in_use(written);
            let lanes = |slots: usize| {
                let keys = slots.div_ceil(LANES) * self.head_dim;
                [keys, slots * self.head_dim.div_ceil(LANES)]
            };
            let lens = lanes(self.slots).into_iter().zip(lanes(used));
            let planes = [&mut self.keys, &mut self.values].map(Buffer::lanes_mut);
            for (plane, (head_len, used)) in planes.into_iter().zip(lens) {
                let heads = plane.chunks_exact_mut(head_len);
                pieces.extend(heads.map(|head| bytemuck::cast_slice_mut(&mut head[..used])));
            }
        }
        if let (KvPart::Rest, Some(tiles)) = (part, &mut self.tiles) {
            tiles.memory(layer.tiles_in_use(written), pieces);
        }
    }

    /// Stores a key and a value, where there are tiles rotated and rounded, and makes a tile of those whose last one it is.
    fn store(&mut self, head: usize, place: usize, key: &[f32], value: &[f32]) {
        let slot = place % self.slots;
        self.put(head, slot, key, value);
        let Some(mut tiles) = self.tiles.take() else {
            return;
        };
        if place < SINKS {
            tiles.store_sink(head, place, key, value);
        }
        if (place + 1).is_multiple_of(TILE) {
            let first = slot + 1 - TILE;
            tiles.compress(head, place / TILE, &ExactHead::new(self, head), first);
        }
        self.tiles = Some(tiles);
    }

    /// Calls `each` with the keys and values of a head at `places`, which ascend, as the token at place `end` sees them.
    fn read(
        &self,
        head: usize,
        places: impl Iterator<Item = usize>,
        end: usize,
        mut each: impl FnMut(&[f32], &[f32]),
    ) {
        let dim = self.head_dim;
        let mut tile = vec![0.0; 2 * TILE * dim];
        let (tile_keys, tile_values) = tile.split_at_mut(TILE * dim);
        let mut tile_at_hand = None;
        let mut exact_key = vec![0.0; dim];
        for place in places {
            let tile = place / TILE;
            match &self.tiles {
                Some(tiles) if tile < Tiles::seen(end) => {
                    if tile_at_hand.replace(tile) != Some(tile) {
                        tiles.head(head).read(tile, tile_keys, tile_values);
                    }
                    let row = place % TILE * dim..(place % TILE + 1) * dim;
                    each(&tile_keys[row.clone()], &tile_values[row]);
                }
                _ => {
                    let (exact, slot) = (ExactHead::new(self, head), place % self.slots);
                    for (channel, number) in exact_key.iter_mut().enumerate() {
                        *number = exact.key(slot, channel);
                    }
                    each(&exact_key, &exact.value(slot)[..dim]);
                }
            }
        }
    }

    fn put(&mut self, head: usize, slot: usize, key: &[f32], value: &[f32]) {
        let dim = self.head_dim;
        let block = (head * self.slots + slot) / LANES;
        let keys = &mut self.keys.lanes_mut()[block * dim..][..dim];
        for (lanes, key) in keys.iter_mut().zip(key) {
            lanes.0[slot % LANES] = *key;
        }
        let stride = dim.div_ceil(LANES);
        let values = &mut self.values.lanes_mut()[(head * self.slots + slot) * stride..][..stride];
        bytemuck::cast_slice_mut(values)[..dim].copy_from_slice(value);
    }
}

vectorized! {
    /// Over whole tiles, if any, and `count` slots from `first` on: behind the last one comes the first of all. Behind tiles, a
    /// block of slots begins with `first`. Returns which of `scores` hold what tokens were weighted with, and the scale of these.
    fn attend(
        query: &[f32],
        tiles: Option<SeenTiles>,
        keys: &[Lanes],
        values: &[Lanes],
        scoring: Scoring,
        first: usize,
        count: usize,
        scores: &mut [Lanes],
        out: &mut [f32],
    ) -> (Range<usize>, f32) {
        let of_tiles = tiles.as_ref().map_or(0, |tiles| tiles.count * TILE);
        let seen = first % LANES..first % LANES + of_tiles + count;
        let scores = &mut scores[..seen.end.div_ceil(LANES)];
        let (tile_scores, slot_scores) = scores.split_at_mut(of_tiles / LANES);
        let tiles = tiles.map(|SeenTiles { tiles, scaled, .. }| {
            tiles.score(query, scoring.scale, scaled, tile_scores);
            tiles
        });
        score_slots(query, scoring.scale, keys, first / LANES, slot_scores);
        let scale = softmax(scores, seen.clone(), scoring.softcap);
        let weights = &bytemuck::cast_slice::<Lanes, f32>(scores)[seen.clone()];
        let (tile_weights, weights) = weights.split_at(of_tiles);
        let tiles = tiles.map(|tiles| (tiles, tile_weights));
        average_all(tiles, weights, values, first, query.len(), scale, out);
        (seen, scale)
    }
}

/// The first `count` tiles of a head. `scaled` has room for a query.
struct SeenTiles<'a> {
    tiles: HeadTiles<'a>,
    count: usize,
    scaled: &'a mut [f32],
}

/// `query · key * scale` for the keys of as many blocks of slots, from `first_block` on.
#[inline(always)]
fn score_slots(
    query: &[f32],
    scale: f32,
    keys: &[Lanes],
    first_block: usize,
    scores: &mut [Lanes],
) {
    let (before, behind) = keys.split_at(first_block * query.len());
    let [behind, before] = [behind, before].map(|keys| keys.chunks_exact(query.len()));
    let mut keys = behind.chain(before);
    let (blocks, rest) = scores.as_chunks_mut::<AT_ONCE>();
    for scores in blocks {
        score(query, scale, &mut keys, scores);
    }
    for scores in rest {
        score(query, scale, &mut keys, std::array::from_mut(scores));
    }
}

/// Makes of scores, of which those in `seen` count, what values are to be weighted with, and returns what the sum of these is
/// to be multiplied with.
#[inline(always)]
fn softmax(scores: &mut [Lanes], seen: Range<usize>, softcap: Option<f32>) -> f32 {
    // Other lanes hold keys that are not seen, or none.
    let numbers = bytemuck::cast_slice_mut::<Lanes, f32>(scores);
    if let Some(cap) = softcap {
        elementwise::softcap(&mut numbers[seen.clone()], cap);
    }
    numbers[..seen.start].fill(f32::NEG_INFINITY);
    numbers[seen.end..].fill(f32::NEG_INFINITY);

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
    1.0 / sums.sum()
}

/// The values of tiles, and of slots from `first` on, weighted, summed and scaled.
#[inline(always)]
fn average_all(
    tiles: Option<(HeadTiles, &[f32])>,
    weights: &[f32],
    values: &[Lanes],
    first: usize,
    head_dim: usize,
    scale: f32,
    out: &mut [f32],
) {
    let stride = head_dim.div_ceil(LANES);
    let (before, behind) = values.split_at(first * stride);
    let (weights, weights_before) = weights.split_at(weights.len().min(behind.len() / stride));
    let parts = [(weights, behind), (weights_before, before)];
    for (start, out) in (0..stride)
        .step_by(AT_ONCE)
        .zip(out.chunks_mut(AT_ONCE * LANES))
    {
        if stride - start >= AT_ONCE {
            average::<AT_ONCE>(tiles, parts, stride, start, scale, out);
        } else {
            for (lane, out) in out.chunks_mut(LANES).enumerate() {
                average::<1>(tiles, parts, stride, start + lane, scale, out);
            }
        }
    }
}

/// `query · key * scale` for `B` blocks of slots.
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

/// Of tiles, and of weights and values, each `stride` lanes, in two parts: the first `out.len()` of `L` lanes from `start` on,
/// weighted, summed and scaled.
#[inline(always)]
fn average<const L: usize>(
    tiles: Option<(HeadTiles, &[f32])>,
    parts: [(&[f32], &[Lanes]); 2],
    stride: usize,
    start: usize,
    scale: f32,
    out: &mut [f32],
) {
    let mut registers = [Lanes::ZERO; L];
    if let Some((tiles, weights)) = tiles {
        tiles.add_values(weights, stride, start, &mut registers);
    }
    for (weights, values) in parts {
        for (weight, value) in weights.iter().zip(values.chunks_exact(stride)) {
            let value = &value[start..start + L];
            for lane in 0..L {
                registers[lane].add_scaled(*weight, &value[lane]);
            }
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
    fn a_ring_gives_the_bits_of_a_full_cache() {
        const HEAD_DIM: usize = 40;
        const RING: usize = 64;
        const ALL: usize = 3 * RING;
        const STRIDE: usize = HEAD_DIM.div_ceil(LANES);
        let lanes = |count: usize| -> Vec<Lanes> {
            let noise = noise(count * LANES);
            noise.as_chunks().0.iter().copied().map(Lanes).collect()
        };
        let (keys, values) = (lanes(ALL / LANES * HEAD_DIM), lanes(ALL * STRIDE));
        let out = |keys: &[Lanes], values: &[Lanes], first: usize, count: usize| {
            let scoring = Scoring {
                scale: 0.1,
                softcap: None,
            };
            let mut scores = vec![Lanes::ZERO; ALL / LANES];
            let mut out = vec![0.0; HEAD_DIM];
            let query = noise(HEAD_DIM);
            attend(
                &query,
                None,
                keys,
                values,
                scoring,
                first,
                count,
                &mut scores,
                &mut out,
            );
            out
        };
        for position in [RING - 1, RING, 70, 95, 96, 100, 2 * RING, ALL - 1] {
            for window in [1, 3, 16, 33, 48] {
                // Blocks of a ring hold the last positions that were written: those up to the end of this one's.
                let mut ring = (lanes(RING / LANES * HEAD_DIM), lanes(RING * STRIDE));
                for block in 0..=position / LANES {
                    let slot = block % (RING / LANES);
                    let key = keys[block * HEAD_DIM..][..HEAD_DIM].iter();
                    ring.0
                        .splice(slot * HEAD_DIM..(slot + 1) * HEAD_DIM, key.copied());
                    let len = LANES * STRIDE;
                    let value = values[block * len..][..len].iter();
                    ring.1.splice(slot * len..(slot + 1) * len, value.copied());
                }
                let first = position + 1 - window;
                assert_eq!(
                    out(&ring.0, &ring.1, first % RING, window),
                    out(&keys, &values, first, window),
                    "window {window} at {position}"
                );
            }
        }
    }

    #[test]
    fn the_vector_width_changes_no_bit() {
        const HEAD_DIM: usize = 90;
        const FIRST: usize = 19;
        const END: usize = 77;
        let lanes = |count: usize| -> Vec<Lanes> {
            let noise = noise(count * LANES);
            noise.as_chunks().0.iter().copied().map(Lanes).collect()
        };
        let keys = lanes(END.div_ceil(LANES) * HEAD_DIM);
        let values = lanes(END * HEAD_DIM.div_ceil(LANES));
        assert_same_bits("attend", || {
            let mut scores = vec![Lanes::ZERO; END.div_ceil(LANES)];
            let mut out = vec![0.0; HEAD_DIM];
            attend(
                &noise(HEAD_DIM),
                None,
                &keys,
                &values,
                Scoring {
                    scale: 0.1,
                    softcap: Some(2.0),
                },
                FIRST,
                END - FIRST,
                &mut scores,
                &mut out,
            );
            out
        });
    }
}
