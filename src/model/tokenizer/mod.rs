//! Text to token ids and back: byte-level BPE built from a file's own vocabulary and merges.
//!
//! The merging itself is the `tokenizers` crate's. This module checks what the file says, picks the
//! pre-tokenizer that it names, and cuts out special tokens before any text reaches the BPE, whose own
//! vocabulary holds no control token: text that is not to become a control token cannot.

use std::collections::BTreeSet;

use aho_corasick::{AhoCorasick, MatchKind};
use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::Value;
use tokenizers::{
    PreTokenizerWrapper, SplitDelimiterBehavior,
    models::bpe::{BPE, Vocab},
    normalizers::unicode::NFC,
    pre_tokenizers::{
        byte_level::ByteLevel,
        digits::Digits,
        sequence::Sequence,
        split::{Split, SplitPattern},
    },
};

use super::{chat_template::Prompt, gguf::Gguf};

/// Texts of control tokens that end a turn or a document, whether or not a metadata key names them:
/// llama.cpp's list, as far as byte-level BPE vocabularies have them.
const END_OF_GENERATION: [&str; 14] = [
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<EOT>",
    "[EOS]",
    "<eos>",
    "</s>",
];

/// A model's tokenizer.
pub struct Tokenizer {
    bpe: tokenizers::Tokenizer,
    /// The vocabulary: a token's id is its index.
    tokens: Vec<Token>,
    /// Everything that is cut out of a raw prompt: `control` and `user_defined` together.
    special: SpecialTokens,
    control: SpecialTokens,
    user_defined: SpecialTokens,
    bos: Option<u32>,
    eos: Option<u32>,
    /// Whether a prompt starts with `bos`.
    add_bos: bool,
    end_of_generation: Vec<u32>,
}

/// An entry of the vocabulary.
struct Token {
    text: String,
    kind: TokenKind,
}

/// `tokenizer.ggml.token_type` of the GGUF specification.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TokenKind {
    /// 1 and, for what it says of byte-level BPE, 6: written in the byte-level alphabet.
    Normal,
    /// 2 and 3: marks up a prompt and stands for no text.
    Control,
    /// 4: plain text that is one token wherever it occurs.
    UserDefined,
    /// 5: fills up the vocabulary.
    Unused,
}

impl TokenKind {
    fn from_ggml(token_type: Option<u64>) -> Option<Self> {
        match token_type? {
            1 | 6 => Some(Self::Normal),
            2 | 3 => Some(Self::Control),
            4 => Some(Self::UserDefined),
            5 => Some(Self::Unused),
            _ => None,
        }
    }
}

/// How text is cut into words before merging.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PreTokenizer {
    Qwen2,
    Smollm,
    LlamaBpe,
    Gpt2,
}

impl PreTokenizer {
    const SUPPORTED: &str = "qwen2, smollm, llama-bpe and gpt-2";

    fn from_name(name: &str) -> Option<Self> {
        match name {
            "qwen2" => Some(Self::Qwen2),
            "smollm" => Some(Self::Smollm),
            "llama-bpe" => Some(Self::LlamaBpe),
            "gpt-2" => Some(Self::Gpt2),
            _ => None,
        }
    }

    /// The stages that the `tokenizer.json` of the models behind the name lists. Each ends in the
    /// byte-level alphabet; `ByteLevel` with its own pattern is GPT-2's split.
    fn stages(self) -> Result<Vec<PreTokenizerWrapper>> {
        let alphabet = ByteLevel::new(false, false, false);
        let gpt2 = ByteLevel::new(false, false, true);
        Ok(match self {
            // Qwen takes digits one by one, Llama 3 in groups of up to three.
            Self::Qwen2 => vec![split(r"\p{N}")?.into(), alphabet.into()],
            Self::LlamaBpe => vec![split(r"\p{N}{1,3}")?.into(), alphabet.into()],
            Self::Smollm => vec![Digits::new(true).into(), gpt2.into()],
            Self::Gpt2 => vec![gpt2.into()],
        })
    }
}

/// The split that Llama 3 and Qwen 2 share but for how they take `digits`.
fn split(digits: &str) -> Result<Split> {
    let pattern = [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        digits,
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
    .join("|");
    let pattern = SplitPattern::Regex(pattern);
    Split::new(pattern, SplitDelimiterBehavior::Isolated, false).map_err(|e| anyhow!(e))
}

impl Tokenizer {
    /// Builds the tokenizer that the file describes.
    ///
    /// # Errors
    ///
    /// Names the key under which the file has nothing, something of no meaning, or something that sharpi
    /// does not support.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self> {
        Self::read(gguf).with_context(|| format!("{}: reading the tokenizer", gguf.name()))
    }

    fn read(gguf: &Gguf) -> Result<Self> {
        let model = gguf.str("tokenizer.ggml.model")?;
        let model = model.context("tokenizer.ggml.model is missing: the file has no tokenizer")?;
        ensure!(
            model == "gpt2",
            "tokenizer.ggml.model is {model:?}; supported is \"gpt2\" (byte-level BPE)"
        );
        let supported = PreTokenizer::SUPPORTED;
        let pre = gguf.str("tokenizer.ggml.pre")?.with_context(|| {
            format!(
                "tokenizer.ggml.pre is missing; supported are {supported}. Convert the model anew with a recent llama.cpp"
            )
        })?;
        let pre = PreTokenizer::from_name(pre)
            .with_context(|| format!("tokenizer.ggml.pre is {pre:?}; supported are {supported}"))?;

        let tokens = read_tokens(gguf)?;
        let bpe = build_bpe(&tokens, array(gguf, "tokenizer.ggml.merges")?, pre)?;

        let token_id = |key: &str| -> Result<Option<u32>> {
            let Some(id) = gguf.u64(key)? else {
                return Ok(None);
            };
            ensure!(
                id < tokens.len() as u64,
                "{key} is {id}, but the vocabulary has {} tokens",
                tokens.len()
            );
            Ok(Some(id as u32))
        };
        let bos = token_id("tokenizer.ggml.bos_token_id")?;
        let eos = token_id("tokenizer.ggml.eos_token_id")?;
        // llama.cpp's defaults.
        let add_bos = gguf.bool("tokenizer.ggml.add_bos_token")?;
        ensure!(
            add_bos != Some(true) || bos.is_some(),
            "tokenizer.ggml.add_bos_token is true, but tokenizer.ggml.bos_token_id is missing"
        );
        let add_bos = add_bos.unwrap_or(pre == PreTokenizer::LlamaBpe);

        let mut end_of_generation: BTreeSet<u32> = ids(&tokens, |token| {
            token.kind == TokenKind::Control && END_OF_GENERATION.contains(&token.text.as_str())
        })
        .collect();
        end_of_generation.extend(eos);
        end_of_generation.extend(token_id("tokenizer.ggml.eot_token_id")?);
        end_of_generation.extend(token_id("tokenizer.ggml.eom_token_id")?);

        let is_control = |token: &Token| token.kind == TokenKind::Control;
        let is_user_defined = |token: &Token| token.kind == TokenKind::UserDefined;
        Ok(Self {
            bpe,
            special: SpecialTokens::new(&tokens, |t| is_control(t) || is_user_defined(t))?,
            control: SpecialTokens::new(&tokens, is_control)?,
            user_defined: SpecialTokens::new(&tokens, is_user_defined)?,
            tokens,
            bos,
            eos,
            add_bos,
            end_of_generation: end_of_generation.into_iter().collect(),
        })
    }

    /// Tokens in the vocabulary, special ones included.
    pub fn vocab_size(&self) -> usize {
        self.tokens.len()
    }

    /// The ids of `prompt`: special-token text outside message content becomes its id. Adds the file's
    /// beginning-of-sequence token where the file asks for one and the text does not start with it.
    ///
    /// Bytes that the vocabulary has no token for are left out, as Hugging Face tokenizers leaves them out.
    pub fn encode(&self, prompt: &Prompt) -> Result<Vec<u32>> {
        let text = prompt.text();
        let mut ids = Vec::with_capacity(text.len() / 3);
        match prompt.control_tokens() {
            None => self.encode_text(text, &self.special, &mut ids)?,
            Some(control_tokens) => {
                let mut done = 0;
                for token in control_tokens {
                    let before = &text[done..token.range.start];
                    self.encode_text(before, &self.user_defined, &mut ids)?;
                    ids.push(token.id);
                    done = token.range.end;
                }
                self.encode_text(&text[done..], &self.user_defined, &mut ids)?;
            }
        }
        if let Some(bos) = self.bos.filter(|_| self.add_bos)
            && ids.first() != Some(&bos)
        {
            ids.insert(0, bos);
        }
        Ok(ids)
    }

    /// Appends the ids of `text`, in which those of `special` are tokens and all else is merged from bytes.
    fn encode_text(&self, text: &str, special: &SpecialTokens, ids: &mut Vec<u32>) -> Result<()> {
        let mut done = 0;
        for (range, id) in special.find_iter(text) {
            self.merge_bytes(&text[done..range.start], ids)?;
            ids.push(id);
            done = range.end;
        }
        self.merge_bytes(&text[done..], ids)
    }

    fn merge_bytes(&self, text: &str, ids: &mut Vec<u32>) -> Result<()> {
        if !text.is_empty() {
            let encoding = self.bpe.encode_fast(text, false);
            let encoding = encoding.map_err(|e| anyhow!(e).context("tokenizing the prompt"))?;
            ids.extend(encoding.get_ids());
        }
        Ok(())
    }

    /// The bytes that a token stands for: part of a character, maybe. Empty for a control token.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        let Some(token) = self.tokens.get(id as usize) else {
            return Vec::new();
        };
        match token.kind {
            // A token outside the byte-level alphabet stands for itself, as in Hugging Face tokenizers.
            TokenKind::Normal => (token.text.chars().map(byte_of).collect::<Option<_>>())
                .unwrap_or_else(|| token.text.clone().into_bytes()),
            TokenKind::UserDefined => token.text.clone().into_bytes(),
            TokenKind::Control | TokenKind::Unused => Vec::new(),
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

    /// The file's end-of-sequence token.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// The tokens that mark up a prompt.
    pub(super) fn control_tokens(&self) -> &SpecialTokens {
        &self.control
    }
}

/// Finds the texts of some tokens.
#[derive(Clone)]
pub(super) struct SpecialTokens {
    texts: AhoCorasick,
    /// By number of the text in `texts`.
    ids: Vec<u32>,
}

impl SpecialTokens {
    fn new(tokens: &[Token], wanted: impl Fn(&Token) -> bool) -> Result<Self> {
        let ids: Vec<u32> = ids(tokens, |t| !t.text.is_empty() && wanted(t)).collect();
        // Of overlapping tokens the leftmost is taken, then the longest: as in Hugging Face tokenizers.
        let texts = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(ids.iter().map(|&id| &tokens[id as usize].text))
            .context("indexing the special tokens")?;
        Ok(Self { texts, ids })
    }

    /// Where the tokens occur in `text`, and their ids.
    pub(super) fn find_iter(
        &self,
        text: &str,
    ) -> impl Iterator<Item = (std::ops::Range<usize>, u32)> {
        (self.texts.find_iter(text)).map(|found| (found.range(), self.ids[found.pattern()]))
    }
}

/// The ids of the `wanted` tokens.
fn ids(tokens: &[Token], wanted: impl Fn(&Token) -> bool) -> impl Iterator<Item = u32> {
    (0..)
        .zip(tokens)
        .filter(move |(_, token)| wanted(token))
        .map(|(id, _)| id)
}

fn read_tokens(gguf: &Gguf) -> Result<Vec<Token>> {
    let texts = array(gguf, "tokenizer.ggml.tokens")?;
    let types = array(gguf, "tokenizer.ggml.token_type")?;
    ensure!(
        texts.len() == types.len(),
        "tokenizer.ggml.tokens has {} entries, but tokenizer.ggml.token_type has {}",
        texts.len(),
        types.len()
    );
    ensure!(
        u32::try_from(texts.len()).is_ok(),
        "tokenizer.ggml.tokens has {} entries, more than 32-bit ids can number",
        texts.len()
    );
    let tokens = texts.iter().zip(types).enumerate();
    tokens
        .map(|(id, (text, token_type))| {
            let text = text.as_str().with_context(|| {
                format!("tokenizer.ggml.tokens: entry {id} is {text}, not a string")
            })?;
            let kind = TokenKind::from_ggml(token_type.as_u64()).with_context(|| {
                format!("tokenizer.ggml.token_type: entry {id} is {token_type}; known are 1 to 6")
            })?;
            Ok(Token {
                text: text.to_owned(),
                kind,
            })
        })
        .collect()
}

fn build_bpe(
    tokens: &[Token],
    merges: &[Value],
    pre: PreTokenizer,
) -> Result<tokenizers::Tokenizer> {
    let mut vocab = Vocab::with_capacity(tokens.len());
    for (id, token) in (0..).zip(tokens) {
        if let Some(first) = vocab.insert(token.text.clone(), id) {
            let text = &token.text;
            bail!("tokenizer.ggml.tokens: entries {first} and {id} are both {text:?}");
        }
    }
    vocab.retain(|_, id| {
        !matches!(
            tokens[*id as usize].kind,
            TokenKind::Control | TokenKind::Unused
        )
    });
    let longest = tokens.iter().map(|token| token.text.len()).max();
    let merges = merges
        .iter()
        .enumerate()
        .map(|(rank, merge)| {
            let (left, right) = merge
                .as_str()
                .and_then(|merge| merge.split_once(' '))
                .with_context(|| {
                    format!("tokenizer.ggml.merges: entry {rank} is {merge}, not two tokens and a space")
                })?;
            // The builder panics on such a merge; other merges into nothing are its errors.
            ensure!(
                Some(left.len() + right.len()) <= longest,
                "tokenizer.ggml.merges: entry {rank} is {merge}, but the vocabulary has no token {left}{right}"
            );
            Ok((left.to_owned(), right.to_owned()))
        })
        .collect::<Result<Vec<_>>>()?;
    let bpe = BPE::builder()
        .vocab_and_merges(vocab, merges)
        .ignore_merges(pre == PreTokenizer::LlamaBpe)
        .build()
        .map_err(|e| anyhow!(e).context("tokenizer.ggml.merges names what is no token"))?;
    let mut tokenizer = tokenizers::Tokenizer::new(bpe);
    tokenizer.with_pre_tokenizer(Some(Sequence::new(pre.stages()?)));
    if pre == PreTokenizer::Qwen2 {
        tokenizer
            .with_normalizer(Some(NFC))
            .map_err(|e| anyhow!(e))?;
    }
    Ok(tokenizer)
}

fn array<'a>(gguf: &'a Gguf, key: &str) -> Result<&'a [Value]> {
    (gguf.array(key)?).with_context(|| format!("{key} is missing"))
}

/// The byte that `char` spells in GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes
/// follow in order from U+0100.
fn byte_of(char: char) -> Option<u8> {
    let code = u32::from(char);
    let byte = match code {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => code,
        0x100..=0x120 => code - 0x100,
        0x121..=0x142 => code - 0x121 + 0x7f,
        0x143 => 0xad,
        _ => return None,
    };
    u8::try_from(byte).ok()
}
