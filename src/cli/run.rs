//! `sharpi run`: from a prompt to streamed text.

use std::{
    io, mem,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use super::{
    backend::Loaded,
    context,
    exit::Outcome,
    figures::three_digits,
    interrupt::Interrupt,
    output::{JsonOutput, KvFacts, ModelFacts, Output, RunFacts, Start, TextOutput, WRITING},
    progress::CountBar,
    resolve::{Format, RunRequest},
};
use crate::{
    backend::Backend,
    engine::{
        Constraint, FinishReason, GenerateOptions, Generation, Observer, TokenEvent, generate,
    },
    model::{Decoder, Gguf},
};

pub fn run(mut request: RunRequest) -> Result<Outcome> {
    let interrupt = Interrupt::catch()?;
    request.model.download()?;
    let loading = Instant::now();
    let (input, grammar) = (request.input, request.grammar);
    let form = grammar.as_ref().map(|grammar| grammar.name);
    let (loaded, (prompt, constraint)) =
        request.compute.load(&request.model, move |vocabulary| {
            let constraint =
                grammar.map(|grammar| Constraint::new(&grammar, &vocabulary.tokenizer));
            Ok((input.tokens(vocabulary)?, constraint.transpose()?))
        })?;
    let Loaded {
        decoder,
        mut session,
        vocabulary,
    } = loaded;
    let context_len = session.backend().limits().context_len;
    let sampling = request.sampling.resolve(&vocabulary.gguf, context_len)?;
    tracing::debug!("sampling: {sampling}");
    let seed = sampling.seed;
    context::check_prompt(&prompt, context_len)?;
    let load = loading.elapsed();
    tracing::debug!(
        "context: {context_len} tokens, of which the prompt takes {}",
        prompt.len()
    );

    let stdout = io::stdout();
    let mut output: Box<dyn Output> = match request.format {
        Format::Text(reasoning) => {
            Box::new(TextOutput::new(stdout, reasoning, constraint.is_some()))
        }
        Format::Json { .. } => Box::new(JsonOutput::new(stdout)),
    };
    output
        .start(&start(
            &vocabulary.gguf,
            &decoder,
            session.backend(),
            &prompt,
        )?)
        .context(WRITING)?;
    let max_tokens = request.max_tokens;
    let options = GenerateOptions {
        max_tokens,
        stop: request.stop,
        ignore_eos: request.ignore_eos,
        logprobs: match request.format {
            Format::Text(_) => None,
            Format::Json { top_logprobs } => Some(top_logprobs.unwrap_or(0)),
        },
        sampling,
        constraint,
    };
    interrupt.generation_starts();
    let mut observer = Stream {
        output: &mut *output,
        prompt_bar: CountBar::new(
            request.compute.show_progress,
            "reading the prompt",
            "tokens",
        ),
        interrupt: &interrupt,
    };
    let generated = generate(
        &mut session,
        &vocabulary.tokenizer,
        &prompt,
        &options,
        &mut observer,
    );
    observer.prompt_bar.clear();
    let generation = match generated {
        Ok(generation) => generation,
        Err(error) => {
            // The text so far stays as it is; the first error is the one to report.
            let _ = output.failed();
            return Err(error);
        }
    };
    let facts = RunFacts {
        seed,
        load,
        backend: session.backend().name(),
        device: session.backend().device(),
        cuda_graph: session.backend().graph_report(),
        step_kernel: session.backend().step_report(),
    };
    output.done(&generation, &facts).context(WRITING)?;
    if let Some(graph) = facts.cuda_graph {
        tracing::debug!(
            "CUDA graph: {} tokens by replay, {} by direct launches",
            graph.replays,
            graph.direct_tokens
        );
    }
    if let Some(step) = facts.step_kernel {
        match &step.disabled_reason {
            None => tracing::debug!("the step kernel computes tokens"),
            Some(reason) => {
                tracing::debug!("separate kernels compute tokens, not the step kernel: {reason}")
            }
        }
    }
    let why = ending(&generation, max_tokens);
    report(&generation, load, seed, why);
    // The process ends, and the system takes everything back at once: sooner than we could give it back piece by piece.
    mem::forget((session, vocabulary));
    let interrupted = generation.finish_reason == FinishReason::Interrupted;
    match form.filter(|_| !generation.whole) {
        Some(form) if interrupted => {
            tracing::warn!("what was printed is only the beginning of {form}");
            Ok(Outcome::Interrupted)
        }
        Some(form) => bail!("what was printed is only the beginning of {form}: {why}"),
        None if interrupted => Ok(Outcome::Interrupted),
        None => Ok(Outcome::Done),
    }
}

fn start<'a>(
    gguf: &'a Gguf,
    decoder: &Decoder,
    backend: &dyn Backend,
    prompt: &'a [u32],
) -> Result<Start<'a>> {
    let kv_layout = backend.kv_layout();
    Ok(Start {
        model: ModelFacts {
            file: gguf.name(),
            name: gguf.str("general.name")?,
            architecture: gguf.str("general.architecture")?.unwrap_or_default(),
            file_bytes: gguf.file_bytes(),
            context_length: decoder.context_length,
        },
        kv_cache: KvFacts {
            kv_type: kv_layout.name(),
            bytes_per_token: kv_layout.bytes_per_token(),
            budget: kv_layout.budget,
        },
        prompt_ids: prompt,
    })
}

/// The closing line of statistics.
fn report(generation: &Generation, load: Duration, seed: u64, why: &str) {
    // Fewer than all where reading was interrupted.
    let read = match generation.prefilled_tokens {
        read if read < generation.prompt_tokens => format!("{read} of "),
        _ => String::new(),
    };
    let first = match generation.generated_tokens {
        0 => String::new(),
        _ => format!(
            "first token after {:.1?}, ",
            generation.timings.time_to_first_token
        ),
    };
    // None where nothing was read, or no token followed the first.
    let rate = |rate: f64| match rate {
        0.0 => String::new(),
        _ => format!(", {} tokens/s", three_digits(rate)),
    };
    tracing::info!(
        "prompt: {read}{} tokens{}; generated: {} tokens{}; {first}loaded in {load:.1?}; {why}; seed {seed}",
        generation.prompt_tokens,
        rate(generation.prefill_tokens_per_second()),
        generation.generated_tokens,
        rate(generation.decode_tokens_per_second()),
    );
}

/// Why the text ends where it does.
fn ending(generation: &Generation, max_tokens: Option<usize>) -> &'static str {
    match generation.finish_reason {
        FinishReason::Stop => "the model ended its answer",
        FinishReason::StopString => "ended at a stop string",
        FinishReason::Length if max_tokens == Some(generation.generated_tokens) => {
            "cut off by --max-tokens"
        }
        FinishReason::Length => "cut off: the context is full (--ctx-size)",
        FinishReason::Interrupted => "interrupted",
    }
}

/// Passes a generation on to the output as it happens.
struct Stream<'a> {
    output: &'a mut dyn Output,
    prompt_bar: CountBar,
    interrupt: &'a Interrupt,
}

impl Observer for Stream<'_> {
    fn interrupted(&self) -> bool {
        self.interrupt.requested()
    }

    fn prefill_progress(&mut self, done: usize, total: usize) {
        self.prompt_bar.update(done, total);
    }

    fn token(&mut self, event: &TokenEvent) -> Result<()> {
        self.output.token(event).context(WRITING)
    }
}
