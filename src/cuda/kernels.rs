//! The kernels of a decode step as typed launches: `kernels/README.md` says what each computes and how its grid is chosen.

use anyhow::{Result, ensure};
use bytemuck::{Pod, Zeroable};
use cudarc::driver::sys::CUdeviceptr;

use super::{
    device::{Arguments, Device, Launch},
    weights::{Matrix, UNIT},
};

const WARP: usize = 32;

/// Values that share a scale in a quantized activation: a Q8_1 block.
const GROUP: usize = 32;

/// Values of a row that one warp reads at a time.
const SLICE: usize = WARP * UNIT;

/// Warps of a product's block, unless a row takes more.
const PRODUCT_WARPS: usize = 12;

/// Query heads that one attention block serves.
const HEADS_A_BLOCK: usize = 8;

const ATTENTION_THREADS: usize = 256;

/// A quantized vector in device memory, in the kernels' own layout: 8-bit values, their scales, and the values as float32.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct Activation {
    /// i8 (length rounded up to [`UNIT`])
    pub quantized: CUdeviceptr,
    /// f32 (length rounded up to [`UNIT`], / 32)
    pub scale: CUdeviceptr,
    /// f32 (length rounded up to [`UNIT`])
    pub value: CUdeviceptr,
}

/// One matrix of a product that covers several.
#[derive(Clone, Copy)]
pub struct Product {
    pub weights: Matrix,
    /// f32 (rows), or 0
    pub bias: CUdeviceptr,
    /// f32 (rows)
    pub out: CUdeviceptr,
}

/// `struct Segment` of `kernels/matvec.cu`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Segment {
    weights: CUdeviceptr,
    bias: CUdeviceptr,
    out: CUdeviceptr,
    kind: i32,
    rows: i32,
    blocks: i32,
    unused: i32,
}

/// `struct AttentionParams` of `kernels/attention.cu`, which says what each field is.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct AttentionParams {
    pub q: CUdeviceptr,
    pub k: CUdeviceptr,
    pub v: CUdeviceptr,
    pub q_norm: CUdeviceptr,
    pub k_norm: CUdeviceptr,
    pub frequencies: CUdeviceptr,
    pub k_cache: CUdeviceptr,
    pub v_cache: CUdeviceptr,
    pub position: CUdeviceptr,
    pub partial: CUdeviceptr,
    pub finished: CUdeviceptr,
    pub out: Activation,
    pub epsilon: f32,
    pub context: i32,
    pub group: i32,
    pub rope_dims: i32,
    pub interleaved: i32,
    pub unused: i32,
}

/// `x[c] = E[token, c]`; `token` and `x` are addresses of an i32 and of f32 (columns).
pub fn embed(
    device: &Device,
    embedding: Matrix,
    token: CUdeviceptr,
    x: CUdeviceptr,
) -> Result<Launch> {
    Ok(Launch {
        function: device.function("embed")?,
        grid: [embedding.columns.div_ceil(256) as u32, 1, 1],
        block: 256,
        shared_bytes: 0,
        arguments: Arguments::default()
            .with(embedding.address)
            .with(embedding.kind)
            .with(embedding.rows as i32)
            .with(embedding.columns as i32)
            .with(token)
            .with(x),
        dependent: true,
    })
}

/// `out = W rms_norm(x) + bias` for up to three matrices with the same columns. `x` and `norm` are f32 (columns).
pub fn norm_matvec(
    device: &Device,
    products: &[Product],
    x: CUdeviceptr,
    norm: CUdeviceptr,
    epsilon: f32,
) -> Result<Launch> {
    let columns = products[0].weights.columns;
    let grid = device.multiprocessors().max(products.len());
    let mut segments = [Segment::zeroed(); 3];
    let mut rows_a_block = 0;
    let blocks = share_blocks(products, grid);
    for ((segment, product), blocks) in segments.iter_mut().zip(products).zip(blocks) {
        let Matrix {
            address,
            kind,
            rows,
            ..
        } = product.weights;
        rows_a_block = rows_a_block.max(rows.div_ceil(blocks));
        *segment = Segment {
            weights: address,
            bias: product.bias,
            out: product.out,
            kind,
            rows: rows as i32,
            blocks: blocks as i32,
            unused: 0,
        };
    }
    let floats = products.iter().any(|product| product.weights.is_float());
    Ok(Launch {
        function: device.function("norm_matvec")?,
        grid: [grid as u32, 1, 1],
        block: product_threads(columns),
        shared_bytes: product_shared_bytes(device, columns, rows_a_block, floats)?,
        arguments: Arguments::default()
            .with(segments)
            .with(x)
            .with(norm)
            .with(epsilon)
            .with(columns as i32),
        dependent: true,
    })
}

/// `x += W a`; `x` is f32 (rows).
pub fn matvec_add(
    device: &Device,
    weights: Matrix,
    a: Activation,
    x: CUdeviceptr,
) -> Result<Launch> {
    let grid = device.multiprocessors();
    let rows_a_block = weights.rows.div_ceil(grid);
    Ok(Launch {
        function: device.function("matvec_add")?,
        grid: [grid as u32, 1, 1],
        block: product_threads(weights.columns),
        shared_bytes: product_shared_bytes(device, weights.columns, rows_a_block, false)?,
        arguments: Arguments::default()
            .with(weights.address)
            .with(weights.kind)
            .with(weights.rows as i32)
            .with(weights.columns as i32)
            .with(a)
            .with(x),
        dependent: true,
    })
}

/// `out = silu(G rms_norm(x)) * (U rms_norm(x))`, quantized. `x` and `norm` are f32 (columns).
pub fn norm_gate_up(
    device: &Device,
    gate: Matrix,
    up: Matrix,
    x: CUdeviceptr,
    norm: CUdeviceptr,
    epsilon: f32,
    out: Activation,
) -> Result<Launch> {
    let groups = gate.rows.div_ceil(GROUP);
    let grid = device.multiprocessors().min(groups);
    let rows_a_block = groups.div_ceil(grid) * GROUP * 2;
    let floats = gate.is_float() || up.is_float();
    Ok(Launch {
        function: device.function("norm_gate_up")?,
        grid: [grid as u32, 1, 1],
        block: product_threads(gate.columns),
        shared_bytes: product_shared_bytes(device, gate.columns, rows_a_block, floats)?,
        arguments: Arguments::default()
            .with(gate.address)
            .with(up.address)
            .with(gate.kind)
            .with(up.kind)
            .with(gate.rows as i32)
            .with(gate.columns as i32)
            .with(x)
            .with(norm)
            .with(epsilon)
            .with(out),
        dependent: true,
    })
}

/// One token's attention over the cache, and the cache's new entry. `splits` pieces of the context run side by side at most.
pub fn attention(
    device: &Device,
    head_dim: usize,
    head_count_kv: usize,
    splits: usize,
    params: AttentionParams,
) -> Result<Launch> {
    let name = match head_dim {
        64 => "attention_64",
        128 => "attention_128",
        256 => "attention_256",
        _ => anyhow::bail!(
            "heads of {head_dim} values cannot run on CUDA, only of 64, 128 or 256: use --device cpu"
        ),
    };
    let group = params.group as usize;
    let heads = group.min(HEADS_A_BLOCK);
    Ok(Launch {
        function: device.function(name)?,
        grid: [
            head_count_kv as u32,
            splits as u32,
            group.div_ceil(HEADS_A_BLOCK) as u32,
        ],
        block: ATTENTION_THREADS as u32,
        shared_bytes: (ATTENTION_THREADS / WARP * heads * (head_dim + 1) * size_of::<f32>()) as u32,
        arguments: Arguments::default().with(params),
        dependent: true,
    })
}

/// Pieces of the context that fill the device with attention blocks.
pub fn attention_splits(device: &Device, head_count_kv: usize, group: usize) -> usize {
    /// `MAX_SPLITS` of `kernels/attention.cu`.
    const MAX_SPLITS: usize = 64;
    let blocks = head_count_kv * group.div_ceil(HEADS_A_BLOCK);
    (device.multiprocessors() / blocks).clamp(1, MAX_SPLITS)
}

/// Counters that the blocks of an attention launch share.
pub fn attention_counters(head_count_kv: usize, group: usize) -> usize {
    head_count_kv * group.div_ceil(HEADS_A_BLOCK)
}

/// How many of `grid` blocks each product gets, by the bytes that it reads; at least one.
fn share_blocks(products: &[Product], grid: usize) -> Vec<usize> {
    let total: usize = products.iter().map(|p| p.weights.bytes).sum();
    let mut left = grid;
    let mut after = products.len();
    products
        .iter()
        .map(|product| {
            after -= 1;
            let fair = (grid * product.weights.bytes + total / 2) / total;
            let blocks = if after == 0 {
                left
            } else {
                fair.clamp(1, left - after)
            };
            left -= blocks;
            blocks
        })
        .collect()
}

fn slices(columns: usize) -> usize {
    columns.div_ceil(SLICE)
}

/// Threads of a product's block: whole sets of warps, one warp for each slice of a row.
fn product_threads(columns: usize) -> u32 {
    let sets = (PRODUCT_WARPS / slices(columns)).max(1);
    (slices(columns) * sets * WARP) as u32
}

/// Dynamic shared memory of a product: every warp's ring of weights, the quantized input, and a partial sum for each row
/// and slice; with float weights also the input as it is.
fn product_shared_bytes(
    device: &Device,
    columns: usize,
    rows_a_block: usize,
    floats: bool,
) -> Result<u32> {
    let units = columns.div_ceil(UNIT);
    let warps = product_threads(columns) as usize / WARP;
    let ring = warps * ring_bytes(device);
    let quantized = units * UNIT + (units * UNIT / GROUP * size_of::<f32>()).next_multiple_of(16);
    let partial = (slices(columns) * rows_a_block * size_of::<f32>()).next_multiple_of(16);
    let values = if floats {
        units * UNIT * size_of::<f32>()
    } else {
        0
    };
    let bytes = ring + quantized + partial + values;
    ensure!(
        bytes <= device.shared_bytes_per_block(),
        "a product over rows of {columns} values takes {bytes} bytes of shared memory, and {} has {}: use --device cpu",
        device.name(),
        device.shared_bytes_per_block()
    );
    Ok(bytes as u32)
}

/// `RING_BYTES` of `kernels/matvec.cu`: less where a multiprocessor has 100 kB of shared memory.
fn ring_bytes(device: &Device) -> usize {
    match device.compute_capability() {
        (8, 6 | 9) | (12.., _) => 3456,
        _ => 6912,
    }
}
