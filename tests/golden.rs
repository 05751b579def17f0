//! Models against Hugging Face transformers (float32, on the file's dequantized weights).
//!
//! `stories-10m` is built in. Others, whose references `tests/make_golden.py` writes, are looked for where
//! `tests/fetch-*.sh` put them and where `SHARPI_SMOLLM2`, `SHARPI_QWEN25_CODER` and `SHARPI_GEMMA3` say; without them,
//! their tests are reported as ignored. So are those of the small Gemma 4 files, which are random, until
//! `tests/make-gemma4.sh` has written them. The Gemmas' references are transformers 5.24's in the same way.

mod common;

use std::{path::PathBuf, process::ExitCode, sync::Arc};

use anyhow::{Context, Result, ensure};
use libtest_mimic::{Arguments, Trial};
use serde::Deserialize;
use sharpi::{
    backend::Backend,
    cpu::CpuBackend,
    model::{Message, Model, Prompt, TemplateOptions},
};

/// What the reference computed for one prompt.
#[derive(Deserialize)]
struct Golden {
    name: String,
    prompt: String,
    /// `text` is the prompt as a user's turn, rendered with the model's template.
    chat: bool,
    text: String,
    prompt_ids: Vec<u32>,
    /// Of the prompt's tokens after the first.
    mean_nll: Option<f64>,
    /// The most likely tokens after the prompt.
    last_logprobs: Vec<(u32, f64)>,
    greedy_ids: Vec<u32>,
    /// By how much the logit of each greedy token exceeds the next best.
    greedy_margins: Vec<f64>,
}

/// How far a log-probability may be from the reference's: both compute in float32.
const TOLERANCE: f64 = 1e-4;

/// A model that is not part of the repository.
struct Reference {
    name: &'static str,
    goldens: &'static str,
    path: Option<PathBuf>,
    /// What brings the file.
    script: &'static str,
    tolerance: f64,
}

fn references() -> Vec<Reference> {
    let gemma4 = |name, file, goldens| Reference {
        name,
        goldens,
        path: common::gemma4_path(file),
        script: "tests/make-gemma4.sh",
        tolerance: TOLERANCE,
    };
    vec![
        Reference {
            name: "smollm2",
            goldens: include_str!("data/smollm2-golden.json"),
            path: common::smollm2_path(),
            script: "tests/fetch-smollm2.sh",
            tolerance: TOLERANCE,
        },
        Reference {
            name: "qwen25-coder",
            goldens: include_str!("data/qwen25-coder-golden.json"),
            path: common::qwen25_coder_path(),
            script: "tests/fetch-qwen25-coder.sh",
            tolerance: TOLERANCE,
        },
        Reference {
            name: "gemma3-270m",
            goldens: include_str!("data/gemma3-270m-golden.json"),
            path: common::gemma3_path(),
            script: "tests/fetch-gemma3.sh",
            // The marks of turns are very unlikely to it, and errors grow with the logits.
            tolerance: 5.0 * TOLERANCE,
        },
        gemma4(
            "gemma4-e-f32",
            "e-f32",
            include_str!("data/gemma4-e-f32-golden.json"),
        ),
        gemma4(
            "gemma4-e-q4km",
            "e-q4km",
            include_str!("data/gemma4-e-q4km-golden.json"),
        ),
        gemma4(
            "gemma4-dense-f32",
            "dense-f32",
            include_str!("data/gemma4-dense-f32-golden.json"),
        ),
        gemma4(
            "gemma4-dense-q4km",
            "dense-q4km",
            include_str!("data/gemma4-dense-q4km-golden.json"),
        ),
    ]
}

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let stories = Some(Model::demo().expect("the built-in model loads"));
    let mut trials = trials(
        "stories-10m",
        include_str!("data/stories-10m-golden.json"),
        TOLERANCE,
        stories,
    );
    for reference in references() {
        let Reference { name, script, .. } = reference;
        if reference.path.is_none() {
            eprintln!("{name} is not here, its tests are ignored: run {script}");
        }
        let open = |path: PathBuf| Model::open(&path).expect("the model loads");
        let model = reference.path.map(open);
        trials.extend(self::trials(
            name,
            reference.goldens,
            reference.tolerance,
            model,
        ));
    }
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// The tests of one model: ignored where there is none.
fn trials(model_name: &str, goldens: &str, tolerance: f64, model: Option<Model>) -> Vec<Trial> {
    type Check = fn(&Arc<Model>, &Golden, f64) -> Result<()>;
    const CHECKS: [(&str, Check); 3] = [
        ("prompt ids are the reference's", prompt_ids),
        (
            "log-probabilities after the prompt are the reference's",
            last_logprobs,
        ),
        ("greedy tokens are the reference's", greedy_tokens),
    ];
    let goldens: Vec<Golden> = serde_json::from_str(goldens).expect("reference outputs parse");
    let model = model.map(Arc::new);
    let mut trials = Vec::new();
    for golden in goldens.into_iter().map(Arc::new) {
        let likelihood: (&str, Check) = ("likelihood of the prompt is the reference's", mean_nll);
        let likelihood = golden.mean_nll.is_some().then_some(likelihood);
        for (check_name, check) in CHECKS.into_iter().chain(likelihood) {
            let (model, golden) = (model.clone(), golden.clone());
            let ignored = model.is_none();
            let name = format!("{model_name}, {}: {check_name}", golden.name);
            let run = move || {
                let model = model.context("the model file is missing")?;
                Ok(check(&model, &golden, tolerance)?)
            };
            trials.push(Trial::test(name, run).with_ignored_flag(ignored));
        }
    }
    trials
}

fn prompt_ids(model: &Arc<Model>, golden: &Golden, _: f64) -> Result<()> {
    let prompt = if golden.chat {
        let turn = Message::new("user", golden.prompt.clone());
        let template = model.chat_template.as_ref().context("no chat template")?;
        template.render(&[turn], &TemplateOptions::default())?
    } else {
        Prompt::raw(&golden.prompt)
    };
    ensure!(
        prompt.text() == golden.text,
        "rendered {:?} for {:?}",
        prompt.text(),
        golden.text
    );
    let ids = model.tokenizer.encode(&prompt);
    ensure!(
        ids == golden.prompt_ids,
        "{ids:?} for {:?}",
        golden.prompt_ids
    );
    Ok(())
}

fn last_logprobs(model: &Arc<Model>, golden: &Golden, tolerance: f64) -> Result<()> {
    let mut backend = backend(model, golden)?;
    let logits = forward(&mut backend, &golden.prompt_ids)?;
    for &(id, expected) in &golden.last_logprobs {
        let logprob = logprob(&logits, id);
        ensure!(
            (logprob - expected).abs() <= tolerance,
            "token {id}: {logprob} for {expected}"
        );
    }
    Ok(())
}

/// An average of log-probabilities that are each good to the tolerance at worst, and whose errors have either sign.
fn mean_nll(model: &Arc<Model>, golden: &Golden, tolerance: f64) -> Result<()> {
    let expected = golden.mean_nll.context("the reference has no likelihood")?;
    let mut backend = backend(model, golden)?;
    let (vocab_size, chunk_len) = (model.decoder.vocab_size, backend.limits().chunk_len);
    let mut sum = 0.0;
    for (chunk, tokens) in golden.prompt_ids.chunks(chunk_len).enumerate() {
        let next = &golden.prompt_ids[chunk * chunk_len + 1..];
        let logits = common::read_all(&mut backend, tokens, chunk * chunk_len)?;
        for (logits, &id) in logits.chunks_exact(vocab_size).zip(next) {
            sum -= logprob(logits, id);
        }
    }
    let mean = sum / (golden.prompt_ids.len() - 1) as f64;
    ensure!(
        (mean - expected).abs() <= tolerance / 5.0,
        "{mean} for {expected}"
    );
    Ok(())
}

/// Each choice is made after the reference's own tokens, so that one other choice is one fault.
fn greedy_tokens(model: &Arc<Model>, golden: &Golden, _: f64) -> Result<()> {
    let mut backend = backend(model, golden)?;
    let mut logits = forward(&mut backend, &golden.prompt_ids)?;
    for (i, (&id, &margin)) in golden
        .greedy_ids
        .iter()
        .zip(&golden.greedy_margins)
        .enumerate()
    {
        let best = (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b]));
        ensure!(
            best == Some(id as usize),
            "token {i} is {best:?} for {id}, whose margin is {margin}"
        );
        let position = golden.prompt_ids.len() + i;
        logits = common::decode(&mut backend, id, position)?.to_vec();
    }
    Ok(())
}

fn backend(model: &Arc<Model>, golden: &Golden) -> Result<CpuBackend> {
    CpuBackend::new(
        model.decoder.clone(),
        golden.prompt_ids.len() + golden.greedy_ids.len(),
        0,
    )
}

/// The logits after `tokens`, read from position 0.
fn forward(backend: &mut CpuBackend, tokens: &[u32]) -> Result<Vec<f32>> {
    let chunk_len = backend.limits().chunk_len;
    let mut logits = Vec::new();
    for (chunk, tokens) in tokens.chunks(chunk_len).enumerate() {
        logits = common::read(backend, tokens, chunk * chunk_len)?.to_vec();
    }
    Ok(logits)
}

/// Log-softmax in float64.
fn logprob(logits: &[f32], id: u32) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits
        .iter()
        .map(|logit| f64::from(logit - max).exp())
        .sum();
    f64::from(logits[id as usize] - max) - sum.ln()
}
