//! The compressed KV cache on a GPU, held to the CPU's, which `tests/kv_tiles.rs` holds to its description.

mod common;

use std::{ops::ControlFlow, sync::Arc};

use anyhow::Context;
use common::{
    gguf_writer::RandomModel,
    gpu::{self, Test, TestResult, check},
};
use sharpi::{
    backend::{Backend, KvOptions, Tiles},
    cpu::CpuBackend,
    cuda::Options,
    engine::{Divergence, Session, made_up_tokens},
    model::Model,
    quant::TensorType,
};

/// Several tiles, and a piece of one.
const LEN: usize = 700;

/// So long that there are tiles.
const CONTEXT_LEN: usize = 4096;

/// What the mean divergence may be where prompts are read: in float16, and a number that lies between two codes may become
/// the other one.
const ROUNDED: f64 = 1e-3;

const GEMMA: &str = "gemma_follows_the_cpu";

fn main() {
    let tests: [Test; 5] = [
        ("prompts_follow_the_cpu", prompts_follow_the_cpu),
        ("decoding_follows_the_cpu", decoding_follows_the_cpu),
        (
            "graph_and_direct_launches_give_the_same_bits",
            graph_and_direct_are_the_same,
        ),
        (
            "a_session_that_went_back_computes_what_a_new_one_does",
            going_back,
        ),
        (GEMMA, gemma_follows_the_cpu),
    ];
    let lacking: &[&str] = match common::gemma4_path("e-f32") {
        Some(_) => &[],
        None => {
            eprintln!("a model is not here, its test is ignored: run tests/make-gemma4.sh");
            &[GEMMA]
        }
    };
    gpu::run(&tests, lacking);
}

/// Random weights in float32, which no step rounds to 8 bits.
fn model(head_dim: u64) -> anyhow::Result<Arc<Model>> {
    let random = RandomModel {
        head_dim,
        context_length: CONTEXT_LEN as u32,
        ..RandomModel::new("qwen3", TensorType::F32)
    };
    random.model()
}

fn options(tiles: Tiles, chunk_len: usize) -> Options {
    Options {
        context_len: Some(CONTEXT_LEN),
        chunk_len: Some(chunk_len),
        kv: KvOptions {
            tiles: Some(tiles),
            budget: None,
        },
        ..Options::default()
    }
}

/// The CPU's logits (vocab_size, LEN).
fn expected(model: &Model, tokens: &[u32], tiles: Option<Tiles>) -> anyhow::Result<Vec<f32>> {
    let options = KvOptions {
        tiles,
        budget: None,
    };
    let mut cpu = CpuBackend::with_kv(model.decoder.clone(), CONTEXT_LEN, 0, options)?;
    let chunk_len = cpu.limits().chunk_len;
    let mut logits = Vec::new();
    for (i, chunk) in tokens.chunks(chunk_len).enumerate() {
        logits.extend_from_slice(common::read_all(&mut cpu, chunk, i * chunk_len)?);
    }
    Ok(logits)
}

/// Calls `hold` for each size of heads and format, with the tokens and the CPU's logits.
fn for_each(
    hold: impl Fn(&Model, Tiles, &[u32], &dyn Fn(usize) -> Vec<f32>) -> TestResult,
) -> TestResult {
    for head_dim in [64, 128, 256, 512] {
        let model = model(head_dim)?;
        let vocab_size = model.decoder.vocab_size;
        let tokens = made_up_tokens(LEN, vocab_size);
        for tiles in Tiles::ALL {
            let expected = expected(&model, &tokens, Some(tiles))?;
            eprint!("heads of {head_dim}, {tiles}: ");
            hold(&model, tiles, &tokens, &|position| {
                expected[position * vocab_size..][..vocab_size].to_vec()
            })?;
        }
    }
    Ok(())
}

/// The mean divergence of a prompt's last token, by how the prompt is cut. The longest comes first: none finds tiles that
/// another one has left.
fn prompts_follow_the_cpu() -> TestResult {
    const LENGTHS: [usize; 8] = [LEN, 512, 385, 384, 300, 257, 256, 20];
    for_each(|model, tiles, tokens, expected| {
        let mut worst: f64 = 0.0;
        for chunk_len in [1, 31, 128, 200, 512, LEN] {
            let mut cuda = gpu::open(model, &options(tiles, chunk_len))?;
            let mut divergence = Divergence::default();
            for len in LENGTHS {
                let mut logits = Vec::new();
                for (i, chunk) in tokens[..len].chunks(chunk_len).enumerate() {
                    logits = common::read(&mut cuda, chunk, i * chunk_len)?.to_vec();
                }
                divergence.push(&logits, &expected(len - 1));
            }
            worst = worst.max(divergence.mean());
        }
        eprintln!("mean KL {worst:.1e}");
        check(worst < ROUNDED, format!("mean KL {worst:e}"))
    })
}

fn decoding_follows_the_cpu() -> TestResult {
    for_each(|model, tiles, tokens, expected| {
        // From the start; behind prompts that end within a tile, and with one.
        for (prompt, bound) in [(0, 1e-5), (150, ROUNDED), (384, ROUNDED)] {
            let mut cuda = gpu::open(model, &options(tiles, 512))?;
            if prompt > 0 {
                common::read(&mut cuda, &tokens[..prompt], 0)?;
            }
            let mut divergence = Divergence::default();
            for (position, &token) in tokens.iter().enumerate().skip(prompt) {
                let logits = common::decode(&mut cuda, token, position)?;
                divergence.push(logits, &expected(position));
            }
            let mean = divergence.mean();
            eprint!("behind {prompt}: mean KL {mean:.1e} ");
            check(mean < bound, format!("behind {prompt}: mean KL {mean:e}"))?;
        }
        eprintln!();
        Ok(())
    })
}

fn graph_and_direct_are_the_same() -> TestResult {
    for head_dim in [64, 128] {
        let model = model(head_dim)?;
        let tokens = made_up_tokens(LEN, model.decoder.vocab_size);
        for tiles in Tiles::ALL {
            let direct = Options {
                graph_disabled: Some("for the test".to_owned()),
                ..options(tiles, 128)
            };
            let mut graph = gpu::open(&model, &options(tiles, 128))?;
            let mut direct = gpu::open(&model, &direct)?;
            for (position, &token) in tokens.iter().enumerate() {
                let same = common::decode(&mut graph, token, position)?
                    == common::decode(&mut direct, token, position)?;
                check(same, format!("{tiles}: other bits at position {position}"))?;
            }
        }
    }
    Ok(())
}

/// Layers with windows stay as they are; others have heads of 512 values, which some layers share.
fn gemma_follows_the_cpu() -> TestResult {
    for name in ["e-f32", "dense-f32"] {
        let path = common::gemma4_path(name).ok_or("the file is missing")?;
        let model = Model::open(&path)?;
        let vocab_size = model.decoder.vocab_size;
        let tokens = made_up_tokens(LEN, vocab_size);
        for tiles in Tiles::ALL {
            let expected = expected(&model, &tokens, Some(tiles))?;
            let expected = |position: usize| &expected[position * vocab_size..][..vocab_size];
            for chunk_len in [33, 512] {
                let mut cuda = gpu::open(&model, &options(tiles, chunk_len))?;
                let mut divergence = Divergence::default();
                let prompt = 500;
                let mut logits = Vec::new();
                for (i, chunk) in tokens[..prompt].chunks(chunk_len).enumerate() {
                    logits = common::read(&mut cuda, chunk, i * chunk_len)?.to_vec();
                }
                divergence.push(&logits, expected(prompt - 1));
                for (position, &token) in tokens.iter().enumerate().skip(prompt) {
                    let logits = common::decode(&mut cuda, token, position)?;
                    divergence.push(logits, expected(position));
                }
                let mean = divergence.mean();
                eprintln!("{name}, {tiles}, chunks of {chunk_len}: mean KL {mean:.1e}");
                check(mean < ROUNDED, format!("{name}, {tiles}: mean KL {mean:e}"))?;
            }
        }
    }
    Ok(())
}

/// Within what the ring remembers, and farther.
fn going_back() -> TestResult {
    let model = model(128)?;
    let tokens = made_up_tokens(LEN, model.decoder.vocab_size);
    for tiles in Tiles::ALL {
        for back in [1, 100, 300, 650] {
            let mut text = tokens[..LEN - back].to_vec();
            text.extend(tokens[..20].iter().rev());
            let logits = |texts: &[&[u32]]| -> anyhow::Result<Vec<f32>> {
                let mut session = Session::new(Box::new(gpu::open(&model, &options(tiles, 64))?));
                let mut logits = Vec::new();
                for text in texts {
                    let mut progress = |_, _| ControlFlow::Continue(());
                    let read = session.prefill(text, &mut progress)?;
                    logits = read.context("nobody stopped it")?.to_vec();
                }
                Ok(logits)
            };
            let mut divergence = Divergence::default();
            divergence.push(&logits(&[&tokens, &text])?, &logits(&[&text])?);
            check(
                divergence.mean() < 1e-5,
                format!("{tiles}, {back} tokens back: {:e}", divergence.mean()),
            )?;
        }
    }
    Ok(())
}
