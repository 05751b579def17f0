//! What goes to standard output while text is generated: the text itself, or JSON lines (docs/json.md).

use std::{
    io::{self, Write},
    time::Duration,
};

use serde::Serialize;

use super::{args::ReasoningPlace, messages};
use crate::{
    backend::{GraphReport, StepReport},
    engine::{FinishReason, Generation, TokenEvent},
};

/// What an error of a write to standard output was doing.
pub const WRITING: &str = "writing to standard output";

/// Where a generation goes, step by step. Every call ends with a flush.
pub trait Output: Send {
    /// The prompt is about to be read.
    fn start(&mut self, start: &Start) -> io::Result<()>;

    /// A token was generated.
    fn token(&mut self, token: &TokenEvent) -> io::Result<()>;

    /// The generation is over.
    fn done(&mut self, generation: &Generation, run: &RunFacts) -> io::Result<()>;

    /// The generation failed: leaves what was written in good order.
    fn failed(&mut self) -> io::Result<()>;
}

/// What is known before the first token.
#[derive(Serialize)]
pub struct Start<'a> {
    pub model: ModelFacts<'a>,
    pub kv_cache: KvFacts,
    pub prompt_ids: &'a [u32],
}

#[derive(Serialize)]
pub struct KvFacts {
    #[serde(rename = "type")]
    pub kv_type: String,
    /// That one more token of context takes.
    pub bytes_per_token: usize,
    /// Tokens of a prompt that each head keeps, if not all.
    pub budget: Option<usize>,
}

#[derive(Serialize)]
pub struct ModelFacts<'a> {
    pub file: &'a str,
    /// `general.name`
    pub name: Option<&'a str>,
    pub architecture: &'a str,
    pub file_bytes: u64,
    /// Tokens that the model was trained to attend over.
    pub context_length: usize,
}

/// What the engine does not know about its own run.
pub struct RunFacts<'a> {
    pub seed: u64,
    pub load: Duration,
    pub backend: &'a str,
    pub device: &'a str,
    /// On CUDA.
    pub cuda_graph: Option<&'a GraphReport>,
    /// Likewise.
    pub step_kernel: Option<&'a StepReport>,
}

/// The generated text and one newline at its end; its reasoning where that is wanted.
pub struct TextOutput<W> {
    out: W,
    /// The last character written, if there is one.
    last: Option<char>,
    place: ReasoningPlace,
    /// Whether a line of reasoning on standard error has not ended.
    aside: bool,
}

impl<W: Write> TextOutput<W> {
    pub fn new(out: W, reasoning: ReasoningPlace) -> Self {
        Self {
            out,
            last: None,
            place: reasoning,
            aside: false,
        }
    }

    fn write(&mut self, text: &str) -> io::Result<()> {
        self.last = text.chars().last().or(self.last);
        self.out.write_all(text.as_bytes())?;
        self.out.flush()
    }

    /// Ends the line of reasoning on standard error.
    fn end_aside(&mut self) {
        if std::mem::take(&mut self.aside) {
            messages::reasoning("\n");
        }
    }
}

impl<W: Write + Send> Output for TextOutput<W> {
    fn start(&mut self, _start: &Start) -> io::Result<()> {
        Ok(())
    }

    fn token(&mut self, token: &TokenEvent) -> io::Result<()> {
        if self.place == ReasoningPlace::Show {
            return self.write(token.text);
        }
        if !token.reasoning {
            self.end_aside();
        }
        self.write(token.answer)?;
        if token.reasoning && self.place == ReasoningPlace::Stderr {
            self.aside = true;
            messages::reasoning(&token.text[token.answer.len()..]);
        }
        Ok(())
    }

    fn done(&mut self, _generation: &Generation, _run: &RunFacts) -> io::Result<()> {
        self.end_aside();
        if self.last != Some('\n') {
            self.out.write_all(b"\n")?;
        }
        self.out.flush()
    }

    fn failed(&mut self) -> io::Result<()> {
        self.end_aside();
        if self.last.is_some_and(|last| last != '\n') {
            self.out.write_all(b"\n")?;
        }
        self.out.flush()
    }
}

/// One JSON object a line.
pub struct JsonOutput<W> {
    out: W,
}

impl<W: Write> JsonOutput<W> {
    pub fn new(out: W) -> Self {
        Self { out }
    }

    fn write(&mut self, event: &Event) -> io::Result<()> {
        write_json_line(&mut self.out, event)
    }
}

impl<W: Write + Send> Output for JsonOutput<W> {
    fn start(&mut self, start: &Start) -> io::Result<()> {
        self.write(&Event::Start(start))
    }

    fn token(&mut self, token: &TokenEvent) -> io::Result<()> {
        self.write(&Event::Token(Token::new(token)))
    }

    fn done(&mut self, generation: &Generation, run: &RunFacts) -> io::Result<()> {
        self.write(&Event::Done(Done::new(generation, run)))
    }

    fn failed(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes `value` as one line and flushes it.
pub fn write_json_line(out: &mut impl Write, value: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    out.write_all(&line)?;
    out.flush()
}

#[derive(Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Event<'a> {
    Start(&'a Start<'a>),
    Token(Token<'a>),
    Done(Done<'a>),
}

#[derive(Serialize)]
struct Token<'a> {
    id: u32,
    text: &'a str,
    /// Where it is part of the model's reasoning.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    reasoning: bool,
    logprob: f32,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    top_logprobs: Vec<TopLogprob>,
}

impl<'a> Token<'a> {
    fn new(event: &TokenEvent<'a>) -> Self {
        let logprobs = event
            .logprobs
            .as_ref()
            .expect("JSON output asks for log-probabilities");
        let top = logprobs.top.iter();
        Self {
            id: event.id,
            text: event.text,
            reasoning: event.reasoning,
            logprob: finite(logprobs.token),
            top_logprobs: top
                .map(|&(id, logprob)| TopLogprob {
                    id,
                    logprob: finite(logprob),
                })
                .collect(),
        }
    }
}

/// JSON has no infinity; a token with no probability at all gets the lowest number there is.
fn finite(logprob: f32) -> f32 {
    logprob.max(f32::MIN)
}

#[derive(Serialize)]
struct TopLogprob {
    id: u32,
    logprob: f32,
}

#[derive(Serialize)]
struct Done<'a> {
    finish_reason: &'static str,
    text: &'a str,
    prompt_tokens: usize,
    cached_tokens: usize,
    generated_tokens: usize,
    seed: u64,
    timings: Timings,
    backend: Backend<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cuda_graph: Option<&'a GraphReport>,
    #[serde(skip_serializing_if = "Option::is_none")]
    step_kernel: Option<&'a StepReport>,
}

#[derive(Serialize)]
struct Timings {
    load_ms: f64,
    prefill_ms: f64,
    decode_ms: f64,
    time_to_first_token_ms: f64,
    prefill_tokens_per_second: f64,
    decode_tokens_per_second: f64,
}

#[derive(Serialize)]
struct Backend<'a> {
    name: &'a str,
    device: &'a str,
}

impl<'a> Done<'a> {
    fn new(generation: &'a Generation, run: &RunFacts<'a>) -> Self {
        let timings = &generation.timings;
        Self {
            finish_reason: finish_reason(generation.finish_reason),
            text: &generation.text,
            prompt_tokens: generation.prompt_tokens,
            cached_tokens: generation.cached_tokens,
            generated_tokens: generation.generated_tokens,
            seed: run.seed,
            timings: Timings {
                load_ms: ms(run.load),
                prefill_ms: ms(timings.prefill),
                decode_ms: ms(timings.decode),
                time_to_first_token_ms: ms(timings.time_to_first_token),
                prefill_tokens_per_second: generation.prefill_tokens_per_second(),
                decode_tokens_per_second: generation.decode_tokens_per_second(),
            },
            backend: Backend {
                name: run.backend,
                device: run.device,
            },
            cuda_graph: run.cuda_graph,
            step_kernel: run.step_kernel,
        }
    }
}

/// What JSON calls it.
pub fn finish_reason(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length | FinishReason::ContextFull => "length",
        FinishReason::StopString => "stop_string",
        FinishReason::Interrupted => "interrupted",
    }
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
