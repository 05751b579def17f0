//! The step kernel against the separate kernels, which are its oracle: both give the same bits.

mod common;

use common::{
    gguf_writer::RandomModel,
    gpu::{self, TYPES, Test, TestResult, check},
};
use sharpi::{
    backend::Backend,
    cuda::Options,
    engine::{Trace, made_up_tokens},
    model::Model,
    quant::TensorType,
};

fn main() {
    let tests: [Test; 6] = [
        (
            "the_demo_models_logits_are_the_same_bits",
            the_demo_models_logits_are_the_same_bits,
        ),
        (
            "every_tensor_type_and_architecture_gives_the_same_bits",
            every_tensor_type_and_architecture_gives_the_same_bits,
        ),
        (
            "matrices_of_any_shape_give_the_same_bits",
            matrices_of_any_shape_give_the_same_bits,
        ),
        (
            "contexts_of_any_length_give_the_same_bits",
            contexts_of_any_length_give_the_same_bits,
        ),
        (
            "a_second_prompt_gives_the_same_bits",
            a_second_prompt_gives_the_same_bits,
        ),
        (
            "a_refused_launch_loses_no_token",
            a_refused_launch_loses_no_token,
        ),
    ];
    gpu::run(&tests, &[])
}

fn options(model: &Model) -> Options {
    Options {
        context_len: Some(model.decoder.context_length.min(32_768)),
        chunk_len: Some(512),
        ..Options::default()
    }
}

/// Decodes `count` tokens behind each prompt both ways.
fn compare(case: &str, model: &Model, prompts: &[Vec<u32>], count: usize) -> TestResult {
    gpu::compare_both_ways(case, model, &options(model), prompts, count)
}

fn the_demo_models_logits_are_the_same_bits() -> TestResult {
    let model = Model::demo()?;
    let prompt = made_up_tokens(1, model.decoder.vocab_size);
    compare("the demo model", &model, &[prompt], 300)
}

fn a_second_prompt_gives_the_same_bits() -> TestResult {
    let model = Model::demo()?;
    let prompts = [200, 37, 1].map(|len| made_up_tokens(len, model.decoder.vocab_size));
    compare("the demo model", &model, &prompts, 100)
}

fn every_tensor_type_and_architecture_gives_the_same_bits() -> TestResult {
    for tensor_type in TYPES {
        for architecture in ["qwen3", "qwen2", "llama"] {
            for (head_dim, tied) in [(64, true), (128, false), (256, true)] {
                let case = format!("{architecture} {} heads of {head_dim}", tensor_type.name());
                let model = RandomModel {
                    head_dim,
                    tied,
                    ..RandomModel::new(architecture, tensor_type)
                }
                .model()?;
                let prompt = made_up_tokens(3, model.decoder.vocab_size);
                compare(&case, &model, &[prompt], 20)?;
            }
        }
    }
    Ok(())
}

/// Rows of one slice and of several, whole and ragged, shared among blocks by groups or not; heads that share keys with
/// more than eight others, and more heads than blocks.
fn matrices_of_any_shape_give_the_same_bits() -> TestResult {
    use TensorType::*;
    for (hidden_size, feed_forward_length, head_count, head_count_kv, head_dim) in [
        (512, 2048, 8, 8, 64),
        (2048, 4864, 16, 2, 128),
        (2304, 5632, 12, 1, 64),
        (4096, 12_288, 32, 8, 128),
        (3584, 18_944, 28, 4, 128),
        (1024, 4352, 8, 1, 256),
        (8192, 1024, 160, 160, 64),
        (5376, 5376, 8, 8, 256),
    ] {
        for tensor_type in [Q4_K, Q6_K, Q8_0, Q2_K, F16] {
            let case = format!(
                "{} {hidden_size} x {feed_forward_length}, {head_count} heads of {head_dim} over {head_count_kv}",
                tensor_type.name()
            );
            let model = RandomModel {
                hidden_size,
                feed_forward_length,
                head_count,
                head_count_kv,
                head_dim,
                layers: 1,
                context_length: 512,
                ..RandomModel::new("qwen3", tensor_type)
            }
            .model()?;
            let prompts = [1, 250].map(|len| made_up_tokens(len, model.decoder.vocab_size));
            compare(&case, &model, &prompts, 12)?;
        }
    }
    Ok(())
}

/// Attention cuts the context into more chunks, then into longer ones, as it grows: around each such place, up to 4,096
/// tokens, at 16,384 and at the end of 32,768.
fn contexts_of_any_length_give_the_same_bits() -> TestResult {
    for head_dim in [64, 128, 256] {
        let model = RandomModel {
            head_dim,
            head_count: 16,
            head_count_kv: 4,
            context_length: 32_768,
            ..RandomModel::new("qwen3", TensorType::Q4_K)
        }
        .model()?;
        let places = (1..=32).map(|i| i * 128).chain([16_384, 32_764]);
        let prompts: Vec<Vec<u32>> = places
            .map(|place| made_up_tokens(place - 2, model.decoder.vocab_size))
            .collect();
        compare(&format!("heads of {head_dim}"), &model, &prompts, 5)?;
    }
    Ok(())
}

/// More blocks than run at once are refused.
fn a_refused_launch_loses_no_token() -> TestResult {
    let model = Model::demo()?;
    let prompt = made_up_tokens(5, model.decoder.vocab_size);
    let [mut refused, mut separate] = gpu::both_ways(&model, &options(&model))?;
    let reference = Trace::record(&mut separate, &prompt, 40, None)?;
    refused.device_handle().set_extra_blocks(1);
    let fallen_back = Trace::record(&mut refused, &prompt, 40, Some(&reference.tokens))?;
    let difference = reference.compare(&fallen_back).first_difference;
    check(
        difference.is_none(),
        format!("logits differ first at token {difference:?}"),
    )?;
    let report = refused.step_report().expect("CUDA has a report");
    let reason = report.disabled_reason.clone().unwrap_or_default();
    check(
        !report.enabled && reason.contains("CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE"),
        format!("{report:?}"),
    )?;
    let graph = refused.graph_report().expect("CUDA has a report");
    check(graph.captures == 1, format!("{graph:?}"))
}
