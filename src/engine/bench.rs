//! Timing a backend the way llama-bench does: no sampling, no text, made-up tokens.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::session::read_prompt;
use crate::backend::{Backend, Batch};

/// What to time, with `depth` tokens already in the context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Workload {
    pub kind: Kind,
    pub tokens: usize,
    pub depth: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Reading a prompt, for the logits after its last token.
    Prompt,
    /// Decoding tokens one after another.
    Generate,
}

impl Workload {
    /// The row's name as llama-bench writes it: `pp512`, `tg128`, `tg128@d4096`.
    pub fn name(&self) -> String {
        let kind = match self.kind {
            Kind::Prompt => "pp",
            Kind::Generate => "tg",
        };
        match self.depth {
            0 => format!("{kind}{}", self.tokens),
            depth => format!("{kind}{}@d{depth}", self.tokens),
        }
    }
}

/// Runs `workload` once to warm up and then `repetitions` times, and returns how long each took. `progress` hears how many
/// tokens of all that are done, and of how many.
///
/// # Errors
/// A context too short, and whatever the backend meets.
pub fn measure(
    backend: &mut dyn Backend,
    workload: Workload,
    repetitions: usize,
    progress: &mut (dyn FnMut(usize, usize) + Send),
) -> Result<Vec<Duration>> {
    let Workload {
        kind,
        tokens,
        depth,
    } = workload;
    let limits = backend.limits();
    let context_len = limits.context_len;
    let end = depth.checked_add(tokens).filter(|&end| end <= context_len);
    let end = end.with_context(|| {
        format!(
            "{} takes a context of {depth} and {tokens} tokens, and this one holds {context_len}",
            workload.name()
        )
    })?;
    let text = made_up_tokens(end, limits.vocab_size);
    let all = depth + (1 + repetitions) * tokens;
    if depth > 0 {
        read_prompt(backend, &text[..depth], 0, &mut |position| {
            progress(position, all)
        })?;
    }
    let mut run = |before: usize| {
        if !backend.remembers(depth) {
            read_prompt(backend, &text[..depth], 0, &mut |_| ())?;
        }
        let mut progress = |position: usize| progress(before * tokens + position, all);
        let start = Instant::now();
        match kind {
            Kind::Prompt => {
                read_prompt(backend, &text[depth..], depth, &mut progress)?;
            }
            Kind::Generate => {
                for (i, token) in text[depth..].iter().enumerate() {
                    progress(depth + i);
                    backend.compute(Batch::decode(token, depth + i))?;
                }
            }
        }
        anyhow::Ok(start.elapsed())
    };
    run(0)?;
    (1..=repetitions).map(run).collect()
}

/// Tokens spread over the vocabulary, the same every time.
pub fn made_up_tokens(count: usize, vocab_size: usize) -> Vec<u32> {
    // A multiplicative hash (Knuth, volume 3, 6.4): neighbours land far apart.
    let token = |i: usize| (i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    (0..count)
        .map(|i| (token(i) % vocab_size as u64) as u32)
        .collect()
}
