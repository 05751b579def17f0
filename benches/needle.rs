//! What evicting and compressing tokens of a KV cache do to finding things in a long prompt:
//! `cargo bench --bench needle -- MODEL.gguf [options]` (`docs/kv-cache.md`, Finding things).
//!
//! Prints one table. A question counts as answered where the answer's tokens are what the model would choose greedily, each
//! behind those before it, on the CPU backend. Two tasks, whose right answers are known:
//!
//! * needle: in made-up prose, sentences at several depths each tell the access code of a thing. One of them is asked for,
//!   and the beginning of the sentence that answers is given.
//! * pairs: a list of made-up words and numbers. One of the words is repeated.
//!
//! Each is asked in two ways: `known`, where the question ends the prompt that is evicted, so that the tokens that choose
//! what stays know it; and `unknown`, where the text is a prompt of its own and the question comes behind its eviction. There
//! the question itself evicts nothing, so that a text is read once for all that is asked of it.

use std::{collections::HashSet, fmt::Write as _, num::NonZero, path::PathBuf, sync::Arc};

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};
use rand_chacha::{
    ChaCha12Rng,
    rand_core::{Rng, SeedableRng},
};
use sharpi::{
    backend::{Backend, Batch, KvOptions, MIN_BUDGET, Tiles, Want},
    cpu::{self, CpuBackend},
    model::{Message, Model, Prompt, TemplateOptions},
};

/// Room behind a text for a question, its answer and what a chat template adds.
const QUESTION_ROOM: usize = 128;

#[derive(Debug, Parser)]
#[command(name = "needle", about = "Finding things in a KV cache that evicts")]
struct Args {
    model: PathBuf,
    /// Tokens of a text, about
    #[arg(long, default_value_t = 1000)]
    tokens: usize,
    /// Texts of each task
    #[arg(long, default_value_t = 2)]
    texts: u64,
    /// Where in a text what is asked for stands, in percent: one question each
    #[arg(long, value_delimiter = ',', default_values_t = [10, 30, 50, 70, 90])]
    depths: Vec<usize>,
    #[arg(long, value_delimiter = ',', default_values = ["f16", "k8v8", "k4v4"])]
    kv_types: Vec<String>,
    /// Budgets: the tokens of a text divided by each of these
    #[arg(long, value_delimiter = ',', default_values_t = [2, 4, 8])]
    parts: Vec<usize>,
    #[arg(long, value_delimiter = ',', default_values = ["needle", "pairs"])]
    tasks: Vec<Task>,
    /// In the known way, which reads a text for each question, ask only the first of each so many of a text
    #[arg(long, default_value = "1")]
    known_every: NonZero<usize>,
    /// 0: one for each core
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Ask without the file's chat template
    #[arg(long)]
    raw: bool,
    /// What cargo adds
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Task {
    Needle,
    Pairs,
}

/// A prompt whose continuation is known.
struct Question {
    /// The text and the question.
    prompt: Vec<u32>,
    /// Tokens of the text, which all questions of a text share.
    text_len: usize,
    answer: Vec<u32>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let model = Model::open(&args.model)?;
    let tasks = args.tasks.iter().map(|&task| {
        let texts = (0..args.texts).map(|seed| task.questions(&model, &args, seed));
        texts.collect::<Result<Vec<_>>>()
    });
    let tasks: Vec<_> = tasks.collect::<Result<_>>()?;
    let mut header = "| cache | tokens kept |".to_owned();
    let mut rule = "|---|---|".to_owned();
    for (task, texts) in args.tasks.iter().zip(&tasks) {
        let name = task.to_possible_value().expect("no task is skipped");
        let name = name.get_name();
        let of = texts.iter().map(Vec::len).sum::<usize>();
        let len = |question: &Question| question.prompt.len();
        let lens = || texts.iter().flatten().map(len);
        let (least, most) = lens().min().zip(lens().max()).context("no questions")?;
        eprintln!("{name}: {of} questions, prompts of {least} to {most} tokens");
        write!(header, " {name}, known | {name}, unknown |")?;
        rule += "---|---|";
    }
    println!("{header}\n{rule}");
    for kv_type in &args.kv_types {
        let tiles = tiles(kv_type)?;
        let budgets = args.parts.iter().map(|part| Some(args.tokens / part));
        for budget in std::iter::once(None).chain(budgets) {
            let budget = budget.map(|budget| budget.max(MIN_BUDGET));
            let options = KvOptions { tiles, budget };
            let room = args.tokens + 2 * QUESTION_ROOM;
            let decoder = Arc::clone(&model.decoder);
            let mut backend = CpuBackend::with_options(
                decoder,
                room,
                cpu::Options {
                    kv: options,
                    ..cpu::Options::exact(args.threads)
                },
            )?;
            let kept = budget.map_or("all".to_owned(), |budget| budget.to_string());
            print!("| `{kv_type}` | {kept} |");
            for texts in &tasks {
                let mut scores = <[Score; 2]>::default();
                for questions in texts {
                    ask(&mut backend, questions, args.known_every.get(), &mut scores)?;
                }
                for Score { right, of } in scores {
                    print!(" {right} of {of} |");
                }
            }
            println!();
        }
    }
    Ok(())
}

fn tiles(kv_type: &str) -> Result<Option<Tiles>> {
    if kv_type == "f16" {
        return Ok(None);
    }
    let named = Tiles::ALL.into_iter().find(|t| t.to_string() == kv_type);
    Ok(Some(
        named.with_context(|| format!("no KV type {kv_type:?}"))?,
    ))
}

/// How many questions were answered rightly, of how many.
#[derive(Default)]
struct Score {
    right: usize,
    of: usize,
}

impl Score {
    fn add(&mut self, is_right: bool) {
        self.right += usize::from(is_right);
        self.of += 1;
    }
}

/// Asks `questions` of one text in both ways: where nothing is evicted they are one.
fn ask(
    backend: &mut dyn Backend,
    questions: &[Question],
    known_every: usize,
    [known, unknown]: &mut [Score; 2],
) -> Result<()> {
    let evicts = backend.kv_layout().budget.is_some();
    let is_known = |index: usize| index.is_multiple_of(known_every);
    let first = questions.first().context("no questions")?;
    read_prompt(backend, &first.prompt[..first.text_len])?;
    for (index, question) in questions.iter().enumerate() {
        let Question {
            prompt,
            text_len,
            answer,
        } = question;
        // Logits of a large vocabulary take long.
        let last = prompt.len() - 1;
        if last > *text_len {
            let asked = &prompt[*text_len..last];
            backend.compute(Batch::prompt(asked, *text_len, Want::Nothing))?;
        }
        let compared = [&prompt[last..], &answer[..answer.len() - 1]].concat();
        let batch = Batch::prompt(&compared, last, Want::All);
        let is_right = follows(answer, backend.compute(batch)?.logits);
        unknown.add(is_right);
        if !evicts && is_known(index) {
            known.add(is_right);
        }
    }
    for (index, question) in questions.iter().enumerate() {
        if !evicts || !is_known(index) {
            continue;
        }
        let Question { prompt, answer, .. } = question;
        let mut logits = read_prompt(backend, prompt)?.to_vec();
        let before = &answer[..answer.len() - 1];
        if !before.is_empty() {
            let batch = Batch::prompt(before, prompt.len(), Want::All);
            logits.extend(backend.compute(batch)?.logits);
        }
        known.add(follows(answer, &logits));
    }
    Ok(())
}

/// Reads a prompt as a session does, and returns the logits behind it.
fn read_prompt<'a>(backend: &'a mut dyn Backend, prompt: &[u32]) -> Result<&'a [f32]> {
    let limits = backend.limits();
    let mut position = 0;
    loop {
        let rest = &prompt[position..];
        let chunk = &rest[..limits.next_len(rest.len())];
        if chunk.len() == rest.len() {
            return Ok(backend
                .compute(Batch::end_of_prompt(chunk, position))?
                .logits);
        }
        backend.compute(Batch::prompt(chunk, position, Want::Nothing))?;
        position += chunk.len();
    }
}

/// Whether each token of `answer` has the greatest of its logits.
fn follows(answer: &[u32], logits: &[f32]) -> bool {
    let vocab_size = logits.len() / answer.len();
    let mut pairs = answer.iter().zip(logits.chunks_exact(vocab_size));
    pairs.all(|(&token, logits)| logits.iter().all(|&other| other <= logits[token as usize]))
}

impl Task {
    /// One text and what is asked of it: the same for the same seed.
    fn questions(self, model: &Model, args: &Args, seed: u64) -> Result<Vec<Question>> {
        let mut draw = Draw(ChaCha12Rng::seed_from_u64(seed));
        match self {
            Self::Needle => {
                ensure!(
                    args.depths.len() <= THINGS.len(),
                    "at most {} depths",
                    THINGS.len()
                );
                let facts: Vec<_> = draw
                    .different(THINGS, args.depths.len())
                    .into_iter()
                    .map(|thing| (thing, draw.number(10_000..100_000)))
                    .collect();
                let telling = |(thing, code): &(&str, usize)| {
                    format!("The access code of the {thing} is {code}. ")
                };
                let text = text(model, args, facts.iter().map(telling), || draw.sentence());
                let facts = facts.iter().map(|(thing, code)| {
                    let asked = format!("What is the access code of the {thing}?");
                    let beginning = format!("The access code of the {thing} is");
                    match &model.chat_template {
                        Some(template) if !args.raw => {
                            let said = format!("{text}\n\n{asked}");
                            let options = TemplateOptions {
                                enable_thinking: Some(false),
                                date: Some(jiff::civil::date(2026, 1, 1).at(0, 0, 0, 0)),
                                ..TemplateOptions::default()
                            };
                            let prompt = template.render(&[Message::new("user", said)], &options);
                            question(model, prompt?.text(), &text, &beginning, *code)
                        }
                        _ => {
                            let prompt = format!("{text}\n\nQuestion: {asked}\nAnswer: ");
                            question(model, &prompt, &text, &beginning, *code)
                        }
                    }
                });
                facts.collect()
            }
            Self::Pairs => {
                let mut words = HashSet::new();
                let mut pair = || {
                    let mut word = draw.word();
                    while !words.insert(word.clone()) {
                        word = draw.word();
                    }
                    (word, draw.number(100..1000))
                };
                let line = |(word, number): &(String, usize)| format!("{word} -> {number}\n");
                let asked: Vec<_> = args.depths.iter().map(|_| pair()).collect();
                let text = text(model, args, asked.iter().map(line), || line(&pair()));
                let asked = asked.iter().map(|(word, number)| {
                    question(model, &text, &text, &format!("{word} ->"), *number)
                });
                asked.collect()
            }
        }
    }
}

/// A text of as many tokens as are asked for, with one of `asked` at each depth and `others` around them.
fn text(
    model: &Model,
    args: &Args,
    asked: impl Iterator<Item = String>,
    mut others: impl FnMut() -> String,
) -> String {
    let tokens = |text: &str| model.tokenizer.encode(&Prompt::raw(text)).len();
    let mut depths = args.depths.clone();
    depths.sort_unstable();
    let mut asked = depths.into_iter().zip(asked).peekable();
    let (mut text, mut len) = (String::new(), 0);
    while len < args.tokens {
        let due = asked.next_if(|(depth, _)| len * 100 >= depth * args.tokens);
        let piece = due.map_or_else(&mut others, |(_, piece)| piece);
        // Counted alone, a piece may have a token of its own that begins a text, or of the blank before the next one.
        len += tokens(piece.trim_end_matches(' ')) - tokens("");
        text += &piece;
    }
    text
}

/// `prompt` and `beginning`, which `number` follows. `text` is the part of the prompt that says so.
fn question(
    model: &Model,
    prompt: &str,
    text: &str,
    beginning: &str,
    number: usize,
) -> Result<Question> {
    let encode = |text: String| model.tokenizer.encode(&Prompt::raw(text));
    let start = prompt.find(text).context("a prompt has its text")?;
    let of_text = encode(prompt[..start + text.len()].to_owned());
    let whole = encode(format!("{prompt}{beginning}"));
    let mut answer = encode(format!("{prompt}{beginning} {number}"));
    ensure!(
        answer.starts_with(&whole),
        "the answer's tokens reach into the question"
    );
    answer.drain(..whole.len());
    // Where more follows, the last tokens of the text may be others.
    let shared = whole.iter().zip(&of_text).take_while(|(a, b)| a == b);
    Ok(Question {
        text_len: shared.count(),
        prompt: whole,
        answer,
    })
}

/// Draws that are the same for the same seed.
struct Draw(ChaCha12Rng);

impl Draw {
    fn number(&mut self, range: std::ops::Range<usize>) -> usize {
        range.start + self.0.next_u32() as usize % range.len()
    }

    fn one<'a>(&mut self, of: &[&'a str]) -> &'a str {
        of[self.number(0..of.len())]
    }

    fn different<'a>(&mut self, of: &[&'a str], count: usize) -> Vec<&'a str> {
        let mut left = of.to_vec();
        (0..count)
            .map(|_| left.swap_remove(self.number(0..left.len())))
            .collect()
    }

    fn word(&mut self) -> String {
        (0..3)
            .map(|_| self.one(CONSONANTS).to_owned() + self.one(VOWELS))
            .collect()
    }

    fn sentence(&mut self) -> String {
        let [first, second] = self.different(NOUNS, 2)[..] else {
            unreachable!("there are more nouns than two");
        };
        let (which, what) = (self.one(ADJECTIVES), self.one(ADJECTIVES));
        let (does, place, time) = (self.one(VERBS), self.one(PLACES), self.one(TIMES));
        match self.number(0..4) {
            0 => format!("The {which} {first} {does} the {second} {place}. "),
            1 => format!("{time}, a {first} {does} the {what} {second}. "),
            2 => format!("{time} the {which} {first} {place} {does} a {what} {second}. "),
            _ => format!("Nobody knew why the {first} {does} a {second} {place}. "),
        }
    }
}

/// What has an access code, and is in no other sentence.
const THINGS: &[&str] = &[
    "lantern", "elevator", "archive", "boat", "kitchen", "museum", "garage", "tower", "bakery",
    "factory", "hotel", "theater",
];
const NOUNS: &[&str] = &[
    "farmer",
    "teacher",
    "horse",
    "river",
    "child",
    "painter",
    "cloud",
    "wagon",
    "neighbor",
    "singer",
    "dog",
    "carpenter",
    "letter",
    "basket",
    "doctor",
    "forest",
    "sailor",
    "stone",
    "window",
    "goat",
    "baker",
    "road",
    "student",
    "blanket",
    "fox",
    "ladder",
    "tree",
    "bird",
];
const ADJECTIVES: &[&str] = &[
    "old", "quiet", "tall", "green", "tired", "young", "heavy", "careful", "small", "bright",
    "gentle", "dusty", "proud", "lonely", "round", "cheerful",
];
const VERBS: &[&str] = &[
    "watched",
    "followed",
    "passed",
    "remembered",
    "needed",
    "greeted",
    "moved",
    "avoided",
    "liked",
    "touched",
    "found",
    "missed",
    "carried",
    "studied",
    "covered",
    "described",
];
const PLACES: &[&str] = &[
    "near the bridge",
    "behind the barn",
    "under the hill",
    "beside the lake",
    "in the market",
    "at the station",
    "across the field",
    "by the old wall",
    "above the valley",
    "outside the school",
    "on the way home",
    "along the shore",
];
const TIMES: &[&str] = &[
    "In the morning",
    "Every autumn",
    "Before the rain",
    "Late at night",
    "On Sundays",
    "After the storm",
    "Once a year",
    "During the winter",
    "Long ago",
    "At noon",
    "In the same week",
    "When the bells rang",
];
const CONSONANTS: &[&str] = &[
    "b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z",
];
const VOWELS: &[&str] = &["a", "e", "i", "o", "u"];
