//! What becomes of logits behind their product.

use anyhow::Result;
use cudarc::driver::sys::CUdeviceptr;

use super::Chunk;
use crate::{
    cuda::{
        device::{Device, Launch, Parameter},
        params::FinishLogitsParams,
    },
    model::ops::SUPPRESSED,
};

/// Caps the logits, f32 (vocabulary, tokens), by `softcap`, if that is not 0, and leaves `suppressed_count` tokens, i32 at
/// `suppressed`, none.
pub fn finish_logits(
    device: &Device,
    logits: CUdeviceptr,
    softcap: f32,
    suppressed: CUdeviceptr,
    suppressed_count: usize,
    vocabulary: usize,
    chunk: Chunk,
) -> Result<Launch> {
    Ok(Launch {
        function: device.function("logits", "finish_logits")?,
        grid: [vocabulary.div_ceil(256) as u32, chunk.tokens as u32, 1],
        block: [256, 1],
        shared_bytes: 0,
        parameter: Parameter::new(FinishLogitsParams {
            logits,
            suppressed,
            softcap,
            suppressed_logit: SUPPRESSED,
            vocabulary: vocabulary as i32,
            suppressed_count: suppressed_count as i32,
        }),
        dependent: true,
        cooperative: false,
    })
}
