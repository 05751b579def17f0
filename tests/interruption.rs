//! A batch that is broken off behind any of its operations leaves no trace, whatever the KV cache.

mod common;

use std::ops::ControlFlow;

use common::gguf_writer::RandomModel;
use sharpi::{
    backend::{KvOptions, Tiles},
    cpu::{CpuBackend, Options},
    engine::Session,
    model::{Gguf, Model},
    quant::TensorType,
};

/// Rings and tiles are full, and tokens are evicted where there is a budget.
const READ: usize = 300;
/// Each is read in two batches from the one before it on.
const LONG: usize = 440;
const LEN: usize = 600;
/// Whose window a ring has no longer when batches behind `READ` were begun.
const BACK: usize = 150;

/// Two layers, the second with a sliding window where one is given.
fn model(window: Option<usize>) -> Model {
    let small = RandomModel {
        hidden_size: 64,
        feed_forward_length: 64,
        head_count: 2,
        head_count_kv: 1,
        head_dim: 32,
        ..RandomModel::new("qwen3", TensorType::F16)
    };
    let file = small.file();
    let gguf = Gguf::from_bytes("a random model", file.to_bytes()).expect("a good file");
    let mut model = Model::from_gguf(gguf).expect("a good model");
    let decoder = std::sync::Arc::get_mut(&mut model.decoder).expect("nobody else has it");
    decoder.layers[1].attention.window = window;
    model
}

fn session(model: &Model, options: KvOptions) -> Session {
    let backend = CpuBackend::with_options(
        model.decoder.clone(),
        1024,
        Options {
            kv: options,
            ..Options::exact(2)
        },
    )
    .unwrap();
    Session::new(Box::new(backend))
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Breaks when it is asked for the last of so many times.
fn breaking(mut times: usize) -> impl FnMut() -> ControlFlow<()> + Send {
    move || {
        times = times.saturating_sub(1);
        match times {
            0 => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        }
    }
}

/// The logits behind `prompt`, and how often it was asked whether to go on. `None` where that was `times` times.
fn read(session: &mut Session, prompt: &[u32], times: usize) -> (Option<Vec<u32>>, usize) {
    let (mut go_on, mut asked) = (breaking(times), 0);
    let mut furthest = 0;
    let logits = session.prefill(prompt, &mut |done, total| {
        assert!(furthest <= done && done <= total && total == prompt.len());
        (furthest, asked) = (done, asked + 1);
        go_on()
    });
    (logits.unwrap().map(bits), asked)
}

const NEVER: usize = usize::MAX;

/// The logits behind every step of a session, of which each is tried `times` times before, and how often the longest step asked
/// whether to go on.
fn walk(model: &Model, options: KvOptions, times: Option<usize>) -> (Vec<Vec<u32>>, usize) {
    let token = |i: u32| i.wrapping_mul(2_654_435_761) % model.decoder.vocab_size as u32;
    let text: Vec<u32> = (0..LEN as u32).map(token).collect();
    let back: Vec<u32> = [&text[..BACK], &text[..50]].concat();
    let mut session = session(model, options);
    let mut all = vec![read(&mut session, &text[..READ], NEVER).0.unwrap()];

    if let Some(times) = times {
        let mut go_on = breaking(times);
        let decoded = session.decode_watched(text[READ], &mut |_| go_on());
        match decoded.unwrap() {
            None => assert_eq!(session.len(), READ),
            Some(_) => session.rewind(READ),
        }
        assert!(read(&mut session, &text[..LONG], times).0.is_none());
        session.rewind(READ);
    }
    all.push(bits(session.decode(text[READ]).unwrap()));

    if let Some(times) = times {
        assert!(read(&mut session, &text[..LONG], times).0.is_none());
        let done = session.len();
        assert!((READ + 1..LONG).contains(&done), "{done}");
    }
    let (logits, asked) = read(&mut session, &text[..LONG], NEVER);
    all.extend(logits);

    if let Some(times) = times {
        // Other tokens than those that come to these places then.
        let farther = [&text[..LONG], &back[..LEN - LONG]].concat();
        assert!(read(&mut session, &farther, times).0.is_none());
        session.rewind(LONG);
    }
    all.push(bits(session.decode(text[LONG]).unwrap()));

    if let Some(times) = times {
        assert!(read(&mut session, &text, times).0.is_none());
    }
    all.extend(read(&mut session, &back, NEVER).0);
    all.push(bits(session.decode(text[0]).unwrap()));
    (all, asked)
}

fn assert_no_trace(window: Option<usize>, tiles: Option<Tiles>, budget: Option<usize>) {
    let model = model(window);
    let options = KvOptions { tiles, budget };
    let (expected, asked) = walk(&model, options, None);
    // Behind every operation but the last of two batches, and before each and behind all.
    assert!(asked > 2 * model.decoder.ops.len() / 2, "{asked}");
    for times in 1..asked {
        let (found, _) = walk(&model, options, Some(times));
        for (step, (found, expected)) in found.iter().zip(&expected).enumerate() {
            assert!(
                found == expected,
                "step {step}, broken off the {times}th time"
            );
        }
    }
}

#[test]
fn in_a_full_cache() {
    assert_no_trace(None, None, None);
}

#[test]
fn in_a_sliding_window() {
    assert_no_trace(Some(50), None, None);
}

#[test]
fn in_tiles() {
    assert_no_trace(None, Some(Tiles::of(4, 3)), None);
}

#[test]
fn in_a_budget() {
    assert_no_trace(None, None, Some(100));
}

#[test]
fn in_a_budget_with_tiles_and_a_window() {
    assert_no_trace(Some(50), Some(Tiles::of(8, 8)), Some(300));
}
