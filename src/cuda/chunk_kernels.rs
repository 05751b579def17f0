//! The kernels that read a chunk of a prompt as typed launches: `kernels/PREFILL.md` says what each computes and how its grid
//! is chosen.

use anyhow::{Result, anyhow, ensure};
use bytemuck::{Pod, Zeroable};
use cudarc::driver::sys::CUdeviceptr;

use super::{
    device::{Arguments, Device, Launch},
    kernels::{Normed, WARP},
    weights::Matrix,
};

/// Values of a row that lie together in a tile of activations.
const STEP: usize = 128;

/// Tokens of an attention tile times query heads that share a key/value head, at most.
const ATTENTION_ROWS: usize = 128;

/// What the gated product is divided by, and the product behind it multiplied with: it can pass float16's range.
pub const GATE_SCALE: f32 = 16.0;

/// Tokens that pass through the layers together.
#[derive(Clone, Copy)]
pub struct Chunk {
    pub tokens: usize,
}

impl Chunk {
    /// Tokens that activations have room for.
    pub fn padded(self) -> usize {
        self.tokens.next_multiple_of(8)
    }

    /// Bytes of float16 activations (columns, tokens), as the products read them.
    pub fn tile_bytes(self, columns: usize) -> usize {
        columns.next_multiple_of(STEP) * self.padded() * 2
    }
}

/// `struct RopeParams` of `kernels/chunk.cu`, which says what each field is.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct RopeParams {
    pub q: CUdeviceptr,
    pub k: CUdeviceptr,
    pub v: CUdeviceptr,
    pub q_norm: CUdeviceptr,
    pub k_norm: CUdeviceptr,
    pub frequencies: CUdeviceptr,
    pub q_out: CUdeviceptr,
    pub k_cache: CUdeviceptr,
    pub v_cache: CUdeviceptr,
    pub position: CUdeviceptr,
    pub epsilon: f32,
    pub context: i32,
    pub head_count: i32,
    pub head_count_kv: i32,
    pub rope_dims: i32,
    pub interleaved: i32,
}

/// `struct FlashParams` of `kernels/flash_attention.cu`, which says what each field is.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct FlashParams {
    pub q: CUdeviceptr,
    pub k_cache: CUdeviceptr,
    pub v_cache: CUdeviceptr,
    pub out: CUdeviceptr,
    pub position: CUdeviceptr,
    pub partial: CUdeviceptr,
    pub finished: CUdeviceptr,
    pub tokens: i32,
    pub padded_tokens: i32,
    pub context: i32,
    pub group: i32,
}

/// `x[token] = E[tokens[token]]`, f32 (hidden_size, tokens).
pub fn embed_chunk(
    device: &Device,
    embedding: Matrix,
    tokens: CUdeviceptr,
    x: CUdeviceptr,
    chunk: Chunk,
) -> Result<Launch> {
    let no_norm = Normed::zeroed();
    let mut launch = super::kernels::embed(device, embedding, tokens, x, 0, no_norm)?;
    launch.grid[1] = chunk.tokens as u32;
    Ok(launch)
}

/// `out = rms_norm(x)` of each token as float16 activations. `x` is f32 (columns, tokens), `weight` f32 (columns).
pub fn norm_tokens(
    device: &Device,
    x: CUdeviceptr,
    weight: CUdeviceptr,
    out: CUdeviceptr,
    epsilon: f32,
    columns: usize,
    chunk: Chunk,
) -> Result<Launch> {
    let threads = columns.div_ceil(4).next_multiple_of(WARP).min(1024);
    Ok(Launch {
        function: device.function("chunk", "norm_tokens")?,
        grid: [chunk.tokens as u32, 1, 1],
        block: [threads as u32, 1],
        shared_bytes: 0,
        arguments: Arguments::default()
            .with(x)
            .with(weight)
            .with(out)
            .with(epsilon)
            .with(columns as i32)
            .with(chunk.padded() as i32),
        dependent: true,
    })
}

/// Queries and keys normalized and rotated, keys and values written to the cache.
pub fn rope_tokens(
    device: &Device,
    head_dim: usize,
    params: RopeParams,
    chunk: Chunk,
) -> Result<Launch> {
    let name = by_head_dim(
        head_dim,
        ["rope_tokens_d64", "rope_tokens_d128", "rope_tokens_d256"],
    )?;
    let blocks_a_token = if chunk.tokens < 64 { 6 } else { 2 };
    Ok(Launch {
        function: device.function("chunk", name)?,
        grid: [chunk.tokens as u32, blocks_a_token, 1],
        block: [256, 1],
        shared_bytes: 0,
        arguments: Arguments::default().with(params),
        dependent: true,
    })
}

/// Causal attention of the chunk, whose last position is below `context_end`, over the cache.
pub fn flash_attention(
    device: &Device,
    head_dim: usize,
    head_count_kv: usize,
    context_end: usize,
    params: FlashParams,
) -> Result<Launch> {
    let names = [
        "flash_attention_d64",
        "flash_attention_d128",
        "flash_attention_d256",
    ];
    let name = by_head_dim(head_dim, names)?;
    let tiles = attention_tiles(params.tokens as usize, params.group as usize)?;
    let splits = (device.multiprocessors() / (tiles * head_count_kv))
        .min(context_end.div_ceil(256))
        .max(1);
    let shared_bytes = match head_dim {
        64 | 128 if device.has_warpgroup_products() => 1280 * head_dim,
        64 => 32_768,
        _ => 65_536,
    };
    Ok(Launch {
        function: device.function("flash_attention", name)?,
        grid: [tiles as u32, head_count_kv as u32, splits as u32],
        block: [384, 1],
        shared_bytes: shared_bytes as u32,
        arguments: Arguments::default().with(params),
        dependent: true,
    })
}

/// Tiles of attention for `tokens` tokens.
pub fn attention_tiles(tokens: usize, group: usize) -> Result<usize> {
    ensure!(
        group <= ATTENTION_ROWS,
        "{group} query heads share a key/value head, and the CUDA kernels take {ATTENTION_ROWS}: use --device cpu"
    );
    Ok(tokens.div_ceil(ATTENTION_ROWS / group))
}

/// f32 values that attention's blocks need to meet.
pub fn attention_partial_len(
    device: &Device,
    head_dim: usize,
    tiles: usize,
    head_count_kv: usize,
) -> usize {
    (tiles * head_count_kv).max(device.multiprocessors()) * ATTENTION_ROWS * (head_dim + 2)
}

/// A float matrix in float16, which [`super::chunk_products::matmul`] reads. `out` has room for [`half_bytes`].
pub fn float_to_half(device: &Device, weights: Matrix, out: CUdeviceptr) -> Result<Launch> {
    Ok(Launch {
        function: device.function("chunk", "float_to_half")?,
        grid: [
            weights.columns.div_ceil(2048) as u32,
            weights.rows as u32,
            1,
        ],
        block: [256, 1],
        shared_bytes: 0,
        arguments: Arguments::default()
            .with(weights.address)
            .with(weights.kind)
            .with(weights.columns as i32)
            .with(out),
        dependent: true,
    })
}

/// Bytes of a matrix in float16.
pub fn half_bytes(rows: usize, columns: usize) -> usize {
    rows * (columns * 2).next_multiple_of(16)
}

/// `out = silu(gate) * up / GATE_SCALE` as float16 activations; `gate` and `up` are f32 (columns, tokens).
pub fn gate_tokens(
    device: &Device,
    gate: CUdeviceptr,
    up: CUdeviceptr,
    out: CUdeviceptr,
    columns: usize,
    chunk: Chunk,
) -> Result<Launch> {
    Ok(Launch {
        function: device.function("chunk", "gate_tokens")?,
        grid: [
            columns.next_multiple_of(STEP).div_ceil(1024) as u32,
            chunk.tokens as u32,
            1,
        ],
        block: [256, 1],
        shared_bytes: 0,
        arguments: Arguments::default()
            .with(gate)
            .with(up)
            .with(out)
            .with(1.0 / GATE_SCALE)
            .with(columns as i32)
            .with(chunk.padded() as i32),
        dependent: true,
    })
}

fn by_head_dim(head_dim: usize, names: [&'static str; 3]) -> Result<&'static str> {
    match head_dim {
        64 => Ok(names[0]),
        128 => Ok(names[1]),
        256 => Ok(names[2]),
        _ => Err(anyhow!(
            "heads of {head_dim} values have no CUDA kernel: use --device cpu"
        )),
    }
}
