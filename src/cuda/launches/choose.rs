//! The choice of the next token behind its logits.

use anyhow::{Result, ensure};

use crate::cuda::{
    device::{Device, Launch, Parameter},
    params::ChooseParams,
};

/// Candidates that [`choose`] can draw from.
pub const MAX_TOP_K: usize = 64;

/// Logits that one block of the first kernel looks at.
const BLOCK_LOGITS: usize = 1024;

/// Threads of the second kernel, and the most blocks of the first.
const MAX_LISTS: usize = 1024;

/// u64 that the first kernel leaves for the second.
pub fn choose_lists_len(vocab_size: usize) -> usize {
    vocab_size.div_ceil(BLOCK_LOGITS) * MAX_TOP_K
}

/// The two launches that choose a token and make it the one to compute next.
pub fn choose(device: &Device, params: ChooseParams) -> Result<[Launch; 2]> {
    let blocks = (params.vocabulary as usize).div_ceil(BLOCK_LOGITS);
    ensure!(
        blocks <= MAX_LISTS,
        "a vocabulary of {} tokens is too large to choose from on the GPU",
        params.vocabulary
    );
    let launch = |name, blocks, threads| {
        anyhow::Ok(Launch {
            function: device.function("choose", name)?,
            grid: [blocks, 1, 1],
            block: [threads, 1],
            shared_bytes: 0,
            parameter: Parameter::new(params),
            dependent: true,
        })
    };
    Ok([
        launch("choose_best", blocks as u32, 512)?,
        launch("choose_token", 1, 1024)?,
    ])
}
