//! RMS norms of a chunk. A decoded token's are part of the GEMV behind each.

use anyhow::Result;
use cudarc::driver::sys::CUdeviceptr;

use super::{Chunk, WARP};
use crate::cuda::{
    device::{Device, Launch, Parameter},
    params::NormParams,
};

/// `out = rms_norm(x)` of each token as float16 activations. `x` is f32 (columns, tokens), `weight` f32 (columns), or 0 for
/// ones; `rms`, where it is not 0, gets what each token was divided by, f32 (tokens).
pub fn norm_tokens(
    device: &Device,
    x: CUdeviceptr,
    weight: CUdeviceptr,
    out: CUdeviceptr,
    rms: CUdeviceptr,
    epsilon: f32,
    columns: usize,
    chunk: Chunk,
) -> Result<Launch> {
    let threads = columns.div_ceil(4).next_multiple_of(WARP).min(1024);
    Ok(Launch {
        function: device.function("norm", "norm_tokens")?,
        grid: [chunk.tokens as u32, 1, 1],
        block: [threads as u32, 1],
        shared_bytes: 0,
        parameter: Parameter::new(NormParams {
            x,
            weight,
            out,
            rms,
            epsilon,
            columns: columns as i32,
            padded_tokens: chunk.padded() as i32,
            unused: 0,
        }),
        dependent: true,
        cooperative: false,
    })
}
