//! `sharpi batch`: an answer for every line of a file, written as soon as it is there.

mod answers;
mod prompts;

use std::{
    mem,
    time::{Duration, Instant},
};

use anyhow::{Context, Error, Result, ensure};
use serde::Serialize;
use serde_json::Value;

use self::{
    answers::{Answers, Held},
    prompts::Prompts,
};
use super::{
    backend::Loaded,
    context,
    exit::Outcome,
    figures::three_digits,
    interrupt::Interrupt,
    output::finish_reason,
    progress::CountBar,
    resolve::{BatchRequest, Line, LineFlags, Task},
};
use crate::{
    engine::{
        FinishReason, GenerateOptions, Generation, Observer, Session, TokenEvent, generate,
        unmarked,
    },
    model::Vocabulary,
};

/// A line of the output: what was generated.
#[derive(Serialize)]
struct Answer<'a> {
    id: Option<Value>,
    text: &'a str,
    /// Where there was any, and then `text` is what came behind it.
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning: Option<&'a str>,
    finish_reason: &'static str,
    prompt_tokens: usize,
    generated_tokens: usize,
    seed: u64,
}

/// A line of the output: why nothing was.
#[derive(Serialize)]
struct Refusal {
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<Value>,
    /// Of the input, counted from 1.
    line: usize,
    error: Cause,
}

#[derive(Serialize)]
struct Cause {
    message: String,
}

/// A model that one prompt after another is given to. Where several texts are to grow side by side, it is here.
struct Writer {
    session: Session,
    vocabulary: Vocabulary,
    /// The prompt before, which the session holds.
    before: Vec<u32>,
}

/// What a model wrote.
struct Written {
    generation: Generation,
    answer: String,
    reasoning: Option<String>,
}

/// Of all lines, for the closing one.
#[derive(Default)]
struct Tally {
    answers: usize,
    errors: usize,
    prompt_tokens: usize,
    /// Those that were not shared with the prompt before.
    read_tokens: usize,
    generated_tokens: usize,
}

pub fn run(mut request: BatchRequest) -> Result<Outcome> {
    let interrupt = Interrupt::catch()?;
    let show_progress = request.compute.show_progress;
    let mut prompts = Prompts::open(&request.input, show_progress)?;
    let mut answers = Answers::open(&request.output, request.resume)?;
    let held = answers.resume(&mut prompts, |number, line| {
        request.flags.read(number, line).id
    })?;
    say_held(&held);
    request.model.download()?;
    let loading = Instant::now();
    let (loaded, ()) = request.compute.load(&request.model, |_| Ok(()))?;
    let load = loading.elapsed();
    answers.create()?;

    let mut writer = Writer::new(loaded);
    let start = Instant::now();
    let waiting = prompts.total.map(|total| total.saturating_sub(held.lines));
    let mut bar = CountBar::new(show_progress, "answering", "lines");
    let mut progress = |done| {
        if let Some(waiting) = waiting {
            bar.update(done, waiting);
        }
    };
    let tally = answer_lines(
        &mut prompts,
        &request.flags,
        &mut writer,
        &mut answers,
        &interrupt,
        &mut progress,
    )?;
    bar.clear();
    answers.sync()?;
    tally.report(start.elapsed(), load);
    // As at the end of a run.
    mem::forget(writer);
    if interrupt.requested() {
        return Ok(Outcome::Interrupted);
    }
    let errors = held.errors + tally.errors;
    ensure!(
        errors == 0,
        "{errors} of {} lines gave an error, which stands in the place of the answer",
        held.lines + tally.lines()
    );
    Ok(Outcome::Done)
}

/// Answers one line after another, until none comes or Ctrl-C does. `progress` hears how many are done.
fn answer_lines(
    prompts: &mut Prompts,
    flags: &LineFlags,
    writer: &mut Writer,
    answers: &mut Answers,
    interrupt: &Interrupt,
    progress: &mut dyn FnMut(usize),
) -> Result<Tally> {
    let mut tally = Tally::default();
    while !interrupt.requested() {
        progress(tally.lines());
        // While a line is waited for, Ctrl-C ends the process at once.
        let Some((number, line)) = prompts.next()? else {
            break;
        };
        interrupt.generation_starts();
        let Line { id, task } = flags.read(number, &line);
        match task.and_then(|task| writer.prepare(task)) {
            Ok((prompt, options)) => {
                let written = writer
                    .write(prompt, &options, interrupt)
                    .with_context(|| format!("line {number} of {}", prompts.name))?;
                if written.generation.finish_reason == FinishReason::Interrupted {
                    break;
                }
                answers.write(&Answer::new(id, &written, options.sampling.seed))?;
                tally.add(&written.generation);
            }
            Err(error) => {
                answers.write(&Refusal::new(id, number, &error))?;
                tally.errors += 1;
            }
        }
        interrupt.generation_ends();
    }
    Ok(tally)
}

fn say_held(held: &Held) {
    let errors = match held.errors {
        0 => String::new(),
        errors => format!("; {errors} of them gave an error, and are not tried again"),
    };
    if held.lines > 0 {
        tracing::info!("{} lines are answered already{errors}", held.lines);
    }
}

impl Writer {
    fn new(loaded: Loaded) -> Self {
        Self {
            session: loaded.session,
            vocabulary: loaded.vocabulary,
            before: Vec::new(),
        }
    }

    /// What a task comes to with this model: the tokens of its prompt, and how to go on behind them.
    fn prepare(&self, task: Task) -> Result<(Vec<u32>, GenerateOptions)> {
        let prompt = task.input.tokens(&self.vocabulary)?;
        let context_len = self.session.backend().limits().context_len;
        context::check_prompt(&prompt, context_len)?;
        let options = GenerateOptions {
            max_tokens: task.max_tokens,
            stop: task.stop,
            ignore_eos: task.ignore_eos,
            logprobs: None,
            sampling: task.sampling.resolve(&self.vocabulary.gguf, context_len)?,
            constraint: None,
        };
        Ok((prompt, options))
    }

    fn write(
        &mut self,
        prompt: Vec<u32>,
        options: &GenerateOptions,
        interrupt: &Interrupt,
    ) -> Result<Written> {
        self.go_back(&prompt);
        let mut texts = Texts {
            answer: String::new(),
            reasoning: None,
            interrupt,
        };
        let tokenizer = &self.vocabulary.tokenizer;
        let generation = generate(&mut self.session, tokenizer, &prompt, options, &mut texts)?;
        self.before = prompt;
        Ok(Written {
            generation,
            answer: texts.answer,
            reasoning: texts.reasoning,
        })
    }

    /// Keeps in the session what `prompt` shares with the prompt before, and nothing that could make the text another than
    /// from an empty one: not what was generated, which a GPU computes otherwise than a prompt, and with a KV budget, which
    /// evicts by how a prompt was read, nothing at all.
    fn go_back(&mut self, prompt: &[u32]) {
        let shared = self.before.iter().zip(prompt).take_while(|(a, b)| a == b);
        let shared = shared.count().min(prompt.len() - 1);
        let backend = self.session.backend();
        let whole = backend.kv_layout().budget.is_none() && backend.remembers(shared);
        self.session.rewind(if whole { shared } else { 0 });
    }
}

/// Keeps a generation's reasoning apart from its answer.
struct Texts<'a> {
    answer: String,
    reasoning: Option<String>,
    interrupt: &'a Interrupt,
}

impl Observer for Texts<'_> {
    fn interrupted(&self) -> bool {
        self.interrupt.requested()
    }

    fn prefill_progress(&mut self, _done: usize, _total: usize) {}

    fn token(&mut self, event: &TokenEvent) -> Result<()> {
        self.answer += event.answer;
        if event.reasoning {
            *self.reasoning.get_or_insert_default() += &event.text[event.answer.len()..];
        }
        Ok(())
    }
}

impl<'a> Answer<'a> {
    fn new(id: Option<Value>, written: &'a Written, seed: u64) -> Self {
        Self {
            id,
            text: &written.answer,
            reasoning: written.reasoning.as_deref().map(unmarked),
            finish_reason: finish_reason(written.generation.finish_reason),
            prompt_tokens: written.generation.prompt_tokens,
            generated_tokens: written.generation.generated_tokens,
            seed,
        }
    }
}

impl Refusal {
    fn new(id: Option<Value>, line: usize, error: &Error) -> Self {
        let message = format!("{error:#}");
        let error = Cause { message };
        Self { id, line, error }
    }
}

impl Tally {
    fn lines(&self) -> usize {
        self.answers + self.errors
    }

    fn add(&mut self, generation: &Generation) {
        self.answers += 1;
        self.prompt_tokens += generation.prompt_tokens;
        self.read_tokens += generation.prefilled_tokens;
        self.generated_tokens += generation.generated_tokens;
    }

    fn report(&self, time: Duration, load: Duration) {
        tracing::info!(
            "{} answers in {time:.1?}; prompts: {} tokens, {} of them shared with the prompt before; generated: {} tokens, \
             {} tokens/s; loaded in {load:.1?}",
            self.answers,
            self.prompt_tokens,
            self.prompt_tokens - self.read_tokens,
            self.generated_tokens,
            three_digits(self.generated_tokens as f64 / time.as_secs_f64().max(1e-9))
        );
    }
}
