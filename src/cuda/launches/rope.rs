//! Rotary embeddings of a chunk. A decoded token's are part of its attention.

use anyhow::Result;

use super::{Chunk, for_head_dim};
use crate::cuda::{
    device::{Device, Launch, Parameter},
    params::RopeParams,
};

/// Queries and keys normalized and rotated, keys and values written to the cache.
pub fn rope_tokens(
    device: &Device,
    head_dim: usize,
    params: RopeParams,
    chunk: Chunk,
) -> Result<Launch> {
    let blocks_a_token = if chunk.tokens < 64 { 6 } else { 2 };
    Ok(Launch {
        function: device.function("rope", &for_head_dim("rope_tokens", head_dim)?)?,
        grid: [chunk.tokens as u32, blocks_a_token, 1],
        block: [256, 1],
        shared_bytes: 0,
        parameter: Parameter::new(params),
        dependent: true,
        cooperative: false,
    })
}
