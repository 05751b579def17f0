//! KV caches with a budget, on the CPU.

mod common;

use std::{ops::ControlFlow, sync::Arc};

use common::{gguf_writer::RandomModel, textbook};
use sharpi::{
    backend::{Backend, Batch, KvOptions, Tiles, Want},
    cpu::{CpuBackend, Options},
    engine::Session,
    model::{Gguf, Model},
    quant::TensorType,
};

const PROMPT_LEN: usize = 300;
const LEN: usize = 400;

/// Two layers, the second with a sliding window where one is given.
fn model(architecture: &'static str, window: Option<usize>) -> Arc<Model> {
    let file = RandomModel::new(architecture, TensorType::F16).file();
    let gguf = Gguf::from_bytes("a random model", file.to_bytes()).expect("a good file");
    let mut model = Model::from_gguf(gguf).expect("a good model");
    let decoder = Arc::get_mut(&mut model.decoder).expect("nobody else has it");
    decoder.layers[1].attention.window = window;
    Arc::new(model)
}

fn tokens(model: &Model) -> Vec<u32> {
    (0..LEN as u32)
        .map(|i| i.wrapping_mul(2_654_435_761) % model.decoder.vocab_size as u32)
        .collect()
}

fn backend(model: &Model, tiles: Option<Tiles>, budget: Option<usize>) -> CpuBackend {
    let options = KvOptions { tiles, budget };
    CpuBackend::with_options(
        model.decoder.clone(),
        1024,
        Options {
            kv: options,
            ..Options::exact(2)
        },
    )
    .unwrap()
}

/// The logits after every token, of which the first [`PROMPT_LEN`] are a prompt; what follows is read in chunks of a length.
fn logits(model: &Model, tiles: Option<Tiles>, budget: Option<usize>, chunk: usize) -> Vec<f32> {
    let mut backend = backend(model, tiles, budget);
    let tokens = tokens(model);
    let (prompt, rest) = tokens.split_at(PROMPT_LEN);
    let (first, last) = prompt.split_at(PROMPT_LEN - 100);
    let mut logits = Vec::new();
    for (i, tokens) in first.chunks(100).enumerate() {
        logits.extend(common::read_all(&mut backend, tokens, i * 100).unwrap());
    }
    let end = Batch {
        ends_prompt: true,
        ..Batch::prompt(last, PROMPT_LEN - 100, Want::All)
    };
    logits.extend(backend.compute(end).unwrap().logits);
    for (i, tokens) in rest.chunks(chunk).enumerate() {
        let position = PROMPT_LEN + i * chunk;
        logits.extend(common::read_all(&mut backend, tokens, position).unwrap());
    }
    logits
}

#[test]
fn the_tokens_that_stay_are_those_of_the_description() {
    for (architecture, window) in [("qwen3", None), ("qwen2", None), ("llama", Some(50))] {
        let model = model(architecture, window);
        for budget in [68, 69, 131, 299] {
            let cache = textbook::Cache {
                tiles: None,
                evict: Some((PROMPT_LEN, budget)),
            };
            let expected = textbook::logits_by(&model, &tokens(&model), cache);
            let size = textbook::size(&expected);
            let near = logits(&model, None, Some(budget), 100);
            let errors = near.iter().zip(&expected);
            let errors = errors.map(|(near, expected)| (f64::from(*near) - expected).abs() / size);
            let greatest = errors.fold(0.0, f64::max);
            println!("{architecture}, {budget} tokens: {greatest:e}");
            assert!(greatest < 5e-6, "{architecture}, {budget}: {greatest:e}");
        }
    }
}

/// Each token of a chunk is computed for itself.
#[test]
fn what_follows_gives_the_same_bits_in_chunks_of_any_length() {
    let model = model("qwen3", None);
    for tiles in [None, Some(Tiles::of(4, 4))] {
        for budget in [100, 270] {
            let whole = bits(&logits(&model, tiles, Some(budget), 100));
            for chunk in [1, 33] {
                let cut = bits(&logits(&model, tiles, Some(budget), chunk));
                assert!(cut == whole, "{tiles:?}, {budget} in chunks of {chunk}");
            }
        }
    }
}

/// Rounding once more moves a logit by no more than rounding to these bits may.
#[test]
fn tiles_of_what_stays_are_nearly_what_it_was() {
    let model = model("qwen3", None);
    let behind = PROMPT_LEN * model.decoder.vocab_size;
    let exact = logits(&model, None, Some(290), 100);
    for tiles in Tiles::ALL {
        let near = logits(&model, Some(tiles), Some(290), 100);
        let squares =
            |pairs: &mut dyn Iterator<Item = f32>| pairs.map(|x| f64::from(x).powi(2)).sum::<f64>();
        let pairs = near[behind..].iter().zip(&exact[behind..]);
        let error = squares(&mut pairs.map(|(near, exact)| near - exact));
        let error = (error / squares(&mut exact[behind..].iter().copied())).sqrt();
        println!("{tiles}: {error:e}");
        let step = 1.0 / f64::from((1 << tiles.value_bits) - 1);
        assert!(error > 0.0 && error < 3.0 * step, "{tiles}: {error:e}");
    }
}

/// The logits behind a prompt, and how many of its tokens were there before.
fn read(session: &mut Session, prompt: &[u32]) -> (Vec<u32>, usize) {
    let mut there = None;
    let mut progress = |done, _| {
        there.get_or_insert(done);
        ControlFlow::Continue(())
    };
    let logits = session.prefill(prompt, &mut progress).unwrap().unwrap();
    (bits(logits), there.expect("progress is heard of"))
}

#[test]
fn a_session_goes_on_behind_what_was_evicted_and_reads_again_before_it() {
    let model = model("qwen3", None);
    let tokens = tokens(&model);
    for tiles in [None, Some(Tiles::of(4, 4))] {
        let new_session = || Session::new(Box::new(backend(&model, tiles, Some(100))));
        let mut session = new_session();
        read(&mut session, &tokens[..200]);
        // A later prompt evicts again.
        let (longer, there) = read(&mut session, &tokens);
        assert_eq!(there, 200);
        // Nothing is left of tokens before its end, so that even its last one is read anew.
        let mut other = tokens[..350].to_vec();
        other.extend(&tokens[..20]);
        for prompt in [&other[..], &tokens[..200]] {
            let (again, there) = read(&mut session, prompt);
            assert_eq!(there, 0);
            assert!(again == read(&mut new_session(), prompt).0);
        }
        let (same_longer, there) = read(&mut session, &tokens);
        assert_eq!(there, 200);
        assert!(same_longer == longer);
        // Nothing was evicted where there is room.
        let mut session = new_session();
        read(&mut session, &tokens[..90]);
        assert_eq!(read(&mut session, &tokens[..80]).1, 79);
    }
}

/// The cache was filled farther than the text reaches that is then evicted.
#[test]
fn what_a_session_went_back_from_is_not_kept() {
    let model = model("qwen3", None);
    let tokens = tokens(&model);
    for tiles in [None, Some(Tiles::of(4, 4))] {
        let new_session = || Session::new(Box::new(backend(&model, tiles, Some(300))));
        let other = [&tokens[..250], &tokens[..80]].concat();
        let mut session = new_session();
        read(&mut session, &tokens[..290]);
        for &token in &tokens[290..350] {
            session.decode(token).unwrap();
        }
        let (logits, there) = read(&mut session, &other);
        assert_eq!(there, 250);
        let mut new = new_session();
        assert!(logits == read(&mut new, &other).0);
        for &token in &tokens[..20] {
            let [ours, theirs] = [&mut session, &mut new].map(|s| bits(s.decode(token).unwrap()));
            assert!(ours == theirs, "{tiles:?}");
        }
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}
