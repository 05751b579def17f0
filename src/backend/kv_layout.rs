//! Where the KV cache keeps what: for each layer its heads, its room and whose keys and values it reads.

use std::{fmt, ops::Range};

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use crate::{
    model::decoder::{Decoder, KeyValues},
    quant::kv_tile::{CODES, Group, KEY_GROUP, TILE, packed_len},
};

/// How a number lies in the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvFormat {
    F32,
    F16,
}

/// How layers without a window keep tokens that are far behind: in tiles of [`TILE`], by numbers of so many bits.
///
/// What the token at a position sees of the others follows from its position alone, however a text was cut into batches: the
/// first [`SINKS`] tokens, and those of the tile before its own and of its own, as they were stored; all others from tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tiles {
    /// 3, 4 or 8, as are those of values.
    pub key_bits: usize,
    pub value_bits: usize,
}

/// The first tokens of a text, to which many heads give most of their attention, are never compressed.
pub const SINKS: usize = 4;

impl fmt::Display for Tiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "k{}v{}", self.key_bits, self.value_bits)
    }
}

impl Tiles {
    /// All that kernels read, the largest first.
    pub const ALL: [Self; 3] = [Self::of(8, 8), Self::of(4, 4), Self::of(4, 3)];

    pub const fn of(key_bits: usize, value_bits: usize) -> Self {
        Self {
            key_bits,
            value_bits,
        }
    }

    /// How many tiles the token at `position` sees.
    pub fn seen(position: usize) -> usize {
        (position / TILE).saturating_sub(1)
    }
}

/// What a cache is to keep, and how.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct KvOptions {
    /// How tokens that are far behind are kept; `None`: as all others are.
    pub tiles: Option<Tiles>,
    /// Tokens that each head of layers without a window keeps behind a prompt, [`MIN_BUDGET`](super::MIN_BUDGET) or more;
    /// `None`: all.
    pub budget: Option<usize>,
}

/// The cache of a whole model.
#[derive(Debug, Clone)]
pub struct KvLayout {
    pub format: KvFormat,
    /// [`KvOptions::budget`]
    pub budget: Option<usize>,
    /// Of each layer of the model.
    pub layers: Vec<KvLayer>,
}

/// The cache of one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvLayer {
    /// The layer whose keys and values this one reads: itself, or one before it.
    pub owner: usize,
    pub head_count_kv: usize,
    pub head_dim: usize,
    /// Tokens that one sees, itself included; `None`: all before it
    pub window: Option<usize>,
    /// Tokens that there is room for, as they were stored.
    pub capacity: usize,
    /// Whether that is less than the context, so that slots are used again.
    pub is_ring: bool,
    /// What becomes of those whose slots are used again, where they are still seen.
    pub tiles: Option<Tiles>,
    /// Whether no reader has a window, so that tokens can be evicted.
    pub evicts: bool,
}

/// A part of a cache's memory, by what becomes of it when a text goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvPart {
    /// The slots of layers with rings: what follows comes into them.
    Rings,
    /// Everything else: what follows leaves it as it is.
    Rest,
}

/// What a cache was filled with since the last start at position 0.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Written {
    /// The end of the positions.
    end: usize,
    /// The end of the places, in layers that evict.
    places_end: usize,
    /// Tokens that these have lost, and the position behind the last one that they had by then.
    evicted: usize,
    evicted_at: usize,
}

impl Written {
    /// Adds `positions`.
    pub fn add(&mut self, positions: Range<usize>) {
        if positions.start == 0 {
            *self = Self::default();
        }
        self.end = self.end.max(positions.end);
        self.places_end = self.places_end.max(positions.end - self.evicted);
    }

    /// Of all tokens before `position`, layers that evict keep `kept`.
    pub fn evict(&mut self, position: usize, kept: usize) {
        self.places_end = kept;
        self.evicted = position - kept;
        self.evicted_at = position;
    }

    /// Whether a cache for `context_len` tokens can have been filled so when a text of `len` tokens was read.
    pub fn is_behind(&self, len: usize, context_len: usize) -> bool {
        self.evicted <= self.evicted_at
            && self.evicted_at <= len
            && (len..=context_len).contains(&self.end)
            && (len - self.evicted..=context_len).contains(&self.places_end)
    }

    /// Tokens that layers that evict have lost: the place of a token among those that they have is its position less this.
    pub fn evicted(&self) -> usize {
        self.evicted
    }
}

impl KvFormat {
    pub fn bytes_per_value(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 => 2,
        }
    }
}

/// Rings have room for a multiple of this many tokens: kernels read whole pieces of so many.
const RING_MULTIPLE: usize = 128;

impl KvLayout {
    /// Room in every layer for what its readers can see of `context_len` tokens, read in chunks of up to `chunk_len`: all of
    /// them, or those of a sliding window and of a chunk, in a ring. Where there are tiles, `tail_len` tokens beside those that one
    /// sees as they were stored.
    pub fn new(
        decoder: &Decoder,
        context_len: usize,
        chunk_len: usize,
        format: KvFormat,
        options: KvOptions,
        tail_len: usize,
    ) -> Self {
        let owner = |index: usize| match decoder.layers[index].attention.kv {
            KeyValues::Own(_) => index,
            KeyValues::SharedWith(owner) => owner,
        };
        let window = |index: usize| decoder.layers[index].attention.window;
        let all = 0..decoder.layers.len();
        let layers = all.clone().map(|index| {
            let attention = &decoder.layers[index].attention;
            let mut readers = all.clone().filter(|&reader| owner(reader) == owner(index));
            let widest = readers.try_fold(0, |widest, reader| Some(widest.max(window(reader)?)));
            let tiles = options.tiles.filter(|_| widest.is_none());
            // A token sees less than two tiles as they were stored.
            let room = match tiles {
                None => widest.map(|window| window.saturating_add(chunk_len)),
                Some(_) => Some(2 * TILE + tail_len),
            };
            let ring = room.and_then(|room| room.checked_next_multiple_of(RING_MULTIPLE));
            let ring = ring.filter(|&ring| ring < context_len);
            KvLayer {
                owner: owner(index),
                head_count_kv: attention.head_count_kv,
                head_dim: attention.head_dim,
                window: window(index),
                capacity: ring.unwrap_or(context_len),
                is_ring: ring.is_some(),
                tiles: tiles.filter(|_| ring.is_some()),
                evicts: widest.is_none(),
            }
        });
        Self {
            format,
            budget: options.budget,
            layers: layers.collect(),
        }
    }

    /// How many tokens each head of layers that evict is to keep of those up to `position`, where they have more.
    pub fn to_keep(&self, position: usize, written: Written) -> Option<usize> {
        self.budget
            .filter(|&budget| position - written.evicted > budget)
    }

    /// The layers that have keys and values of their own.
    pub fn owners(&self) -> impl Iterator<Item = (usize, &KvLayer)> {
        let layers = self.layers.iter().enumerate();
        layers.filter(|(index, layer)| layer.owner == *index)
    }

    /// How the cache keeps what takes most of it, as `--kv-type` and messages name it.
    pub fn name(&self) -> String {
        match (
            self.layers.iter().find_map(|layer| layer.tiles),
            self.format,
        ) {
            (Some(tiles), _) => tiles.to_string(),
            (None, KvFormat::F16) => "f16".to_owned(),
            (None, KvFormat::F32) => "f32".to_owned(),
        }
    }

    /// Bytes that one more token of context takes: a key and a value for every key/value head of every owner without a ring.
    pub fn bytes_per_token(&self) -> usize {
        let grows = |layer: &&KvLayer| !layer.is_ring || layer.tiles.is_some();
        let bytes = |layer: &KvLayer| match layer.tiles {
            None => self.bytes_of(std::iter::once(layer.token_len())),
            Some(_) => layer.tile_bytes().div_ceil(TILE),
        };
        let owners = self.owners().map(|(_, layer)| layer);
        owners.filter(grows).map(bytes).sum()
    }

    /// Bytes of all rings, and of the first tokens of layers with tiles.
    pub fn ring_bytes(&self) -> usize {
        let tokens = |layer: &KvLayer| layer.capacity + layer.tiles.map_or(0, |_| SINKS);
        let rings = self.owners().filter(|(_, layer)| layer.is_ring);
        self.bytes_of(rings.map(|(_, layer)| layer.token_len() * tokens(layer)))
    }

    /// Says under `-v` what a context takes, by what is known of its layout.
    pub fn log_size(context_len: usize, bytes_per_token: usize, ring_bytes: usize) {
        let bytes = context_len.saturating_mul(bytes_per_token);
        tracing::debug!("KV cache: {bytes} bytes, {bytes_per_token} a token");
        if ring_bytes > 0 {
            tracing::debug!("KV cache, what does not grow with the context: {ring_bytes} bytes");
        }
    }

    /// Refuses what another cache handed out where this one takes another number of bytes.
    pub fn check_state(&self, bytes: usize, takes: usize) -> Result<()> {
        ensure!(
            bytes == takes,
            "it holds {bytes} bytes of keys and values, and this KV cache takes {takes}"
        );
        Ok(())
    }

    /// Bytes of so many keys' values, and of as many values'.
    fn bytes_of(&self, lens: impl Iterator<Item = usize>) -> usize {
        2 * lens.sum::<usize>() * self.format.bytes_per_value()
    }

    /// Bytes of one layer's keys, or values.
    pub fn plane_bytes(&self, layer: usize) -> usize {
        let layer = &self.layers[layer];
        layer.token_len() * layer.capacity * self.format.bytes_per_value()
    }

    /// Bytes of keys and values that decoding the token at `position` reads.
    pub fn bytes_read(&self, position: usize, written: Written) -> u64 {
        let bytes = |layer: &KvLayer| {
            let place = layer.place(position, written.evicted);
            let seen = place.min(layer.window.unwrap_or(usize::MAX) - 1);
            let tiles = layer.tiles.map_or(0, |_| Tiles::seen(place));
            let exact = self.bytes_of(std::iter::once(layer.token_len() * (seen - tiles * TILE)));
            (exact + tiles * layer.tile_bytes()) as u64
        };
        self.layers.iter().map(bytes).sum()
    }

    /// Whether all that a token at `position` sees before it is still there, but for what was evicted before it.
    pub fn remembers(&self, position: usize, written: Written) -> bool {
        let remembers = |layer: &KvLayer| {
            let place = layer.place(position, written.evicted);
            let end = layer.places_end(written);
            let first_seen = match layer.tiles {
                None => (place + 1).saturating_sub(layer.window.unwrap_or(usize::MAX)),
                Some(_) => Tiles::seen(place) * TILE,
            };
            first_seen >= end.saturating_sub(layer.capacity)
        };
        position == 0 || position >= written.evicted_at && self.layers.iter().all(remembers)
    }
}

impl KvLayer {
    /// The place of the token at `position` among all that the layer has, where those that evict have lost `evicted`.
    /// Callers keep both apart: positions rotate, places say what is near, far and seen.
    pub fn place(&self, position: usize, evicted: usize) -> usize {
        match self.evicts {
            true => position - evicted,
            false => position,
        }
    }

    /// The end of the places that were written.
    fn places_end(&self, written: Written) -> usize {
        match self.evicts {
            true => written.places_end,
            false => written.end,
        }
    }

    /// Slots, from the first on, that hold something.
    pub fn slots_in_use(&self, written: Written) -> usize {
        self.places_end(written).min(self.capacity)
    }

    /// Tiles of each head, from the first on, that hold something.
    pub fn tiles_in_use(&self, written: Written) -> usize {
        self.tiles.map_or(0, |_| self.places_end(written) / TILE)
    }

    /// Where in the cache the token at `place` lies.
    pub fn slot(&self, place: usize) -> usize {
        place % self.capacity
    }

    /// Values of one token's keys.
    pub fn token_len(&self) -> usize {
        self.head_count_kv * self.head_dim
    }

    /// Bytes of a tile of all heads.
    pub fn tile_bytes(&self) -> usize {
        let Some(Tiles {
            key_bits,
            value_bits,
        }) = self.tiles
        else {
            return 0;
        };
        let codes = self.head_dim * (TILE / CODES) * packed_len(key_bits)
            + TILE * self.head_dim.div_ceil(CODES) * packed_len(value_bits);
        let groups = self.head_dim * (TILE / KEY_GROUP) + TILE;
        self.head_count_kv * (codes + groups * size_of::<Group>())
    }
}
