//! RMS norms of a chunk. A decoded token's are part of the GEMV behind each.

use anyhow::Result;

use super::{Chunk, WARP};
use crate::cuda::{
    device::{Device, Launch, Parameter},
    params::NormParams,
};

/// `out = rms_norm(x)` of each token as float16 activations. Of `params` it fills in what follows from the chunk.
pub fn norm_tokens(device: &Device, params: NormParams, chunk: Chunk) -> Result<Launch> {
    let columns = params.columns as usize;
    let threads = columns.div_ceil(4).next_multiple_of(WARP).min(1024);
    Ok(Launch {
        function: device.function("norm", "norm_tokens")?,
        grid: [chunk.tokens as u32, 1, 1],
        block: [threads as u32, 1],
        shared_bytes: 0,
        parameter: Parameter::new(NormParams {
            padded_tokens: chunk.padded() as i32,
            ..params
        }),
        dependent: true,
        cooperative: false,
    })
}
