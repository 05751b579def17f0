//! What a layer adds to the residual stream, where it is normalized or scaled on the way. Elsewhere the sum is part of the
//! GEMM or the GEMV.

use anyhow::Result;
use cudarc::driver::sys::CUdeviceptr;

use super::{Chunk, Normed, token_threads};
use crate::cuda::{
    device::{Device, Launch, Parameter},
    params::{AddBranchParams, AddBranchTokensParams},
};

/// What becomes of a branch: `x = (x + rms_norm(branch)) * scale`.
#[derive(Clone, Copy)]
pub struct BranchSum {
    /// f32 (columns), or 0 where the branch is not normalized
    pub norm: CUdeviceptr,
    pub epsilon: f32,
    pub scale: f32,
}

impl Default for BranchSum {
    /// The branch is added as it is.
    fn default() -> Self {
        Self {
            norm: 0,
            epsilon: 0.0,
            scale: 1.0,
        }
    }
}

/// Adds `branch` (or 0: nothing) to `x`, and writes what the GEMV behind it reads: `x` times `next_norm` (or 0: as it is).
/// All are f32 (columns).
pub fn add_branch(
    device: &Device,
    x: CUdeviceptr,
    branch: CUdeviceptr,
    sum: BranchSum,
    columns: usize,
    next_norm: CUdeviceptr,
    next: Normed,
) -> Result<Launch> {
    Ok(Launch {
        function: device.function("branch", "add_branch")?,
        grid: [columns.div_ceil(256) as u32, 1, 1],
        block: [256, 1],
        shared_bytes: 0,
        parameter: Parameter::new(AddBranchParams {
            x,
            branch,
            norm: sum.norm,
            next_norm,
            next: next.activation,
            next_squares: next.squares,
            epsilon: sum.epsilon,
            scale: sum.scale,
            columns: columns as i32,
            unused: 0,
        }),
        dependent: true,
        cooperative: false,
    })
}

/// Adds the branch of each token, times `factor`, to `x`; both are f32 (columns, tokens).
pub fn add_branch_tokens(
    device: &Device,
    x: CUdeviceptr,
    branch: CUdeviceptr,
    factor: f32,
    sum: BranchSum,
    columns: usize,
    chunk: Chunk,
) -> Result<Launch> {
    Ok(Launch {
        function: device.function("branch", "add_branch_tokens")?,
        grid: [chunk.tokens as u32, 1, 1],
        block: [token_threads(columns), 1],
        shared_bytes: 0,
        parameter: Parameter::new(AddBranchTokensParams {
            x,
            branch,
            norm: sum.norm,
            epsilon: sum.epsilon,
            factor,
            scale: sum.scale,
            columns: columns as i32,
        }),
        dependent: true,
        cooperative: false,
    })
}
