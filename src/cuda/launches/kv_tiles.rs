//! What a compressed KV cache does besides attention.

use anyhow::Result;

use super::{dependent, for_head_dim};
use crate::{
    backend::Tiles,
    cuda::{
        device::{Device, Launch, Parameter},
        params::{CompressTilesParams, CopyTokensParams},
    },
    quant::kv_tile::TILE,
};

/// Threads of a block of each.
const THREADS: usize = 256;

/// Records of the tiles that the newest tokens end, of `layers` layers with heads of `head_dim` values. Those lie in the rings
/// that `params` names.
pub fn compress_tiles(
    device: &Device,
    head_dim: usize,
    head_count_kv: usize,
    layers: usize,
    tiles: Tiles,
    params: CompressTilesParams,
) -> Result<Launch> {
    let name = for_head_dim("compress_tiles", head_dim)?;
    let tokens = params.tokens as usize;
    // So many ends can be among them, wherever they begin.
    let ends = tokens.div_ceil(TILE);
    let function = device.function("kv_tiles", &format!("{name}_{tiles}"))?;
    let grid = [head_count_kv, ends, layers];
    Ok(dependent(function, grid, THREADS, Parameter::new(params)))
}

/// Tokens of a layer from one ring to another.
pub fn copy_tokens(
    device: &Device,
    head_count_kv: usize,
    params: CopyTokensParams,
) -> Result<Launch> {
    /// Along tokens, of which there are a few hundred.
    const BLOCKS: usize = 4;
    let function = device.function("kv_tiles", "copy_tokens")?;
    let grid = [head_count_kv, 2, BLOCKS];
    Ok(dependent(function, grid, THREADS, Parameter::new(params)))
}
