//! The kernels of a decode step as typed launches: `kernels/README.md` says what each computes and how its grid is chosen.

use anyhow::{Result, ensure};
use bytemuck::{Pod, Zeroable};
use cudarc::driver::sys::CUdeviceptr;

use super::{
    device::{Arguments, Device, Launch},
    weights::{Matrix, UNIT},
};

/// Threads of a warp.
pub const WARP: usize = 32;

/// Values that share a scale in a quantized activation: a Q8_1 block.
const GROUP: usize = 32;

/// Values of a row that one warp reads at a time.
const SLICE: usize = WARP * UNIT;

/// Warps of a product's block, unless a row takes more.
const PRODUCT_WARPS: usize = 12;

/// `MAX_WARPS` of `kernels/matvec.cu`.
const MOST_PRODUCT_WARPS: usize = 14;

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

/// A vector that a norm and then a product are to read: `x * norm weights`, quantized, and what the norm's quotient takes.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct Normed {
    pub activation: Activation,
    /// f32 (length / 32): sums of `x^2`
    pub squares: CUdeviceptr,
}

/// One matrix of a product that stores its results, of one token or of a chunk of them.
#[derive(Clone, Copy)]
pub struct Product {
    pub weights: Matrix,
    /// f32 (rows), or 0
    pub bias: CUdeviceptr,
    /// f32 (rows, tokens)
    pub out: CUdeviceptr,
}

/// `struct Matrix` of `kernels/matvec.cu`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct MatrixParams {
    weights: CUdeviceptr,
    bias: CUdeviceptr,
    out: CUdeviceptr,
    kind: i32,
    rows: i32,
    blocks: i32,
    unused: i32,
}

impl MatrixParams {
    fn new(weights: Matrix, bias: CUdeviceptr, out: CUdeviceptr, blocks: usize) -> Self {
        Self {
            weights: weights.address,
            bias,
            out,
            kind: weights.kind,
            rows: weights.rows as i32,
            blocks: blocks as i32,
            unused: 0,
        }
    }
}

/// `struct ProductParams` of `kernels/matvec.cu`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct ProductParams {
    matrix: [MatrixParams; 3],
    a: Activation,
    squares: CUdeviceptr,
    next: Activation,
    next_norm: CUdeviceptr,
    next_squares: CUdeviceptr,
    epsilon: f32,
    columns: i32,
    ring_bytes: i32,
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

/// `x = E[token]`, and what the product behind the first norm reads. `token` is the address of an i32, `x` of f32 (columns).
pub fn embed(
    device: &Device,
    embedding: Matrix,
    token: CUdeviceptr,
    x: CUdeviceptr,
    norm: CUdeviceptr,
    next: Normed,
) -> Result<Launch> {
    ensure!(
        embedding.columns.is_multiple_of(GROUP),
        "a hidden size of {} is no multiple of {GROUP}, which the CUDA kernels take: use --device cpu",
        embedding.columns
    );
    Ok(Launch {
        function: device.function("token", "embed")?,
        grid: [embedding.columns.div_ceil(256) as u32, 1, 1],
        block: [256, 1],
        shared_bytes: 0,
        arguments: Arguments::default()
            .with(embedding.address)
            .with(embedding.kind)
            .with(embedding.columns as i32)
            .with(token)
            .with(x)
            .with(norm)
            .with(next.activation)
            .with(next.squares),
        dependent: true,
    })
}

/// `out = W rms_norm(x) + bias` for up to three matrices with the same columns.
pub fn product_store(
    device: &Device,
    products: &[Product],
    x: Normed,
    epsilon: f32,
) -> Result<Launch> {
    let columns = products[0].weights.columns;
    let rows = products.iter().map(|product| product.weights.rows).sum();
    let grid = product_blocks(device, columns, rows).max(products.len());
    let mut matrix = [MatrixParams::zeroed(); 3];
    let mut rows_a_block = 0;
    let blocks = share_blocks(products, grid);
    for ((matrix, product), blocks) in matrix.iter_mut().zip(products).zip(blocks) {
        rows_a_block = rows_a_block.max(2 * product.weights.rows.div_ceil(2).div_ceil(blocks));
        *matrix = MatrixParams::new(product.weights, product.bias, product.out, blocks);
    }
    let params = ProductParams {
        matrix,
        a: x.activation,
        squares: x.squares,
        epsilon,
        ..ProductParams::zeroed()
    };
    product(device, "product_store", columns, grid, rows_a_block, params)
}

/// `x += W a`, and what the product behind the next norm reads. `x` is f32 (rows).
pub fn product_add(
    device: &Device,
    weights: Matrix,
    a: Activation,
    x: CUdeviceptr,
    norm: CUdeviceptr,
    next: Normed,
) -> Result<Launch> {
    let groups = weights.rows.div_ceil(GROUP);
    let grid = product_blocks(device, weights.columns, weights.rows).min(groups);
    let mut matrix = [MatrixParams::zeroed(); 3];
    matrix[0] = MatrixParams::new(weights, 0, x, grid);
    let params = ProductParams {
        matrix,
        a,
        next: next.activation,
        next_norm: norm,
        next_squares: next.squares,
        ..ProductParams::zeroed()
    };
    let rows_a_block = GROUP * groups.div_ceil(grid);
    product(
        device,
        "product_add",
        weights.columns,
        grid,
        rows_a_block,
        params,
    )
}

/// `out = silu(G rms_norm(x)) * (U rms_norm(x))`, quantized.
pub fn product_swiglu(
    device: &Device,
    gate: Matrix,
    up: Matrix,
    x: Normed,
    epsilon: f32,
    out: Activation,
) -> Result<Launch> {
    let groups = gate.rows.div_ceil(GROUP);
    let grid = product_blocks(device, gate.columns, 2 * gate.rows).min(groups);
    let mut matrix = [MatrixParams::zeroed(); 3];
    matrix[0] = MatrixParams::new(gate, 0, 0, grid);
    matrix[1] = MatrixParams::new(up, 0, 0, grid);
    let params = ProductParams {
        matrix,
        a: x.activation,
        squares: x.squares,
        next: out,
        epsilon,
        ..ProductParams::zeroed()
    };
    let rows_a_block = 2 * GROUP * groups.div_ceil(grid);
    product(
        device,
        "product_swiglu",
        gate.columns,
        grid,
        rows_a_block,
        params,
    )
}

/// A product over rows of `columns` values, of which no block has more than `rows_a_block`.
fn product(
    device: &Device,
    name: &'static str,
    columns: usize,
    grid: usize,
    rows_a_block: usize,
    params: ProductParams,
) -> Result<Launch> {
    let (slices, sets) = product_warps(columns);
    ensure!(
        slices <= MOST_PRODUCT_WARPS,
        "rows of {columns} values are longer than the {} that the CUDA kernels take: use --device cpu",
        MOST_PRODUCT_WARPS * SLICE
    );
    let ring_bytes = ring_bytes(device);
    let shared_bytes = slices * sets * ring_bytes + slices * (rows_a_block + 64) * size_of::<f32>();
    ensure!(
        shared_bytes <= device.shared_bytes_per_block(),
        "a product over {rows_a_block} rows of {columns} values takes {shared_bytes} bytes of shared memory, and {} has {}: \
         use --device cpu",
        device.name(),
        device.shared_bytes_per_block()
    );
    Ok(Launch {
        function: device.function("matvec", name)?,
        grid: [grid as u32, 1, 1],
        block: [(WARP * slices) as u32, sets as u32],
        shared_bytes: shared_bytes as u32,
        arguments: Arguments::default().with(ProductParams {
            columns: columns as i32,
            ring_bytes: ring_bytes as i32,
            ..params
        }),
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
        function: device.function("attention", name)?,
        grid: [
            head_count_kv as u32,
            splits as u32,
            group.div_ceil(HEADS_A_BLOCK) as u32,
        ],
        block: [ATTENTION_THREADS as u32, 1],
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

/// Slices of a row, one for each of as many warps, and sets of such warps in a product's block.
fn product_warps(columns: usize) -> (usize, usize) {
    let slices = columns.div_ceil(SLICE);
    (slices, (PRODUCT_WARPS / slices).max(1))
}

/// Blocks of a product over `rows` rows: one a multiprocessor, or as many more as it takes for their partial sums to fit into
/// shared memory.
fn product_blocks(device: &Device, columns: usize, rows: usize) -> usize {
    let (slices, sets) = product_warps(columns);
    let left = device
        .shared_bytes_per_block()
        .saturating_sub(slices * sets * ring_bytes(device));
    // Twice the 64 rows that rounding may add.
    let most = (left / (slices * size_of::<f32>()))
        .saturating_sub(128)
        .max(1);
    device.multiprocessors().max(rows.div_ceil(most))
}

/// Shared memory of each warp's stream of weights: enough to keep the memory busy, where a block can have that much.
fn ring_bytes(device: &Device) -> usize {
    match device.shared_bytes_per_block() {
        200_000.. => 11_520,
        _ => 6_912,
    }
}
