//! Keys and values of earlier tokens: float32, or farther behind in tiles of few bits.

use std::ops::Range;

use half::f16;

use super::{
    attention::{Attended, AttentionScratch, Head, Query, Scoring},
    simd::{Buffer, LANES},
    tiles::{ExactHead, TileCache},
};
use crate::{
    backend::{KvLayer, KvLayout, KvPart, SINKS, Tiles, Written},
    quant::kv_tile::{TILE, rotate},
};

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

    /// Attends with `queries` of one key/value head, (position of its token, numbers) each: the tokens are in the cache, as are
    /// all that they see.
    pub fn attend<'q, 's>(
        &self,
        layer: usize,
        head_kv: usize,
        queries: impl Iterator<Item = (usize, &'q [f32])>,
        scoring: Scoring,
        scratch: &'s mut AttentionScratch,
    ) -> impl Iterator<Item = Attended<'s>> {
        let layer = &self.layout.layers[layer];
        let cache = self.layers[layer.owner].as_ref();
        let cache = cache.expect("an owner has a cache");
        let queries = queries.map(|(position, numbers)| {
            let end = layer.place(position, self.written.evicted()) + 1;
            let (start, first_in_slot) = match cache.tiles {
                None => {
                    let start = end - layer.window.map_or(end, |window| window.min(end));
                    (start, start)
                }
                Some(_) => (0, Tiles::seen(end - 1) * TILE),
            };
            Query {
                numbers,
                places: start..end,
                first_in_slot,
            }
        });
        cache.head(head_kv).attend(queries, scoring, scratch)
    }
}

/// To float16, as what is rotated is cached.
fn round(numbers: &mut [f32]) {
    numbers
        .iter_mut()
        .for_each(|x| *x = f16::from_f32(*x).to_f32());
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

    fn head(&self, head: usize) -> Head<'_> {
        let keys = self.slots / LANES * self.head_dim;
        let values = self.slots * self.head_dim.div_ceil(LANES);
        Head {
            head_dim: self.head_dim,
            keys: &self.keys.lanes()[head * keys..][..keys],
            values: &self.values.lanes()[head * values..][..values],
            tiles: self.tiles.as_ref().map(|tiles| tiles.head(head)),
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
