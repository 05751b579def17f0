//! Which tokens are a model's reasoning rather than its answer: those between a pair of marks, and the marks.

use crate::model::Tokenizer;

/// The tokens that open and close it: of Qwen3, DeepSeek R1 and many others, and of Gemma 4.
const MARKS: [(&str, &str); 2] = [("<think>", "</think>"), ("<|channel>", "<channel|>")];

/// What Gemma 4 calls its reasoning, behind the mark that opens it.
const LABEL: &str = "thought\n";

/// What is in a text of reasoning, without its marks and the space around it.
pub fn unmarked(reasoning: &str) -> &str {
    let mut inner = reasoning.trim();
    for (start, end) in MARKS {
        inner = inner.strip_prefix(start).unwrap_or(inner);
        inner = inner.strip_suffix(end).unwrap_or(inner);
    }
    inner.strip_prefix(LABEL).unwrap_or(inner).trim()
}

/// The tokens of a vocabulary that open it.
pub fn openings(tokenizer: &Tokenizer) -> Vec<u32> {
    let ids = 0..tokenizer.vocab_size() as u32;
    let opens = |id: &u32| {
        let piece = tokenizer.piece(*id);
        MARKS.iter().any(|(start, _)| *start == piece)
    };
    ids.filter(opens).collect()
}

/// Follows a text token by token.
pub struct Reasoning<'a> {
    tokenizer: &'a Tokenizer,
    /// What will close the reasoning that the text is in.
    until: Option<&'static str>,
    /// Tokens since it was closed, if it was.
    since: Option<usize>,
}

/// Tokens that a template may put behind reasoning that it closes at once, so that there is none: line breaks.
const GAP: usize = 2;

impl<'a> Reasoning<'a> {
    /// At the end of `prompt`, which may have opened it.
    pub fn new(tokenizer: &'a Tokenizer, prompt: &[u32]) -> Self {
        let mut reasoning = Self {
            tokenizer,
            until: None,
            since: None,
        };
        for &token in prompt {
            reasoning.includes(token);
        }
        reasoning
    }

    /// Whether the text is in it.
    pub fn is_open(&self) -> bool {
        self.until.is_some()
    }

    /// Whether it has just been closed, so that the answer follows.
    pub fn is_behind(&self) -> bool {
        self.since.is_some_and(|tokens| tokens <= GAP)
    }

    /// Whether the text's next token is part of it.
    pub fn includes(&mut self, token: u32) -> bool {
        let piece = self.tokenizer.piece(token);
        self.since = self.since.map(|tokens| tokens + 1);
        match self.until {
            Some(end) => {
                if piece == end {
                    self.until = None;
                    self.since = Some(0);
                }
                true
            }
            None => {
                let opened = MARKS.iter().find(|(start, _)| *start == piece);
                self.until = opened.map(|(_, end)| *end);
                self.until.is_some()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::unmarked;

    #[test]
    fn marks_come_off_whole_reasoning_and_what_there_is_of_one_cut_short() {
        for (reasoning, inner) in [
            ("<think>\nLet me see.\n</think>", "Let me see."),
            ("Opened by the prompt.</think>", "Opened by the prompt."),
            ("<think>\nCut sho", "Cut sho"),
            ("<|channel>thought\nLet me see.<channel|>", "Let me see."),
            ("<|channel>thought\n<channel|>", ""),
        ] {
            assert_eq!(unmarked(reasoning), inner);
        }
    }
}
