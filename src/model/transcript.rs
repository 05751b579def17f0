//! A conversation as its model has read and written it, so that the next turn is only added to it.
//!
//! A chat template renders a whole conversation anew for every turn, and what the model wrote would be made tokens of anew,
//! which need not be those that it chose: the model might see other tokens than it did, and none of its KV cache behind the
//! first such place could be used again. So the ids are kept, for as long as the template writes the text that they stand for.

use super::{Prompt, Tokenizer, chat_template::ControlToken};

/// The prompt that was read last, and what was generated behind it.
#[derive(Default)]
pub struct Transcript {
    text: Vec<u8>,
    /// Of the prompt.
    control_tokens: Vec<ControlToken>,
    ids: Vec<u32>,
    /// Where text can go on with other ids than before, in order: behind what was generated.
    cuts: Vec<Cut>,
}

/// A place between two tokens.
#[derive(Clone, Copy, Default)]
struct Cut {
    /// Bytes of text before it.
    text: usize,
    /// Tokens before it.
    ids: usize,
}

impl Transcript {
    /// The ids of `prompt`: those of the transcript for the text that is the same up to the end of a generated token where the
    /// prompt goes on with a control token, and for the rest what [`Tokenizer::encode`] makes of it.
    pub fn ids_of(&self, prompt: &Prompt, tokenizer: &Tokenizer) -> Vec<u32> {
        let cut = self.shared(prompt);
        match cut.ids {
            0 => tokenizer.encode(prompt),
            kept => [
                &self.ids[..kept],
                &tokenizer.encode_behind(prompt, cut.text),
            ]
            .concat(),
        }
    }

    /// Takes `prompt`, with the ids of [`Self::ids_of`], for what was read last.
    pub fn read(&mut self, prompt: &Prompt, ids: &[u32]) {
        let shared = self.shared(prompt);
        self.cuts.retain(|cut| cut.text <= shared.text);
        self.text = prompt.text().into();
        self.control_tokens = prompt.control_tokens().unwrap_or_default().to_vec();
        self.ids = ids.to_vec();
    }

    /// Appends a token that was generated. What ends an answer is left to the template, which may write another end.
    pub fn push(&mut self, id: u32, tokenizer: &Tokenizer) {
        if tokenizer.is_end_of_generation(id) {
            return;
        }
        self.text.extend(tokenizer.token_bytes(id));
        self.ids.push(id);
        self.cuts.push(Cut {
            text: self.text.len(),
            ids: self.ids.len(),
        });
    }

    /// The last cut up to which `prompt` is the same, and behind which it goes on with a control token: only there are its
    /// ids those of the text on both sides. The start, where there is none.
    fn shared(&self, prompt: &Prompt) -> Cut {
        let controls = prompt.control_tokens().unwrap_or_default();
        let same = (self.text.iter().zip(prompt.text().as_bytes()))
            .take_while(|(a, b)| a == b)
            .count();
        let pairs = self.control_tokens.iter().zip(controls);
        let same_controls = pairs.take_while(|(a, b)| a == b).count();
        let others = [
            &self.control_tokens[same_controls..],
            &controls[same_controls..],
        ];
        let first_other = others.iter().filter_map(|rest| rest.first());
        let same = first_other
            .map(|token| token.range.start)
            .fold(same, usize::min);
        let goes_on = |cut: &&Cut| {
            let control = controls.binary_search_by_key(&cut.text, |token| token.range.start);
            cut.text <= same && control.is_ok()
        };
        self.cuts
            .iter()
            .rev()
            .find(goes_on)
            .copied()
            .unwrap_or_default()
    }
}
