//! Texts that must match a JSON schema, a regular expression or a grammar: which tokens may come next, by llguidance.

use std::{fmt, sync::Arc};

use anyhow::{Context, Error, Result, anyhow, bail, ensure};
use llguidance::{
    Matcher, ParserFactory,
    api::{GrammarInit, ParserLimits, TopLevelGrammar},
    earley::SlicedBiasComputer,
    toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie, TokenId},
};
use serde_json::Value;

use super::{
    json_schema::{self, Numbers},
    reasoning,
};
use crate::model::Tokenizer;

/// What a text must match, compiled without a vocabulary.
#[derive(Clone)]
pub struct Grammar {
    /// What a text that matches is, for messages.
    pub name: &'static str,
    compiled: GrammarInit,
    /// Whether numbers are kept to what every reader of JSON takes.
    is_json: bool,
}

impl Grammar {
    /// JSON documents that `schema` allows: on one line, with at most one blank behind a comma or a colon.
    ///
    /// # Errors
    /// A schema that is none, that no document satisfies, or that holds something which cannot be enforced exactly; it is
    /// named, with its place in the schema.
    pub fn json_schema(schema: &Value) -> Result<Self> {
        let schema = json_schema::prepare(schema)?;
        Ok(Self {
            name: "a JSON document of the schema",
            compiled: compile(TopLevelGrammar::from_json_schema(schema))?,
            is_json: true,
        })
    }

    /// Texts that the expression matches from their beginning to their end. The syntax is that of the crate `regex`.
    ///
    /// # Errors
    /// An expression that is none, or one with something beyond regular languages, such as look-ahead.
    pub fn regex(expression: &str) -> Result<Self> {
        // Its messages do not speak of the grammar that llguidance makes of an expression.
        if let Err(error @ regex::Error::Syntax(_)) = regex::Regex::new(expression) {
            return Err(readable(error.into()));
        }
        Ok(Self {
            name: "what the regular expression matches",
            compiled: compile(TopLevelGrammar::from_regex(expression)).map_err(without_place)?,
            is_json: false,
        })
    }

    /// Texts that the rule `start` of a grammar in Lark's syntax, as llguidance has it, derives.
    ///
    /// # Errors
    /// A grammar that is none, and one that speaks of tokens rather than of text.
    pub fn lark(grammar: &str) -> Result<Self> {
        ensure!(
            !grammar.contains("%json"),
            "%json is not supported within a grammar: a JSON schema alone can be enforced exactly"
        );
        ensure!(
            !grammar.contains("allow_invalid_utf8"),
            "allow_invalid_utf8 is not supported within a grammar: an answer is text"
        );
        let sets_temperature = regex::Regex::new(r"(?m)^\s*[?!]?\w+\s*\[[^\]]*\btemperature\s*=")?;
        ensure!(
            !sets_temperature.is_match(grammar),
            "temperature= is not supported within a grammar: --temp is for the whole answer"
        );
        Ok(Self {
            name: "a text of the grammar",
            compiled: compile(TopLevelGrammar::from_lark(grammar.to_owned()))?,
            is_json: false,
        })
    }
}

/// Compiles a grammar, and tries whether a parser can be made of it, with bytes for a vocabulary.
fn compile(grammar: TopLevelGrammar) -> Result<GrammarInit> {
    let bytes = ApproximateTokEnv::single_byte_env();
    let init = GrammarInit::Serialized(grammar);
    let (grammar, spec) = init
        .to_internal(Some(bytes.clone()), limits())
        .map_err(readable)?;
    ensure!(
        spec.special_token_rx.is_none(),
        "tokens, such as <|im_end|> or <[5]>, are not supported within a grammar: it describes the text alone"
    );
    ensure!(
        !spec.has_stop,
        "stop= is not supported within a grammar: suffix= is"
    );
    if let Some(warning) = spec.render_warnings().first() {
        bail!("{warning}");
    }
    let init = GrammarInit::Internal(grammar, spec);
    let parser = parsers(bytes, &[])?.create_parser_from_init_default(init.clone());
    let mut matcher = Matcher::new(Ok(parser.map_err(readable)?));
    matcher.compute_mask_or_eos().map_err(readable)?;
    Ok(init)
}

/// What makes parsers that choose among the tokens of `vocabulary`. `slices`: kinds of text that many tokens consist of.
fn parsers(vocabulary: TokEnv, slices: &[String]) -> Result<ParserFactory> {
    let mut factory = ParserFactory::new(&vocabulary, InferenceCapabilities::default(), slices)?;
    *factory.limits_mut() = limits();
    factory.quiet();
    Ok(factory)
}

fn limits() -> ParserLimits {
    ParserLimits {
        verbose_errors: false,
        ..ParserLimits::default()
    }
}

/// llguidance's message without what is for its developers.
fn readable(error: Error) -> Error {
    // The crate `regex` has a line of its own that begins as an error does.
    let mut message = format!("{error:#}")
        .replace("\nerror: ", "\n")
        .replace("NoExtensionBias", "nothing can come next");
    // It lists the tokens of a vocabulary that is none.
    if let Some(list) = message.find("; following special tokens are available") {
        message.truncate(list);
    }
    let ends = ["\n<", ":  (And", ":  (SearchRegex"];
    let end = ends.iter().filter_map(|end| message.find(end)).min();
    anyhow!("{}", message[..end.unwrap_or(message.len())].trim_end())
}

/// The message of an expression, without its place in the grammar that llguidance made of it.
fn without_place(error: Error) -> Error {
    let message = error.to_string();
    let first = message.lines().next().unwrap_or_default();
    let (_, what) = first.split_once("): ").unwrap_or(("", first));
    anyhow!("{what}")
}

/// A grammar over the tokens of a model.
#[derive(Clone)]
pub struct Constraint {
    /// At the beginning of a text.
    beginning: Arc<Guide>,
    /// The tokens that open reasoning, which may come before it.
    reasoning: Arc<[u32]>,
}

impl Constraint {
    /// # Errors
    /// A vocabulary without an end, one too large, and a grammar too large for it.
    pub fn new(grammar: &Grammar, tokenizer: &Tokenizer) -> Result<Self> {
        let vocabulary: TokEnv = Arc::new(ApproximateTokEnv::new(token_trie(tokenizer)?));
        // Those of white space cost more at the start than they save: little of it is allowed.
        let slices = SlicedBiasComputer::json_slices().split_off(1);
        let factory = parsers(vocabulary.clone(), &slices)?;
        let parser = factory.create_parser_from_init_default(grammar.compiled.clone());
        let beginning = Guide {
            matcher: Matcher::new(Ok(parser.map_err(readable)?)),
            vocabulary,
            text: Vec::new(),
            numbers: grammar.is_json.then(Numbers::default),
        };
        Ok(Self {
            beginning: Arc::new(beginning),
            reasoning: reasoning::openings(tokenizer).into(),
        })
    }

    /// The tokens of the vocabulary that open reasoning.
    pub(super) fn reasoning(&self) -> &[u32] {
        &self.reasoning
    }

    /// Begins a text.
    pub fn begin(&self) -> Guide {
        Guide::clone(&self.beginning)
    }
}

impl fmt::Debug for Constraint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Constraint").finish_non_exhaustive()
    }
}

/// The bytes of all tokens. Those that stand for no text are not in it, nor those that no text can have: of bytes that
/// llguidance keeps for itself, or very long.
fn token_trie(tokenizer: &Tokenizer) -> Result<TokTrie> {
    /// Of a token, and of a vocabulary: what `TokTrie` can count.
    const MOST_BYTES: usize = 1 << 10;
    const MOST_BYTES_TOGETHER: usize = 1 << 22;
    let ends = tokenizer.end_of_generation();
    let end = *ends.first().context(
        "the model's vocabulary has no token that ends an answer, so that none can be enforced",
    )?;
    let bytes: Vec<Vec<u8>> = (0..tokenizer.vocab_size() as TokenId)
        .map(|id| match tokenizer.token_bytes(id) {
            bytes if bytes.contains(&TokTrie::SPECIAL_TOKEN_MARKER) => Vec::new(),
            bytes if bytes.len() >= MOST_BYTES || ends.contains(&id) => Vec::new(),
            bytes => bytes,
        })
        .collect();
    let together: usize = bytes.iter().map(Vec::len).sum();
    ensure!(
        together < MOST_BYTES_TOGETHER,
        "the model's vocabulary of {together} bytes is too large for constraints"
    );
    let info = TokRxInfo::new(bytes.len() as u32, end);
    Ok(TokTrie::from(&info, &bytes).with_eos_tokens(ends))
}

/// Follows one text token by token and says what may come next.
#[derive(Clone)]
pub struct Guide {
    matcher: Matcher,
    vocabulary: TokEnv,
    /// The answer so far.
    text: Vec<u8>,
    /// Of a JSON document.
    numbers: Option<Numbers>,
}

impl Guide {
    /// Which tokens may come next, those that end an answer included: bit `i % 32` of word `i / 32` for token `i`, and none
    /// beyond the last word. It depends on the tokens so far alone, so that it can be computed beside the logits.
    ///
    /// # Errors
    /// A grammar that took too long, and a vocabulary that cannot spell what must come.
    pub fn allowed(&mut self) -> Result<Vec<u32>> {
        let mask = self.matcher.compute_mask_or_eos();
        let mut mask = mask
            .map_err(readable)
            .context("finding the tokens that may come next")?;
        if let Some(numbers) = &self.numbers {
            numbers.restrict(&mut mask, self.vocabulary.tok_trie());
        }
        Ok(mask.as_slice().to_vec())
    }

    /// Goes on with `token`, one of those allowed, which does not end the answer.
    ///
    /// # Errors
    /// A token that is not allowed, and a grammar that took too long.
    pub fn accept(&mut self, token: u32) -> Result<()> {
        let bytes = self.vocabulary.tok_trie().token(token);
        self.text.extend_from_slice(bytes);
        if let Some(numbers) = &mut self.numbers {
            numbers.push(bytes);
        }
        self.matcher
            .consume_token(token)
            .map_err(|error| readable(error).context("following the grammar"))
    }

    /// Whether the text matches as it is. What Lark's `~` comes to need be no text.
    pub fn matches(&mut self) -> bool {
        self.matcher.is_accepting().unwrap_or(false) && str::from_utf8(&self.text).is_ok()
    }

    /// Whether the text matches and nothing can follow.
    pub fn is_over(&self) -> bool {
        self.matcher.is_stopped()
    }
}
