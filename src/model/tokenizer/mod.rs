//! Text to token ids and back, as a file's own vocabulary says.
//!
//! This module reads what the file says and cuts out special tokens before any text reaches the merging, whose own
//! vocabulary holds no control token: text that is not to become a control token cannot.

mod byte_level;
mod merge;
mod pre_tokenizer;
mod sentence_piece;
mod special;

use std::collections::{HashMap, hash_map::Entry};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use self::{
    byte_level::ByteLevel,
    merge::Merge,
    pre_tokenizer::PreTokenizer,
    sentence_piece::{BLANK, Order, SentencePiece},
    special::Named,
};
use super::{chat_template::Prompt, gguf::Gguf};

pub(super) use special::SpecialTokens;

/// A model's tokenizer.
pub struct Tokenizer {
    model: Model,
    /// The vocabulary: a token's id is its index.
    tokens: Vec<Token>,
    /// Everything that is cut out of a raw prompt: `control` and `user_defined` together.
    special: SpecialTokens,
    control: SpecialTokens,
    user_defined: SpecialTokens,
    bos: Option<u32>,
    /// Tokens by the names of a template's variables.
    variables: Vec<(&'static str, u32)>,
    suppressed: Vec<u32>,
    /// Whether a prompt starts with `bos`.
    add_bos: bool,
    /// Whether blanks after a special token belong to it.
    strips_after_special: bool,
    /// In ascending order.
    end_of_generation: Vec<u32>,
}

/// What makes tokens of text: `tokenizer.ggml.model`.
enum Model {
    ByteLevel(ByteLevel),
    SentencePiece(SentencePiece),
}

/// By the ids of two neighbours, what they become.
type Merges = HashMap<(u32, u32), Merge>;

/// An entry of the vocabulary.
struct Token {
    text: String,
    kind: TokenKind,
}

/// `tokenizer.ggml.token_type` of the GGUF specification.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TokenKind {
    /// 1, and 0, which says nothing: text, in the spelling of the model.
    Normal,
    /// 2 and 3: marks up a prompt and stands for no text.
    Control,
    /// 4: plain text that is one token wherever it occurs.
    UserDefined,
    /// 5: fills up the vocabulary.
    Unused,
    /// 6: a byte of a character that has no token. Byte-level BPE has none: there such a token is a normal one.
    Byte(u8),
}

impl TokenKind {
    fn from_ggml(token_type: Option<u64>) -> Option<Self> {
        match token_type? {
            0 | 1 | 6 => Some(Self::Normal),
            2 | 3 => Some(Self::Control),
            4 => Some(Self::UserDefined),
            5 => Some(Self::Unused),
            _ => None,
        }
    }

    /// Whether merging may come to such a token.
    fn is_text(self) -> bool {
        matches!(self, Self::Normal | Self::UserDefined)
    }
}

impl Tokenizer {
    /// Builds the tokenizer that the file describes.
    ///
    /// # Errors
    ///
    /// Names the key under which the file has nothing, something of no meaning, or something that sharpi
    /// does not support. What nothing depends on is a warning instead.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self> {
        Self::read(gguf).context("reading the tokenizer")
    }

    fn read(gguf: &Gguf) -> Result<Self> {
        const MODEL: &str = "tokenizer.ggml.model";
        let model = gguf.str(MODEL)?;
        let model =
            model.with_context(|| format!("{MODEL} is missing: the file has no tokenizer"))?;
        ensure!(
            matches!(model, "gpt2" | "llama" | "gemma4"),
            "{MODEL} is {model:?}; supported are \"gpt2\" (byte-level BPE), \"llama\" (SentencePiece) and \"gemma4\""
        );
        let texts = read_texts(gguf)?;
        let ids = index(&texts)?;
        let merges = match model {
            "llama" => Vec::new(),
            _ => read_merges(gguf, &ids)?,
        };
        let mut spelled = vec![false; texts.len()];
        merges
            .iter()
            .for_each(|merge| spelled[merge[2] as usize] = true);
        let mut tokens = read_tokens(gguf, &texts, model)?;
        let mut named = Named::read(gguf, tokens.len());
        if model == "llama" {
            // SentencePiece's own ids, where the file names none.
            let token = |id: u32| (id < tokens.len() as u32).then_some(id);
            named.unknown = named.unknown.or(token(0));
            named.bos = named.bos.or(token(1));
            named.eos = named.eos.or(token(2));
        }
        let ends = special::mark_turns(&mut tokens, &ids, &named, |id| spelled[id as usize]);

        let merges = rank(&merges, &tokens);
        let model = match model {
            "gpt2" => Model::ByteLevel(ByteLevel::new(read_pre(gguf)?, &tokens, merges)),
            _ => {
                let order = match model {
                    "llama" => Order::Scores(read_ranks(gguf, tokens.len())?),
                    _ => Order::Merges(merges),
                };
                let prefix = gguf.bool("tokenizer.ggml.add_space_prefix")?;
                let prefix = prefix.unwrap_or(model == "llama");
                Model::SentencePiece(SentencePiece::new(&tokens, order, named.unknown, prefix))
            }
        };
        let add_bos = gguf.bool("tokenizer.ggml.add_bos_token")?;
        if add_bos == Some(true) && named.bos.is_none() {
            tracing::warn!(
                "{}: tokenizer.ggml.add_bos_token is true, but tokenizer.ggml.bos_token_id names no token: none is added",
                gguf.name()
            );
        }
        for key in [
            "tokenizer.ggml.add_eos_token",
            "tokenizer.ggml.add_sep_token",
        ] {
            if gguf.bool(key)? == Some(true) {
                tracing::debug!(
                    "{}: {key} is true, but nothing is put behind a prompt: the model is to go on with it",
                    gguf.name()
                );
            }
        }
        let is_special = |kind| matches!(kind, TokenKind::Control | TokenKind::UserDefined);
        Ok(Self {
            special: SpecialTokens::new(&tokens, is_special)?,
            control: SpecialTokens::new(&tokens, |kind| kind == TokenKind::Control)?,
            user_defined: SpecialTokens::new(&tokens, |kind| kind == TokenKind::UserDefined)?,
            bos: named.bos,
            variables: named.variables(),
            suppressed: named.suppressed,
            add_bos: match &model {
                Model::ByteLevel(model) => add_bos.unwrap_or(model.adds_bos()),
                // Gemma 4 is lost without, whatever its file says.
                Model::SentencePiece(model) => add_bos.unwrap_or(true) || model.is_gemma4(),
            },
            strips_after_special: matches!(model, Model::SentencePiece(_))
                && gguf.str("general.architecture")? == Some("phi3"),
            end_of_generation: ends.into_iter().collect(),
            model,
            tokens,
        })
    }

    /// Tokens in the vocabulary, special ones included.
    pub fn vocab_size(&self) -> usize {
        self.tokens.len()
    }

    /// The ids of `prompt`: special-token text outside message content becomes its id. Adds the file's
    /// beginning-of-sequence token where the file asks for one and the text does not start with it. Nothing is added
    /// behind the text, whatever the file asks for: an end there would have the model begin something new.
    ///
    /// What the vocabulary has no token for becomes its unknown token, or is left out where it has none.
    pub fn encode(&self, prompt: &Prompt) -> Vec<u32> {
        let mut ids = self.encode_behind(prompt, 0);
        if let Some(bos) = self.bos.filter(|_| self.add_bos)
            && ids.first() != Some(&bos)
        {
            ids.insert(0, bos);
        }
        ids
    }

    /// The ids of what `prompt` has from byte `start` on, which is its first or that of a control token.
    pub(super) fn encode_behind(&self, prompt: &Prompt, start: usize) -> Vec<u32> {
        let text = prompt.text();
        let mut ids = Vec::with_capacity((text.len() - start) / 3);
        match prompt.control_tokens() {
            None => self.encode_text(&text[start..], &self.special, &mut ids),
            Some(control_tokens) => {
                let mut done = start;
                for token in control_tokens.iter().filter(|t| t.range.start >= start) {
                    let before = text.get(done..token.range.start).unwrap_or_default();
                    self.encode_text(before, &self.user_defined, &mut ids);
                    ids.push(token.id);
                    done = self.end_of(token.id, token.range.end, text);
                }
                self.encode_text(&text[done..], &self.user_defined, &mut ids);
            }
        }
        ids
    }

    /// Appends the ids of `text`, in which those of `special` are tokens and all else is merged.
    fn encode_text(&self, text: &str, special: &SpecialTokens, ids: &mut Vec<u32>) {
        let mut done = 0;
        for (range, id) in special.find_iter(text) {
            self.merge(text.get(done..range.start).unwrap_or_default(), ids);
            ids.push(id);
            done = self.end_of(id, range.end, text);
        }
        self.merge(&text[done..], ids);
    }

    /// Where text goes on after the special token `id`, which is spelled up to `end`.
    fn end_of(&self, id: u32, end: usize, text: &str) -> usize {
        // Phi 3 was trained so, and its file cannot say it.
        let strips = self.strips_after_special
            && !matches!(self.piece(id), "<unk>" | "<s>" | "<|endoftext|>");
        match strips {
            true => text.len() - text[end..].trim_start().len(),
            false => end,
        }
    }

    fn merge(&self, text: &str, ids: &mut Vec<u32>) {
        match &self.model {
            _ if text.is_empty() => {}
            Model::ByteLevel(model) => model.encode(text, ids),
            Model::SentencePiece(model) => model.encode(text, ids),
        }
    }

    /// The bytes that a token stands for: part of a character, maybe. Empty for a control token.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        let Some(token) = self.tokens.get(id as usize) else {
            return Vec::new();
        };
        match (token.kind, &self.model) {
            // A token outside the byte-level alphabet stands for itself, as in Hugging Face tokenizers.
            (TokenKind::Normal, Model::ByteLevel(_)) => {
                byte_level::bytes_of(&token.text).unwrap_or_else(|| token.text.clone().into_bytes())
            }
            (TokenKind::Normal, Model::SentencePiece(_)) => {
                token.text.replace(BLANK, " ").into_bytes()
            }
            (TokenKind::Byte(byte), _) => vec![byte],
            (TokenKind::UserDefined, _) => token.text.clone().into_bytes(),
            (TokenKind::Control | TokenKind::Unused, _) => Vec::new(),
        }
    }

    /// The vocabulary's own spelling of a token (`<|im_end|>`, `Ġthe`), for listings. Empty for an id that
    /// the vocabulary does not have.
    pub fn piece(&self, id: u32) -> &str {
        (self.tokens.get(id as usize)).map_or("", |token| &token.text)
    }

    /// The tokens that end generation, in ascending order.
    pub fn end_of_generation(&self) -> &[u32] {
        &self.end_of_generation
    }

    /// Whether generation ends with this token.
    pub fn is_end_of_generation(&self, id: u32) -> bool {
        self.end_of_generation.contains(&id)
    }

    /// The file's beginning-of-sequence token.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The tokens that the file says are never to be generated.
    pub fn suppressed(&self) -> &[u32] {
        &self.suppressed
    }

    /// The tokens that a chat template knows, by the names of its variables: `bos_token` and others.
    pub(super) fn variables(&self) -> &[(&'static str, u32)] {
        &self.variables
    }

    /// The tokens that mark up a prompt.
    pub(super) fn control_tokens(&self) -> &SpecialTokens {
        &self.control
    }
}

fn read_texts(gguf: &Gguf) -> Result<Vec<&str>> {
    const KEY: &str = "tokenizer.ggml.tokens";
    let texts = array(gguf, KEY)?;
    ensure!(
        u32::try_from(texts.len()).is_ok(),
        "{KEY} has {} entries, more than 32-bit ids can number",
        texts.len()
    );
    let texts = texts.iter().enumerate().map(|(id, text)| {
        text.as_str()
            .with_context(|| format!("{KEY}: entry {id} is {text}, not a string"))
    });
    texts.collect()
}

/// The id of each text.
fn index<'a>(texts: &[&'a str]) -> Result<HashMap<&'a str, u32>> {
    let mut ids = HashMap::with_capacity(texts.len());
    for (id, text) in (0..).zip(texts) {
        match ids.entry(*text) {
            // Nothing can be spelled so, and files fill up their vocabulary with it.
            _ if text.is_empty() => {}
            Entry::Vacant(entry) => drop(entry.insert(id)),
            Entry::Occupied(first) => bail!(
                "tokenizer.ggml.tokens: entries {} and {id} are both {text:?}",
                first.get()
            ),
        }
    }
    Ok(ids)
}

/// The vocabulary with the file's types. Without any all tokens are normal.
fn read_tokens(gguf: &Gguf, texts: &[&str], model: &str) -> Result<Vec<Token>> {
    const KEY: &str = "tokenizer.ggml.token_type";
    let types = gguf.array(KEY)?;
    if let Some(types) = types {
        ensure!(
            texts.len() == types.len(),
            "tokenizer.ggml.tokens has {} entries, but {KEY} has {}",
            texts.len(),
            types.len()
        );
    } else {
        tracing::warn!(
            "{}: {KEY} is missing: all tokens count as normal text",
            gguf.name()
        );
    }
    let tokens = texts.iter().enumerate().map(|(id, &text)| {
        let mut kind = TokenKind::Normal;
        if let Some(types) = types {
            kind = TokenKind::from_ggml(types[id].as_u64())
                .with_context(|| format!("{KEY}: entry {id} is {}; known are 0 to 6", types[id]))?;
        }
        if model != "gpt2"
            && kind == TokenKind::Normal
            && let Some(byte) = sentence_piece::byte_of(text)
        {
            kind = TokenKind::Byte(byte);
        }
        let text = text.to_owned();
        Ok(Token { text, kind })
    });
    tokens.collect()
}

/// The merges as ids: left, right, and what they become.
fn read_merges(gguf: &Gguf, ids: &HashMap<&str, u32>) -> Result<Vec<[u32; 3]>> {
    const KEY: &str = "tokenizer.ggml.merges";
    let merges = array(gguf, KEY)?.iter().enumerate();
    let merges = merges.map(|(rank, merge)| {
        // A token may be a blank, but none is empty.
        let text = merge.as_str().unwrap_or_default();
        let (first, rest) = text.split_at(text.chars().next().map_or(0, char::len_utf8));
        let (left, right) = rest
            .find(' ')
            .map(|at| (&text[..first.len() + at], &rest[at + 1..]))
            .with_context(|| {
                format!("{KEY}: entry {rank} is {merge}, not two tokens and a space")
            })?;
        let id = |text: &str| {
            ids.get(text).copied().with_context(|| {
                format!("{KEY}: entry {rank} is {merge}, but the vocabulary has no token {text}")
            })
        };
        Ok([id(left)?, id(right)?, id(&format!("{left}{right}"))?])
    });
    merges.collect()
}

/// The merges that ordinary text may take, ranked.
fn rank(merges: &[[u32; 3]], tokens: &[Token]) -> Merges {
    let is_text = |&id: &u32| tokens[id as usize].kind.is_text();
    (0..)
        .zip(merges)
        .filter(|(_, merge)| merge.iter().all(is_text))
        .map(|(rank, &[left, right, id])| ((left, right), Merge { rank, id }))
        .collect()
}

fn read_pre(gguf: &Gguf) -> Result<PreTokenizer> {
    const KEY: &str = "tokenizer.ggml.pre";
    let name = gguf.str(KEY)?.unwrap_or_else(|| {
        tracing::warn!(
            "{}: {KEY} is missing: text is cut as \"default\" does, which may not be what the model was trained on",
            gguf.name()
        );
        "default"
    });
    PreTokenizer::from_name(name)
}

/// By id, how many distinct scores are higher than the token's.
fn read_ranks(gguf: &Gguf, vocab_size: usize) -> Result<Vec<u32>> {
    const KEY: &str = "tokenizer.ggml.scores";
    let scores = array(gguf, KEY)?;
    ensure!(
        scores.len() == vocab_size,
        "tokenizer.ggml.tokens has {vocab_size} entries, but {KEY} has {}",
        scores.len()
    );
    let scores = scores.iter().enumerate().map(|(id, score)| {
        score
            .as_f64()
            .with_context(|| format!("{KEY}: entry {id} is {score}, not a finite number"))
    });
    let scores = scores.collect::<Result<Vec<f64>>>()?;
    let mut distinct = scores.clone();
    distinct.sort_by(|a, b| b.total_cmp(a));
    distinct.dedup();
    let rank = |score: &f64| distinct.partition_point(|other| other > score) as u32;
    Ok(scores.iter().map(rank).collect())
}

fn array<'a>(gguf: &'a Gguf, key: &str) -> Result<&'a [Value]> {
    (gguf.array(key)?).with_context(|| format!("{key} is missing"))
}
