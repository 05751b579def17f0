//! The choice of the next token behind its logits.

use anyhow::{Result, ensure};

use crate::{
    backend::SamplingParams,
    cuda::{
        device::{Device, Launch, Parameter},
        params::{ChoiceSettings, ChooseParams},
    },
};

/// Candidates that [`choose`] can draw from.
pub const MAX_TOP_K: usize = 64;

/// Logits that one block of the first kernel looks at.
const BLOCK_LOGITS: usize = 1024;

/// Threads of the second kernel, and the most blocks of the first.
const MAX_LISTS: usize = 1024;

/// `counts` marks a token that is never chosen with its highest bit.
const BANNED: u32 = 1 << 31;

/// How [`choose`] is to choose. `banned`: tokens that it never does.
pub fn choice_settings(sampling: &SamplingParams, banned: &[u32]) -> ChoiceSettings {
    let counted = match sampling.has_penalties() {
        true => i32::try_from(sampling.repeat_last_n).unwrap_or(i32::MAX),
        false => 0,
    };
    ChoiceSettings {
        temperature: sampling.temperature,
        top_k: match sampling.temperature {
            0.0 => 0,
            _ => sampling.top_k as i32,
        },
        top_p: sampling.top_p,
        min_p: sampling.min_p,
        repeat_penalty: sampling.repeat_penalty,
        presence_penalty: sampling.presence_penalty,
        frequency_penalty: sampling.frequency_penalty,
        repeat_last_n: counted,
        adjusts: i32::from(counted > 0 || !banned.is_empty()),
    }
}

/// What [`choose`] has to know of the tokens behind `text`, (vocab_size).
pub fn choice_counts(
    settings: &ChoiceSettings,
    vocab_size: usize,
    text: &[u32],
    banned: &[u32],
) -> Vec<u32> {
    let mut counts = vec![0; vocab_size];
    for &token in &text[text.len().saturating_sub(settings.repeat_last_n as usize)..] {
        counts[token as usize] += 1;
    }
    for &token in banned {
        counts[token as usize] |= BANNED;
    }
    counts
}

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
            cooperative: false,
        })
    };
    Ok([
        launch("choose_best", blocks as u32, 512)?,
        launch("choose_token", 1, 1024)?,
    ])
}
