//! RMS norms of a chunk. A decoded token's are part of the GEMV behind each.

use anyhow::Result;

use super::{Chunk, token_threads};
use crate::cuda::{
    device::{Device, Launch, Parameter},
    params::NormParams,
};

/// `out = rms_norm(x)` of each token as float16 activations. Of `params` it fills in what follows from the chunk.
pub fn norm_tokens(device: &Device, params: NormParams, chunk: Chunk) -> Result<Launch> {
    Ok(Launch {
        function: device.function("norm", "norm_tokens")?,
        grid: [chunk.tokens as u32, 1, 1],
        block: [token_threads(params.columns as usize), 1],
        shared_bytes: 0,
        parameter: Parameter::new(NormParams {
            padded_tokens: chunk.padded() as i32,
            ..params
        }),
        dependent: true,
        cooperative: false,
    })
}
