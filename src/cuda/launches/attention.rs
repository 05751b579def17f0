//! Attention over the KV cache: of one token, with its rotary embeddings and its cache entry, and of a chunk, whose
//! [`rope_tokens`](super::rope_tokens) does these before.

use anyhow::{Result, ensure};

use super::{WARP, for_head_dim};
use crate::{
    backend::Tiles,
    cuda::{
        device::{Device, Function, Launch, Parameter},
        params::{DecodeAttentionParams, FlashAttentionParams},
    },
    quant::kv_tile::{Group, KEY_GROUP},
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
/// side at most. `tiles`: how the layer keeps tokens that are far behind, if so.
pub fn decode_attention(
    device: &Device,
    head_dim: usize,
    head_count_kv: usize,
    splits: usize,
    tiles: Option<Tiles>,
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
    let shared_bytes = values * size_of::<f32>();
    let (function, shared_bytes, params) = match tiles {
        None => {
            let function = device.function("decode_attention", &name)?;
            (function, shared_bytes, params)
        }
        Some(tiles) => {
            let name = format!("{name}_{tiles}");
            let function = device.function("decode_attention_tiles", &name)?;
            // The rows of warps are used beside the rings, what is joined behind them.
            let rows = warps * head_dim * size_of::<f32>();
            let places = warps * tile_place_bytes(head_dim, tiles);
            let depth = tile_depth(device, &function, rows, places, MAX_TILE_DEPTH)?;
            let params = DecodeAttentionParams {
                tile_ring: rows as i32,
                tile_depth: depth as i32,
                ..params
            };
            (function, shared_bytes.max(rows + depth * places), params)
        }
    };
    Ok(Launch {
        function,
        grid: [
            head_count_kv as u32,
            splits as u32,
            group.div_ceil(HEADS_PER_BLOCK) as u32,
        ],
        block: [DECODE_THREADS as u32, 1],
        shared_bytes: shared_bytes as u32,
        parameter: Parameter::new(params),
        dependent: true,
        cooperative: false,
    })
}

/// `MAX_TILE_DEPTH` of `kernels/tile_stream.cuh`.
const MAX_TILE_DEPTH: usize = 8;

/// Bytes of what a warp handles at a time, in its ring: `PLACE` of `kernels/tile_stream.cuh`.
fn tile_place_bytes(head_dim: usize, tiles: Tiles) -> usize {
    const TOKENS: usize = 32;
    let part = match head_dim {
        512 => head_dim / 2,
        _ => head_dim,
    };
    let codes = TOKENS * part * (tiles.key_bits + tiles.value_bits) / 8;
    codes + (part + TOKENS) * size_of::<Group>()
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

/// Causal attention of the chunk, whose last place is below `context_end`, over the cache.
pub fn flash_attention(
    device: &Device,
    head_dim: usize,
    head_count_kv: usize,
    context_end: usize,
    tiles_kept: Option<Tiles>,
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
    // And of how many keys slots are: `Config::keys` of `kernels/attend_chunk.cuh`.
    let (shared_bytes, keys) = match head_dim {
        64 | 128 if device.has_warpgroup_mma() => (1280 * head_dim, 128),
        64 => (32_768, 64),
        128 => (65_536, 64),
        // Keys and values, and parts of scores.
        512 => (65_536 + 16_384, 16),
        _ => (65_536, 32),
    };
    let (function, shared_bytes, params) = match tiles_kept {
        None => {
            let function = device.function("flash_attention", &name)?;
            (function, shared_bytes, params)
        }
        Some(kept) => {
            let name = format!("{name}_{kept}");
            let function = device.function("flash_attention_tiles", &name)?;
            let stage = tile_stage_bytes(head_dim, keys, kept);
            let depth = tile_depth(device, &function, shared_bytes, stage, MAX_STAGES)?;
            let params = FlashAttentionParams {
                tile_ring: shared_bytes as i32,
                tile_depth: depth as i32,
                ..params
            };
            (function, shared_bytes + depth * stage, params)
        }
    };
    Ok(Launch {
        function,
        grid: [tiles as u32, head_count_kv as u32, splits as u32],
        block: [384, 1],
        shared_bytes: shared_bytes as u32,
        parameter: Parameter::new(params),
        dependent: true,
        cooperative: false,
    })
}

/// `MAX_STAGES` of `kernels/expand_tiles.cuh`.
const MAX_STAGES: usize = 4;

/// Bytes of the codes of a slot's `keys` keys or values, whichever are more: `STAGE` of `kernels/expand_tiles.cuh`.
fn tile_stage_bytes(head_dim: usize, keys: usize, tiles: Tiles) -> usize {
    let codes = |bits: usize| keys * head_dim * bits / 8;
    let groups = keys.div_ceil(KEY_GROUP) * head_dim;
    let of_keys = codes(tiles.key_bits) + groups * size_of::<Group>();
    let of_values = codes(tiles.value_bits) + keys * size_of::<Group>();
    of_keys.max(of_values)
}

/// Places of `bytes` each that fit into the shared memory of a function's block behind `taken` bytes: `most` at most.
fn tile_depth(
    device: &Device,
    function: &Function,
    taken: usize,
    bytes: usize,
    most: usize,
) -> Result<usize> {
    let left = device.shared_bytes_per_block() - function.static_shared_bytes;
    let depth = (left.saturating_sub(taken) / bytes).min(most);
    ensure!(
        depth > 0,
        "the GPU has too little shared memory for a compressed KV cache of this model: use --kv-type f16"
    );
    Ok(depth)
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
