//! A matrix times one quantized vector (GEMV): what decoding a token is made of. The norm before it, and the gate or
//! the residual sum behind it, are part of it.

use anyhow::{Result, ensure};
use bytemuck::Zeroable;
use cudarc::driver::sys::CUdeviceptr;

use super::{GROUP, Linear, Normed, WARP, gelu};
use crate::{
    cuda::{
        device::{Device, Launch, Parameter},
        params::{Activation, GemvMatrix, GemvParams},
        tensor_types::{KernelType, UNIT},
        weights::Matrix,
    },
    model::decoder,
    quant::TensorType,
};

/// Values of a row that one warp reads at a time.
const SLICE: usize = WARP * UNIT;

/// Warps of a block, unless a row takes more.
const WARPS: usize = 12;

/// `MAX_WARPS` of `kernels/gemv.cuh`.
const MAX_WARPS: usize = 14;

/// `out = W rms_norm(x) + bias` for up to three matrices with the same columns. Without sums of squares, x is read as it is.
pub fn gemv_store(device: &Device, linears: &[Linear], x: Normed, epsilon: f32) -> Result<Launch> {
    let params = GemvParams {
        squares: x.squares,
        epsilon,
        ..GemvParams::zeroed()
    };
    store(device, linears, x.activation, params)
}

/// `out = activation(W x) * factors`, not quantized. `factors` is f32 (rows).
pub fn gemv_store_gated(
    device: &Device,
    linear: Linear,
    x: Activation,
    activation: decoder::Activation,
    factors: CUdeviceptr,
) -> Result<Launch> {
    let params = GemvParams {
        factors,
        gelu: gelu(activation),
        ..GemvParams::zeroed()
    };
    store(device, &[linear], x, params)
}

fn store(device: &Device, linears: &[Linear], x: Activation, params: GemvParams) -> Result<Launch> {
    let columns = linears[0].weights.columns;
    let rows = linears.iter().map(|linear| linear.weights.rows).sum();
    let grid = gemv_blocks(device, columns, rows).max(linears.len());
    let mut matrix = [GemvMatrix::zeroed(); 3];
    let mut rows_a_block = 0;
    let blocks = share_blocks(linears, grid);
    for ((matrix, linear), blocks) in matrix.iter_mut().zip(linears).zip(blocks) {
        rows_a_block = rows_a_block.max(2 * linear.weights.rows.div_ceil(2).div_ceil(blocks));
        *matrix = gemv_matrix(linear.weights, linear.bias, linear.out, blocks)?;
    }
    let params = GemvParams {
        matrix,
        a: x,
        ..params
    };
    let types: Vec<TensorType> = linears
        .iter()
        .map(|linear| linear.weights.tensor_type)
        .collect();
    gemv(device, &types, "store", columns, grid, rows_a_block, params)
}

/// `x += W a`, and what the GEMV behind the next norm reads. `x` is f32 (rows).
pub fn gemv_add(
    device: &Device,
    weights: Matrix,
    a: Activation,
    x: CUdeviceptr,
    norm: CUdeviceptr,
    next: Normed,
) -> Result<Launch> {
    let groups = weights.rows.div_ceil(GROUP);
    let grid = gemv_blocks(device, weights.columns, weights.rows).min(groups);
    let mut matrix = [GemvMatrix::zeroed(); 3];
    matrix[0] = gemv_matrix(weights, 0, x, grid)?;
    let params = GemvParams {
        matrix,
        a,
        next: next.activation,
        next_norm: norm,
        next_squares: next.squares,
        ..GemvParams::zeroed()
    };
    let rows_a_block = GROUP * groups.div_ceil(grid);
    gemv(
        device,
        &[weights.tensor_type],
        "add",
        weights.columns,
        grid,
        rows_a_block,
        params,
    )
}

/// `out = activation(G rms_norm(x)) * (U rms_norm(x))`, quantized.
pub fn gemv_gate(
    device: &Device,
    gate: Matrix,
    up: Matrix,
    activation: decoder::Activation,
    x: Normed,
    epsilon: f32,
    out: Activation,
) -> Result<Launch> {
    let groups = gate.rows.div_ceil(GROUP);
    let grid = gemv_blocks(device, gate.columns, 2 * gate.rows).min(groups);
    let mut matrix = [GemvMatrix::zeroed(); 3];
    matrix[0] = gemv_matrix(gate, 0, 0, grid)?;
    matrix[1] = gemv_matrix(up, 0, 0, grid)?;
    let params = GemvParams {
        matrix,
        a: x.activation,
        squares: x.squares,
        next: out,
        epsilon,
        gelu: gelu(activation),
        ..GemvParams::zeroed()
    };
    let rows_a_block = 2 * GROUP * groups.div_ceil(grid);
    gemv(
        device,
        &[gate.tensor_type, up.tensor_type],
        "gate",
        gate.columns,
        grid,
        rows_a_block,
        params,
    )
}

/// A product over rows of `columns` values, of which no block has more than `rows_a_block`: the kernel for matrices of
/// these types that ends with `epilogue`.
fn gemv(
    device: &Device,
    types: &[TensorType],
    epilogue: &str,
    columns: usize,
    grid: usize,
    rows_a_block: usize,
    params: GemvParams,
) -> Result<Launch> {
    let (slices, sets) = gemv_warps(columns);
    ensure!(
        slices <= MAX_WARPS,
        "rows of {columns} values are longer than the {} that the CUDA kernels take: use --device cpu",
        MAX_WARPS * SLICE
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
    let (file, name) = KernelType::gemv_kernels(types)?;
    let (in_set, sets) =
        match file == "gemv_one" && takes_two_tiles(device) && has_short_end(columns) {
            // Two for the first slice, and one for the second, in which each half of a warp takes a tile.
            true => (slices + 1, slices * sets / (slices + 1)),
            false => (slices, sets),
        };
    Ok(Launch {
        function: device.function(file, &format!("{name}_{epilogue}"))?,
        grid: [grid as u32, 1, 1],
        block: [(WARP * in_set) as u32, sets as u32],
        shared_bytes: shared_bytes as u32,
        parameter: Parameter::new(GemvParams {
            columns: columns as i32,
            ring_bytes: ring_bytes as i32,
            ..params
        }),
        dependent: true,
        cooperative: false,
    })
}

/// `matrix` as `blocks` blocks of a launch read it.
fn gemv_matrix(
    matrix: Matrix,
    bias: CUdeviceptr,
    out: CUdeviceptr,
    blocks: usize,
) -> Result<GemvMatrix> {
    Ok(GemvMatrix {
        weights: matrix.address,
        bias,
        out,
        tensor_type: KernelType::of(matrix.tensor_type)?.id,
        rows: matrix.rows as i32,
        blocks: blocks as i32,
        unused: 0,
    })
}

/// How many of `grid` blocks each matrix gets, by the bytes that it reads; at least one.
fn share_blocks(linears: &[Linear], grid: usize) -> Vec<usize> {
    let total: usize = linears.iter().map(|linear| linear.weights.bytes).sum();
    let mut left = grid;
    let mut after = linears.len();
    linears
        .iter()
        .map(|linear| {
            after -= 1;
            let fair = (grid * linear.weights.bytes + total / 2) / total;
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

/// Slices of a row, one for each of as many warps, and sets of such warps in a block.
fn gemv_warps(columns: usize) -> (usize, usize) {
    let slices = columns.div_ceil(SLICE);
    (slices, (WARPS / slices).max(1))
}

/// Whether a row has two slices, the second of which is at most half as long as the first.
fn has_short_end(columns: usize) -> bool {
    columns > SLICE && 2 * (columns - SLICE) <= SLICE
}

/// Whether the kernels for one type wait for two tiles at a time: `TILES_OF_ONE_TYPE` of `kernels/gemv.cuh`.
fn takes_two_tiles(device: &Device) -> bool {
    (9..12).contains(&device.compute_capability().0)
}

/// Blocks of a GEMV over `rows` rows: one a multiprocessor, or as many more as it takes for their partial sums to fit
/// into shared memory.
fn gemv_blocks(device: &Device, columns: usize, rows: usize) -> usize {
    let (slices, sets) = gemv_warps(columns);
    let left = device
        .shared_bytes_per_block()
        .saturating_sub(slices * sets * ring_bytes(device));
    // Twice the 64 rows that rounding may add.
    let most = (left / (slices * size_of::<f32>()))
        .saturating_sub(128)
        .max(1);
    device.multiprocessors().max(rows.div_ceil(most))
}

/// Shared memory of each warp's stream of weights: enough to keep the memory busy, where a block can have that much. Of the
/// widest type that large models have, Q6_K, it then holds two places of two tiles.
fn ring_bytes(device: &Device) -> usize {
    match device.shared_bytes_per_block() {
        200_000.. => 13_824,
        _ => 6_912,
    }
}
