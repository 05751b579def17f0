//! The generation loop: prompt in, tokens out, one at a time, until something ends it.

use std::{
    ops::ControlFlow,
    time::{Duration, Instant},
};

use anyhow::Result;

use super::{
    Constraint, Sampler, SamplingParams, Session, SessionStream, TextStream, answer::Answer,
    log_softmax_denominator,
};
use crate::{backend::StreamStart, model::Tokenizer};

/// What to generate.
#[derive(Debug, Clone)]
pub struct GenerateOptions {
    /// `None`: until the model ends, or the context is full.
    pub max_tokens: Option<usize>,
    /// Strings that end the text and are not part of it.
    pub stop: Vec<String>,
    /// Never choose an end-of-generation token.
    pub ignore_eos: bool,
    /// Report log-probabilities, and those of this many of the likeliest tokens.
    pub logprobs: Option<usize>,
    pub sampling: SamplingParams,
    /// What the answer must match.
    pub constraint: Option<Constraint>,
}

/// Why the text ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// The model chose an end-of-generation token.
    Stop,
    /// `max_tokens` were generated.
    Length,
    /// The context is full.
    ContextFull,
    /// A stop string came up.
    StopString,
    /// The observer asked for it.
    Interrupted,
}

/// A generated token.
pub struct TokenEvent<'a> {
    pub id: u32,
    /// The text that this token made certain: empty while a character is incomplete or a stop string possible.
    pub text: &'a str,
    /// Whether it is part of the model's reasoning, marks included, and not of its answer.
    pub reasoning: bool,
    /// The part of `text` that is part of the answer: what was held back where reasoning begins, or all of it, but for white
    /// space between reasoning and an answer that need not match anything.
    pub answer: &'a str,
    /// Natural logarithms of probabilities, from the raw logits.
    pub logprobs: Option<Logprobs>,
}

/// Log-softmax of the raw logits, before penalties and temperature.
pub struct Logprobs {
    /// Of the token itself.
    pub token: f32,
    /// The likeliest tokens and theirs, the likeliest first.
    pub top: Vec<(u32, f32)>,
}

/// Who watches a generation, on whichever thread computes.
pub trait Observer: Send {
    /// Whether to end as soon as possible.
    fn interrupted(&self) -> bool;

    /// `done` of the prompt's `total` tokens are read, those counted that are part of the work of a chunk.
    fn prefill_progress(&mut self, done: usize, total: usize);

    /// A token was generated. An error ends the generation.
    fn token(&mut self, event: &TokenEvent) -> Result<()>;
}

/// How long each part took.
#[derive(Debug, Clone, Copy, Default)]
pub struct Timings {
    /// From the start to the logits after the prompt.
    pub prefill: Duration,
    /// From there to the end.
    pub decode: Duration,
    /// From the start until the first token was handed to the observer.
    pub time_to_first_token: Duration,
}

/// What was generated.
#[derive(Debug)]
pub struct Generation {
    pub finish_reason: FinishReason,
    /// All tokens' text.
    pub text: String,
    /// Whether the answer matches what it must, if anything, and is not only the beginning of it.
    pub whole: bool,
    pub prompt_tokens: usize,
    /// Of these, the tokens that had to be computed: not those that the session held already, nor those after an
    /// interruption.
    pub prefilled_tokens: usize,
    /// Those that the session held.
    pub cached_tokens: usize,
    /// An end-of-generation token included.
    pub generated_tokens: usize,
    pub timings: Timings,
}

impl Generation {
    /// Tokens a second while reading the prompt.
    pub fn prefill_tokens_per_second(&self) -> f64 {
        rate(self.prefilled_tokens, self.timings.prefill)
    }

    /// Tokens a second after the first, which the prompt's logits gave.
    pub fn decode_tokens_per_second(&self) -> f64 {
        rate(self.generated_tokens.saturating_sub(1), self.timings.decode)
    }
}

fn rate(tokens: usize, time: Duration) -> f64 {
    match tokens {
        0 => 0.0,
        _ => tokens as f64 / time.as_secs_f64().max(1e-9),
    }
}

/// Reads `prompt` and generates what follows it, telling `observer` about each token.
///
/// # Errors
/// What the session and the observer meet; text handed to the observer before stays valid.
pub fn generate(
    session: &mut Session,
    tokenizer: &Tokenizer,
    prompt: &[u32],
    options: &GenerateOptions,
    observer: &mut dyn Observer,
) -> Result<Generation> {
    let start = Instant::now();
    let context_len = session.backend().limits().context_len;
    let mut generation = Generation {
        finish_reason: FinishReason::Length,
        text: String::new(),
        whole: options.constraint.is_none(),
        prompt_tokens: prompt.len(),
        prefilled_tokens: 0,
        cached_tokens: 0,
        generated_tokens: 0,
        timings: Timings::default(),
    };
    let mut first_done = None;
    let logits = session.prefill(prompt, &mut |done, total| {
        first_done.get_or_insert(done);
        observer.prefill_progress(done, total);
        go_on(observer)
    })?;
    generation.timings.prefill = start.elapsed();
    let held = first_done.unwrap_or(0);
    generation.cached_tokens = held;
    let Some(logits) = logits else {
        generation.prefilled_tokens = session.len() - held;
        generation.finish_reason = FinishReason::Interrupted;
        return Ok(generation);
    };
    generation.prefilled_tokens = prompt.len() - held;
    if options.max_tokens == Some(0) {
        return Ok(generation);
    }

    let mut banned = tokenizer.suppressed().to_vec();
    if options.ignore_eos {
        banned.extend(tokenizer.end_of_generation());
    }
    let mut sampler = Sampler::new(options.sampling.clone(), prompt, banned);
    let mut stream = TextStream::new(&options.stop);
    let mut answer = Answer::new(tokenizer, prompt, options.constraint.as_ref());
    let mut id = sampler.sample_among(logits, answer.allowed()?.as_deref())?;
    let mut logprobs = options.logprobs.map(|top| Logprobs::new(logits, id, top));
    // The last token is not computed, so a full context gives one more than it holds.
    let room = context_len + 1 - prompt.len();
    let most = options.max_tokens.map_or(room, |most| most.min(room));
    let mut in_gap = false;
    let mut unstarted = Some((session, sampler));
    let mut following = None;
    generation.finish_reason = loop {
        generation.generated_tokens += 1;
        let ended = tokenizer.is_end_of_generation(id);
        let was_reasoning = answer.is_reasoning();
        let reasoning = answer.push(id)?;
        // What was held back for a stop string belongs to where it was written: none reaches over an end of reasoning.
        let mut text = match reasoning && !was_reasoning {
            true => stream.finish(),
            false => String::new(),
        };
        let held = text.len();
        let mut stopped = false;
        if !ended {
            let (certain, met) = stream.push(&tokenizer.token_bytes(id));
            text += &certain;
            stopped = met;
        }
        if reasoning && !answer.is_reasoning() {
            text += &stream.finish();
            in_gap = !answer.is_constrained();
        }
        let finish_reason = if ended || answer.is_over() {
            Some(FinishReason::Stop)
        } else if stopped {
            Some(FinishReason::StopString)
        } else if observer.interrupted() {
            Some(FinishReason::Interrupted)
        } else if options.max_tokens == Some(generation.generated_tokens) {
            Some(FinishReason::Length)
        } else if generation.generated_tokens == room {
            Some(FinishReason::ContextFull)
        } else {
            None
        };
        if finish_reason.is_some() {
            text += &stream.finish();
        }
        let answered = match reasoning {
            true => &text[..held],
            false if in_gap => text.trim_start(),
            false => &text,
        };
        in_gap &= answered.is_empty();
        observer.token(&TokenEvent {
            id,
            text: &text,
            reasoning,
            answer: answered,
            logprobs: logprobs.take(),
        })?;
        generation.text += &text;
        if generation.generated_tokens == 1 {
            generation.timings.time_to_first_token = start.elapsed();
        }
        if let Some(finish_reason) = finish_reason {
            break finish_reason;
        }
        // Behind the first token, which does not wait for what this takes.
        if let Some((session, sampler)) = unstarted.take() {
            following = Some(Following::new(
                session,
                sampler,
                prompt,
                id,
                most - 1,
                options,
            )?);
        }
        let following = following.as_mut().expect("it was started");
        let Some(next) = following.next(id, options.logprobs, &mut answer, observer)? else {
            // What is not certain of the text yet, a piece of a character or of a stop string, goes with the token.
            break FinishReason::Interrupted;
        };
        (id, logprobs) = next;
    };
    generation.whole = answer.is_whole();
    generation.timings.decode = start.elapsed() - generation.timings.prefill;
    Ok(generation)
}

fn go_on(observer: &dyn Observer) -> ControlFlow<()> {
    match observer.interrupted() {
        true => ControlFlow::Break(()),
        false => ControlFlow::Continue(()),
    }
}

/// Who computes and chooses the tokens behind the first.
enum Following<'a> {
    OnDevice(SessionStream<'a>),
    OnHost {
        session: &'a mut Session,
        sampler: Box<Sampler>,
    },
}

impl<'a> Following<'a> {
    /// At most `most` tokens behind `prompt` and `first`. The device chooses them where it can, unless log-probabilities are
    /// to be reported, which take all logits.
    fn new(
        session: &'a mut Session,
        mut sampler: Sampler,
        prompt: &[u32],
        first: u32,
        most: usize,
        options: &GenerateOptions,
    ) -> Result<Self> {
        // A context that the prompt fills has no place to compute anything.
        let wanted = most > 0 && options.logprobs.is_none();
        if !wanted || !session.backend().chooses(&options.sampling) {
            tracing::debug!("the host chooses the tokens");
            let sampler = Box::new(sampler);
            return Ok(Self::OnHost { session, sampler });
        }
        tracing::debug!("the device chooses the tokens");
        let uniforms = sampler.take_uniforms(most);
        Ok(Self::OnDevice(session.stream(&StreamStart {
            text: &[prompt, &[first]].concat(),
            sampling: &options.sampling,
            banned: sampler.banned(),
            uniforms: &uniforms,
        })?))
    }

    /// The token behind `last`, which is computed first, and with the host its log-probabilities, if `top` asks for them.
    /// `None` where `observer` interrupts that.
    fn next(
        &mut self,
        last: u32,
        top: Option<usize>,
        answer: &mut Answer,
        observer: &mut dyn Observer,
    ) -> Result<Option<(u32, Option<Logprobs>)>> {
        match self {
            Self::OnDevice(stream) if answer.is_constrained() => {
                Ok(Some((stream.next_allowed(&mut || answer.allowed())?, None)))
            }
            Self::OnDevice(stream) => Ok(Some((stream.next_token()?, None))),
            Self::OnHost { session, sampler } => {
                let mut watch = move |_| go_on(observer);
                let Some(logits) = session.decode_watched(last, &mut watch)? else {
                    return Ok(None);
                };
                let id = sampler.sample_among(logits, answer.allowed()?.as_deref())?;
                Ok(Some((id, top.map(|top| Logprobs::new(logits, id, top)))))
            }
        }
    }
}

impl Logprobs {
    fn new(logits: &[f32], id: u32, top: usize) -> Self {
        let denominator = log_softmax_denominator(logits);
        let logprob = |id: u32| (f64::from(logits[id as usize]) - denominator) as f32;
        let top = super::sampling::likeliest(logits, top);
        Self {
            token: logprob(id),
            top: top.into_iter().map(|id| (id, logprob(id))).collect(),
        }
    }
}
