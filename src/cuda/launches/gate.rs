//! The gate of a chunk's feed-forward where gate and up cannot be one GEMM. Elsewhere it is part of the GEMM or the
//! GEMV.

use anyhow::Result;
use cudarc::driver::sys::CUdeviceptr;

use super::{Chunk, TILE_COLUMNS};
use crate::cuda::{
    device::{Device, Launch, Parameter},
    params::GateParams,
};

/// What a chunk's gated values are divided by, and the GEMM behind them multiplied with: they can pass float16's range.
pub const GATE_SCALE: f32 = 16.0;

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
        function: device.function("gate", "gate_tokens")?,
        grid: [
            columns.next_multiple_of(TILE_COLUMNS).div_ceil(1024) as u32,
            chunk.tokens as u32,
            1,
        ],
        block: [256, 1],
        shared_bytes: 0,
        parameter: Parameter::new(GateParams {
            gate,
            up,
            out,
            factor: 1.0 / GATE_SCALE,
            columns: columns as i32,
            padded_tokens: chunk.padded() as i32,
            unused: 0,
        }),
        dependent: true,
        cooperative: false,
    })
}
