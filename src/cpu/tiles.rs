//! Keys and values of a layer that are kept in tiles of few bits (`docs/kv-cache.md`), and attention over them.
//!
//! A score needs no number of a tile but its codes: `query · key = sum of (query * scale) * code + query · zero`, with a scale and a
//! zero for each channel of a group of tokens. Likewise for values, whose scales and zeros belong to tokens.

use super::{
    attention::{QUERIES, Seen},
    kv_cache::LayerCache,
    products::{Columns, Factors, add_products},
    simd::{LANES, Lanes, vectorized},
};
use crate::{
    backend::{KvLayer, SINKS, Tiles},
    quant::{
        kv_tile::{CODES, Group, KEY_GROUP, TILE, pack, packed_len, unpack},
        vectorize_inside,
    },
};

const _: () = assert!(CODES == LANES && KEY_GROUP.is_multiple_of(LANES) && SINKS <= LANES);

/// Blocks of tokens of a tile, each with its scores in a [`Lanes`].
const BLOCKS: usize = TILE / LANES;

/// Groups of keys of a tile, and blocks of each.
const KEY_GROUPS: usize = TILE / KEY_GROUP;
const GROUP_BLOCKS: usize = KEY_GROUP / LANES;

/// The tiles of one layer.
pub struct TileCache {
    bits: Tiles,
    head_dim: usize,
    /// Of each head.
    tiles: usize,
    /// (LANES tokens, head_dim, blocks of tokens, tiles, head_count_kv)
    key_codes: Vec<u8>,
    /// (head_dim, KEY_GROUPS, tiles, head_count_kv)
    key_groups: Vec<Group>,
    /// (head_dim padded to lanes, tokens, tiles, head_count_kv)
    value_codes: Vec<u8>,
    /// (tokens, tiles, head_count_kv)
    value_groups: Vec<Group>,
    /// (head_dim, SINKS, head_count_kv)
    sink_keys: Vec<f32>,
    sink_values: Vec<f32>,
}

/// The tiles of one head, as far as a token sees them.
#[derive(Clone, Copy)]
pub struct HeadTiles<'a> {
    bits: Tiles,
    key_codes: &'a [u8],
    key_groups: &'a [Group],
    value_codes: &'a [u8],
    value_groups: &'a [Group],
    sink_keys: &'a [f32],
    sink_values: &'a [f32],
}

/// What attention over tiles needs of a worker's memory: for [`KEY_GROUP`] tokens at a time, keys' or values'.
pub struct TileScratch {
    /// Their codes as numbers.
    codes: Vec<Lanes>,
    /// (head_dim or tokens, QUERIES): queries or weights, scaled as the codes are
    scaled: Vec<f32>,
}

impl TileScratch {
    /// For heads of up to `head_dim` values.
    pub fn new(head_dim: usize) -> Self {
        Self {
            codes: vec![Lanes::ZERO; KEY_GROUP * head_dim.div_ceil(LANES)],
            scaled: vec![0.0; head_dim.max(KEY_GROUP) * QUERIES],
        }
    }
}

impl TileCache {
    /// `None` where there is no memory for `context_len` tokens.
    pub fn new(layer: &KvLayer, bits: Tiles, context_len: usize) -> Option<Self> {
        let KvLayer {
            head_dim,
            head_count_kv,
            ..
        } = *layer;
        let tiles = context_len / TILE;
        let all = tiles.checked_mul(head_count_kv)?;
        let key_codes = all.checked_mul(head_dim * BLOCKS * packed_len(bits.key_bits))?;
        let value_codes =
            all.checked_mul(TILE * head_dim.div_ceil(LANES) * packed_len(bits.value_bits))?;
        let sinks = SINKS * layer.token_len();
        Some(Self {
            bits,
            head_dim,
            tiles,
            key_codes: bytemuck::try_zeroed_vec(key_codes).ok()?,
            key_groups: bytemuck::try_zeroed_vec(all * KEY_GROUPS * head_dim).ok()?,
            value_codes: bytemuck::try_zeroed_vec(value_codes).ok()?,
            value_groups: bytemuck::try_zeroed_vec(all * TILE).ok()?,
            sink_keys: vec![0.0; sinks],
            sink_values: vec![0.0; sinks],
        })
    }

    /// Appends the memory of the sinks and of the first `tiles` tiles of each head to `pieces`.
    pub fn memory<'a>(&'a mut self, tiles: usize, pieces: &mut Vec<&'a mut [u8]>) {
        pieces.push(bytemuck::cast_slice_mut(&mut self.sink_keys));
        pieces.push(bytemuck::cast_slice_mut(&mut self.sink_values));
        let heads = self.value_groups.len() / (self.tiles * TILE);
        let all: [&mut [u8]; 4] = [
            &mut self.key_codes,
            bytemuck::cast_slice_mut(&mut self.key_groups),
            &mut self.value_codes,
            bytemuck::cast_slice_mut(&mut self.value_groups),
        ];
        for of_heads in all {
            let head_len = of_heads.len() / heads;
            let used = head_len / self.tiles * tiles;
            let heads = of_heads.chunks_exact_mut(head_len);
            pieces.extend(heads.map(|head| &mut head[..used]));
        }
    }

    /// Keeps the first tokens of a text as they are.
    pub fn store_sink(&mut self, head: usize, position: usize, key: &[f32], value: &[f32]) {
        let at = (head * SINKS + position) * self.head_dim;
        self.sink_keys[at..at + self.head_dim].copy_from_slice(key);
        self.sink_values[at..at + self.head_dim].copy_from_slice(value);
    }

    /// Makes a tile of its tokens, of which the first lies in slot `slot` of `exact`.
    pub fn compress(&mut self, head: usize, tile: usize, exact: &ExactHead, slot: usize) {
        let Tiles {
            key_bits,
            value_bits,
        } = self.bits;
        let (dim, index) = (self.head_dim, head * self.tiles + tile);
        let codes = &mut self.key_codes[index * dim * BLOCKS * packed_len(key_bits)..];
        let mut codes = codes.chunks_exact_mut(packed_len(key_bits));
        let groups = &mut self.key_groups[index * KEY_GROUPS * dim..][..KEY_GROUPS * dim];
        for (start, groups) in (0..TILE)
            .step_by(KEY_GROUP)
            .zip(groups.chunks_exact_mut(dim))
        {
            // What lies in the places of sinks counts for nothing.
            let is_first = tile == 0 && start == 0;
            let tokens = start + if is_first { SINKS } else { 0 }..start + KEY_GROUP;
            for (channel, group) in groups.iter_mut().enumerate() {
                let keys = tokens.clone().map(|token| exact.key(slot + token, channel));
                *group = Group::of(keys, key_bits);
            }
            for block in (start..start + KEY_GROUP).step_by(LANES) {
                for (channel, group) in groups.iter().enumerate() {
                    let codes_of_block: [u8; CODES] = std::array::from_fn(|lane| {
                        group.code(exact.key(slot + block + lane, channel), key_bits)
                    });
                    pack(
                        codes_of_block,
                        key_bits,
                        codes.next().expect("codes of all channels"),
                    );
                }
            }
        }
        let lanes = dim.div_ceil(LANES);
        let codes = &mut self.value_codes[index * TILE * lanes * packed_len(value_bits)..];
        let mut codes = codes.chunks_exact_mut(packed_len(value_bits));
        let groups = &mut self.value_groups[index * TILE..][..TILE];
        for (token, group) in groups.iter_mut().enumerate() {
            let value = exact.value(slot + token);
            *group = Group::of(value[..dim].iter().copied(), value_bits);
            for numbers in value.chunks_exact(LANES) {
                let codes_of_lanes: [u8; CODES] =
                    std::array::from_fn(|lane| group.code(numbers[lane], value_bits));
                pack(
                    codes_of_lanes,
                    value_bits,
                    codes.next().expect("codes of all tokens"),
                );
            }
        }
    }

    /// Those of a head.
    pub fn head(&self, head: usize) -> HeadTiles<'_> {
        fn part<T>(all: &[T], head: usize, len: usize) -> &[T] {
            &all[head * len..][..len]
        }
        let Tiles {
            key_bits,
            value_bits,
        } = self.bits;
        let (dim, lanes) = (self.head_dim, self.head_dim.div_ceil(LANES));
        HeadTiles {
            bits: self.bits,
            key_codes: part(
                &self.key_codes,
                head,
                self.tiles * dim * BLOCKS * packed_len(key_bits),
            ),
            key_groups: part(&self.key_groups, head, self.tiles * KEY_GROUPS * dim),
            value_codes: part(
                &self.value_codes,
                head,
                self.tiles * TILE * lanes * packed_len(value_bits),
            ),
            value_groups: part(&self.value_groups, head, self.tiles * TILE),
            sink_keys: part(&self.sink_keys, head, SINKS * dim),
            sink_values: part(&self.sink_values, head, SINKS * dim),
        }
    }
}

/// A head's keys and values as they were stored.
pub struct ExactHead<'a> {
    cache: &'a LayerCache,
    head: usize,
}

impl<'a> ExactHead<'a> {
    pub fn new(cache: &'a LayerCache, head: usize) -> Self {
        Self { cache, head }
    }

    pub fn key(&self, slot: usize, channel: usize) -> f32 {
        let slot = self.head * self.cache.slots + slot % self.cache.slots;
        self.cache.keys.lanes()[slot / LANES * self.cache.head_dim + channel].0[slot % LANES]
    }

    /// With its padding.
    pub fn value(&self, slot: usize) -> &'a [f32] {
        let slot = self.head * self.cache.slots + slot % self.cache.slots;
        let stride = self.cache.head_dim.div_ceil(LANES);
        bytemuck::cast_slice(&self.cache.values.lanes()[slot * stride..][..stride])
    }
}

impl HeadTiles<'_> {
    fn head_dim(&self) -> usize {
        self.sink_keys.len() / SINKS
    }

    /// The keys and values of a tile, each (head_dim, TILE), as they are read back; the sinks as they were stored.
    pub fn read(&self, tile: usize, keys: &mut [f32], values: &mut [f32]) {
        match self.bits.key_bits {
            3 => self.read_keys::<3>(tile, keys),
            4 => self.read_keys::<4>(tile, keys),
            _ => self.read_keys::<8>(tile, keys),
        }
        match self.bits.value_bits {
            3 => self.read_values::<3>(tile, values),
            4 => self.read_values::<4>(tile, values),
            _ => self.read_values::<8>(tile, values),
        }
        if tile == 0 {
            keys[..self.sink_keys.len()].copy_from_slice(self.sink_keys);
            values[..self.sink_values.len()].copy_from_slice(self.sink_values);
        }
    }

    fn read_keys<const BITS: usize>(&self, tile: usize, keys: &mut [f32]) {
        let dim = keys.len() / TILE;
        let groups = &self.key_groups[tile * KEY_GROUPS * dim..][..KEY_GROUPS * dim];
        let codes = &self.key_codes[tile * BLOCKS * dim * packed_len(BITS)..];
        let mut codes = codes.chunks_exact(packed_len(BITS));
        for (block, keys) in keys.chunks_exact_mut(LANES * dim).enumerate() {
            let groups = &groups[block / GROUP_BLOCKS * dim..][..dim];
            for (channel, (group, codes)) in groups.iter().zip(&mut codes).enumerate() {
                for (lane, code) in unpack::<BITS>(codes).into_iter().enumerate() {
                    keys[lane * dim + channel] = group.number(code);
                }
            }
        }
    }

    fn read_values<const BITS: usize>(&self, tile: usize, values: &mut [f32]) {
        let dim = values.len() / TILE;
        let groups = &self.value_groups[tile * TILE..][..TILE];
        let token_len = dim.div_ceil(LANES) * packed_len(BITS);
        let codes = self.value_codes[tile * TILE * token_len..].chunks_exact(token_len);
        for ((group, codes), values) in groups.iter().zip(codes).zip(values.chunks_exact_mut(dim)) {
            let pieces = values.chunks_mut(LANES);
            for (codes, values) in codes.chunks_exact(packed_len(BITS)).zip(pieces) {
                for (code, value) in unpack::<BITS>(codes).into_iter().zip(values) {
                    *value = group.number(code);
                }
            }
        }
    }

    /// Sets the scores of tokens in tiles to `query · key`. `queries` is (head_dim, rows), rows of `scores` begin `row_lanes` apart,
    /// with the first token's.
    pub fn score(
        &self,
        queries: &[f32],
        seen: &[Seen],
        scratch: &mut TileScratch,
        scores: &mut [Lanes],
        row_lanes: usize,
    ) {
        let dim = self.head_dim();
        for (group, rows) in groups_seen(seen) {
            let queries = &queries[rows * dim..];
            let scores = &mut scores[rows * row_lanes + group * GROUP_BLOCKS..];
            self.score_group(group, queries, scratch, scores, row_lanes);
        }
        let rows = queries.chunks_exact(dim).zip(seen);
        for ((query, seen), scores) in rows.zip(scores.chunks_exact_mut(row_lanes)) {
            if seen.first_in_slot > 0 {
                let keys = self.sink_keys.chunks_exact(dim);
                for (score, key) in scores[0].0.iter_mut().zip(keys) {
                    *score = query.iter().zip(key).map(|(query, key)| query * key).sum();
                }
            }
        }
    }

    fn score_group(
        &self,
        group: usize,
        queries: &[f32],
        TileScratch { codes, scaled }: &mut TileScratch,
        scores: &mut [Lanes],
        row_lanes: usize,
    ) {
        let dim = self.head_dim();
        let mut zeros = [0.0; QUERIES];
        let groups = &self.key_groups[group * dim..][..dim];
        for (channel, group) in groups.iter().enumerate() {
            let (scale, zero) = (group.scale.to_f32(), group.zero.to_f32());
            let rows = queries.chunks_exact(dim).zip(scaled.chunks_exact_mut(dim));
            for ((query, scaled), sum) in rows.zip(&mut zeros) {
                scaled[channel] = query[channel] * scale;
                *sum += query[channel] * zero;
            }
        }
        let len = GROUP_BLOCKS * dim * packed_len(self.bits.key_bits);
        let packed = &self.key_codes[group * len..][..len];
        unpack_all(self.bits.key_bits, packed, codes);
        let factors = Factors {
            numbers: scaled,
            row_len: dim,
            len: dim,
        };
        let columns = Columns {
            lanes: codes,
            count: GROUP_BLOCKS,
            spacing: dim,
            step: 1,
        };
        add_products(factors, columns, scores, row_lanes, true);
        for (scores, zero) in scores.chunks_mut(row_lanes).zip(zeros) {
            add_to_all(zero, &mut scores[..GROUP_BLOCKS]);
        }
    }

    /// Adds the values of tokens in tiles, weighted, to `sums`, (head_dim padded to lanes, rows). Rows of `weights` begin `row_len`
    /// apart, with the first token's.
    pub fn add_values(
        &self,
        weights: &[f32],
        row_len: usize,
        seen: &[Seen],
        scratch: &mut TileScratch,
        sums: &mut [Lanes],
    ) {
        let dim = self.head_dim();
        let stride = dim.div_ceil(LANES);
        let mut zeros = [0.0; QUERIES];
        for (group, rows) in groups_seen(seen) {
            let weights = &weights[rows * row_len..];
            let (sums, zeros) = (&mut sums[rows * stride..], &mut zeros[rows..]);
            self.add_group(group, weights, row_len, zeros, scratch, sums);
        }
        let rows = weights.chunks_exact(row_len).zip(seen).zip(zeros);
        for (((weights, seen), zero), sums) in rows.zip(sums.chunks_exact_mut(stride)) {
            if seen.first_in_slot > 0 {
                add_to_all(zero, sums);
                let sums = bytemuck::cast_slice_mut::<Lanes, f32>(sums);
                for (weight, value) in weights.iter().zip(self.sink_values.chunks_exact(dim)) {
                    for (sum, value) in sums.iter_mut().zip(value) {
                        *sum += weight * value;
                    }
                }
            }
        }
    }

    fn add_group(
        &self,
        group: usize,
        weights: &[f32],
        row_len: usize,
        zeros: &mut [f32],
        TileScratch { codes, scaled }: &mut TileScratch,
        sums: &mut [Lanes],
    ) {
        // What lies in the places of sinks counts for nothing.
        let first = if group == 0 { SINKS } else { 0 };
        let tokens = group * KEY_GROUP + first..(group + 1) * KEY_GROUP;
        let groups = &self.value_groups[tokens.clone()];
        let rows = weights
            .chunks(row_len)
            .zip(scaled.chunks_exact_mut(KEY_GROUP));
        for ((weights, scaled), sum) in rows.zip(zeros) {
            let weights = weights[tokens.clone()].iter().zip(groups);
            for (scaled, (weight, group)) in scaled.iter_mut().zip(weights) {
                *scaled = weight * group.scale.to_f32();
                *sum += weight * group.zero.to_f32();
            }
        }
        let stride = self.head_dim().div_ceil(LANES);
        let token_len = stride * packed_len(self.bits.value_bits);
        let packed = &self.value_codes[tokens.start * token_len..tokens.end * token_len];
        unpack_all(self.bits.value_bits, packed, codes);
        let factors = Factors {
            numbers: scaled,
            row_len: KEY_GROUP,
            len: tokens.len(),
        };
        let columns = Columns {
            lanes: codes,
            count: stride,
            spacing: 1,
            step: stride,
        };
        add_products(factors, columns, sums, stride, false);
    }
}

/// The groups of [`KEY_GROUP`] tokens that some queries see in tiles, each with the first query that does: those behind it do, too.
fn groups_seen(seen: &[Seen]) -> impl Iterator<Item = (usize, usize)> {
    let in_tiles = seen.last().map_or(0, |seen| seen.first_in_slot);
    (0..in_tiles / KEY_GROUP).map(|group| {
        let see_it = |seen: &Seen| seen.first_in_slot > group * KEY_GROUP;
        (group, seen.partition_point(|seen| !see_it(seen)))
    })
}

vectorized! {
    /// The codes of `packed` as numbers.
    fn unpack_all(bits: usize, packed: &[u8], codes: &mut [Lanes]) {
        match bits {
            3 => unpack_bits::<3>(packed, codes),
            4 => unpack_bits::<4>(packed, codes),
            _ => unpack_bits::<8>(packed, codes),
        }
    }

    fn add_to_all(number: f32, all: &mut [Lanes]) {
        for lanes in all {
            vectorize_inside();
            lanes.0.iter_mut().for_each(|lane| *lane += number);
        }
    }
}

#[inline(always)]
fn unpack_bits<const BITS: usize>(packed: &[u8], codes: &mut [Lanes]) {
    for (packed, codes) in packed.chunks_exact(packed_len(BITS)).zip(codes) {
        vectorize_inside();
        *codes = Lanes(unpack::<BITS>(packed));
    }
}
