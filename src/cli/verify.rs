//! `sharpi verify`: direct launches, the CUDA graph, the step kernel and the CPU side by side on any file.

use std::io::{self, Write};

use anyhow::{Context, Result, bail};
use indicatif::HumanBytes;

use super::{
    backend::{self, Compute},
    exit::Outcome,
    interrupt::Interrupt,
    output::WRITING,
    progress::Spinner,
    resolve::ModelSource,
    system,
};
use crate::{
    backend::Backend,
    cpu::Arithmetic,
    cuda::{CudaBackend, StepKernel},
    engine::{Comparison, Trace},
    model::{Model, Prompt},
};

/// Files up to this size are also computed on the CPU without being asked to.
const SMALL_BYTES: u64 = 1 << 30;

pub struct VerifyRequest {
    pub model: ModelSource,
    pub compute: Compute,
    /// Compare with the CPU whatever the model's size.
    pub cpu: bool,
    /// Tokens to decode.
    pub tokens: usize,
    pub prompt: String,
}

pub fn run(request: &VerifyRequest) -> Result<Outcome> {
    Interrupt::catch()?;
    let show_progress = request.compute.show_progress;
    let spinner = Spinner::loading(show_progress, &request.model.name());
    let mut opening = request.compute.clone().open();
    let model = request.model.open(request.compute.context_len)?;
    let gpu = opening.gpu()?.context("verify runs on a GPU only")?;
    let prompt = prompt(&model, &request.prompt)?;
    check_memory(request.tokens, model.decoder.vocab_size)?;
    let mut compute = Compute {
        context_len: Some(prompt.len() + request.tokens),
        ..request.compute.clone()
    };
    // What is compared need not be the faster way.
    if compute.step_kernel == StepKernel::WhereFaster {
        compute.step_kernel = StepKernel::Always;
    }
    let mut cuda = backend::on_gpu(gpu, &compute, &model.decoder)?;
    drop(spinner);
    let spinner = Spinner::new(show_progress, "computing on the GPU");
    cuda.set_step(Some("verify".to_owned()));
    cuda.set_graph(Some("verify".to_owned()));
    let direct = Trace::record(&mut cuda, &prompt, request.tokens, None)?;
    cuda.set_graph(None);
    let follow = Some(direct.tokens.as_slice());
    let graph = Trace::record(&mut cuda, &prompt, request.tokens, follow)?;
    if let Some(reason) = cuda
        .graph_report()
        .and_then(|report| report.disabled_reason.clone())
    {
        bail!("no CUDA graph to verify: {reason}");
    }
    let step = match &compute.step_kernel {
        StepKernel::WhereFaster | StepKernel::Always => {
            record_step(&mut cuda, &prompt, &direct.tokens)?
        }
        StepKernel::Never(forbids) => {
            tracing::debug!("the step kernel is not compared: {forbids} forbids it");
            None
        }
    };

    drop(spinner);
    let mut out = io::stdout().lock();
    write_head(&mut out, &cuda, request.tokens).context(WRITING)?;
    let replayed = direct.compare(&graph);
    write_row(&mut out, "graph : direct", &replayed).context(WRITING)?;
    let stepped = step.map(|step| direct.compare(&step));
    if let Some(stepped) = &stepped {
        write_row(&mut out, "step : separate", stepped).context(WRITING)?;
    }
    if request.cpu || model.gguf.file_bytes() <= SMALL_BYTES {
        let spinner = Spinner::new(show_progress, "computing on the CPU");
        let compute = Compute {
            arithmetic: Arithmetic::Exact,
            ..compute
        };
        let mut cpu = backend::on_cpu(&compute, &model.decoder)?;
        let reference = Trace::record(&mut *cpu, &prompt, request.tokens, follow)?;
        drop(spinner);
        write_row(&mut out, "direct : cpu", &reference.compare(&direct)).context(WRITING)?;
    }
    if let Some(token) = replayed.first_difference {
        bail!("graph and direct launches differ, first in the logits of token {token}");
    }
    if let Some(token) = stepped.and_then(|stepped| stepped.first_difference) {
        bail!("step kernel and separate launches differ, first in the logits of token {token}");
    }
    Ok(Outcome::Done)
}

/// Decodes `tokens` with the step kernel. Where something else computed them, says why, and there is nothing to compare.
fn record_step(cuda: &mut CudaBackend, prompt: &[u32], tokens: &[u32]) -> Result<Option<Trace>> {
    cuda.set_step(None);
    let trace = Trace::record(cuda, prompt, tokens.len(), Some(tokens))?;
    let report = cuda.step_report();
    if let Some(reason) = report.and_then(|report| report.disabled_reason.as_ref()) {
        tracing::info!("the step kernel is not compared: {reason}");
        return Ok(None);
    }
    Ok(Some(trace))
}

/// Refuses more tokens than this machine can keep the logits of: float32, of each way that is compared.
fn check_memory(tokens: usize, vocab_size: usize) -> Result<()> {
    const WAYS: usize = 4;
    let per_token = (WAYS * vocab_size * size_of::<f32>()) as u64;
    if let Some(total) = system::total_memory_bytes()
        && tokens as u64 > total / per_token
    {
        bail!(
            "--max-tokens {tokens}: the logits that are compared take {} a token, and this machine has {} of memory: \
             at most {} fit",
            HumanBytes(per_token),
            HumanBytes(total),
            total / per_token
        );
    }
    Ok(())
}

/// The text's tokens, at least one.
fn prompt(model: &Model, text: &str) -> Result<Vec<u32>> {
    let tokens = model.tokenizer.encode(&Prompt::raw(text));
    if tokens.is_empty() {
        bail!("the prompt holds no tokens: give it some text");
    }
    Ok(tokens)
}

fn write_head(out: &mut impl Write, backend: &dyn Backend, tokens: usize) -> io::Result<()> {
    writeln!(out, "{tokens} tokens on {}\n", backend.device())?;
    writeln!(
        out,
        "{:<16} {:>10} {:>12} {:>12} {:>12} {:>9}",
        "compared", "same bits", "largest diff", "mean KL", "largest KL", "same top"
    )
}

fn write_row(out: &mut impl Write, name: &str, comparison: &Comparison) -> io::Result<()> {
    let divergence = &comparison.divergence;
    writeln!(
        out,
        "{name:<16} {:>10} {:>12.3e} {:>12.3e} {:>12.3e} {:>8.2}%",
        if comparison.first_difference.is_none() {
            "yes"
        } else {
            "no"
        },
        comparison.max_difference,
        divergence.mean(),
        divergence.max(),
        100.0 * divergence.same_top_fraction()
    )
}
