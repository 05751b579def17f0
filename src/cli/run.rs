//! `sharpi run`: from a prompt to streamed text.

use std::{
    io, mem,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use super::{
    backend::Loaded,
    context,
    escape::escaped,
    exit::{Outcome, is_broken_pipe},
    figures::three_digits,
    interrupt::Interrupt,
    output::{JsonOutput, KvFacts, ModelFacts, Output, RunFacts, Start, TextOutput, WRITING},
    progress::CountBar,
    prompt_cache::PromptCacheFile,
    resolve::{Format, RunRequest},
};
use crate::{
    backend::Backend,
    engine::{
        Constraint, FinishReason, GenerateOptions, Generation, Observer, TokenEvent, generate,
        model_id,
    },
    model::{Decoder, Gguf},
};

pub fn run(mut request: RunRequest) -> Result<Outcome> {
    let interrupt = Interrupt::catch()?;
    let prompt_cache = request.prompt_cache.map(PromptCacheFile::read);
    let prompt_cache = prompt_cache.transpose()?;
    request.model.download()?;
    let loading = Instant::now();
    let (input, grammar) = (request.input, request.grammar);
    let form = grammar.as_ref().map(|grammar| grammar.name);
    let is_cached = prompt_cache.is_some();
    let (loaded, (prompt, constraint, fingerprint)) =
        request.compute.load(&request.model, move |vocabulary| {
            let constraint =
                grammar.map(|grammar| Constraint::new(&grammar, &vocabulary.tokenizer));
            let fingerprint = is_cached.then(|| vocabulary.gguf.fingerprint());
            Ok((
                input.tokens(vocabulary)?,
                constraint.transpose()?,
                fingerprint,
            ))
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
    let writing = prompt_cache
        .zip(fingerprint)
        .and_then(|(reading, fingerprint)| {
            reading.restore(&mut session, &model_id(fingerprint, &decoder), &prompt)
        });
    let load = loading.elapsed();
    tracing::debug!(
        "context: {context_len} tokens, of which the prompt takes {}",
        prompt.len()
    );

    let stdout = io::stdout();
    let mut output: Box<dyn Output> = match request.format {
        Format::Text(reasoning) => Box::new(TextOutput::new(stdout, reasoning)),
        Format::Json { .. } => Box::new(JsonOutput::new(stdout)),
    };
    // What has begun with a line ends with one.
    interrupt.generation_starts();
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
    let told = match generated {
        Ok(generation) => {
            let facts = RunFacts {
                seed,
                load,
                backend: session.backend().name(),
                device: session.backend().device(),
                cuda_graph: session.backend().graph_report(),
                step_kernel: session.backend().step_report(),
            };
            let done = output.done(&generation, &facts).context(WRITING);
            done.and_then(|()| {
                say_how(&facts);
                let why = ending(generation.finish_reason);
                report(&generation, load, seed, why);
                match form.filter(|_| !generation.whole) {
                    Some(form) if generation.finish_reason == FinishReason::Interrupted => {
                        tracing::warn!("what was printed is only the beginning of {form}");
                    }
                    Some(form) => {
                        bail!("what was printed is only the beginning of {form}: {why}")
                    }
                    None => {}
                }
                Ok(generation.finish_reason)
            })
        }
        Err(error) => {
            // The text so far stays as it is; the first error is the one to report.
            let _ = output.failed();
            Err(error)
        }
    };
    // Nobody waits for it any more, and who has left the pipe may come again.
    let written = match writing {
        Some(writing) if told.as_ref().err().is_none_or(is_broken_pipe) => {
            writing.write(&mut session, &interrupt, request.compute.show_progress)
        }
        _ => Ok(Outcome::Done),
    };
    // The process ends, and the system takes everything back at once: sooner than we could give it back piece by piece.
    mem::forget((session, vocabulary));
    match (told, written) {
        (Ok(FinishReason::Interrupted), written) => {
            if let Err(error) = written {
                tracing::warn!("{}", escaped(&format!("{error:#}")));
            }
            Ok(Outcome::Interrupted)
        }
        (Err(error), Ok(_)) => Err(error),
        (_, written) => written,
    }
}

/// Says under `-v` how tokens were computed.
fn say_how(facts: &RunFacts) {
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
    let (computed, cached) = (generation.prefilled_tokens, generation.cached_tokens);
    // Fewer than all where reading was interrupted.
    let read = match computed + cached {
        read if read < generation.prompt_tokens => format!("{read} of "),
        _ => String::new(),
    };
    let cached = match cached {
        0 => String::new(),
        cached if cached == generation.prompt_tokens => ", all from the prompt cache".to_owned(),
        cached => format!(", {cached} from the prompt cache"),
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
        "prompt: {read}{} tokens{cached}{}; generated: {} tokens{}; {first}loaded in {load:.1?}; {why}; seed {seed}",
        generation.prompt_tokens,
        rate(generation.prefill_tokens_per_second()),
        generation.generated_tokens,
        rate(generation.decode_tokens_per_second()),
    );
}

/// Why the text ends where it does.
fn ending(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "the model ended its answer",
        FinishReason::StopString => "ended at a stop string",
        FinishReason::Length => "cut off by --max-tokens",
        FinishReason::ContextFull => "cut off: the context is full (--ctx-size)",
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
