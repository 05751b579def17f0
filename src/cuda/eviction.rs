//! Which tokens stay where the KV cache has a budget, and bringing these together behind a prompt (`docs/kv-cache.md`,
//! Eviction).

use std::{ops::Range, sync::Arc};

use anyhow::Result;
use cudarc::driver::sys::CUdeviceptr;
use half::f16;

use super::{
    device::{Device, DeviceBuffer, Launch},
    kv_cache::{KvCache, Ring},
    launches::{Chunk, EvictHeads, evict, evict_gather, evict_scratch_len},
    lowering::Heads,
    params::{EvictParams, GatherKeptParams},
};
use crate::{
    backend::{KvLayout, output_grams},
    model::{Decoder, decoder::Attention},
    quant::kv_tile::TILE,
};

/// What each layer keeps, and what is needed to choose it.
pub struct Eviction {
    device: Arc<Device>,
    /// Of each layer that stores and evicts: [`output_grams`], f16 (head_dim, head_dim, head_count), times a factor of the
    /// layer; and what it keeps, i32 (budget, head_count_kv).
    layers: Vec<Option<[CUdeviceptr; 2]>>,
    /// i32: where each piece of what is kept begins
    starts: CUdeviceptr,
    /// f32: what is computed of the layer at hand
    scratch: CUdeviceptr,
    piece_len: usize,
    /// Owns all of it.
    _memory: DeviceBuffer,
}

/// Places to look for scratch at: what each of more takes is the same.
const MANY: usize = 1 << 20;

/// Bytes that a cache of a budget takes beside keys and values: whatever the context, and for each token of it.
pub fn bytes(decoder: &Decoder, layout: &KvLayout) -> (usize, usize) {
    let Some(budget) = layout.budget else {
        return (0, 0);
    };
    let fixed = evicting(layout).map(|index| {
        let [gram, kept] = lens(&decoder.layers[index].attention, budget);
        gram + kept
    });
    let per_token = scratch_len(decoder, layout, MANY).div_ceil(MANY) * size_of::<f32>();
    let starts = budget.div_ceil(TILE) * size_of::<i32>();
    (fixed.sum::<usize>() + starts + ALIGNMENT, per_token)
}

/// Of what begins at an address of its own.
const ALIGNMENT: usize = 256;

/// The layers that store and evict.
fn evicting(layout: &KvLayout) -> impl Iterator<Item = usize> {
    let owners = layout.owners().filter(|(_, layer)| layer.evicts);
    owners.map(|(index, _)| index)
}

/// Bytes of a layer's products, and of what it keeps.
fn lens(attention: &Attention, budget: usize) -> [usize; 2] {
    [
        attention.head_dim * attention.q_dim() * size_of::<f16>(),
        budget * attention.head_count_kv * size_of::<i32>(),
    ]
    .map(|len| len.next_multiple_of(ALIGNMENT))
}

fn scratch_len(decoder: &Decoder, layout: &KvLayout, places: usize) -> usize {
    let of_layers = evicting(layout).map(|index| {
        let heads = evict_heads(&decoder.layers[index].attention);
        evict_scratch_len(heads, places)
    });
    of_layers.max().unwrap_or(0)
}

fn evict_heads(attention: &Attention) -> EvictHeads {
    EvictHeads {
        head_dim: attention.head_dim,
        head_count: attention.head_count,
        head_count_kv: attention.head_count_kv,
    }
}

impl Eviction {
    /// For a cache of so many tokens that keeps `budget` of a prompt, which is read in chunks of up to `chunk_len`.
    pub fn new(
        device: &Arc<Device>,
        decoder: &Decoder,
        layout: &KvLayout,
        budget: usize,
        context_len: usize,
        chunk_len: usize,
    ) -> Result<Self> {
        let scratch_bytes = scratch_len(decoder, layout, context_len) * size_of::<f32>();
        // As much as the place through which chunks pass has room for, beside the tokens before it.
        let piece_len = chunk_len.next_multiple_of(TILE);
        let starts: Vec<i32> = (0..budget)
            .step_by(piece_len)
            .map(|start| start as i32)
            .collect();
        let layers_bytes = evicting(layout).map(|index| {
            let lens = lens(&decoder.layers[index].attention, budget);
            lens.iter().sum::<usize>()
        });
        let starts_at = layers_bytes.sum::<usize>() + scratch_bytes;
        let memory = device.allocate(starts_at + size_of_val(&starts[..]))?;
        memory.upload(starts_at, bytemuck::cast_slice(&starts))?;
        let mut layers = vec![None; decoder.layers.len()];
        let mut offset = 0;
        for (index, gram) in output_grams(decoder, layout).into_iter().enumerate() {
            let Some(gram) = gram else { continue };
            // No sum of squares is as great as that of a value that is all in one channel.
            let greatest = gram.iter().copied().fold(f32::MIN_POSITIVE, f32::max);
            let gram: Vec<f16> = gram.iter().map(|x| f16::from_f32(x / greatest)).collect();
            memory.upload(offset, bytemuck::cast_slice(&gram))?;
            let [gram_bytes, kept_bytes] = lens(&decoder.layers[index].attention, budget);
            layers[index] = Some([offset, offset + gram_bytes].map(|offset| memory.at(offset)));
            offset += gram_bytes + kept_bytes;
        }
        Ok(Self {
            device: device.clone(),
            layers,
            starts: memory.at(starts_at),
            scratch: memory.at(offset),
            piece_len,
            _memory: memory,
        })
    }

    /// What chooses which `count` of the tokens that a layer has each of its heads keeps, behind its attention to a chunk, and
    /// where the layer is one that evicts. `queries` as `rope_tokens` leaves them; the layer has tokens up to place `end`.
    pub fn choose(
        &self,
        cache: &KvCache,
        heads: &Heads,
        queries: CUdeviceptr,
        chunk: Chunk,
        end: usize,
        count: usize,
    ) -> Result<Vec<Launch>> {
        let Some([grams, kept]) = self.layers[heads.layer] else {
            return Ok(Vec::new());
        };
        let here = cache.chunk(heads.layer);
        let params = EvictParams {
            q: queries,
            k_cache: here.keys,
            v_cache: here.values,
            tiles: cache.tiles(heads.layer),
            grams,
            kept,
            tokens: chunk.tokens as i32,
            places: end as i32,
            context: here.capacity as i32,
            group: heads.attention.group() as i32,
            softcap: heads.exponent_softcap(),
            budget: count as i32,
            ..bytemuck::Zeroable::zeroed()
        };
        let launches = evict(
            &self.device,
            evict_heads(heads.attention),
            cache.kept(heads.layer),
            self.scratch,
            params,
        )?;
        Ok(launches.into())
    }

    /// What brings together what every layer keeps: `count` of the tokens up to place `end`.
    pub fn gather(
        &self,
        cache: &KvCache,
        end: usize,
        count: usize,
        launch: &mut dyn FnMut(Launch) -> Result<()>,
    ) -> Result<()> {
        let device = &self.device;
        for (index, layer) in self.layers.iter().enumerate() {
            let Some([_, kept]) = *layer else { continue };
            let gather = |target: Ring, places: Range<usize>| {
                let from = cache.ring(index);
                let params = GatherKeptParams {
                    k_from: from.keys,
                    v_from: from.values,
                    k_to: target.keys,
                    v_to: target.values,
                    tiles: cache.tiles(index),
                    kept,
                    context: from.capacity as i32,
                    to_context: target.capacity as i32,
                    budget: count as i32,
                    places: end as i32,
                    first: places.start as i32,
                    count: places.len() as i32,
                };
                let layer = &cache.layout().layers[index];
                let (dim, heads) = (layer.head_dim, layer.head_count_kv);
                evict_gather(device, dim, heads, cache.kept(index), params)
            };
            if cache.kept(index).is_none() {
                launch(gather(cache.ring(index), 0..count)?)?;
                continue;
            }
            let pieces = (0..count).step_by(self.piece_len).enumerate();
            let pieces: Vec<_> = pieces
                .map(|(i, start)| {
                    let place = self.starts + (i * size_of::<i32>()) as u64;
                    let end = (start + self.piece_len).min(count);
                    (place, start..end)
                })
                .collect();
            // Tiles of a piece are made in the place of those whose tokens are gathered already: what is kept only moves
            // towards the beginning. The ring is read to the end.
            for (place, places) in &pieces {
                launch(gather(cache.chunk(index), places.clone())?)?;
                launch(cache.make_tiles(device, index, *place, places.len())?)?;
            }
            let near = pieces
                .len()
                .saturating_sub(1 + (2 * TILE).div_ceil(self.piece_len));
            for (place, places) in &pieces[near..] {
                launch(cache.keep_newest(device, index, *place, places.len())?)?;
            }
        }
        Ok(())
    }
}
