//! The compressed KV cache on the CPU.

mod common;

use std::{ops::ControlFlow, sync::Arc};

use common::{gguf_writer::RandomModel, textbook};
use sharpi::{
    backend::{KvOptions, Tiles},
    cpu::{CpuBackend, Options},
    engine::Session,
    model::{Gguf, Model},
    quant::TensorType,
};

/// Several tiles, and a piece of one.
const LEN: usize = 700;

fn model() -> Arc<Model> {
    let file = RandomModel::new("qwen3", TensorType::F16).file();
    let gguf = Gguf::from_bytes("a random model", file.to_bytes()).expect("a good file");
    Arc::new(Model::from_gguf(gguf).expect("a good model"))
}

fn tokens(model: &Model) -> Vec<u32> {
    (0..LEN as u32)
        .map(|i| i.wrapping_mul(2_654_435_761) % model.decoder.vocab_size as u32)
        .collect()
}

fn backend(model: &Model, tiles: Option<Tiles>) -> CpuBackend {
    let options = KvOptions {
        tiles,
        budget: None,
    };
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

/// The logits after every token, read in chunks of a length.
fn logits(model: &Model, tiles: Option<Tiles>, chunk: usize) -> Vec<f32> {
    let mut backend = backend(model, tiles);
    let mut logits = Vec::new();
    for (i, tokens) in tokens(model).chunks(chunk).enumerate() {
        logits.extend(common::read_all(&mut backend, tokens, i * chunk).unwrap());
    }
    logits
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn what_a_token_sees_follows_from_its_position_alone() {
    let model = model();
    for tiles in Tiles::ALL {
        let whole = bits(&logits(&model, Some(tiles), 128));
        for chunk in [1, 31, 33, 100] {
            assert!(
                bits(&logits(&model, Some(tiles), chunk)) == whole,
                "{tiles:?} in chunks of {chunk}"
            );
        }
    }
}

#[test]
fn a_session_that_went_back_computes_what_a_new_one_does() {
    let model = model();
    let tokens = tokens(&model);
    for tiles in Tiles::ALL {
        let new_session = || Session::new(Box::new(backend(&model, Some(tiles))));
        let read = |session: &mut Session, tokens: &[u32]| {
            let mut progress = |_, _| ControlFlow::Continue(());
            bits(session.prefill(tokens, &mut progress).unwrap().unwrap())
        };
        let mut session = new_session();
        read(&mut session, &tokens);
        // To where the tail still is, to where it no longer is, and to before the first tile.
        for kept in [650, 300, 100] {
            let mut other = tokens[..kept].to_vec();
            other.extend(tokens[kept..].iter().rev());
            let again = read(&mut session, &other);
            let new = read(&mut new_session(), &other);
            assert!(again == new, "{tiles:?} from {kept} on");
        }
    }
}

/// Against the format's description in float64. A number that lies between two codes may become the other one; with layers
/// of rounding to float32 before it that happens to few, each of which moves a logit by some thousandths of its usual size.
#[test]
fn the_format_is_as_described() {
    let model = model();
    let tokens = &tokens(&model)[..400];
    for tiles in Tiles::ALL {
        let cache = textbook::Cache {
            tiles: Some(tiles),
            evict: None,
        };
        let expected = textbook::logits_by(&model, tokens, cache);
        let near = &logits(&model, Some(tiles), 128)[..expected.len()];
        let size = textbook::size(&expected);
        let errors = near.iter().zip(&expected);
        let errors = errors.map(|(near, expected)| (f64::from(*near) - expected).abs() / size);
        let mut errors: Vec<f64> = errors.collect();
        errors.sort_by(f64::total_cmp);
        let (median, greatest) = (errors[errors.len() / 2], errors[errors.len() - 1]);
        println!("{tiles:?}: median {median:e}, greatest {greatest:e}");
        assert!(median < 2e-4, "{median:e}");
        assert!(greatest < 2e-2, "{greatest:e}");
    }
}

#[test]
fn compressed_tokens_are_nearly_what_they_were() {
    let model = model();
    let exact = logits(&model, None, 128);
    let vocabulary = model.decoder.vocab_size;
    let error = |tiles: Tiles, tokens: std::ops::Range<usize>| {
        let tokens = tokens.start * vocabulary..tokens.end * vocabulary;
        let near = &logits(&model, Some(tiles), 128)[tokens.clone()];
        let squares = |x: f64| x * x;
        let pairs = near.iter().zip(&exact[tokens]);
        let (error, size) = pairs.fold((0.0, 0.0), |(error, size), (&near, &exact)| {
            (
                error + squares(f64::from(near - exact)),
                size + squares(exact.into()),
            )
        });
        (error / size).sqrt()
    };
    for tiles in Tiles::ALL {
        let (before, behind) = (error(tiles, 0..256), error(tiles, 256..LEN));
        println!("{tiles:?}: {before:e} without tiles, {behind:e} with");
        assert!(before < 5e-3, "{before:e}");
        assert!(behind > 10.0 * before, "nothing was compressed");
        let step = 1.0 / f64::from((1 << tiles.value_bits) - 1);
        assert!(behind < 3.0 * step, "{behind:e}");
    }
}
