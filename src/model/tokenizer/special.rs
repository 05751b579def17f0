//! Tokens that are more than their text: which ones mark up a prompt, which ones end an answer, and where in a text they
//! stand.
//!
//! Files give each token a type, and many give the tokens that end or open a turn a wrong one. So these are known by
//! their text too.

use std::collections::{BTreeSet, HashMap};

use aho_corasick::{AhoCorasick, MatchKind};
use anyhow::{Context, Result};
use serde_json::Value;

use super::{
    super::gguf::{Gguf, describe},
    Token, TokenKind,
};

/// Texts that end a turn or a document: llama.cpp's list, and CodeLlama's spelling of one.
const ENDS: [&str; 23] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "▁<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
];

/// Ends of a fill-in-the-middle answer, one token each: the key's, else the first of these texts. llama.cpp's list too.
const FIM_ENDS: [(&str, &[&str]); 3] = [
    (
        "tokenizer.ggml.fim_pad_token_id",
        &["<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"],
    ),
    (
        "tokenizer.ggml.fim_rep_token_id",
        &[
            "<|fim_repo|>",
            "<|repo_name|>",
            "<fim-repo>",
            "<REPO>",
            "<reponame>",
        ],
    ),
    ("tokenizer.ggml.fim_sep_token_id", &["<|file_sep|>"]),
];

/// Texts that open a turn, or say whose it is.
const TURNS: [&str; 45] = [
    // ChatML, Kimi, Phi 4
    "<|im_start|>",
    "<|im_sep|>",
    "<|im_middle|>",
    "<|im_system|>",
    "<|im_user|>",
    "<|im_assistant|>",
    // Llama
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|header_start|>",
    "<|header_end|>",
    "<|eot|>",
    // Gemma
    "<bos>",
    "<start_of_turn>",
    "<|turn>",
    // Phi, Zephyr, GLM
    "<|system|>",
    "<|developer|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<|tool|>",
    // gpt-oss
    "<|start|>",
    "<|message|>",
    "<|channel|>",
    "<|constrain|>",
    // Mistral
    "[INST]",
    "[/INST]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    // Command R
    "<|START_OF_TURN_TOKEN|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|SYSTEM_TOKEN|>",
    "<|USER_TOKEN|>",
    "<|CHATBOT_TOKEN|>",
    // Granite
    "<|start_of_role|>",
    "<|end_of_role|>",
    // DeepSeek
    "<｜begin▁of▁sentence｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    // EXAONE
    "[|system|]",
    "[|user|]",
    "[|assistant|]",
    "[|endofturn|]",
];

/// The tokens that the file's keys name.
pub struct Named {
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    /// What stands for text that has no token.
    pub unknown: Option<u32>,
    /// What only templates ask for, by the names that these know.
    for_templates: Vec<(&'static str, u32)>,
    /// Never to be generated.
    pub suppressed: Vec<u32>,
    /// Of `eot`, `eom` and `eos_token_ids`.
    other_ends: Vec<u32>,
    /// In the order of [`FIM_ENDS`].
    fim_ends: [Option<u32>; 3],
}

impl Named {
    /// Reads the keys. What names no token of the vocabulary counts as missing, with a warning.
    pub fn read(gguf: &Gguf, vocab_size: usize) -> Self {
        let warn = |what: String| tracing::warn!("{}: {what}; not used", gguf.name());
        let in_vocabulary = |key: &str, value: &Value| match value.as_u64() {
            Some(id) if id < vocab_size as u64 => Some(id as u32),
            _ => {
                warn(format!(
                    "{key} is {}, but the vocabulary has {vocab_size} tokens",
                    describe(value)
                ));
                None
            }
        };
        let id = |key: &str| gguf.get(key).and_then(|value| in_vocabulary(key, value));
        let ids = |key: &str| -> Vec<u32> {
            let ids = gguf.array(key).unwrap_or_else(|error| {
                warn(error.to_string());
                None
            });
            let ids = ids.into_iter().flatten();
            ids.filter_map(|id| in_vocabulary(key, id)).collect()
        };
        // Files name such tokens that have none.
        let for_template = |(name, key): (&'static str, &str)| {
            let id = gguf.get(key)?.as_u64()?;
            (id < vocab_size as u64).then_some((name, id as u32))
        };
        // Ollama's key: all ends in one array.
        let mut other_ends = ids("tokenizer.ggml.eos_token_ids");
        other_ends.extend(id("tokenizer.ggml.eot_token_id"));
        other_ends.extend(id("tokenizer.ggml.eom_token_id"));
        Self {
            bos: id("tokenizer.ggml.bos_token_id"),
            eos: id("tokenizer.ggml.eos_token_id"),
            unknown: id("tokenizer.ggml.unknown_token_id"),
            for_templates: [
                // As GGUF spells it.
                ("sep_token", "tokenizer.ggml.seperator_token_id"),
                ("pad_token", "tokenizer.ggml.padding_token_id"),
                ("mask_token", "tokenizer.ggml.mask_token_id"),
            ]
            .into_iter()
            .filter_map(for_template)
            .collect(),
            suppressed: ids("tokenizer.ggml.suppress_tokens"),
            other_ends,
            fim_ends: FIM_ENDS.map(|(key, _)| id(key)),
        }
    }
}

impl Named {
    /// The tokens that transformers hands to a template, by the names of its variables.
    pub fn variables(&self) -> Vec<(&'static str, u32)> {
        let ids = [
            ("bos_token", self.bos),
            ("eos_token", self.eos),
            ("unk_token", self.unknown),
        ];
        let known = ids.into_iter().filter_map(|(name, id)| Some((name, id?)));
        known.chain(self.for_templates.iter().copied()).collect()
    }
}

/// Makes a control token of every token that ends or opens a turn, whatever its type, and returns those that end an
/// answer. `spelled`: whether ordinary text can come out as this token, by merging.
pub fn mark_turns(
    tokens: &mut [Token],
    ids: &HashMap<&str, u32>,
    named: &Named,
    spelled: impl Fn(u32) -> bool,
) -> BTreeSet<u32> {
    let has = |text: &str| ids.contains_key(text);
    let kind = |id: u32| tokens[id as usize].kind;
    let known = |text: &&str| {
        let id = *ids.get(text)?;
        let is_text = kind(id) == TokenKind::Normal && spelled(id);
        (!is_text).then_some(id)
    };
    // HTML has `</s>` as well: such vocabularies have its other tags, or an end of their own.
    let mut other_ends = ENDS.iter().filter_map(|text| ids.get(text));
    let has_typed_end = other_ends.any(|&id| kind(id) == TokenKind::Control);
    let is_html = |id: u32| {
        has("<|tool_response>")
            || match kind(id) {
                TokenKind::Control => false,
                TokenKind::Normal => has("</b>") || has_typed_end,
                _ => has("</b>"),
            }
    };
    // There `<|end|>` ends a message, and an answer has several.
    let ends_message = has("<|return|>") && has("<|call|>") || has("<|calls|>") && has("<|flush|>");
    let mut ends: BTreeSet<u32> = ENDS
        .iter()
        .filter(|&&text| !(text == "<|end|>" && ends_message))
        .filter_map(known)
        .filter(|&id| ids.get("</s>") != Some(&id) || !is_html(id))
        .collect();
    for (key, (_, texts)) in named.fim_ends.iter().zip(FIM_ENDS) {
        ends.extend(key.or_else(|| texts.iter().find_map(known)));
    }
    let mut marks: BTreeSet<u32> = TURNS.iter().filter_map(known).collect();
    marks.extend(known(&"<|end|>"));
    marks.extend(&ends);

    ends.extend(named.eos);
    ends.extend(&named.other_ends);
    // A key may name a token that is plain text, such as a line's end: only what is written like a mark becomes one.
    let named = ends.iter().copied().chain(named.bos);
    marks.extend(named.filter(|&id| match kind(id) {
        TokenKind::UserDefined => true,
        TokenKind::Normal => !spelled(id) && tokens[id as usize].text.starts_with(['<', '[']),
        _ => false,
    }));
    for id in marks {
        tokens[id as usize].kind = TokenKind::Control;
    }
    ends
}

/// Finds the texts of some tokens.
#[derive(Clone)]
pub struct SpecialTokens {
    texts: AhoCorasick,
    /// By number of the text in `texts`.
    ids: Vec<u32>,
}

impl SpecialTokens {
    pub(super) fn new(tokens: &[Token], wanted: impl Fn(TokenKind) -> bool) -> Result<Self> {
        let ids: Vec<u32> = (0..)
            .zip(tokens)
            .filter(|(_, token)| !token.text.is_empty() && wanted(token.kind))
            .map(|(id, _)| id)
            .collect();
        // Of overlapping tokens the leftmost is taken, then the longest: as in Hugging Face tokenizers.
        let texts = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(ids.iter().map(|&id| &tokens[id as usize].text))
            .context("indexing the special tokens")?;
        Ok(Self { texts, ids })
    }

    /// Where the tokens occur in `text`, and their ids.
    pub fn find_iter(&self, text: &str) -> impl Iterator<Item = (std::ops::Range<usize>, u32)> {
        (self.texts.find_iter(text)).map(|found| (found.range(), self.ids[found.pattern()]))
    }
}
