//! What a compressed KV cache does besides attention.

use anyhow::Result;

use super::for_head_dim;
use crate::{
    backend::Tiles,
    cuda::{
        device::{Device, Function, Launch, Parameter},
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
    launch(
        device.function("kv_tiles", &format!("{name}_{tiles}"))?,
        [head_count_kv, ends, layers],
        Parameter::new(params),
    )
}

/// Tokens of a layer from one ring to another.
pub fn copy_tokens(
    device: &Device,
    head_count_kv: usize,
    params: CopyTokensParams,
) -> Result<Launch> {
    /// Along tokens, of which there are a few hundred.
    const BLOCKS: usize = 4;
    launch(
        device.function("kv_tiles", "copy_tokens")?,
        [head_count_kv, 2, BLOCKS],
        Parameter::new(params),
    )
}

fn launch(function: Function, grid: [usize; 3], parameter: Parameter) -> Result<Launch> {
    Ok(Launch {
        function,
        grid: grid.map(|blocks| blocks as u32),
        block: [THREADS as u32, 1],
        shared_bytes: 0,
        parameter,
        dependent: true,
        cooperative: false,
    })
}
