//! What a token gives to every layer.

use anyhow::Result;

use super::Chunk;
use crate::cuda::{
    device::{Device, Launch, Parameter},
    params::TokenInputsParams,
};

/// Threads of a block.
const THREADS: u32 = 128;

/// For `layers` parts of `params.width` values of each token: its row of the table and its projection, in the place of the
/// latter.
pub fn token_inputs(
    device: &Device,
    layers: usize,
    params: TokenInputsParams,
    chunk: Chunk,
) -> Result<Launch> {
    Ok(Launch {
        function: device.function("token_inputs", "token_inputs")?,
        grid: [layers as u32, chunk.tokens as u32, 1],
        block: [THREADS, 1],
        shared_bytes: 0,
        parameter: Parameter::new(params),
        dependent: true,
        cooperative: false,
    })
}
