//! How byte-level BPE cuts text into words before merging: the regular expressions behind `tokenizer.ggml.pre`.
//!
//! A name's expressions are those in the `tokenizer.json` of the models behind it; which names mean the same is
//! llama.cpp's reading of them. Most expressions end in `\s+(?!\S)|\s+`: a run of blanks leaves its last one to the word
//! behind it. That look-ahead is done by hand here ([`Split`]), as an expression without it takes linear time.

use std::borrow::Cow;

use anyhow::{Context, Result, bail};
use regex::Regex;
use unicode_normalization_alignments::{UnicodeNormalization, is_nfc};

/// The pre-tokenizer that a file names.
pub struct PreTokenizer {
    /// Each cuts what the one before it left whole.
    splits: Vec<Split>,
    /// Whether text is brought into Unicode's normal form C first.
    nfc: bool,
    /// Whether a word that is a token is taken whole, whatever the merges say.
    pub takes_words: bool,
    /// Whether a prompt starts with the beginning-of-sequence token where `tokenizer.ggml.add_bos_token` is missing.
    pub adds_bos: bool,
}

const CONTRACTION: &str = "(?i:'s|'t|'re|'ve|'m|'ll|'d)";
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+";
const LETTERS: &str = r"[^\r\n\p{L}\p{N}]?\p{L}+";
const OTHERS: &str = r" ?[^\s\p{L}\p{N}]+[\r\n]*";
const BLOOM: &str = r" ?[^(\s|.,!?…。，、।۔،)]+";
const DEEPSEEK_V3: &str = concat!(
    r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+"
);
const SPARK: &str = concat!(
    r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
    r"| ?[\p{P}\p{S}]+|[\r\n]|\s+"
);
const HAN_AND_KANA: &str = r"[\u{4e00}-\u{9fa5}\u{3040}-\u{30ff}]+";
/// Hangul, the punctuation of Chinese, Bopomofo, Han and kana.
const YOUTU: &str = concat!(
    r"[\u{ac00}-\u{d7a3}\u{3131}-\u{318e}]+",
    r"|[\u{ff01}\u{2026}\u{201c}\u{201d}\u{2018}\u{2019}\u{2014}\u{ff1a}\u{ff1b}\u{ff0c}\u{3001}-\u{303f}\u{fe30}-\u{fe4f}]+",
    r"|[\u{3105}-\u{312f}]+|[\u{4e00}-\u{9fa5}\u{3040}-\u{30ff}]+"
);
/// Letters that have a case, without those that DeepSeek LLM's own list of them leaves out.
const DEEPSEEK_LLM_LETTERS: &str = concat!(
    r"\s?[[\p{Lu}\p{Ll}\p{Lt}]--[\u{560}-\u{588}\u{10c7}-\u{10ff}\u{1c80}-\u{1c88}\u{2d00}-\u{2d2d}\u{a78f}-\u{ab6f}",
    r"\u{10570}-\u{105bc}\u{16e40}-\u{16e7f}\u{1d400}-\u{1d7cb}\u{1df00}-\u{1df1e}]]+"
);
const DEEPSEEK_PUNCTUATION: &str =
    r"\s?[!-/:-~\u{ff01}-\u{ff0f}\u{ff1a}-\u{ff5e}\u{2018}-\u{201f}\u{3000}-\u{3002}]+";
const DEEPSEEK_CJK: &str = r"[\u{4e00}-\u{9fa5}\u{800}-\u{4e00}\u{ac00}-\u{d7ff}]+";

impl PreTokenizer {
    /// The pre-tokenizer called `name`.
    ///
    /// # Errors
    ///
    /// The name is not known.
    pub fn from_name(name: &str) -> Result<Self> {
        match name {
            "qwen2" | "deepseek-r1-qwen" | "kormo" | "f2llmv2" | "megrez" => {
                Self::new(&[&llama3(r"\p{N}")])?.nfc()
            }
            "qwen35" => Self::new(&[&words(
                r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",
                r"\p{N}",
                r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
            )])?
            .nfc(),
            "stablelm2" | "hunyuan" | "solar-open" | "grok-2" | "bailingmoe" | "bailingmoe2"
            | "llada-moe" => Self::new(&[&llama3(r"\p{N}")]),
            "ufakzeka" => Self::new(&[&llama3(r"\p{N}")[CONTRACTION.len() + 1..]]),
            "laguna" => Self::new(&[r"\n+", &llama3(r"\p{N}")]),
            "seed-coder" => Self::new(&[&words(LETTERS, r"\p{N}", r" ?[^\s\p{L}\p{N}]+")]),
            "exaone-moe" => Self::new(&[&words(
                r"[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+",
                r"\p{N}",
                r" ?[^\s\p{L}\p{N}]+[\r\n/]?",
            )]),
            "minicpm5" => Self::new(&[r"\p{N}{1,3}", &llama3(r"\p{N}+")])?.takes_words(),
            "llama-bpe" | "llama3" | "llama-v3" | "falcon3" | "falcon-h1" | "pixtral"
            | "midm-2.0" | "lfm2" | "jina-v5-nano" => Self::new(&[&llama3(r"\p{N}{1,3}")])?
                .takes_words()?
                .adds_bos(),
            "glm4" | "glm5" => Self::new(&[&llama3(r"\p{N}{1,3}")])?.takes_words(),
            "dbrx" | "smaug-bpe" | "chatglm-bpe" => Self::new(&[&llama3(r"\p{N}{1,3}")]),
            "tekken" => Self::new(&[&by_case("", r"\p{N}")])?
                .takes_words()?
                .adds_bos(),
            "youtu" => {
                Self::new(&[YOUTU, &by_case(&format!("{CONTRACTION}?"), r"\p{N}")])?.takes_words()
            }
            "gpt-4o" | "llama4" | "kanana2" | "talkie" | "minimax-m2" => {
                Self::new(&[&by_case(&format!("{CONTRACTION}?"), r"\p{N}{1,3}")])
            }
            "gpt-2" | "phi-2" | "jina-es" | "jina-de" | "jina-v2-es" | "jina-v2-de"
            | "gigachat" | "a.x-4.0" | "mellum" | "modern-bert" | "exaone4" | "jais"
            | "trillion" | "granite-docling" => Self::new(&[GPT2]),
            "mpt" | "olmo" => Self::new(&[GPT2])?.nfc(),
            "smollm" | "starcoder" | "refact" | "codeshell" | "exaone" | "minerva-7b"
            | "mellum2" => Self::new(&[r"\p{N}", GPT2]),
            "command-r" => Self::new(&[r"\p{N}", GPT2])?.nfc(),
            "default" => Self::new(&[r"[\p{P}$+<=>^~|]+", GPT2, r"\p{N}+", "[0-9]{3}"]),
            "falcon" => Self::new(&[r"[\p{P}$+<=>^~|`]+", GPT2, r"\p{N}+", "[0-9]{3}"]),
            "deepseek-llm" => Self::new(&[
                r"[\r\n]",
                DEEPSEEK_LLM_LETTERS,
                DEEPSEEK_PUNCTUATION,
                r"\s+$",
                DEEPSEEK_CJK,
                r"\p{N}+",
            ]),
            "deepseek-coder" => Self::new(&[
                r"[\r\n]",
                r"\s?\p{L}+",
                r"\s?\p{P}+",
                DEEPSEEK_CJK,
                r"\p{N}",
            ]),
            "deepseek-v3" | "hunyuan-dense" | "joyai-llm" | "hy_v4" => {
                Self::new(&[r"\p{N}{1,3}", HAN_AND_KANA, DEEPSEEK_V3])
            }
            "spark2_5" => Self::new(&[r"\p{N}{1,3}", HAN_AND_KANA, SPARK, r"\p{N}"]),
            "bloom" | "poro-chat" | "gpt3-finnish" => Self::new(&[BLOOM]),
            "viking" => Self::new(&[BLOOM, r"\p{N}"]),
            _ => bail!(
                "tokenizer.ggml.pre is {name:?}, which is not supported; supported are qwen2, qwen35, llama-bpe, tekken, \
                 gpt-4o, gpt-2, smollm, command-r, falcon, deepseek-v3, default and others like them"
            ),
        }
    }

    fn new(patterns: &[&str]) -> Result<Self> {
        Ok(Self {
            splits: patterns
                .iter()
                .copied()
                .map(Split::new)
                .collect::<Result<_>>()?,
            nfc: false,
            takes_words: false,
            adds_bos: false,
        })
    }

    fn nfc(self) -> Result<Self> {
        Ok(Self { nfc: true, ..self })
    }

    fn takes_words(self) -> Result<Self> {
        Ok(Self {
            takes_words: true,
            ..self
        })
    }

    fn adds_bos(self) -> Result<Self> {
        Ok(Self {
            adds_bos: true,
            ..self
        })
    }

    /// `text` as it is to be cut.
    pub fn normalize<'t>(&self, text: &'t str) -> Cow<'t, str> {
        match self.nfc && !is_nfc(text) {
            true => text.nfc().map(|(char, _)| char).collect::<String>().into(),
            false => text.into(),
        }
    }

    /// Hands the words of `text` to `take`, in order; together they are the text.
    pub fn for_each_word(&self, text: &str, take: &mut impl FnMut(&str)) {
        cut(&self.splits, text, take);
    }
}

fn cut(splits: &[Split], text: &str, take: &mut impl FnMut(&str)) {
    match splits.split_first() {
        Some((first, rest)) => first.for_each_piece(text, &mut |piece| cut(rest, piece, take)),
        None => take(text),
    }
}

/// Llama 3's expression and Qwen's, which take digits differently.
fn llama3(digits: &str) -> String {
    words(LETTERS, digits, OTHERS)
}

fn words(letters: &str, digits: &str, others: &str) -> String {
    format!(r"{CONTRACTION}|{letters}|{digits}|{others}|\s*[\r\n]+|\s+")
}

/// Tekken's expression and GPT-4o's: a word begins at a capital letter; `ending` belongs to it.
fn by_case(ending: &str, digits: &str) -> String {
    const BEFORE: &str = r"[^\r\n\p{L}\p{N}]?";
    const UPPER: &str = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]";
    const LOWER: &str = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]";
    format!(
        r"{BEFORE}{UPPER}*{LOWER}+{ending}|{BEFORE}{UPPER}+{LOWER}*{ending}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+"
    )
}

/// One expression: its matches are pieces, and so is what lies between them.
struct Split {
    pattern: Regex,
    /// Whether `\s+` at the pattern's end stands for `\s+(?!\S)|\s+`.
    leaves_blank: bool,
    /// Whether an alternative before that one takes all blanks up to a line's end.
    takes_line_ends: bool,
}

impl Split {
    fn new(pattern: &str) -> Result<Self> {
        Ok(Self {
            pattern: Regex::new(pattern).context("compiling the pre-tokenizer")?,
            leaves_blank: pattern.ends_with(r"|\s+"),
            takes_line_ends: pattern.contains(r"|\s*[\r\n]+|"),
        })
    }

    fn for_each_piece(&self, text: &str, take: &mut impl FnMut(&str)) {
        let mut done = 0;
        while let Some(found) = self.pattern.find_at(text, done) {
            let end =
                found.end() - self.blank_left(&text[found.range()], found.end() == text.len());
            for piece in [&text[done..found.start()], &text[found.start()..end]] {
                if !piece.is_empty() {
                    take(piece);
                }
            }
            done = end;
        }
        if done < text.len() {
            take(&text[done..]);
        }
    }

    /// Bytes at the end of a match that belong to what follows: the last of several blanks, unless nothing does.
    fn blank_left(&self, found: &str, at_end: bool) -> usize {
        let mut from_behind = found.chars().rev();
        match (from_behind.next(), from_behind.next()) {
            (Some(last), Some(_)) if self.leaves_blank && !at_end && last.is_whitespace() => {
                // Only `\s+` ends in a blank, but where another alternative takes line ends, those are none of its own.
                let by_line_end = self.takes_line_ends && matches!(last, '\r' | '\n');
                if by_line_end { 0 } else { last.len_utf8() }
            }
            _ => 0,
        }
    }
}
