//! The CPU backend against a forward pass in float64 that is written here a second time, as plainly as it goes, and
//! against itself: other threads, other chunks.

mod common;

use std::sync::Arc;

use common::gguf_writer::{GgufFile, Random, RandomModel};
use sharpi::{
    cpu::CpuBackend,
    engine::Backend,
    model::{Gguf, Model, Tensor, config::RopeStyle},
    quant::TensorType,
};

fn load(file: &GgufFile) -> Arc<Model> {
    let gguf = Gguf::from_bytes("a random model", file.to_bytes()).expect("a good file");
    Arc::new(Model::from_gguf(gguf).expect("a good model"))
}

fn random_tokens(model: &Model, count: usize) -> Vec<u32> {
    let mut random = Random(7);
    (0..count)
        .map(|_| random.below(model.config.vocab_size) as u32)
        .collect()
}

/// The logits after every token, read in chunks of the given lengths.
fn logits(
    model: &Arc<Model>,
    threads: usize,
    tokens: &[u32],
    chunks: impl IntoIterator<Item = usize>,
) -> Vec<f32> {
    let mut backend = CpuBackend::new(model.clone(), tokens.len(), threads).unwrap();
    let mut logits = Vec::new();
    let mut position = 0;
    for len in chunks {
        let end = tokens.len().min(position + len);
        logits.extend(
            backend
                .forward_all(&tokens[position..end], position)
                .unwrap(),
        );
        position = end;
    }
    assert_eq!(position, tokens.len(), "the chunks cover the tokens");
    logits
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// The logits after every token by the textbook, in float64.
fn reference(model: &Model, tokens: &[u32]) -> Vec<f64> {
    let (config, weights) = (&model.config, &model.weights);
    let head_dim = config.head_dim;
    let mut hidden: Vec<Vec<f64>> = tokens
        .iter()
        .map(|&token| {
            let row = token as usize * config.hidden_size;
            widen(&weights.token_embd.to_f32()[row..row + config.hidden_size])
        })
        .collect();
    for layer in &weights.layers {
        let project =
            |matrix: &Tensor, bias: &Option<Vec<f32>>, norm: &Option<Vec<f32>>, rotated: bool| {
                let matrix = widen(&matrix.to_f32());
                hidden
                    .iter()
                    .enumerate()
                    .map(|(position, x)| {
                        let mut out = product(
                            &matrix,
                            &rms_norm(x, &layer.attn_norm, config.rms_norm_epsilon),
                        );
                        if let Some(bias) = bias {
                            out.iter_mut()
                                .zip(bias)
                                .for_each(|(out, bias)| *out += f64::from(*bias));
                        }
                        let heads = out.chunks(head_dim).map(|head| match norm {
                            Some(norm) => rms_norm(head, norm, config.rms_norm_epsilon),
                            None => head.to_vec(),
                        });
                        heads
                            .map(|head| {
                                if rotated {
                                    rotate(model, &head, position)
                                } else {
                                    head
                                }
                            })
                            .collect::<Vec<_>>()
                    })
                    .collect::<Vec<_>>()
            };
        let queries = project(&layer.attn_q, &layer.attn_q_bias, &layer.attn_q_norm, true);
        let keys = project(&layer.attn_k, &layer.attn_k_bias, &layer.attn_k_norm, true);
        let values = project(&layer.attn_v, &layer.attn_v_bias, &None, false);

        let matrices = [
            &layer.attn_output,
            &layer.ffn_gate,
            &layer.ffn_up,
            &layer.ffn_down,
        ];
        let [output, gate, up, down] = matrices.map(|matrix| widen(&matrix.to_f32()));
        for (position, x) in hidden.iter_mut().enumerate() {
            let mut attended = Vec::new();
            for (head, query) in queries[position].iter().enumerate() {
                let head_kv = head * config.head_count_kv / config.head_count;
                let weights: Vec<f64> = (0..=position)
                    .map(|p| (dot(query, &keys[p][head_kv]) / (head_dim as f64).sqrt()).exp())
                    .collect();
                let sum: f64 = weights.iter().sum();
                attended.extend((0..head_dim).map(|i| {
                    (0..=position)
                        .map(|p| weights[p] * values[p][head_kv][i])
                        .sum::<f64>()
                        / sum
                }));
            }
            add(x, &product(&output, &attended));
            let normed = rms_norm(x, &layer.ffn_norm, config.rms_norm_epsilon);
            let gated: Vec<f64> = product(&gate, &normed)
                .iter()
                .zip(product(&up, &normed))
                .map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up)
                .collect();
            add(x, &product(&down, &gated));
        }
    }
    let output = widen(&weights.output.to_f32());
    let normed = hidden
        .iter()
        .map(|x| rms_norm(x, &weights.output_norm, config.rms_norm_epsilon));
    normed.flat_map(|x| product(&output, &x)).collect()
}

fn widen(values: &[f32]) -> Vec<f64> {
    values.iter().copied().map(f64::from).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(x: &mut [f64], y: &[f64]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

fn product(matrix: &[f64], x: &[f64]) -> Vec<f64> {
    matrix.chunks(x.len()).map(|row| dot(row, x)).collect()
}

fn rms_norm(x: &[f64], weight: &[f32], epsilon: f32) -> Vec<f64> {
    let scale = (dot(x, x) / x.len() as f64 + f64::from(epsilon))
        .sqrt()
        .recip();
    x.iter()
        .zip(weight)
        .map(|(x, weight)| x * scale * f64::from(*weight))
        .collect()
}

fn rotate(model: &Model, head: &[f64], position: usize) -> Vec<f64> {
    let config = &model.config;
    let count = config.rope_dimension_count;
    let factors = model.gguf.tensor("rope_freqs.weight").map(|t| t.to_f32());
    let mut out = head.to_vec();
    for i in 0..count / 2 {
        let frequency = f64::from(config.rope_freq_base).powf(-2.0 * i as f64 / count as f64)
            / factors
                .as_ref()
                .map_or(1.0, |factors| f64::from(factors[i]));
        let (sin, cos) =
            (position as f64 * f64::from(config.rope_position_scale) * frequency).sin_cos();
        let (a, b) = match config.rope_style {
            RopeStyle::Interleaved => (2 * i, 2 * i + 1),
            RopeStyle::Neox => (i, i + count / 2),
        };
        out[a] = head[a] * cos - head[b] * sin;
        out[b] = head[a] * sin + head[b] * cos;
    }
    out
}

/// Two layers round to float32 about a dozen times in a row; sums of up to 512 products in 16 lanes add at most
/// 32 + 4 roundings each, most of which cancel. 2^-24 * sqrt(12 * 36) is 1.2e-6 of a logit's usual size; the greatest
/// of some ten thousand lies four standard deviations out.
#[track_caller]
fn assert_matches_reference(model: &Arc<Model>, name: &str) {
    let tokens = random_tokens(model, 37);
    let logits = logits(model, 2, &tokens, [21, 1, 15]);
    let expected = reference(model, &tokens);
    let size = (dot(&expected, &expected) / expected.len() as f64).sqrt();
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
    assert_eq!(model.config.rope_position_scale, 0.25);
    assert_matches_reference(&model, "scaled");
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let model = load(&RandomModel::new("qwen3", TensorType::Q4_K).file());
    let tokens = random_tokens(&model, 100);
    let one = bits(&logits(&model, 1, &tokens, [64, 1, 35]));
    for threads in [2, 3] {
        assert!(
            bits(&logits(&model, threads, &tokens, [64, 1, 35])) == one,
            "{threads} threads"
        );
    }
}

#[test]
fn the_way_a_prompt_is_cut_changes_no_bit() {
    for tensor_type in [TensorType::F16, TensorType::Q6_K] {
        let model = load(&RandomModel::new("qwen2", tensor_type).file());
        let tokens = random_tokens(&model, 100);
        let whole = bits(&logits(&model, 2, &tokens, [100]));
        for len in [1, 7, 64] {
            let cut = bits(&logits(
                &model,
                2,
                &tokens,
                std::iter::repeat_n(len, 100usize.div_ceil(len)),
            ));
            assert!(cut == whole, "chunks of {len}");
        }
    }
}

#[test]
fn logits_of_the_last_token_are_those_of_all() {
    let model = load(&RandomModel::new("llama", TensorType::Q4_0).file());
    let tokens = random_tokens(&model, 33);
    let all = logits(&model, 2, &tokens, [33]);
    let mut backend = CpuBackend::new(model.clone(), tokens.len(), 2).unwrap();
    let last = backend.forward(&tokens, 0).unwrap();
    assert!(bits(last) == bits(&all[32 * model.config.vocab_size..]));
}

/// A prompt that shares its start with an earlier one is read on from where they part.
#[test]
fn going_back_forgets_what_came_after() {
    let model = load(&RandomModel::new("qwen3", TensorType::F16).file());
    let tokens = random_tokens(&model, 40);
    let fresh = bits(&logits(&model, 2, &tokens, [40])[39 * model.config.vocab_size..]);
    let mut backend = CpuBackend::new(model.clone(), 64, 2).unwrap();
    let mut detour = tokens[..10].to_vec();
    detour.extend(tokens[..50 - 10].iter().rev());
    backend.forward(&detour, 0).unwrap();
    assert!(bits(backend.forward(&tokens[10..], 10).unwrap()) == fresh);
}

#[test]
fn the_context_is_filled_to_its_last_position_and_not_beyond() {
    let model = load(&RandomModel::new("llama", TensorType::F32).file());
    let tokens = random_tokens(&model, 18);
    let mut backend = CpuBackend::new(model, 17, 1).unwrap();
    assert_eq!(backend.context_len(), 17);
    backend.forward(&tokens[..16], 0).unwrap();
    backend.forward(&tokens[16..17], 16).unwrap();
    let error = backend.forward(&tokens[17..], 17).unwrap_err().to_string();
    assert!(
        error.contains("position 17") && error.contains("context of 17"),
        "{error}"
    );
    assert!(backend.forward(&tokens, 0).is_err());
    assert!(backend.forward(&tokens[..1], usize::MAX).is_err());
}

#[test]
fn calls_that_make_no_sense_are_refused() {
    let model = load(&RandomModel::new("llama", TensorType::F32).file());
    let vocab_size = model.config.vocab_size as u32;
    let mut backend = CpuBackend::new(model, 1000, 1).unwrap();
    assert!(backend.forward(&[], 0).is_err());
    assert!(
        backend
            .forward_all(&vec![0; backend.chunk_len() + 1], 0)
            .is_err()
    );
    let error = backend.forward(&[vocab_size], 0).unwrap_err().to_string();
    assert!(error.contains(&vocab_size.to_string()), "{error}");
}

#[test]
fn a_context_beyond_all_memory_is_an_error_that_names_it() {
    let model = load(&RandomModel::new("llama", TensorType::F32).file());
    for context_len in [1 << 50, usize::MAX] {
        let error = CpuBackend::new(model.clone(), context_len, 1)
            .err()
            .expect("no machine has that")
            .to_string();
        assert!(error.contains(&context_len.to_string()), "{error}");
    }
}
