//! An answer as it comes: reasoning before it is free, the answer itself is held to a constraint where there is one.

use anyhow::{Result, ensure};

use super::{Constraint, Guide, reasoning::Reasoning};
use crate::model::Tokenizer;

/// Follows a text token by token.
pub struct Answer<'a> {
    tokenizer: &'a Tokenizer,
    reasoning: Reasoning<'a>,
    guide: Option<Guide>,
    /// Tokens that begin reasoning, as long as the text may begin with it.
    openings: Vec<u32>,
}

impl<'a> Answer<'a> {
    /// At the end of `prompt`.
    pub fn new(tokenizer: &'a Tokenizer, prompt: &[u32], constraint: Option<&Constraint>) -> Self {
        let reasoning = Reasoning::new(tokenizer, prompt);
        let openings = constraint.filter(|_| !reasoning.is_behind());
        let openings = openings.map_or(&[][..], Constraint::reasoning);
        Self {
            tokenizer,
            reasoning,
            guide: constraint.map(Constraint::begin),
            openings: openings.to_vec(),
        }
    }

    /// Which tokens may follow, or `None` for all: bit `i % 32` of word `i / 32` for token `i`, and none beyond the last word.
    ///
    /// # Errors
    /// As [`Guide::allowed`], and where all that may follow are suppressed by the file.
    pub fn allowed(&mut self) -> Result<Option<Vec<u32>>> {
        let Some(guide) = self.guide.as_mut().filter(|_| !self.reasoning.is_open()) else {
            return Ok(None);
        };
        let mut words = guide.allowed()?;
        let bit = |id: &u32| (*id as usize / 32, 1 << (id % 32));
        for (word, bit) in self.openings.iter().map(bit) {
            words[word] |= bit;
        }
        for (word, bit) in self.tokenizer.suppressed().iter().map(bit) {
            words[word] &= !bit;
        }
        ensure!(
            words.iter().any(|&word| word != 0),
            "none of the tokens that may come next can be chosen: the model's file suppresses all of them"
        );
        Ok(Some(words))
    }

    /// Whether it is held to a constraint.
    pub fn is_constrained(&self) -> bool {
        self.guide.is_some()
    }

    /// Goes on by a token, and says whether it is part of the reasoning.
    ///
    /// # Errors
    /// As [`Guide::accept`].
    pub fn push(&mut self, id: u32) -> Result<bool> {
        self.openings.clear();
        let reasoning = self.reasoning.includes(id);
        if let Some(guide) = &mut self.guide
            && !reasoning
            && !self.tokenizer.is_end_of_generation(id)
        {
            guide.accept(id)?;
        }
        Ok(reasoning)
    }

    /// Whether the text is in its reasoning.
    pub fn is_reasoning(&self) -> bool {
        self.reasoning.is_open()
    }

    /// Whether it can only end here.
    pub fn is_over(&self) -> bool {
        self.guide.as_ref().is_some_and(Guide::is_over)
    }

    /// Whether it may end here.
    pub fn is_whole(&mut self) -> bool {
        let reasoning = self.reasoning.is_open();
        let guide = self.guide.as_mut();
        guide.is_none_or(|guide| !reasoning && guide.matches())
    }
}
