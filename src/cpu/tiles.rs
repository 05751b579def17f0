//! Keys and values of a layer that are kept in tiles of few bits (`docs/kv-cache.md`), and attention over them.
//!
//! A score needs no number of a tile but its codes: `query · key = sum of (query * scale) * code + query · zero`, with a scale and a
//! zero for each channel of a group of tokens. Likewise for values, whose scales and zeros belong to tokens.

use super::{
    attention::LayerCache,
    simd::{LANES, Lanes},
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

    /// `query · key * scale` for all tokens of the first tiles, [`BLOCKS`] of `scores` each. `scaled` has room for a query.
    #[inline(always)]
    pub fn score(&self, query: &[f32], scale: f32, scaled: &mut [f32], scores: &mut [Lanes]) {
        match self.bits.key_bits {
            3 => self.score_bits::<3>(query, scale, scaled, scores),
            4 => self.score_bits::<4>(query, scale, scaled, scores),
            _ => self.score_bits::<8>(query, scale, scaled, scores),
        }
        if let [Lanes(first), ..] = scores {
            for (score, key) in first
                .iter_mut()
                .zip(self.sink_keys.chunks_exact(query.len()))
            {
                *score = query
                    .iter()
                    .zip(key)
                    .map(|(query, key)| query * key)
                    .sum::<f32>()
                    * scale;
            }
        }
    }

    #[inline(always)]
    fn score_bits<const BITS: usize>(
        &self,
        query: &[f32],
        scale: f32,
        scaled: &mut [f32],
        scores: &mut [Lanes],
    ) {
        let block_len = query.len() * packed_len(BITS);
        let keys = self.key_groups.chunks_exact(query.len());
        let keys = keys.zip(self.key_codes.chunks_exact(GROUP_BLOCKS * block_len));
        for (scores, (groups, codes)) in scores.chunks_exact_mut(GROUP_BLOCKS).zip(keys) {
            let mut zero = 0.0;
            for ((scaled, query), group) in scaled.iter_mut().zip(query).zip(groups) {
                *scaled = query * group.scale.to_f32();
                zero += query * group.zero.to_f32();
            }
            for (score, codes) in scores.iter_mut().zip(codes.chunks_exact(block_len)) {
                let mut sum = Lanes::ZERO;
                for (scaled, codes) in scaled.iter().zip(codes.chunks_exact(packed_len(BITS))) {
                    vectorize_inside();
                    sum.add_scaled(*scaled, &Lanes(unpack::<BITS>(codes)));
                }
                *score = Lanes(sum.0.map(|score| (score + zero) * scale));
            }
        }
    }

    /// Adds the values of the first `weights.len()` tokens (whole tiles), weighted, to `L` lanes from lane `start` of `stride` on.
    #[inline(always)]
    pub fn add_values<const L: usize>(
        &self,
        weights: &[f32],
        stride: usize,
        start: usize,
        sums: &mut [Lanes; L],
    ) {
        match self.bits.value_bits {
            3 => self.add_values_bits::<3, L>(weights, stride, start, sums),
            4 => self.add_values_bits::<4, L>(weights, stride, start, sums),
            _ => self.add_values_bits::<8, L>(weights, stride, start, sums),
        }
        let dim = self.sink_values.len() / SINKS;
        for (weight, value) in weights.iter().zip(self.sink_values.chunks_exact(dim)) {
            for (lane, sum) in sums.iter_mut().enumerate() {
                let value = value.get((start + lane) * LANES..).unwrap_or_default();
                for (sum, value) in sum.0.iter_mut().zip(value) {
                    *sum += weight * value;
                }
            }
        }
    }

    #[inline(always)]
    fn add_values_bits<const BITS: usize, const L: usize>(
        &self,
        weights: &[f32],
        stride: usize,
        start: usize,
        sums: &mut [Lanes; L],
    ) {
        let mut zero = 0.0;
        let tokens = self
            .value_groups
            .iter()
            .zip(self.value_codes.chunks_exact(stride * packed_len(BITS)));
        for (weight, (group, codes)) in weights.iter().zip(tokens).skip(SINKS) {
            let scaled = weight * group.scale.to_f32();
            zero += weight * group.zero.to_f32();
            let codes = &codes[start * packed_len(BITS)..][..L * packed_len(BITS)];
            for (sum, codes) in sums.iter_mut().zip(codes.chunks_exact(packed_len(BITS))) {
                vectorize_inside();
                sum.add_scaled(scaled, &Lanes(unpack::<BITS>(codes)));
            }
        }
        for sum in sums {
            sum.0.iter_mut().for_each(|sum| *sum += zero);
        }
    }
}
