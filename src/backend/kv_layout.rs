//! Where the KV cache keeps what: for each layer its heads, its room and whose keys and values it reads.

use std::ops::Range;

use crate::model::decoder::{Decoder, KeyValues};

/// How a number lies in the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvFormat {
    F32,
    F16,
}

/// The cache of a whole model.
#[derive(Debug, Clone)]
pub struct KvLayout {
    pub format: KvFormat,
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
    /// Tokens that there is room for.
    pub capacity: usize,
    /// Whether that is less than the context, so that slots are used again.
    pub is_ring: bool,
}

/// The end of the positions that a cache was filled with since the last start at position 0.
#[derive(Debug, Clone, Copy, Default)]
pub struct Written(usize);

impl Written {
    /// Adds `positions`.
    pub fn add(&mut self, positions: Range<usize>) {
        let before = if positions.start == 0 { 0 } else { self.0 };
        self.0 = before.max(positions.end);
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
    /// them, or those of a sliding window and of a chunk, in a ring.
    pub fn new(decoder: &Decoder, context_len: usize, chunk_len: usize, format: KvFormat) -> Self {
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
            let ring = |window: usize| {
                let room = window.saturating_add(chunk_len);
                room.checked_next_multiple_of(RING_MULTIPLE)
            };
            let ring = widest.and_then(ring).filter(|&ring| ring < context_len);
            KvLayer {
                owner: owner(index),
                head_count_kv: attention.head_count_kv,
                head_dim: attention.head_dim,
                window: window(index),
                capacity: ring.unwrap_or(context_len),
                is_ring: ring.is_some(),
            }
        });
        Self {
            format,
            layers: layers.collect(),
        }
    }

    /// The layers that have keys and values of their own.
    pub fn owners(&self) -> impl Iterator<Item = (usize, &KvLayer)> {
        let layers = self.layers.iter().enumerate();
        layers.filter(|(index, layer)| layer.owner == *index)
    }

    /// Bytes that one more token of context takes: a key and a value for every key/value head of every owner without a ring.
    pub fn bytes_per_token(&self) -> usize {
        let layers = self.owners().filter(|(_, layer)| !layer.is_ring);
        self.bytes_of(layers.map(|(_, layer)| layer.token_len()))
    }

    /// Bytes of all rings.
    pub fn ring_bytes(&self) -> usize {
        let rings = self.owners().filter(|(_, layer)| layer.is_ring);
        self.bytes_of(rings.map(|(_, layer)| layer.token_len() * layer.capacity))
    }

    /// Says under `-v` what a context takes, by what is known of its layout.
    pub fn log_size(context_len: usize, bytes_per_token: usize, ring_bytes: usize) {
        let bytes = context_len.saturating_mul(bytes_per_token);
        tracing::debug!("KV cache: {bytes} bytes, {bytes_per_token} a token");
        if ring_bytes > 0 {
            tracing::debug!("KV cache of layers with sliding windows: {ring_bytes} bytes");
        }
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
    pub fn bytes_read(&self, position: usize) -> u64 {
        let seen = |layer: &KvLayer| position.min(layer.window.unwrap_or(usize::MAX) - 1);
        let values = self.layers.iter();
        let values = values.map(|layer| 2 * layer.token_len() as u64 * seen(layer) as u64);
        values.sum::<u64>() * self.format.bytes_per_value() as u64
    }

    /// Whether all that a token at `position` sees before it is still there.
    pub fn remembers(&self, position: usize, Written(end): Written) -> bool {
        let sees_nothing = position == 0;
        let mut layers = self.layers.iter();
        sees_nothing
            || layers.all(|layer| {
                let window = layer.window.unwrap_or(usize::MAX);
                let first_seen = (position + 1).saturating_sub(window);
                first_seen >= end.saturating_sub(layer.capacity)
            })
    }
}

impl KvLayer {
    /// Where in the cache the token at `position` lies. Callers keep both apart: what is rotated and compared is the
    /// position, what is addressed is the slot.
    pub fn slot(&self, position: usize) -> usize {
        position % self.capacity
    }

    /// Values of one token's keys.
    pub fn token_len(&self) -> usize {
        self.head_count_kv * self.head_dim
    }
}
