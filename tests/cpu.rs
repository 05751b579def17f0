//! The CPU backend against the textbook in float64, and against itself: other threads, other chunks.

mod common;

use std::{ops::ControlFlow, sync::Arc};

use common::{
    gguf_writer::{GgufFile, Random, RandomModel},
    textbook,
};
use sharpi::{
    backend::Backend,
    cpu::{Arithmetic, CpuBackend, Options},
    engine::Session,
    model::{Gguf, Model, decoder::RopeScaling},
    quant::TensorType,
};

fn load(file: &GgufFile) -> Arc<Model> {
    let gguf = Gguf::from_bytes("a random model", file.to_bytes()).expect("a good file");
    Arc::new(Model::from_gguf(gguf).expect("a good model"))
}

fn random_tokens(model: &Model, count: usize) -> Vec<u32> {
    let mut random = Random(7);
    (0..count)
        .map(|_| random.below(model.decoder.vocab_size) as u32)
        .collect()
}

const WAYS: [Arithmetic; 2] = [Arithmetic::Exact, Arithmetic::EightBits];

/// The logits after every token, read in chunks of the given lengths.
fn logits(
    model: &Arc<Model>,
    threads: usize,
    tokens: &[u32],
    chunks: impl IntoIterator<Item = usize>,
) -> Vec<f32> {
    logits_by(Options::exact(threads), model, tokens, chunks)
}

fn logits_by(
    options: Options,
    model: &Arc<Model>,
    tokens: &[u32],
    chunks: impl IntoIterator<Item = usize>,
) -> Vec<f32> {
    let decoder = model.decoder.clone();
    let mut backend = CpuBackend::with_options(decoder, tokens.len(), options).unwrap();
    let mut logits = Vec::new();
    let mut position = 0;
    for len in chunks {
        let end = tokens.len().min(position + len);
        logits.extend(common::read_all(&mut backend, &tokens[position..end], position).unwrap());
        position = end;
    }
    assert_eq!(position, tokens.len(), "the chunks cover the tokens");
    logits
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Two layers round to float32 about a dozen times in a row; sums of up to 512 products in 16 lanes add at most
/// 32 + 4 roundings each, most of which cancel. 2^-24 * sqrt(12 * 36) is 1.2e-6 of a logit's usual size; the greatest
/// of some ten thousand lies four standard deviations out.
#[track_caller]
fn assert_matches_reference(model: &Arc<Model>, name: &str) {
    let tokens = random_tokens(model, 37);
    let logits = logits(model, 2, &tokens, [21, 1, 15]);
    let expected = textbook::logits(model, &tokens);
    let size = textbook::size(&expected);
    assert_eq!(logits.len(), expected.len());
    for (i, (logit, expected)) in logits.iter().zip(&expected).enumerate() {
        let error = (f64::from(*logit) - expected).abs() / size;
        assert!(
            error < 5e-6,
            "{name}, logit {i}: {logit} for {expected}, off by {error:e} of the usual size"
        );
    }
}

#[test]
fn every_architecture_computes_what_the_textbook_says() {
    for architecture in ["llama", "qwen2", "qwen3"] {
        let file = RandomModel::new(architecture, TensorType::F32).file();
        assert_matches_reference(&load(&file), architecture);
    }
}

#[test]
fn every_tensor_type_computes_what_the_textbook_says() {
    for &tensor_type in TensorType::ALL {
        let mut model = RandomModel::new("qwen3", tensor_type);
        model.tied = false;
        assert_matches_reference(&load(&model.file()), tensor_type.name());
    }
}

/// Lengths that are no multiple of a vector, a tile or a panel.
#[test]
fn odd_lengths_compute_what_the_textbook_says() {
    for tensor_type in [TensorType::F32, TensorType::F16, TensorType::BF16] {
        let mut model = RandomModel::new("llama", tensor_type);
        (model.hidden_size, model.feed_forward_length) = (102, 523);
        (model.head_count, model.head_count_kv, model.head_dim) = (6, 2, 18);
        assert_matches_reference(&load(&model.file()), tensor_type.name());
    }
    let mut model = RandomModel::new("qwen3", TensorType::F32);
    (model.head_count, model.head_count_kv, model.head_dim) = (3, 3, 90);
    assert_matches_reference(&load(&model.file()), "heads of 90");
}

#[test]
fn rope_factors_scaling_and_partial_rotation_are_applied() {
    let mut file = RandomModel::new("llama", TensorType::F32).file();
    file.set("llama.rope.scaling.type", "linear")
        .set("llama.rope.scaling.factor", 4.0f32);
    file.set("llama.rope.dimension_count", 32u32);
    let factors: Vec<u8> = (0..16)
        .flat_map(|i| (1.0 + i as f32 / 4.0).to_le_bytes())
        .collect();
    file.push("rope_freqs.weight", &[16], TensorType::F32, factors);
    let model = load(&file);
    assert_eq!(
        model.decoder.layers[0].attention.rope.scaling,
        RopeScaling::Linear(4.0)
    );
    assert_matches_reference(&model, "scaled");
}

#[test]
fn yarn_scales_frequencies_and_scores() {
    let mut file = RandomModel::new("qwen2", TensorType::F32).file();
    file.set("qwen2.rope.scaling.type", "yarn")
        .set("qwen2.rope.scaling.factor", 8.0f32)
        .set("qwen2.rope.scaling.original_context_length", 16u32);
    let model = load(&file);
    assert!(model.decoder.layers[0].attention.rope.magnitude() > 1.2);
    assert_matches_reference(&model, "YaRN");
    // Values of a head that are not rotated keep their scale.
    file.set("qwen2.rope.dimension_count", 32u32);
    assert_matches_reference(&load(&file), "YaRN in part");
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let model = load(&RandomModel::new("qwen3", TensorType::Q4_K).file());
    let tokens = random_tokens(&model, 100);
    for arithmetic in WAYS {
        let by = |threads: usize| {
            let options = Options {
                threads,
                arithmetic,
                ..Options::exact(0)
            };
            bits(&logits_by(options, &model, &tokens, [64, 1, 35]))
        };
        let one = by(1);
        for threads in [2, 3] {
            assert!(by(threads) == one, "{threads} threads, {arithmetic:?}");
        }
    }
}

#[test]
fn the_way_a_prompt_is_cut_changes_no_bit() {
    for (tensor_type, arithmetic) in [
        (TensorType::F16, Arithmetic::Exact),
        (TensorType::Q6_K, Arithmetic::Exact),
        (TensorType::Q6_K, Arithmetic::EightBits),
        (TensorType::Q5_1, Arithmetic::EightBits),
    ] {
        let model = load(&RandomModel::new("qwen2", tensor_type).file());
        let tokens = random_tokens(&model, 100);
        let in_chunks = |len: usize| {
            let options = Options {
                arithmetic,
                ..Options::exact(2)
            };
            let chunks = std::iter::repeat_n(len, 100usize.div_ceil(len));
            bits(&logits_by(options, &model, &tokens, chunks))
        };
        let whole = in_chunks(100);
        for len in [1, 3, 7, 64] {
            assert!(in_chunks(len) == whole, "chunks of {len}, {arithmetic:?}");
        }
    }
}

#[test]
fn logits_of_the_last_token_are_those_of_all() {
    let model = load(&RandomModel::new("llama", TensorType::Q4_0).file());
    let tokens = random_tokens(&model, 33);
    let all = logits(&model, 2, &tokens, [33]);
    let mut backend = CpuBackend::new(model.decoder.clone(), tokens.len(), 2).unwrap();
    let last = common::read(&mut backend, &tokens, 0).unwrap();
    assert!(bits(last) == bits(&all[32 * model.decoder.vocab_size..]));
}

/// A prompt that shares its start with an earlier one is read on from where they part.
#[test]
fn going_back_forgets_what_came_after() {
    let model = load(&RandomModel::new("qwen3", TensorType::F16).file());
    let tokens = random_tokens(&model, 40);
    let fresh = bits(&logits(&model, 2, &tokens, [40])[39 * model.decoder.vocab_size..]);
    let mut backend = CpuBackend::new(model.decoder.clone(), 64, 2).unwrap();
    let mut detour = tokens[..10].to_vec();
    detour.extend(tokens[..50 - 10].iter().rev());
    common::read(&mut backend, &detour, 0).unwrap();
    assert!(bits(common::read(&mut backend, &tokens[10..], 10).unwrap()) == fresh);
}

/// A session that went back computes what one computes that never went further.
#[test]
fn a_session_goes_back_to_an_earlier_length() {
    let model = load(&RandomModel::new("qwen2", TensorType::Q8_0).file());
    let tokens = random_tokens(&model, 30);
    let session = || {
        let backend = CpuBackend::new(model.decoder.clone(), 64, 2).unwrap();
        let mut session = Session::new(Box::new(backend));
        let mut progress = |_, _| ControlFlow::Continue(());
        session.prefill(&tokens[..20], &mut progress).unwrap();
        session
    };
    let mut fresh = session();
    let expected = bits(fresh.decode(tokens[20]).unwrap());
    let mut went_back = session();
    for token in &tokens[21..] {
        went_back.decode(*token).unwrap();
    }
    went_back.rewind(20);
    assert_eq!(went_back.len(), 20);
    assert!(bits(went_back.decode(tokens[20]).unwrap()) == expected);
    assert_eq!(went_back.len(), 21);
}

#[test]
fn the_context_is_filled_to_its_last_position_and_not_beyond() {
    let model = load(&RandomModel::new("llama", TensorType::F32).file());
    let tokens = random_tokens(&model, 18);
    let mut backend = CpuBackend::new(model.decoder.clone(), 17, 1).unwrap();
    assert_eq!(backend.limits().context_len, 17);
    common::read(&mut backend, &tokens[..16], 0).unwrap();
    common::read(&mut backend, &tokens[16..17], 16).unwrap();
    let error = common::read(&mut backend, &tokens[17..], 17)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("position 17") && error.contains("context of 17"),
        "{error}"
    );
    assert!(common::read(&mut backend, &tokens, 0).is_err());
    assert!(common::read(&mut backend, &tokens[..1], usize::MAX).is_err());
}

#[test]
fn calls_that_make_no_sense_are_refused() {
    let model = load(&RandomModel::new("llama", TensorType::F32).file());
    let vocab_size = model.decoder.vocab_size as u32;
    let mut backend = CpuBackend::new(model.decoder.clone(), 1000, 1).unwrap();
    let chunk_len = backend.limits().chunk_len;
    assert!(common::read(&mut backend, &[], 0).is_err());
    assert!(common::read_all(&mut backend, &vec![0; chunk_len + 1], 0).is_err());
    let error = common::read(&mut backend, &[vocab_size], 0)
        .unwrap_err()
        .to_string();
    assert!(error.contains(&vocab_size.to_string()), "{error}");
}

#[test]
fn a_context_beyond_all_memory_is_an_error_that_names_it() {
    let model = load(&RandomModel::new("llama", TensorType::F32).file());
    for context_len in [1 << 50, usize::MAX] {
        let error = CpuBackend::new(model.decoder.clone(), context_len, 1)
            .err()
            .expect("no machine has that")
            .to_string();
        assert!(error.contains(&context_len.to_string()), "{error}");
    }
}
