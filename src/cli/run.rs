//! `sharpi run`: from a prompt to streamed text.

use std::{
    io, mem, thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};

use super::{
    escape::escaped,
    exit::Outcome,
    interrupt::Interrupt,
    output::{JsonOutput, KvFacts, ModelFacts, Output, RunFacts, Start, TextOutput, WRITING},
    progress::{CountBar, Spinner},
    resolve::{Format, Input, RunRequest},
};
use crate::{
    backend::Backend,
    engine::{FinishReason, GenerateOptions, Generation, Observer, Session, TokenEvent, generate},
    model::{Decoder, Gguf, Vocabulary},
};

pub fn run(mut request: RunRequest) -> Result<Outcome> {
    let interrupt = Interrupt::catch()?;
    request.model.download()?;
    let loading = Instant::now();
    let opening = request.compute.clone().open();
    let spinner = Spinner::new(
        request.compute.show_progress,
        format!("loading {}", escaped(&request.model.name())),
    );
    let gguf = request.model.open_gguf()?;
    let decoder = request.model.describe(&gguf, request.compute.context_len)?;
    drop(spinner);
    // A large vocabulary takes as long to read as the weights to a GPU.
    let input = request.input;
    let reading = thread::spawn(move || read_prompt(gguf, &input));
    let backend = opening.load(&decoder);
    let read = reading.join();
    let mut session = Session::new(backend?);
    let (vocabulary, prompt) =
        read.map_err(|_| anyhow!("reading the vocabulary ended the thread that did it"))??;
    let context_len = session.backend().limits().context_len;
    let sampling = request.sampling.resolve(&vocabulary.gguf, context_len)?;
    tracing::debug!("{sampling:?}");
    let seed = sampling.seed;
    ensure!(
        prompt.len() <= context_len,
        "the prompt is {} tokens long, but the context holds {context_len}: shorten it, or raise --ctx-size",
        prompt.len()
    );
    let load = loading.elapsed();
    tracing::debug!(
        "context: {context_len} tokens, of which the prompt takes {}",
        prompt.len()
    );

    let stdout = io::stdout().lock();
    let mut output: Box<dyn Output> = match request.format {
        Format::Text => Box::new(TextOutput::new(stdout)),
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
            Format::Text => None,
            Format::Json { top_logprobs } => Some(top_logprobs.unwrap_or(0)),
        },
        sampling,
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
    report(&generation, load, seed, max_tokens);
    // The process ends, and the system takes everything back at once: sooner than we could give it back piece by piece.
    mem::forget((session, vocabulary));
    Ok(match generation.finish_reason {
        FinishReason::Interrupted => Outcome::Interrupted,
        _ => Outcome::Done,
    })
}

/// Reads the file's vocabulary, and with it the prompt.
fn read_prompt(gguf: Gguf, input: &Input) -> Result<(Vocabulary, Vec<u32>)> {
    let name = gguf.name().to_owned();
    let vocabulary = Vocabulary::from_gguf(gguf).with_context(|| format!("cannot load {name}"))?;
    let prompt = input.render(vocabulary.chat_template.as_ref(), &name)?;
    let ids = vocabulary.tokenizer.encode(&prompt);
    Ok((vocabulary, ids))
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
fn report(generation: &Generation, load: Duration, seed: u64, max_tokens: Option<usize>) {
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
    tracing::info!(
        "prompt: {read}{} tokens, {:.1} tokens/s; generated: {} tokens, {:.1} tokens/s; {first}loaded in {load:.1?}; {}; seed {seed}",
        generation.prompt_tokens,
        generation.prefill_tokens_per_second(),
        generation.generated_tokens,
        generation.decode_tokens_per_second(),
        ending(generation, max_tokens)
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
