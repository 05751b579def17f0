//! The compressed KV cache on a GPU, held to the CPU's, which `tests/kv_tiles.rs` holds to its description.

mod common;

use std::{ops::ControlFlow, sync::Arc};

use anyhow::Context;
use common::{
    gguf_writer::RandomModel,
    gpu::{self, Test, TestResult, check},
};
use sharpi::{
    backend::{Backend, KvOptions, MIN_BUDGET, SamplingParams, StreamStart, Tiles},
    cpu::{self, CpuBackend},
    cuda::{Options, StepKernel},
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

/// The same where tokens are evicted by what they are worth: of two that are worth nearly the same the other one may stay, by
/// which scales of the tile that it comes into change.
const CHOSEN: f64 = 1e-2;

const GEMMA: &str = "gemma_follows_the_cpu";
const GEMMA_EVICTS: &str = "gemma_evicts_as_the_cpu";

fn main() {
    let tests: [Test; 11] = [
        ("prompts_follow_the_cpu", prompts_follow_the_cpu),
        ("decoding_follows_the_cpu", decoding_follows_the_cpu),
        (
            "graph_and_direct_launches_give_the_same_bits",
            graph_and_direct_are_the_same,
        ),
        (
            "the_step_kernel_and_separate_kernels_give_the_same_bits",
            step_and_separate_are_the_same,
        ),
        (
            "the_step_kernel_leaves_larger_heads_to_separate_kernels",
            larger_heads_are_refused,
        ),
        ("long_chunks_follow_the_cpu", long_chunks_follow_the_cpu),
        (
            "a_session_that_went_back_computes_what_a_new_one_does",
            going_back,
        ),
        (GEMMA, gemma_follows_the_cpu),
        (
            "what_stays_of_a_prompt_is_what_stays_on_the_cpu",
            evicting_follows_the_cpu,
        ),
        (GEMMA_EVICTS, gemma_evicts_as_the_cpu),
        (
            "evicting_leaves_graph_step_kernel_and_streams_as_they_are",
            evicting_changes_no_way,
        ),
    ];
    let lacking: &[&str] = match common::gemma4_path("e-f32") {
        Some(_) => &[],
        None => {
            eprintln!("a model is not here, its tests are ignored: run tests/make-gemma4.sh");
            &[GEMMA, GEMMA_EVICTS]
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
    let mut cpu = CpuBackend::with_options(
        model.decoder.clone(),
        CONTEXT_LEN,
        cpu::Options {
            kv: options,
            ..cpu::Options::exact(0)
        },
    )?;
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

/// From the start over several ends of tiles, and behind prompts: such that chunks of what is seen begin and end anywhere in
/// tiles, and the ring has gone round. Heads of one key/value head are fewer than 8, or more; or there are more key/value heads
/// than blocks, and what each sees is one chunk.
fn step_and_separate_are_the_same() -> TestResult {
    for (head_dim, head_count, head_count_kv) in [
        (64, 16, 4),
        (128, 16, 4),
        (64, 24, 2),
        (128, 28, 4),
        (128, 10, 1),
        (64, 160, 160),
    ] {
        let random = RandomModel {
            head_dim,
            head_count,
            head_count_kv,
            context_length: CONTEXT_LEN as u32,
            ..RandomModel::new("qwen3", TensorType::Q4_K)
        };
        let model = random.model()?;
        let prompt = |len: usize| made_up_tokens(len, model.decoder.vocab_size);
        for tiles in Tiles::ALL {
            let case = format!("{head_count} heads of {head_dim} over {head_count_kv}, {tiles}");
            let options = options(tiles, 512);
            gpu::compare_both_ways(&case, &model, &options, &[prompt(1)], LEN)?;
            let lengths = (1..=31).map(|i| i * 130).chain([4050]);
            let prompts: Vec<Vec<u32>> = lengths.map(prompt).collect();
            gpu::compare_both_ways(&case, &model, &options, &prompts, 12)?;
            let around_an_end = [prompt(1020), prompt(4000)];
            gpu::compare_both_ways(&case, &model, &options, &around_an_end, 45)?;
        }
    }
    Ok(())
}

fn larger_heads_are_refused() -> TestResult {
    let model = model(256)?;
    let options = Options {
        step_kernel: StepKernel::Always,
        ..options(Tiles::ALL[0], 512)
    };
    let cuda = gpu::open(&model, &options)?;
    let report = cuda.step_report().expect("CUDA has a report");
    let reason = report.disabled_reason.as_deref().unwrap_or_default();
    check(
        !report.enabled && reason.contains("heads of more than 128 values"),
        format!("{report:?}"),
    )
}

/// Of so many key/value heads that what each sees is cut into few chunks: longer ones than the ring.
fn long_chunks_follow_the_cpu() -> TestResult {
    const LONG: usize = 3000;
    const DECODED: usize = 40;
    for head_dim in [64, 128] {
        let random = RandomModel {
            head_dim,
            head_count: 22,
            head_count_kv: 22,
            context_length: CONTEXT_LEN as u32,
            ..RandomModel::new("qwen3", TensorType::F32)
        };
        let model = random.model()?;
        let vocab_size = model.decoder.vocab_size;
        let tokens = made_up_tokens(LONG, vocab_size);
        let prompt = LONG - DECODED;
        for tiles in Tiles::ALL {
            let expected = expected(&model, &tokens, Some(tiles))?;
            let mut cuda = gpu::both_ways(&model, &options(tiles, 512))?;
            for cuda in &mut cuda {
                for (i, chunk) in tokens[..prompt].chunks(512).enumerate() {
                    common::read(cuda, chunk, i * 512)?;
                }
                let mut divergence = Divergence::default();
                for (position, &token) in tokens.iter().enumerate().skip(prompt) {
                    let logits = common::decode(cuda, token, position)?;
                    divergence.push(logits, &expected[position * vocab_size..][..vocab_size]);
                }
                let mean = divergence.mean();
                eprintln!("heads of {head_dim}, {tiles}: mean KL {mean:.1e}");
                check(mean < ROUNDED, format!("{tiles}: mean KL {mean:e}"))?;
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

/// All ways to keep tokens.
fn formats() -> impl Iterator<Item = Option<Tiles>> {
    std::iter::once(None).chain(Tiles::ALL.map(Some))
}

fn budgeted(tiles: Option<Tiles>, budget: usize, chunk_len: usize) -> Options {
    Options {
        context_len: Some(CONTEXT_LEN),
        chunk_len: Some(chunk_len),
        kv: KvOptions {
            tiles,
            budget: Some(budget),
        },
        ..Options::default()
    }
}

/// The logits behind a prompt, after each of the tokens behind it, behind the second prompt that they then belong to, and after
/// 50 more tokens.
fn follow(session: &mut Session, tokens: &[u32], ends: Ends) -> anyhow::Result<Vec<Vec<f32>>> {
    let mut progress = |_, _| ControlFlow::Continue(());
    let Ends {
        first,
        decoded,
        second,
    } = ends;
    let read = session.prefill(&tokens[..first], &mut progress)?;
    let mut logits = vec![read.context("nobody stopped it")?.to_vec()];
    for &token in &tokens[first..decoded] {
        logits.push(session.decode(token)?.to_vec());
    }
    let read = session.prefill(&tokens[..second], &mut progress)?;
    logits.push(read.context("nobody stopped it")?.to_vec());
    for &token in tokens[..50].iter().rev() {
        logits.push(session.decode(token)?.to_vec());
    }
    Ok(logits)
}

/// Of tokens, where the first prompt ends, what is decoded behind it, and the second prompt.
#[derive(Clone, Copy)]
struct Ends {
    first: usize,
    decoded: usize,
    second: usize,
}

/// How far a GPU's session, in which both prompts evict, is from one on the CPU.
fn holds_evicting(
    model: &Model,
    name: &str,
    tiles: Option<Tiles>,
    budget: usize,
    ends: Ends,
    chunk_len: usize,
) -> TestResult {
    let tokens = made_up_tokens(LEN, model.decoder.vocab_size);
    let options = budgeted(tiles, budget, chunk_len);
    let cpu = CpuBackend::with_options(
        model.decoder.clone(),
        CONTEXT_LEN,
        cpu::Options {
            kv: options.kv,
            ..cpu::Options::exact(0)
        },
    )?;
    let expected = follow(&mut Session::new(Box::new(cpu)), &tokens, ends)?;
    let cuda = gpu::open(model, &options)?;
    let logits = follow(&mut Session::new(Box::new(cuda)), &tokens, ends)?;
    let mut divergence = Divergence::default();
    for (logits, expected) in logits.iter().zip(&expected) {
        divergence.push(logits, expected);
    }
    let kv_type = tiles.map_or("f16".to_owned(), |tiles| tiles.to_string());
    let mean = divergence.mean();
    let case = format!("{name}, {kv_type}, budget {budget}: mean KL {mean:.1e}");
    eprintln!("{case}");
    let bound = match budget {
        MIN_BUDGET => ROUNDED,
        _ => CHOSEN,
    };
    check(mean < bound, case)
}

/// To random weights all tokens are worth nearly the same, and rounding decides which of them stay: so nearly none goes, or all
/// that may. Behind the second prompt of the last case a tile is made of tokens that stayed.
const OF_RANDOM: [(usize, Ends, usize); 4] = [
    (MIN_BUDGET, ends(400, 460, 700), 512),
    (MIN_BUDGET, ends(90, 95, 260), 64),
    (298, ends(300, 303, 306), 128),
    (497, ends(500, 503, 506), 512),
];

const fn ends(first: usize, decoded: usize, second: usize) -> Ends {
    Ends {
        first,
        decoded,
        second,
    }
}

/// Behind the first prompt tokens are evicted, behind the second one again.
fn evicting_follows_the_cpu() -> TestResult {
    for head_dim in [64, 128, 256, 512] {
        let model = model(head_dim)?;
        for tiles in formats() {
            for (budget, ends, chunk_len) in OF_RANDOM {
                let name = format!("heads of {head_dim}");
                holds_evicting(&model, &name, tiles, budget, ends, chunk_len)?;
            }
        }
    }
    let demo = Model::demo()?;
    for tiles in formats() {
        for (budget, ends, chunk_len) in [
            (100, ends(400, 460, 700), 512),
            (200, ends(401, 480, 600), 128),
            (390, ends(640, 650, 690), 64),
        ] {
            holds_evicting(&demo, "trained", tiles, budget, ends, chunk_len)?;
        }
    }
    Ok(())
}

fn gemma_evicts_as_the_cpu() -> TestResult {
    for name in ["e-f32", "dense-f32"] {
        let path = common::gemma4_path(name).ok_or("the file is missing")?;
        let model = Model::open(&path)?;
        for tiles in formats() {
            for (budget, ends, chunk_len) in OF_RANDOM {
                holds_evicting(&model, name, tiles, budget, ends, chunk_len)?;
            }
        }
    }
    Ok(())
}

type Change = fn(&mut Options);

/// The same bits by the graph, by direct launches and by the step kernel, where there is one, on every run; and what the
/// device chooses by itself is the likeliest each time.
fn evicting_changes_no_way() -> TestResult {
    const ENDS: Ends = ends(400, 600, LEN);
    for head_dim in [64, 128] {
        let model = model(head_dim)?;
        let tokens = made_up_tokens(LEN, model.decoder.vocab_size);
        for tiles in formats() {
            let session = |change: Change| {
                let mut options = budgeted(tiles, 250, 128);
                options.step_kernel = StepKernel::Never("for the test".to_owned());
                change(&mut options);
                anyhow::Ok(Session::new(Box::new(gpu::open(&model, &options)?)))
            };
            let graph = follow(&mut session(|_| {})?, &tokens, ENDS)?;
            let ways: [(&str, Change); 3] = [
                ("the same way", |_| {}),
                ("direct launches", |options| {
                    options.graph_disabled = Some("for the test".to_owned());
                }),
                ("the step kernel", |options| {
                    options.step_kernel = StepKernel::Always;
                }),
            ];
            for (way, change) in ways {
                let other = follow(&mut session(change)?, &tokens, ENDS)?;
                check(other == graph, format!("{tiles:?}: other bits by {way}"))?;
            }

            let mut session = session(|_| {})?;
            let mut progress = |_, _| ControlFlow::Continue(());
            let likeliest = |logits: &[f32]| {
                let order = |a: &usize, b: &usize| logits[*a].total_cmp(&logits[*b]).then(b.cmp(a));
                (0..logits.len()).max_by(order).unwrap_or(0) as u32
            };
            let read = session.prefill(&tokens[..400], &mut progress)?;
            let first = likeliest(read.context("nobody stopped it")?);
            let mut expected = vec![first];
            for i in 0..150 {
                expected.push(likeliest(session.decode(expected[i])?));
            }
            session.rewind(400);
            let text = [&tokens[..400], &[first]].concat();
            let mut stream = session.stream(&StreamStart {
                text: &text,
                sampling: &greedy(),
                banned: &[],
                uniforms: &[0.0; 150],
            })?;
            for (i, &expected) in expected[1..].iter().enumerate() {
                let chosen = stream.next_token()?;
                let same = chosen == expected;
                check(
                    same,
                    format!("{tiles:?}: token {i} is {chosen}, not {expected}"),
                )?;
            }
        }
    }
    Ok(())
}

fn greedy() -> SamplingParams {
    SamplingParams {
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        repeat_penalty: 1.0,
        repeat_last_n: 0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        seed: 0,
    }
}
