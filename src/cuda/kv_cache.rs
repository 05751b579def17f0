//! Keys and values of all tokens so far in device memory. `kernels/kv_cache.cuh` reads and writes them, and
//! `kernels/kv_tiles.cuh` those that are kept in tiles.

use std::{ops::Range, sync::Arc};

use anyhow::{Context, Result};
use bytemuck::Zeroable;
use cudarc::driver::sys::CUdeviceptr;
use half::f16;

use super::{
    device::{Device, DeviceBuffer, Launch},
    launches::{compress_tiles, copy_tokens},
    params::{CompressTilesParams, CompressedLayer, CopyTokensParams, KvTiles},
    scratch::Whereabouts,
    transfer::{SLOT_BYTES, Staged, download, upload},
};
use crate::{
    backend::{KvFormat, KvLayer, KvLayout, KvOptions, KvPart, SINKS, Tiles, Written},
    model::Decoder,
    quant::kv_tile::TILE,
};

/// For each layer that has its own: keys, then values, each f16 (head_dim, capacity, head_count_kv), head_dim contiguous. Where
/// older tokens are kept in tiles, behind them the sinks, f16 (head_dim, SINKS, 2, head_count_kv), and the records, (bytes, tiles,
/// head_count_kv).
pub struct KvCache {
    memory: DeviceBuffer,
    layout: KvLayout,
    /// Of each layer, where the keys that it reads begin, in bytes.
    offsets: Vec<usize>,
    /// Tiles of each head, where there are any.
    tiles: usize,
    /// Where a chunk's tokens, and those before it that they see as they were stored, lie while it is read: of each layer with
    /// tiles, keys and values, each f16 (head_dim, capacity, head_count_kv). What no other layer reads lies in one place.
    chunks: Vec<Option<[CUdeviceptr; 2]>>,
    chunk_capacity: usize,
    /// The layers with tiles of their own.
    compressed: Vec<usize>,
    /// [`CompressedLayer`] (compressed, 2): what tiles are made of, the layers' rings, and then what chunks are in
    tables: DeviceBuffer,
}

/// A layer's keys and values as they were stored.
#[derive(Clone, Copy)]
pub struct Ring {
    pub keys: CUdeviceptr,
    pub values: CUdeviceptr,
    /// Tokens that there is room for.
    pub capacity: usize,
}

/// The layout of a cache on a GPU: of tokens that chunks store and later ones see as they were stored, layers with tiles have
/// room for one tile more, so that a text can go back a little.
pub fn layout(
    decoder: &Decoder,
    context_len: usize,
    chunk_len: usize,
    options: KvOptions,
) -> KvLayout {
    KvLayout::new(
        decoder,
        context_len,
        chunk_len,
        KvFormat::F16,
        options,
        TILE,
    )
}

/// Bytes through which chunks of up to `chunk_len` tokens pass, in layers with tiles.
pub fn chunk_bytes(layout: &KvLayout, chunk_len: usize) -> usize {
    let places = chunk_places(layout);
    places.map(|(_, len)| 2 * plane_bytes(len, chunk_len)).sum()
}

/// Of each place for a chunk, the layer whose alone it is, if so, and values of a token.
fn chunk_places(layout: &KvLayout) -> impl Iterator<Item = (Option<usize>, usize)> {
    let with_tiles = layout.owners().filter(|(_, layer)| layer.tiles.is_some());
    let is_shared = |owner: usize| {
        let readers = layout.layers.iter().filter(|layer| layer.owner == owner);
        readers.count() > 1
    };
    let (shared, others): (Vec<_>, Vec<_>) = with_tiles.partition(|&(index, _)| is_shared(index));
    let longest = others.iter().map(|(_, layer)| layer.token_len()).max();
    let own = shared
        .into_iter()
        .map(|(index, layer)| (Some(index), layer.token_len()));
    own.chain(longest.map(|len| (None, len)))
}

fn chunk_capacity(chunk_len: usize) -> usize {
    (2 * TILE + chunk_len).next_multiple_of(TILE)
}

fn plane_bytes(token_len: usize, chunk_len: usize) -> usize {
    token_len * chunk_capacity(chunk_len) * size_of::<f16>()
}

/// Bytes of a layer's sinks.
fn sinks_bytes(layer: &KvLayer) -> usize {
    2 * SINKS * layer.token_len() * size_of::<f16>()
}

impl KvCache {
    pub fn new(
        device: &Arc<Device>,
        layout: KvLayout,
        context_len: usize,
        chunk_len: usize,
    ) -> Result<Self> {
        let tiles = context_len / TILE;
        let mut offsets: Vec<usize> = Vec::new();
        let mut bytes = 0;
        for (index, layer) in layout.layers.iter().enumerate() {
            if layer.owner != index {
                offsets.push(offsets[layer.owner]);
                continue;
            }
            offsets.push(bytes);
            bytes += 2 * layout.plane_bytes(index);
            if layer.tiles.is_some() {
                bytes += sinks_bytes(layer) + tiles * layer.tile_bytes();
            }
        }
        let places: Vec<_> = chunk_places(&layout).collect();
        let memory = device.allocate(bytes + chunk_bytes(&layout, chunk_len))?;
        memory.clear()?;
        let mut chunks = vec![None; layout.layers.len()];
        for (owner, token_len) in places {
            let plane = plane_bytes(token_len, chunk_len);
            let place = [bytes, bytes + plane].map(|offset| memory.at(offset));
            bytes += 2 * plane;
            for (chunk, layer) in chunks.iter_mut().zip(&layout.layers) {
                if layer.tiles.is_some()
                    && chunk.is_none()
                    && owner.is_none_or(|owner| owner == layer.owner)
                {
                    *chunk = Some(place);
                }
            }
        }
        let compressed: Vec<usize> = layout
            .owners()
            .filter(|(_, layer)| layer.tiles.is_some())
            .map(|(index, _)| index)
            .collect();
        let tables =
            device.allocate((2 * compressed.len() * size_of::<CompressedLayer>()).max(1))?;
        let cache = Self {
            memory,
            layout,
            offsets,
            tiles,
            chunks,
            chunk_capacity: chunk_capacity(chunk_len),
            compressed,
            tables,
        };
        let entry = |layer: usize, ring: Ring| CompressedLayer {
            k_cache: ring.keys,
            v_cache: ring.values,
            tiles: cache.tiles(layer),
            context: ring.capacity as i32,
            unused: 0,
        };
        let rings = cache
            .compressed
            .iter()
            .map(|&layer| entry(layer, cache.ring(layer)));
        let chunks = cache
            .compressed
            .iter()
            .map(|&layer| entry(layer, cache.chunk(layer)));
        let entries: Vec<CompressedLayer> = rings.chain(chunks).collect();
        cache.tables.upload(0, bytemuck::cast_slice(&entries))?;
        Ok(cache)
    }

    pub fn layout(&self) -> &KvLayout {
        &self.layout
    }

    /// What a decoded token stores and reads.
    pub fn ring(&self, layer: usize) -> Ring {
        let keys = self.memory.at(self.offsets[layer]);
        Ring {
            keys,
            values: keys + self.layout.plane_bytes(layer) as u64,
            capacity: self.layout.layers[layer].capacity,
        }
    }

    /// What a chunk's tokens store and read.
    pub fn chunk(&self, layer: usize) -> Ring {
        match self.chunks[layer] {
            None => self.ring(layer),
            Some([keys, values]) => Ring {
                keys,
                values,
                capacity: self.chunk_capacity,
            },
        }
    }

    /// How a layer keeps tokens that are far behind, if so.
    pub fn kept(&self, layer: usize) -> Option<Tiles> {
        self.layout.layers[layer].tiles
    }

    /// Where it keeps them.
    pub fn tiles(&self, layer: usize) -> KvTiles {
        let of_layer = &self.layout.layers[layer];
        if of_layer.tiles.is_none() {
            return KvTiles::zeroed();
        }
        let sinks = self
            .memory
            .at(self.offsets[layer] + 2 * self.layout.plane_bytes(layer));
        let head_bytes = self.tiles * of_layer.tile_bytes() / of_layer.head_count_kv;
        KvTiles {
            records: sinks + sinks_bytes(of_layer) as u64,
            head_bytes: head_bytes as u64,
            sinks,
        }
    }

    /// What makes tiles of all layers whose last token is the decoded one, behind all attention.
    pub fn compress(&self, device: &Device, at: Whereabouts) -> Result<Vec<Launch>> {
        let alike = |&a: &usize, &b: &usize| {
            let [a, b] = [a, b].map(|layer| &self.layout.layers[layer]);
            (a.head_dim, a.head_count_kv) == (b.head_dim, b.head_count_kv)
        };
        let mut first = 0;
        let runs = self.compressed.chunk_by(alike);
        runs.map(|layers| {
            let place = at.place_in(&self.layout.layers[layers[0]]);
            let launch = self.compress_run(device, first, layers, place, 1);
            first += layers.len();
            launch
        })
        .collect()
    }

    /// What brings the tokens before a chunk that it sees as they were stored to where the chunk's are.
    pub fn bring(&self, device: &Device, layer: usize, place: CUdeviceptr) -> Result<Launch> {
        self.copy(device, layer, self.ring(layer), self.chunk(layer), place, 0)
    }

    /// What makes tiles of a layer's tokens of a chunk that end one.
    pub fn make_tiles(
        &self,
        device: &Device,
        layer: usize,
        place: CUdeviceptr,
        tokens: usize,
    ) -> Result<Launch> {
        let index = self.compressed.iter().position(|&other| other == layer);
        let index = index.expect("a layer with tiles of its own");
        self.compress_run(
            device,
            self.compressed.len() + index,
            &[layer],
            place,
            tokens,
        )
    }

    /// What brings the last of a layer's tokens of a chunk to its ring.
    pub fn keep_newest(
        &self,
        device: &Device,
        layer: usize,
        place: CUdeviceptr,
        tokens: usize,
    ) -> Result<Launch> {
        let (from, to) = (self.chunk(layer), self.ring(layer));
        self.copy(device, layer, from, to, place, tokens)
    }

    /// Of `layers`, the first of which is `first` in the tables.
    fn compress_run(
        &self,
        device: &Device,
        first: usize,
        layers: &[usize],
        place: CUdeviceptr,
        tokens: usize,
    ) -> Result<Launch> {
        let layer = &self.layout.layers[layers[0]];
        let kept = layer.tiles.expect("it has tiles");
        let params = CompressTilesParams {
            layers: self.tables.at(first * size_of::<CompressedLayer>()),
            place,
            tokens: tokens as i32,
            unused: 0,
        };
        compress_tiles(
            device,
            layer.head_dim,
            layer.head_count_kv,
            layers.len(),
            kept,
            params,
        )
    }

    fn copy(
        &self,
        device: &Device,
        layer: usize,
        from: Ring,
        to: Ring,
        place: CUdeviceptr,
        tokens: usize,
    ) -> Result<Launch> {
        let layer = &self.layout.layers[layer];
        let params = CopyTokensParams {
            k_from: from.keys,
            v_from: from.values,
            k_to: to.keys,
            v_to: to.values,
            place,
            from_context: from.capacity as i32,
            to_context: to.capacity as i32,
            head_dim: layer.head_dim as i32,
            tokens: tokens as i32,
        };
        copy_tokens(device, layer.head_count_kv, params)
    }

    /// Where in memory a part of the cache lies, as far as it was `written`: pieces of up to [`SLOT_BYTES`], in an order, and of
    /// lengths, that do not depend on how long the context is.
    fn pieces(&self, part: KvPart, written: Written) -> Vec<Range<usize>> {
        let mut runs = Vec::new();
        for (index, layer) in self.layout.owners() {
            let (start, plane) = (self.offsets[index], self.layout.plane_bytes(index));
            if layer.is_ring == (part == KvPart::Rings) {
                let row = layer.head_dim * size_of::<f16>();
                let heads = (0..2 * layer.head_count_kv).map(|head| head * layer.capacity * row);
                runs.extend(heads.map(|head| (start + head, layer.slots_in_use(written) * row)));
            }
            if part == KvPart::Rest && layer.tiles.is_some() {
                let sinks = start + 2 * plane;
                let records = sinks + sinks_bytes(layer);
                let record = layer.tile_bytes() / layer.head_count_kv;
                runs.push((sinks, sinks_bytes(layer)));
                let heads = (0..layer.head_count_kv).map(|head| head * self.tiles * record);
                let used = layer.tiles_in_use(written) * record;
                runs.extend(heads.map(|head| (records + head, used)));
            }
        }
        let cut = runs.into_iter().flat_map(|(start, len)| {
            let starts = (start..start + len).step_by(SLOT_BYTES);
            starts.map(move |at| at..(at + SLOT_BYTES).min(start + len))
        });
        cut.collect()
    }

    /// Hands `take` a part of the cache, as far as it was `written`.
    pub fn export(
        &self,
        device: &Arc<Device>,
        part: KvPart,
        written: Written,
        take: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        download(device, &self.memory, &self.pieces(part, written), take)
            .context("copying the KV cache from the GPU")
    }

    /// Fills the cache with what both parts of one that was `written` so held, the rings first.
    pub fn import(&self, device: &Arc<Device>, written: Written, state: &[u8]) -> Result<()> {
        let parts = [KvPart::Rings, KvPart::Rest];
        let pieces = parts.map(|part| self.pieces(part, written)).concat();
        let takes = pieces.iter().map(Range::len).sum();
        self.layout.check_state(state.len(), takes)?;
        let mut rest = state;
        let sources: Vec<&[u8]> = pieces
            .iter()
            .map(|piece| rest.split_off(..piece.len()))
            .map(|source| source.expect("as many bytes as all pieces have"))
            .collect();
        upload(device, &sources, &mut |Staged { source, bytes, .. }| {
            // SAFETY: `upload` leaves the bytes alone until the stream has passed the copy.
            unsafe { self.memory.upload_later(pieces[source].start, bytes) }
        })
        .context("copying the KV cache to the GPU")
    }

    /// All keys and values, as they lie on the device.
    pub fn download(&self) -> Result<Vec<f16>> {
        let mut values = vec![f16::ZERO; self.memory.bytes() / size_of::<f16>()];
        self.memory
            .download(0, bytemuck::cast_slice_mut(&mut values))?;
        Ok(values)
    }
}
