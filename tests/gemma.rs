//! Text in the files of Gemma 3 and Gemma 4, against Hugging Face's and SentencePiece's outputs, a file that is refused, and
//! what a GPU computes. `tests/golden.rs` has what the CPU does.
//!
//! Without the files, which `tests/fetch-gemma3.sh` and `tests/make-gemma4.sh` bring, these tests are reported as ignored.

mod common;

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use common::gpu::{self, Test, TestResult, check};
use libtest_mimic::Trial;
use serde::Deserialize;
use serde_json::Value;
use sharpi::{
    backend::Backend,
    cpu::CpuBackend,
    cuda::{CudaBackend, Device, Options, StepKernel},
    engine::{Divergence, Trace, made_up_tokens},
    model::{Gguf, Message, Model, Prompt, TemplateOptions, Vocabulary},
};

const BOS: u32 = 2;

const GEMMA3: &str = "gemma3-270m";

/// The names of the small files.
const GEMMA4: [&str; 4] = ["e-f32", "dense-f32", "e-q4km", "dense-q4km"];

fn main() {
    let gemma3 = common::gemma3_path();
    let [gemma4, experts] = ["e-f32", "moe-f32"].map(common::gemma4_path);
    for (path, script) in [
        (&gemma3, "tests/fetch-gemma3.sh"),
        (&gemma4, "tests/make-gemma4.sh"),
    ] {
        if path.is_none() {
            eprintln!("a model is not here, its tests are ignored: run {script}");
        }
    }
    let mut trials = vec![
        trial("gemma3_ids_are_the_references", &gemma3, |path| {
            ids(path, include_str!("data/gemma3-tokens.json"))
        }),
        trial("gemma4_ids_are_the_references", &gemma4, |path| {
            ids(path, include_str!("data/gemma4-tokens.json"))
        }),
        trial("gemma3_ends_turns", &gemma3, |path| ends(path, &[1, 106])),
        trial("gemma4_ends_turns", &gemma4, |path| {
            ends(path, &[1, 50, 106])
        }),
        trial("gemma4_prompts_are_the_references", &gemma4, chats),
        trial("channels_are_reasoning", &gemma4, channels_are_reasoning),
        trial("experts_are_refused", &experts, experts_are_refused),
    ];
    let on_gpu: [Test; 5] = [
        ("cuda_follows_the_cpu", cuda_follows_the_cpu),
        (
            "graph_and_direct_launches_give_the_same_bits",
            graph_and_direct_are_the_same,
        ),
        (
            "the_step_kernel_gives_the_bits_of_separate_kernels",
            step_and_separate_are_the_same,
        ),
        (
            "a_ring_gives_the_bits_of_a_full_cache",
            a_ring_is_as_good_as_a_full_cache,
        ),
        (
            "a_table_goes_to_the_hosts_memory_where_the_gpu_is_full",
            a_table_goes_to_the_host,
        ),
    ];
    let lacking = match gemma4 {
        Some(_) => vec![],
        None => on_gpu.map(|(name, _)| name).to_vec(),
    };
    trials.extend(gpu::trials(&on_gpu, &lacking));
    gpu::run_trials(trials)
}

/// Ignored where there is no file.
fn trial(name: &str, path: &Option<PathBuf>, check: fn(&Path) -> Result<()>) -> Trial {
    let path = path.clone();
    let ignored = path.is_none();
    let run = move || Ok(check(&path.context("the file is missing")?)?);
    Trial::test(name, run).with_ignored_flag(ignored)
}

fn vocabulary(path: &Path) -> Result<Vocabulary> {
    Vocabulary::from_gguf(Gguf::open(path)?)
}

fn ids(path: &Path, vectors: &str) -> Result<()> {
    #[derive(Deserialize)]
    struct Vector {
        text: String,
        /// Without the beginning.
        ids: Vec<u32>,
    }
    let vectors: Vec<Vector> = serde_json::from_str(vectors)?;
    let tokenizer = vocabulary(path)?.tokenizer;
    for Vector { text, ids } in vectors {
        let encoded = tokenizer.encode(&Prompt::raw(&text));
        // A text that spells the beginning itself does not get a second one.
        let expected = match ids.first() {
            Some(&BOS) => ids,
            _ => [&[BOS], &ids[..]].concat(),
        };
        ensure!(
            encoded == expected,
            "{encoded:?} for {expected:?}, of {text:?}"
        );
    }
    Ok(())
}

/// By their texts: the files name the first of them only.
fn ends(path: &Path, expected: &[u32]) -> Result<()> {
    let tokenizer = vocabulary(path)?.tokenizer;
    let ends = tokenizer.end_of_generation();
    ensure!(ends == expected, "{ends:?} for {expected:?}");
    Ok(())
}

fn chats(path: &Path) -> Result<()> {
    #[derive(Deserialize)]
    struct Vector {
        name: String,
        messages: Vec<Message>,
        args: Options,
        text: String,
    }
    #[derive(Deserialize)]
    struct Options {
        enable_thinking: Option<bool>,
    }
    let vectors: Vec<Vector> = serde_json::from_str(include_str!("data/gemma4-chat.json"))?;
    let vocabulary = vocabulary(path)?;
    let template = vocabulary.chat_template.context("no chat template")?;
    for vector in vectors {
        let options = TemplateOptions {
            enable_thinking: vector.args.enable_thinking,
            ..TemplateOptions::default()
        };
        let prompt = template.render(&vector.messages, &options)?;
        ensure!(
            prompt.text() == vector.text,
            "{}: {:?} for {:?}",
            vector.name,
            prompt.text(),
            vector.text
        );
        let [ids, spelled] =
            [prompt, Prompt::raw(vector.text)].map(|prompt| vocabulary.tokenizer.encode(&prompt));
        ensure!(ids == spelled, "{}: {ids:?} for {spelled:?}", vector.name);
        let beginnings = ids.iter().filter(|&&id| id == BOS).count();
        ensure!(beginnings == 1, "{}: {beginnings} beginnings", vector.name);
    }
    Ok(())
}

/// The text of a random model closes no channel by itself.
fn channels_are_reasoning(path: &Path) -> Result<()> {
    for (prompt, expected) in [
        ("Hi", false),
        ("<|channel>thought", true),
        ("<|channel>thought<channel|>", false),
    ] {
        let ran = Command::new(env!("CARGO_BIN_EXE_sharpi"))
            .args([
                "run", "--device", "cpu", "--raw", "--json", "-n", "3", "--temp", "0",
            ])
            .args(["--ignore-eos", "-c", "64", "-p", prompt, "-m"])
            .arg(path)
            .output()?;
        let lines = String::from_utf8(ran.stdout)?;
        let events: Vec<Value> = lines
            .lines()
            .map(serde_json::from_str)
            .collect::<Result<_, _>>()?;
        let tokens: Vec<bool> = events
            .iter()
            .filter(|event| event["type"] == "token")
            .map(|token| token["reasoning"] == true)
            .collect();
        ensure!(tokens == [expected; 3], "{prompt:?}: {tokens:?} in {lines}");
    }
    Ok(())
}

fn experts_are_refused(path: &Path) -> Result<()> {
    let error = Model::open(path).err().context("it was taken")?;
    let message = format!("{error:#}");
    ensure!(message.contains("expert"), "{message:?} names no experts");
    Ok(())
}

/// Tokens that are decoded: windows are crossed ten times.
const DECODED: usize = 330;

/// The mean divergence of a prompt's last token, by how the prompt is cut, and of tokens that are decoded.
fn cuda_follows_the_cpu() -> TestResult {
    const LENGTHS: [usize; 4] = [20, 97, 200, 330];
    let mut files: Vec<(String, PathBuf)> = GEMMA4
        .iter()
        .filter_map(|name| Some(((*name).to_owned(), common::gemma4_path(name)?)))
        .collect();
    files.extend(common::gemma3_path().map(|path| (GEMMA3.to_owned(), path)));
    for (name, path) in files {
        let model = Model::open(&path)?;
        let vocab_size = model.decoder.vocab_size;
        let tokens = made_up_tokens(DECODED, vocab_size);
        let mut cpu = CpuBackend::new(model.decoder.clone(), DECODED, 0)?;
        let mut expected = Vec::new();
        let chunk_len = cpu.limits().chunk_len;
        for (i, chunk) in tokens.chunks(chunk_len).enumerate() {
            expected.extend_from_slice(common::read_all(&mut cpu, chunk, i * chunk_len)?);
        }
        let expected = |position: usize| &expected[position * vocab_size..][..vocab_size];
        for chunk_len in [1, 31, 32, 33, 128, DECODED] {
            let options = Options {
                context_len: Some(DECODED),
                chunk_len: Some(chunk_len),
                ..Options::default()
            };
            let mut cuda = gpu::open(&model, &options)?;
            let mut divergence = Divergence::default();
            for len in LENGTHS {
                let mut logits = Vec::new();
                for (i, chunk) in tokens[..len].chunks(chunk_len).enumerate() {
                    logits = common::read(&mut cuda, chunk, i * chunk_len)?.to_vec();
                }
                divergence.push(&logits, expected(len - 1));
            }
            let mean = divergence.mean();
            eprintln!("{name}, chunks of {chunk_len}: mean KL {mean:.1e}");
            check(
                mean < 1e-4,
                format!("{name}, chunks of {chunk_len}: mean KL {mean:e}"),
            )?;
        }
        let mut cuda = gpu::open(&model, &Options::default())?;
        // Of quantized matrices' inputs 8 bits are kept.
        let (mean, bound) = if name == GEMMA3 {
            (written(&model, &mut cuda, &mut cpu)?, 1e-3)
        } else {
            let mut divergence = Divergence::default();
            for (position, &token) in tokens.iter().enumerate() {
                let logits = common::decode(&mut cuda, token, position)?;
                divergence.push(logits, expected(position));
            }
            let bound = if name.ends_with("f32") { 5e-6 } else { 1e-2 };
            (divergence.mean(), bound)
        };
        eprintln!("{name}, decoded: mean KL {mean:.1e}");
        check(mean < bound, format!("{name}, decoded: mean KL {mean:e}"))?;
    }
    Ok(())
}

/// The mean divergence over what a trained model writes: 8 bits keep less of tokens that are made up.
fn written(model: &Model, cuda: &mut CudaBackend, cpu: &mut CpuBackend) -> Result<f64> {
    let prompt = model.tokenizer.encode(&Prompt::raw("Once upon a time"));
    let trace = Trace::record(cuda, &prompt, 300, None)?;
    let reference = Trace::record(cpu, &prompt, trace.tokens.len(), Some(&trace.tokens))?;
    Ok(reference.compare(&trace).divergence.mean())
}

/// Decodes the same tokens with each of these, and holds their logits to the same bits.
fn decodes_the_same(options: &[Options]) -> TestResult {
    for name in GEMMA4 {
        let path = common::gemma4_path(name).ok_or("the file is missing")?;
        let model = Model::open(&path)?;
        let tokens = made_up_tokens(DECODED, model.decoder.vocab_size);
        let mut backends = Vec::new();
        for options in options {
            let backend = gpu::open(&model, options)?;
            let report = backend.step_report().expect("CUDA has a report");
            let wanted = matches!(options.step_kernel, StepKernel::Always);
            check(report.enabled || !wanted, format!("{name}: {report:?}"))?;
            backends.push(backend);
        }
        for (position, &token) in tokens.iter().enumerate() {
            let mut logits = Vec::new();
            for backend in &mut backends {
                logits.push(common::decode(backend, token, position)?.to_vec());
            }
            let same = logits.windows(2).all(|pair| pair[0] == pair[1]);
            check(same, format!("{name}: other bits at position {position}"))?;
        }
    }
    Ok(())
}

fn graph_and_direct_are_the_same() -> TestResult {
    decodes_the_same(&[
        Options::default(),
        Options {
            graph_disabled: Some("for the test".to_owned()),
            ..Options::default()
        },
    ])
}

fn step_and_separate_are_the_same() -> TestResult {
    decodes_the_same(
        &[
            StepKernel::Always,
            StepKernel::Never("for the test".to_owned()),
        ]
        .map(|step_kernel| Options {
            step_kernel,
            ..Options::default()
        }),
    )
}

/// The window and a chunk are 128 tokens in one, and more than the context in the other.
fn a_ring_is_as_good_as_a_full_cache() -> TestResult {
    decodes_the_same(&[64, 512].map(|chunk_len| Options {
        context_len: Some(512),
        chunk_len: Some(chunk_len),
        ..Options::default()
    }))
}

/// Less and less memory is left free, a megabyte at a time: before everything is refused, the table of 2.4 MB moves.
fn a_table_goes_to_the_host() -> TestResult {
    /// What is kept for the driver, and more than memory is rounded up by.
    const SPARE: usize = (256 << 20) + (16 << 20);
    let path = common::gemma4_path("e-f32").ok_or("the file is missing")?;
    let model = Model::open(&path)?;
    let device = Device::open(0)?;
    let options = Options {
        context_len: Some(256),
        chunk_len: Some(64),
        ..Options::default()
    };
    let open = || {
        let decoder = model.decoder.clone();
        CudaBackend::new(device.clone(), decoder, &options, &mut |_, _| {})
    };
    let tokens = made_up_tokens(100, model.decoder.vocab_size);
    let logits = |mut backend: CudaBackend| -> Result<Vec<f32>> {
        let mut logits = common::read(&mut backend, &tokens[..50], 0)?.to_vec();
        for (position, &token) in tokens.iter().enumerate().skip(50) {
            logits.extend(common::decode(&mut backend, token, position)?);
        }
        Ok(logits)
    };
    // Kernels are loaded when they are first asked for, and stay.
    let expected = logits(open()?)?;
    let backend = open()?;
    let (left, on_device) = (device.memory()?.0, backend.weights_bytes());
    drop(backend);
    for lacking in (0..).step_by(1 << 20) {
        let filler = device.allocate(left - SPARE + lacking)?;
        let backend = open()?;
        let on_host = on_device - backend.weights_bytes();
        if on_host > 0 {
            let table = 12 * 32 * model.decoder.vocab_size * size_of::<f32>();
            check(on_host == table, format!("{on_host} bytes are on the host"))?;
            check(logits(backend)? == expected, "other logits")?;
            break;
        }
        drop(filler);
    }
    Ok(())
}
