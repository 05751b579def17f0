//! The rows of the embedding matrix that stand for tokens.

use anyhow::{Result, ensure};
use bytemuck::Zeroable;
use cudarc::driver::sys::CUdeviceptr;

use super::{Chunk, GROUP, Normed};
use crate::cuda::{
    device::{Device, Launch, Parameter},
    params::EmbedParams,
    tensor_types::KernelType,
    weights::Matrix,
};

/// `x = E[token] * scale`, and what the GEMV behind the first norm reads. `token` is the address of an i32, `x` of f32
/// (columns).
pub fn embed_token(
    device: &Device,
    embedding: Matrix,
    scale: f32,
    token: CUdeviceptr,
    x: CUdeviceptr,
    norm: CUdeviceptr,
    next: Normed,
) -> Result<Launch> {
    let columns = embedding.columns;
    ensure!(
        columns.is_multiple_of(GROUP),
        "a hidden size of {columns} is no multiple of {GROUP}, which the CUDA kernels take: use --device cpu"
    );
    Ok(Launch {
        function: device.function("embed", "embed")?,
        grid: [columns.div_ceil(256) as u32, 1, 1],
        block: [256, 1],
        shared_bytes: 0,
        parameter: Parameter::new(EmbedParams {
            weights: embedding.address,
            token,
            x,
            norm,
            next: next.activation,
            next_squares: next.squares,
            tensor_type: KernelType::of(embedding.tensor_type)?.id,
            columns: columns as i32,
            scale,
            unused: 0,
        }),
        dependent: true,
        cooperative: false,
    })
}

/// `x[token] = E[tokens[token]] * scale`, f32 (columns, tokens).
pub fn embed_tokens(
    device: &Device,
    embedding: Matrix,
    scale: f32,
    tokens: CUdeviceptr,
    x: CUdeviceptr,
    chunk: Chunk,
) -> Result<Launch> {
    let mut launch = embed_token(device, embedding, scale, tokens, x, 0, Normed::zeroed())?;
    launch.grid[1] = chunk.tokens as u32;
    Ok(launch)
}
