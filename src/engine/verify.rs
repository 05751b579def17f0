//! Holding two ways of computing the same tokens side by side.

use anyhow::Result;

use super::{Divergence, sampling::largest_logit, session::read_prompt};
use crate::backend::{Backend, Batch};

/// The logits after a prompt and after each of the tokens that followed.
pub struct Trace {
    /// The tokens that followed the prompt: the likeliest at each step, or those that were given.
    pub tokens: Vec<u32>,
    /// (vocab_size, tokens), vocab_size contiguous; row `i` is what token `i` was chosen from.
    pub logits: Vec<f32>,
}

/// How two traces of the same tokens differ.
pub struct Comparison {
    /// The first step whose logits are not the same bits.
    pub first_difference: Option<usize>,
    pub max_difference: f32,
    pub divergence: Divergence,
}

impl Trace {
    /// Reads `prompt` from the start of the context and then decodes `count` tokens: those of `follow`, or the likeliest.
    ///
    /// # Errors
    /// Logits that are no numbers, and whatever the backend meets.
    pub fn record(
        backend: &mut dyn Backend,
        prompt: &[u32],
        count: usize,
        follow: Option<&[u32]>,
    ) -> Result<Self> {
        let mut trace = Self {
            tokens: Vec::with_capacity(count),
            logits: Vec::new(),
        };
        trace.push(read_prompt(backend, prompt, 0, &mut |_| ())?, follow)?;
        while trace.tokens.len() < count {
            let position = prompt.len() + trace.tokens.len() - 1;
            let token = trace.tokens[trace.tokens.len() - 1];
            let results = backend.compute(Batch::decode(&token, position))?;
            trace.push(results.logits, follow)?;
        }
        Ok(trace)
    }

    fn push(&mut self, logits: &[f32], follow: Option<&[u32]>) -> Result<()> {
        largest_logit(logits)?;
        let token = match follow {
            Some(follow) => follow[self.tokens.len()],
            None => super::evaluate::top(logits).unwrap_or(0) as u32,
        };
        self.tokens.push(token);
        self.logits.extend_from_slice(logits);
        Ok(())
    }

    /// Compares this trace, as the reference, with another of the same tokens.
    pub fn compare(&self, other: &Self) -> Comparison {
        let vocab_size = self.logits.len() / self.tokens.len();
        let mut comparison = Comparison {
            first_difference: None,
            max_difference: 0.0,
            divergence: Divergence::default(),
        };
        let rows = self.logits.chunks_exact(vocab_size);
        for (i, (ours, theirs)) in rows.zip(other.logits.chunks_exact(vocab_size)).enumerate() {
            let same = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits();
            if comparison.first_difference.is_none() && !ours.iter().zip(theirs).all(same) {
                comparison.first_difference = Some(i);
            }
            let differences = ours.iter().zip(theirs).map(|(a, b)| (a - b).abs());
            comparison.max_difference = differences.fold(comparison.max_difference, f32::max);
            comparison.divergence.push(theirs, ours);
        }
        comparison
    }
}
