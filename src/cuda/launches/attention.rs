//! Attention over the KV cache: of one token, with its rotary embeddings and its cache entry, and of a chunk, whose
//! [`rope_tokens`](super::rope_tokens) does these before.

use anyhow::{Result, ensure};

use super::{WARP, for_head_dim};
use crate::cuda::{
    device::{Device, Launch, Parameter},
    params::{DecodeAttentionParams, FlashAttentionParams},
};

/// Query heads that one block of [`decode_attention`] serves.
const HEADS_PER_BLOCK: usize = 8;

/// Threads of a block of [`decode_attention`].
const DECODE_THREADS: usize = 256;

/// Tokens of a tile of [`flash_attention`] times query heads that share a key/value head, at most.
fn tile_rows(head_dim: usize) -> usize {
    match head_dim {
        512 => 32,
        _ => 128,
    }
}

/// One token's attention over the cache, and the cache's new entry. `splits` pieces of what the token sees run side by
/// side at most.
pub fn decode_attention(
    device: &Device,
    head_dim: usize,
    head_count_kv: usize,
    splits: usize,
    params: DecodeAttentionParams,
) -> Result<Launch> {
    let group = params.layer.group as usize;
    let warps = DECODE_THREADS / WARP;
    // `TEAMS` of `kernels/decode_attention.cuh`.
    let teams = match head_dim {
        512 => warps / 2,
        _ => warps,
    };
    let joined = teams * group.min(HEADS_PER_BLOCK) * (head_dim + 2);
    let values = (warps * head_dim).max(joined);
    let name = for_head_dim("decode_attention", head_dim)?;
    Ok(Launch {
        function: device.function("decode_attention", &name)?,
        grid: [
            head_count_kv as u32,
            splits as u32,
            group.div_ceil(HEADS_PER_BLOCK) as u32,
        ],
        block: [DECODE_THREADS as u32, 1],
        shared_bytes: (values * size_of::<f32>()) as u32,
        parameter: Parameter::new(params),
        dependent: true,
        cooperative: false,
    })
}

/// Pieces of what a token sees that fill the device with blocks of [`decode_attention`].
pub fn decode_attention_splits(device: &Device, head_count_kv: usize, group: usize) -> usize {
    /// `MAX_SPLITS` of `kernels/decode_attention.cu`.
    const MAX_SPLITS: usize = 64;
    let blocks = decode_attention_counters(head_count_kv, group);
    (device.multiprocessors() / blocks).clamp(1, MAX_SPLITS)
}

/// Pieces that [`decode_attention`] cuts `tokens` tokens into, at most.
pub fn most_chunks(tokens: usize) -> usize {
    /// `MIN_CHUNK` of `kernels/decode_attention.cuh`.
    const MIN_CHUNK: usize = 128;
    tokens.div_ceil(MIN_CHUNK)
}

/// f32 values in which the blocks of [`decode_attention`] leave their sums.
pub fn decode_attention_partial_len(head_dim: usize, head_count: usize, splits: usize) -> usize {
    // Behind the values the greatest score and the sum of exponentials, filled up to 16 bytes.
    (head_dim + 4) * head_count * splits
}

/// Counters that the blocks of [`decode_attention`] share.
pub fn decode_attention_counters(head_count_kv: usize, group: usize) -> usize {
    head_count_kv * group.div_ceil(HEADS_PER_BLOCK)
}

/// Causal attention of the chunk, whose last position is below `context_end`, over the cache.
pub fn flash_attention(
    device: &Device,
    head_dim: usize,
    head_count_kv: usize,
    context_end: usize,
    params: FlashAttentionParams,
) -> Result<Launch> {
    let name = for_head_dim("flash_attention", head_dim)?;
    let (tokens, group) = (params.tokens as usize, params.group as usize);
    let tiles = flash_attention_tiles(head_dim, tokens, group)?;
    let seen = match params.window {
        0 => context_end,
        window => context_end.min(window as usize + tile_rows(head_dim) / group),
    };
    let splits = (device.multiprocessors() / (tiles * head_count_kv))
        .min(seen.div_ceil(256))
        .max(1);
    let shared_bytes = match head_dim {
        64 | 128 if device.has_warpgroup_mma() => 1280 * head_dim,
        64 => 32_768,
        // Keys and values, and parts of scores.
        512 => 65_536 + 16_384,
        _ => 65_536,
    };
    Ok(Launch {
        function: device.function("flash_attention", &name)?,
        grid: [tiles as u32, head_count_kv as u32, splits as u32],
        block: [384, 1],
        shared_bytes: shared_bytes as u32,
        parameter: Parameter::new(params),
        dependent: true,
        cooperative: false,
    })
}

/// Tiles of [`flash_attention`] for `tokens` tokens.
pub fn flash_attention_tiles(head_dim: usize, tokens: usize, group: usize) -> Result<usize> {
    let rows = tile_rows(head_dim);
    ensure!(
        group <= rows,
        "{group} query heads of {head_dim} values share a key/value head, and the CUDA kernels take {rows}: \
         use --device cpu"
    );
    Ok(tokens.div_ceil(rows / group))
}

/// f32 values of the [`SplitKWorkspace`](super::SplitKWorkspace) of [`flash_attention`].
pub fn flash_attention_partial_len(
    device: &Device,
    head_dim: usize,
    tiles: usize,
    head_count_kv: usize,
) -> usize {
    (tiles * head_count_kv).max(device.multiprocessors()) * tile_rows(head_dim) * (head_dim + 2)
}
