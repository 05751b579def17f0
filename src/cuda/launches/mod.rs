//! Every operation as typed launches, one file for each: where decoding a token and reading a chunk of a prompt differ,
//! their kernels stand beside each other. `kernels/README.md` says how each grid is chosen.
//!
//! Decoding multiplies a matrix with one quantized vector (GEMV); a chunk of tokens is multiplied in float16 (GEMM).

mod attention;
mod branch;
mod choose;
mod convert;
mod embed;
mod evict;
mod gate;
mod gemm;
mod gemv;
mod kv_tiles;
mod logits;
mod norm;
mod rope;
mod step;
mod token_inputs;

use anyhow::{Result, ensure};
use bytemuck::Zeroable;
use cudarc::driver::sys::CUdeviceptr;

use super::{
    device::{Function, Launch, Parameter},
    params::Activation,
    weights::Matrix,
};
use crate::model::decoder;

pub use attention::{
    decode_attention, decode_attention_counters, decode_attention_partial_len,
    decode_attention_splits, flash_attention, flash_attention_partial_len, flash_attention_tiles,
    most_chunks,
};
pub use branch::{BranchSum, add_branch, add_branch_tokens};
pub use choose::{MAX_TOP_K, choice_counts, choice_settings, choose, choose_lists_len};
pub use convert::{float_to_half, repack};
pub use embed::{embed_token, embed_tokens};
pub use evict::{EvictHeads, EvictScratch, evict, evict_gather, evict_scratch_len};
pub use gate::{GATE_SCALE, Gate, gate_token, gate_tokens};
pub use gemm::{Epilogue, gemm, gemm_counters, gemm_partial_len};
pub use gemv::{gemv_add, gemv_gate, gemv_store, gemv_store_gated};
pub use kv_tiles::{compress_tiles, copy_tokens};
pub use logits::finish_logits;
pub use norm::norm_tokens;
pub use rope::rope_tokens;
pub use step::{STEP_STAGE_BYTES, StepLinear, StepStage, step};
pub use token_inputs::token_inputs;

/// Threads of a warp.
const WARP: usize = 32;

/// Values that share a scale in a quantized activation: a Q8_1 block.
const GROUP: usize = 32;

/// Values of a row that lie together in a tile of float16 activations.
const TILE_COLUMNS: usize = 128;

/// A launch without dynamic shared memory, of a kernel that waits for its predecessor itself.
fn dependent(function: Function, grid: [usize; 3], threads: usize, parameter: Parameter) -> Launch {
    Launch {
        function,
        grid: grid.map(|blocks| blocks as u32),
        block: [threads as u32, 1],
        shared_bytes: 0,
        parameter,
        dependent: true,
        cooperative: false,
    }
}

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

    /// Bytes of float16 activations (columns, tokens), as GEMMs read them.
    pub fn tile_bytes(self, columns: usize) -> usize {
        columns.next_multiple_of(TILE_COLUMNS) * self.padded() * 2
    }
}

/// A vector that a norm and then a GEMV are to read: `x * norm weights`, quantized, and what the norm's quotient takes.
#[derive(Clone, Copy, Zeroable)]
pub struct Normed {
    pub activation: Activation,
    /// f32 (length / 32): sums of `x^2`
    pub squares: CUdeviceptr,
}

/// A matrix and where its product with a token, or with each of a chunk, goes.
#[derive(Clone, Copy)]
pub struct Linear {
    pub weights: Matrix,
    /// f32 (rows), or 0
    pub bias: CUdeviceptr,
    /// f32 (rows, tokens)
    pub out: CUdeviceptr,
}

/// Where blocks that share a result leave their parts of it, and the last of them adds these up.
#[derive(Clone, Copy)]
pub struct SplitKWorkspace {
    /// f32 ([`gemm_partial_len`] or [`flash_attention_partial_len`])
    pub partial: CUdeviceptr,
    /// u32 ([`gemm_counters`] or one for each tile and key/value head), zero between launches
    pub finished: CUdeviceptr,
}

/// Threads of a block that works on a token's `columns` values, four a thread.
fn token_threads(columns: usize) -> u32 {
    columns.div_ceil(4).next_multiple_of(WARP).min(1024) as u32
}

/// A function that gates go through, as kernels know it (`kernels/activate.cuh`).
fn gelu(activation: decoder::Activation) -> i32 {
    match activation {
        decoder::Activation::Silu => 0,
        decoder::Activation::GeluTanh => 1,
    }
}

/// The kernel for heads of `head_dim` values among those called `kernel`.
fn for_head_dim(kernel: &str, head_dim: usize) -> Result<String> {
    ensure!(
        matches!(head_dim, 64 | 128 | 256 | 512),
        "heads of {head_dim} values cannot run on CUDA, only of 64, 128, 256 or 512: use --device cpu"
    );
    Ok(format!("{kernel}_d{head_dim}"))
}
