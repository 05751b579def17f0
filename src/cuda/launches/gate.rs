//! The gate where it is not part of a GEMM or a GEMV: of a chunk's feed-forward whose gate and up differ in type, and of what
//! a layer takes of the tokens themselves.

use anyhow::Result;
use cudarc::driver::sys::CUdeviceptr;

use super::{Chunk, GROUP, TILE_COLUMNS, gelu};
use crate::{
    cuda::{
        device::{Device, Launch, Parameter},
        params::{self, GateParams, GateTokenParams},
    },
    model::decoder::Activation,
};

/// What a chunk's gated values are divided by, and the GEMM behind them multiplied with: they can pass float16's range.
pub const GATE_SCALE: f32 = 16.0;

/// Values of a chunk, and how they are gated.
#[derive(Clone, Copy)]
pub struct Gate {
    /// f32 (columns, tokens)
    pub gate: CUdeviceptr,
    /// f32 (up_stride, tokens), of which `columns` count
    pub up: CUdeviceptr,
    pub up_stride: usize,
    /// f32 (tokens): what each token's `gate` is multiplied with; 0: nothing
    pub rms: CUdeviceptr,
    pub columns: usize,
    pub activation: Activation,
}

/// `out = activation(gate) * up / GATE_SCALE` as float16 activations.
pub fn gate_tokens(device: &Device, gate: Gate, out: CUdeviceptr, chunk: Chunk) -> Result<Launch> {
    let columns = gate.columns;
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
            gate: gate.gate,
            up: gate.up,
            rms: gate.rms,
            out,
            factor: 1.0 / GATE_SCALE,
            columns: columns as i32,
            up_stride: gate.up_stride as i32,
            padded_tokens: chunk.padded() as i32,
            gelu: gelu(gate.activation),
            unused: 0,
        }),
        dependent: true,
        cooperative: false,
    })
}

/// `out = activation(gate) * up` of one token, quantized; `gate` and `up` are f32 (columns).
pub fn gate_token(
    device: &Device,
    gate: CUdeviceptr,
    up: CUdeviceptr,
    columns: usize,
    activation: Activation,
    out: params::Activation,
) -> Result<Launch> {
    let threads = columns.next_multiple_of(GROUP);
    Ok(Launch {
        function: device.function("gate", "gate_token")?,
        grid: [threads.div_ceil(256) as u32, 1, 1],
        block: [256, 1],
        shared_bytes: 0,
        parameter: Parameter::new(GateTokenParams {
            gate,
            up,
            out,
            columns: columns as i32,
            gelu: gelu(activation),
        }),
        dependent: true,
        cooperative: false,
    })
}
