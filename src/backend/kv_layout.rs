//! Where the KV cache keeps what: for each layer its heads, its room and whose keys and values it reads.

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
    /// Tokens that there is room for.
    pub capacity: usize,
}

impl KvFormat {
    pub fn bytes_per_value(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 => 2,
        }
    }
}

impl KvLayout {
    /// Room for `context_len` tokens in every layer.
    pub fn new(decoder: &Decoder, context_len: usize, format: KvFormat) -> Self {
        let layers = decoder.layers.iter().enumerate().map(|(index, layer)| {
            let attention = &layer.attention;
            KvLayer {
                owner: match attention.kv {
                    KeyValues::Own(_) => index,
                    KeyValues::SharedWith(owner) => owner,
                },
                head_count_kv: attention.head_count_kv,
                head_dim: attention.head_dim,
                capacity: context_len,
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

    /// Bytes that one token adds, a key and a value for every key/value head of every owner.
    pub fn bytes_per_token(&self) -> usize {
        let values = self.owners().map(|(_, layer)| 2 * layer.token_len());
        values.sum::<usize>() * self.format.bytes_per_value()
    }

    /// Bytes of one layer's keys, or values.
    pub fn plane_bytes(&self, layer: usize) -> usize {
        let layer = &self.layers[layer];
        layer.token_len() * layer.capacity * self.format.bytes_per_value()
    }

    /// Bytes of keys and values that decoding the token at `position` reads.
    pub fn bytes_read(&self, position: usize) -> u64 {
        let values = self
            .layers
            .iter()
            .map(|layer| 2 * layer.token_len() as u64 * position.min(layer.capacity) as u64);
        values.sum::<u64>() * self.format.bytes_per_value() as u64
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
