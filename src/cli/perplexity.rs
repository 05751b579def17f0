//! `sharpi perplexity`: how well a model predicts a text, and how closely a device follows the CPU.

use std::{
    io::{self, Write},
    ops::ControlFlow,
};

use anyhow::{Context, Result, ensure};

use super::{
    backend::{self, Compute},
    exit::Outcome,
    interrupt::Interrupt,
    output::WRITING,
    progress::{CountBar, Spinner},
    resolve::ModelSource,
};
use crate::{
    backend::{Backend, KvOptions},
    cpu::Arithmetic,
    engine::{Evaluation, evaluate},
    model::Prompt,
};

pub struct PerplexityRequest {
    pub model: ModelSource,
    pub compute: Compute,
    pub text: String,
    /// Tokens that are read together.
    pub window: usize,
    /// Compare with the CPU.
    pub kl: bool,
}

pub fn run(request: &PerplexityRequest) -> Result<Outcome> {
    let interrupt = Interrupt::catch()?;
    let show_progress = request.compute.show_progress;
    let spinner = Spinner::loading(show_progress, &request.model.name());
    let opening = request.compute.clone().open();
    let model = request.model.open(request.compute.context_len)?;
    let tokens = model.tokenizer.encode(&Prompt::text_alone(&request.text));
    // What an empty text begins with is what every window should begin with.
    let bos = model
        .tokenizer
        .encode(&Prompt::text_alone(""))
        .first()
        .copied();
    ensure!(
        tokens.len() >= request.window,
        "the text is {} tokens long, and one window takes {}: give a longer text or a smaller --ctx-size",
        tokens.len(),
        request.window
    );
    let mut backend = opening.load(&model.decoder)?;
    let mut reference: Option<Box<dyn Backend>> = match request.kl {
        true => {
            let exact = Compute {
                kv: KvOptions::default(),
                arithmetic: Arithmetic::Exact,
                ..request.compute.clone()
            };
            Some(backend::on_cpu(&exact, &model.decoder)?)
        }
        false => None,
    };
    drop(spinner);
    interrupt.generation_starts();
    let mut bar = CountBar::new(show_progress, "reading the text", "tokens");
    let evaluation = evaluate(
        &mut *backend,
        reference
            .as_mut()
            .map(|reference| &mut **reference as &mut dyn Backend),
        &tokens,
        request.window,
        bos,
        &mut |done, total| {
            bar.update(done, total);
            match interrupt.requested() {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        },
    )
    .with_context(|| format!("evaluating {}", model.gguf.name()))?;
    bar.clear();
    if interrupt.requested() && evaluation.positions == 0 {
        return Ok(Outcome::Interrupted);
    }
    write(&mut io::stdout().lock(), &evaluation).context(WRITING)?;
    let windows = tokens.len() / request.window;
    Ok(match evaluation.windows < windows {
        true => {
            tracing::warn!(
                "interrupted in window {} of {windows}: this is of what came before",
                evaluation.windows + 1
            );
            Outcome::Interrupted
        }
        false => Outcome::Done,
    })
}

fn write(out: &mut impl Write, evaluation: &Evaluation) -> io::Result<()> {
    writeln!(
        out,
        "perplexity     {:.4} ± {:.4} over {} positions",
        evaluation.perplexity(),
        evaluation.perplexity_error(),
        evaluation.positions
    )?;
    if let Some(divergence) = &evaluation.divergence {
        writeln!(
            out,
            "KL divergence  mean {:.3e}, median {:.3e}, 99% {:.3e}, maximum {:.3e}",
            divergence.mean(),
            divergence.quantile(0.5),
            divergence.quantile(0.99),
            divergence.max()
        )?;
        writeln!(
            out,
            "same top token {:.2}%",
            100.0 * divergence.same_top_fraction()
        )?;
    }
    out.flush()
}
