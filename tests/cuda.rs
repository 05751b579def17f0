//! The CUDA backend on a real GPU.

mod common;

use std::{ops::ControlFlow, sync::Arc};

use common::{
    gguf_writer::RandomModel,
    gpu::{self, TYPES, Test, TestResult, check},
};
use sharpi::{
    backend::{Backend, KvOptions, Tiles},
    cpu::CpuBackend,
    cuda::{self, CudaBackend, Device, Options, StepKernel},
    engine::{
        Constraint, GenerateOptions, Grammar, Observer, Sampler, SamplingParams, Session,
        TokenEvent, Trace, evaluate, generate, made_up_tokens,
    },
    model::{Gguf, Model},
    quant::TensorType,
};

fn main() {
    let tests: [Test; 24] = [
        (
            "graph_and_direct_logits_are_the_same_bits",
            graph_and_direct_logits_are_the_same_bits,
        ),
        (
            "kernels_that_wait_for_each_other_give_the_same_bits",
            kernels_that_wait_for_each_other_give_the_same_bits,
        ),
        (
            "a_device_that_chooses_writes_the_hosts_text",
            a_device_that_chooses_writes_the_hosts_text,
        ),
        (
            "a_device_that_is_told_what_may_follow_writes_the_hosts_text",
            a_device_that_is_told_what_may_follow_writes_the_hosts_text,
        ),
        (
            "a_stream_that_is_left_leaves_nothing_behind",
            a_stream_that_is_left_leaves_nothing_behind,
        ),
        (
            "a_thousand_texts_can_be_left_anywhere",
            a_thousand_texts_can_be_left_anywhere,
        ),
        (
            "a_hundred_thousand_steps_write_one_text",
            a_hundred_thousand_steps_write_one_text,
        ),
        (
            "a_failed_capture_loses_no_token",
            a_failed_capture_loses_no_token,
        ),
        (
            "a_second_prompt_on_a_session_computes_what_a_fresh_one_does",
            a_second_prompt_on_a_session_computes_what_a_fresh_one_does,
        ),
        (
            "predictions_follow_the_cpu_on_a_text",
            predictions_follow_the_cpu_on_a_text,
        ),
        (
            "predictions_follow_the_cpu_after_the_golden_prompts",
            predictions_follow_the_cpu_after_the_golden_prompts,
        ),
        (
            "every_tensor_type_and_architecture_follows_the_cpu",
            every_tensor_type_and_architecture_follows_the_cpu,
        ),
        (
            "feed_forwards_of_any_length_follow_the_cpu",
            feed_forwards_of_any_length_follow_the_cpu,
        ),
        (
            "nothing_is_allocated_once_generation_has_begun",
            nothing_is_allocated_once_generation_has_begun,
        ),
        (
            "weights_take_little_more_than_the_file",
            weights_take_little_more_than_the_file,
        ),
        ("a_plan_is_what_a_run_takes", a_plan_is_what_a_run_takes),
        (
            "a_context_that_does_not_fit_is_refused_with_every_part",
            a_context_that_does_not_fit_is_refused_with_every_part,
        ),
        (
            "a_type_without_kernels_is_refused_by_name",
            a_type_without_kernels_is_refused_by_name,
        ),
        (
            "reading_a_prompt_follows_the_cpu_for_every_chunk_length",
            reading_a_prompt_follows_the_cpu_for_every_chunk_length,
        ),
        (
            SMOLLM2,
            reading_a_prompt_of_smollm2_follows_the_cpu_for_every_chunk_length,
        ),
        (
            "every_tensor_type_reads_prompts",
            every_tensor_type_reads_prompts,
        ),
        (
            "the_cache_after_reading_is_the_one_after_decoding",
            the_cache_after_reading_is_the_one_after_decoding,
        ),
        (
            "perplexity_is_the_same_read_in_chunks_or_token_by_token",
            perplexity_is_the_same_read_in_chunks_or_token_by_token,
        ),
        (
            "a_session_reads_only_what_is_new",
            a_session_reads_only_what_is_new,
        ),
    ];
    match common::smollm2_path() {
        Some(_) => gpu::run(&tests, &[]),
        None => gpu::run(&tests, &[SMOLLM2]),
    }
}

const SMOLLM2: &str = "reading_a_prompt_of_smollm2_follows_the_cpu_for_every_chunk_length";

fn demo() -> Arc<Model> {
    Arc::new(Model::demo().expect("the demo model is sound"))
}

fn backend(model: &Arc<Model>, no_graph: bool) -> CudaBackend {
    let options = Options {
        context_len: Some(2048),
        graph_disabled: no_graph.then(|| "a test".to_owned()),
        step_kernel: StepKernel::Always,
        ..Options::default()
    };
    gpu::open(model, &options).expect("the model runs on CUDA")
}

/// A backend that reads prompts `chunk_len` tokens at a time.
fn chunked(
    model: &Arc<Model>,
    context_len: usize,
    chunk_len: usize,
) -> anyhow::Result<CudaBackend> {
    let options = Options {
        context_len: Some(context_len),
        chunk_len: Some(chunk_len),
        ..Options::default()
    };
    gpu::open(model, &options)
}

fn golden() -> Vec<serde_json::Value> {
    serde_json::from_str(include_str!("data/stories-10m-golden.json")).expect("the file is JSON")
}

fn ids(case: &serde_json::Value, key: &str) -> Vec<u32> {
    serde_json::from_value(case[key].clone()).expect("token ids")
}

/// ‖ours − reference‖ / ‖reference‖
fn relative_error(reference: impl Iterator<Item = f32>, ours: impl Iterator<Item = f32>) -> f64 {
    let (mut difference, mut norm) = (0.0, 0.0);
    for (r, o) in reference.zip(ours) {
        difference += f64::from(r - o).powi(2);
        norm += f64::from(r).powi(2);
    }
    (difference / norm).sqrt()
}

/// 300 tokens: across the places where attention cuts the context into more pieces.
fn graph_and_direct_logits_are_the_same_bits() -> TestResult {
    let model = demo();
    let prompt = made_up_tokens(5, model.decoder.vocab_size);
    let (mut direct, mut graph) = (backend(&model, true), backend(&model, false));
    let reference = Trace::record(&mut direct, &prompt, 300, None)?;
    let replayed = Trace::record(&mut graph, &prompt, 300, Some(&reference.tokens))?;
    let difference = reference.compare(&replayed).first_difference;
    check(
        difference.is_none(),
        format!("logits differ first at token {difference:?}"),
    )?;
    let report = graph.graph_report().expect("CUDA has a report");
    check(
        report.enabled
            && report.captures == 1
            && report.direct_tokens == 1
            && report.replays == 298,
        format!("{report:?}"),
    )?;
    let report = direct.graph_report().expect("CUDA has a report");
    check(
        !report.enabled && report.replays == 0 && report.direct_tokens == 299,
        format!("{report:?}"),
    )
}

/// Kernels start before the one before has ended, in graphs and in direct launches alike, and wait themselves for what they
/// read. A missing wait shows against launches that all wait.
fn kernels_that_wait_for_each_other_give_the_same_bits() -> TestResult {
    let models = [
        demo(),
        RandomModel::new("qwen2", TensorType::Q6_K).model()?,
        RandomModel::new("llama", TensorType::BF16).model()?,
    ];
    for model in models {
        let options = Options {
            context_len: Some(model.decoder.context_length.min(1024)),
            chunk_len: Some(64),
            ..Options::default()
        };
        let trace = |dependent, follow: Option<&[u32]>| {
            let device = Device::open(0)?;
            device.set_dependent_launch(dependent);
            let mut cuda =
                CudaBackend::new(device, model.decoder.clone(), &options, &mut |_, _| {})?;
            let prompt = made_up_tokens(77, model.decoder.vocab_size);
            let count = options.context_len.unwrap_or(0).min(400) - prompt.len();
            Trace::record(&mut cuda, &prompt, count, follow)
        };
        let waiting = trace(false, None)?;
        let dependent = trace(true, Some(&waiting.tokens))?;
        let difference = waiting.compare(&dependent).first_difference;
        check(
            difference.is_none(),
            format!(
                "{}: logits differ first at token {difference:?}",
                model.gguf.name()
            ),
        )?;
    }
    Ok(())
}

/// The ids of a generation, in which log-probabilities make the host choose.
struct Ids {
    ids: Vec<u32>,
    stop_after: usize,
}

impl Observer for Ids {
    fn interrupted(&self) -> bool {
        self.ids.len() + 1 >= self.stop_after
    }

    fn prefill_progress(&mut self, _done: usize, _total: usize) {}

    fn token(&mut self, event: &TokenEvent) -> anyhow::Result<()> {
        self.ids.push(event.id);
        Ok(())
    }
}

const SAMPLED: SamplingParams = SamplingParams {
    temperature: 0.7,
    top_k: 40,
    top_p: 0.95,
    min_p: 0.05,
    repeat_penalty: 1.0,
    repeat_last_n: 64,
    presence_penalty: 0.0,
    frequency_penalty: 0.0,
    seed: 11,
};

fn generated(
    session: &mut Session,
    model: &Model,
    prompt: &[u32],
    sampling: &SamplingParams,
    logprobs: Option<usize>,
    stop_after: usize,
) -> anyhow::Result<Vec<u32>> {
    let options = GenerateOptions {
        max_tokens: Some(300),
        stop: vec![],
        ignore_eos: true,
        logprobs,
        sampling: sampling.clone(),
        constraint: None,
    };
    let mut observer = Ids {
        ids: vec![],
        stop_after,
    };
    generate(session, &model.tokenizer, prompt, &options, &mut observer)?;
    Ok(observer.ids)
}

fn a_device_that_chooses_writes_the_hosts_text() -> TestResult {
    let model = demo();
    let prompt = made_up_tokens(9, model.decoder.vocab_size);
    let greedy = SamplingParams {
        temperature: 0.0,
        ..SAMPLED
    };
    let penalized = SamplingParams {
        repeat_penalty: 1.15,
        presence_penalty: 0.2,
        frequency_penalty: 0.1,
        ..SAMPLED
    };
    let cases = [
        greedy.clone(),
        SAMPLED,
        SamplingParams {
            temperature: 1.4,
            top_k: 64,
            top_p: 1.0,
            min_p: 0.0,
            ..SAMPLED
        },
        penalized.clone(),
        SamplingParams {
            repeat_last_n: 7,
            ..penalized.clone()
        },
        SamplingParams {
            temperature: 0.0,
            ..penalized
        },
    ];
    for no_graph in [false, true] {
        let mut session = Session::new(Box::new(backend(&model, no_graph)));
        let mut texts = Vec::new();
        for sampling in &cases {
            check(
                session.backend().chooses(sampling),
                format!("the device does not choose by {sampling:?}"),
            )?;
            let mut text =
                |logprobs| generated(&mut session, &model, &prompt, sampling, logprobs, 301);
            let (device, host) = (text(None)?, text(Some(0))?);
            check(
                device.len() == 300 && device == host,
                format!("{sampling:?}: the device wrote {device:?}, the host {host:?}"),
            )?;
            texts.push(host);
        }
        texts.sort();
        texts.dedup();
        check(
            texts.len() == cases.len(),
            "two ways of choosing wrote one text",
        )?;
    }
    // A prompt that fills the context has one token behind it, of which nothing is computed.
    let full = made_up_tokens(2048, model.decoder.vocab_size);
    let mut session = Session::new(Box::new(backend(&model, false)));
    let mut text = |logprobs| generated(&mut session, &model, &full, &SAMPLED, logprobs, 301);
    let (device, host) = (text(None)?, text(Some(0))?);
    check(
        device.len() == 1 && device == host,
        format!("behind a full context: {device:?} for {host:?}"),
    )?;
    let all = SamplingParams {
        top_k: 0,
        ..SAMPLED
    };
    check(
        !backend(&model, false).chooses(&all),
        "the device has no room for all tokens as candidates",
    )
}

/// With a grammar, of which the device is told while it computes, and which the host alone follows.
fn a_device_that_is_told_what_may_follow_writes_the_hosts_text() -> TestResult {
    let model = demo();
    let schema = serde_json::json!({"type": "array", "items": {"type": "string"}, "minItems": 40});
    let constraint = Constraint::new(&Grammar::json_schema(&schema)?, &model.tokenizer)?;
    let prompt = made_up_tokens(9, model.decoder.vocab_size);
    for no_graph in [false, true] {
        let mut session = Session::new(Box::new(backend(&model, no_graph)));
        for temperature in [0.0, 0.8, 1.5] {
            let mut text = |logprobs| {
                let options = GenerateOptions {
                    max_tokens: Some(200),
                    stop: vec![],
                    ignore_eos: false,
                    logprobs,
                    sampling: SamplingParams {
                        temperature,
                        repeat_penalty: 1.1,
                        ..SAMPLED
                    },
                    constraint: Some(constraint.clone()),
                };
                let mut observer = Ids {
                    ids: vec![],
                    stop_after: 301,
                };
                generate(
                    &mut session,
                    &model.tokenizer,
                    &prompt,
                    &options,
                    &mut observer,
                )?;
                anyhow::Ok(observer.ids)
            };
            let (device, host) = (text(None)?, text(Some(0))?);
            check(
                device.len() == 200 && device == host,
                format!("{temperature}: the device wrote {device:?}, the host {host:?}"),
            )?;
        }
    }
    Ok(())
}

/// Left at every token while others are queued behind it, a session goes on as one that the host led.
fn a_stream_that_is_left_leaves_nothing_behind() -> TestResult {
    let model = demo();
    let prompt = made_up_tokens(9, model.decoder.vocab_size);
    let mut session = Session::new(Box::new(backend(&model, false)));
    let whole = generated(&mut session, &model, &prompt, &SAMPLED, Some(0), 301)?;
    // From the second token on: one who stops before the first gets none.
    for stop_after in 2..20 {
        let part = generated(&mut session, &model, &prompt, &SAMPLED, None, stop_after)?;
        check(
            part == whole[..stop_after] && session.len() == prompt.len() + stop_after - 1,
            format!(
                "stopped after {stop_after}: {part:?}, {} cached",
                session.len()
            ),
        )?;
        let longer = [&prompt[..], &whole[..40]].concat();
        let greedy = SamplingParams {
            temperature: 0.0,
            ..SAMPLED
        };
        let again = generated(&mut session, &model, &longer, &greedy, None, 30)?;
        let mut fresh = Session::new(Box::new(backend(&model, true)));
        let expected = generated(&mut fresh, &model, &longer, &greedy, Some(0), 30)?;
        check(
            again == expected,
            format!("after {stop_after}: {again:?} for {expected:?}"),
        )?;
    }
    Ok(())
}

/// Left at a random token each, in one session.
fn a_thousand_texts_can_be_left_anywhere() -> TestResult {
    let model = demo();
    let prompt = made_up_tokens(9, model.decoder.vocab_size);
    let mut session = Session::new(Box::new(backend(&model, false)));
    let whole = generated(&mut session, &model, &prompt, &SAMPLED, Some(0), 301)?;
    for (text, random) in made_up_tokens(1000, 60).into_iter().enumerate() {
        let stop_after = 2 + random as usize;
        let part = generated(&mut session, &model, &prompt, &SAMPLED, None, stop_after)?;
        check(
            part == whole[..stop_after],
            format!("text {text}, stopped after {stop_after}: {part:?}"),
        )?;
    }
    Ok(())
}

/// The same text over and over, as the host wrote it.
fn a_hundred_thousand_steps_write_one_text() -> TestResult {
    let model = demo();
    let prompt = made_up_tokens(9, model.decoder.vocab_size);
    let mut session = Session::new(Box::new(backend(&model, false)));
    let whole = generated(&mut session, &model, &prompt, &SAMPLED, Some(0), 301)?;
    check(whole.len() == 300, format!("{} tokens", whole.len()))?;
    for text in 0..100_000 / 300 + 1 {
        let again = generated(&mut session, &model, &prompt, &SAMPLED, None, 301)?;
        check(
            again == whole,
            format!("text {text} is another one: {again:?}"),
        )?;
    }
    Ok(())
}

fn a_failed_capture_loses_no_token() -> TestResult {
    let model = demo();
    let prompt = made_up_tokens(5, model.decoder.vocab_size);
    let reference = Trace::record(&mut backend(&model, true), &prompt, 40, None)?;
    let mut failing = backend(&model, false);
    failing.device_handle().set_failing_captures(true);
    let direct = Trace::record(&mut failing, &prompt, 40, Some(&reference.tokens))?;
    let difference = reference.compare(&direct).first_difference;
    check(
        difference.is_none(),
        format!("logits differ first at token {difference:?}"),
    )?;
    let report = failing.graph_report().expect("CUDA has a report").clone();
    let reason = report.disabled_reason.clone().unwrap_or_default();
    check(
        !report.enabled
            && report.captures == 0
            && report.direct_tokens == 39
            && reason.contains("CUDA_ERROR"),
        format!("{report:?}"),
    )?;
    // Nor does a stream.
    let prompt_and_text = |failing: CudaBackend| {
        let mut session = Session::new(Box::new(failing));
        generated(&mut session, &model, &prompt, &SAMPLED, None, 301)
    };
    let failing_again = backend(&model, false);
    failing_again.device_handle().set_failing_captures(true);
    check(
        prompt_and_text(failing_again)? == prompt_and_text(backend(&model, true))?,
        "a stream whose capture fails writes another text",
    )?;
    // The device is as good as before.
    failing.device_handle().set_failing_captures(false);
    failing.set_graph(None);
    let replayed = Trace::record(&mut failing, &prompt, 40, Some(&reference.tokens))?;
    let report = failing.graph_report().expect("CUDA has a report");
    check(
        report.captures == 1 && reference.compare(&replayed).first_difference.is_none(),
        format!("{report:?}"),
    )
}

fn a_second_prompt_on_a_session_computes_what_a_fresh_one_does() -> TestResult {
    let model = demo();
    let prompts = [200, 37].map(|len| made_up_tokens(len, model.decoder.vocab_size));
    let mut used = backend(&model, false);
    Trace::record(&mut used, &prompts[0], 100, None)?;
    let second = Trace::record(&mut used, &prompts[1], 100, None)?;
    let fresh = Trace::record(
        &mut backend(&model, true),
        &prompts[1],
        100,
        Some(&second.tokens),
    )?;
    let difference = fresh.compare(&second).first_difference;
    check(
        difference.is_none(),
        format!("logits differ first at token {difference:?}"),
    )
}

/// 2,000 tokens of the demo model's own stories.
fn predictions_follow_the_cpu_on_a_text() -> TestResult {
    let model = demo();
    let mut cpu = CpuBackend::new(model.decoder.clone(), 2048, 0)?;
    let tokens = story(&model, &mut cpu, 2_000)?;
    for (way, chunk_len, bound) in [("decoded", 1, 1e-3), ("read in chunks", 2048, 1e-5)] {
        let mut progress = |_, _| ControlFlow::Continue(());
        let mut cuda = chunked(&model, 2048, chunk_len)?;
        let evaluation = evaluate(&mut cuda, Some(&mut cpu), &tokens, 500, None, &mut progress)?;
        let divergence = evaluation.divergence.expect("there was a reference");
        let (mean, same_top) = (divergence.mean(), divergence.same_top_fraction());
        eprintln!(
            "{way}: mean KL divergence {mean:.2e}, same top token {:.2}%",
            same_top * 100.0
        );
        check(
            mean <= bound && same_top >= 0.985,
            format!("{way}: mean KL divergence {mean:e}, same top token {same_top}"),
        )?;
    }
    Ok(())
}

fn predictions_follow_the_cpu_after_the_golden_prompts() -> TestResult {
    let model = demo();
    let mut cpu = CpuBackend::new(model.decoder.clone(), 2048, 0)?;
    let mut cuda = backend(&model, false);
    let mut kl = Vec::new();
    for case in golden() {
        let (prompt, following) = (ids(&case, "prompt_ids"), ids(&case, "greedy_ids"));
        let reference = Trace::record(&mut cpu, &prompt, following.len(), Some(&following))?;
        let ours = Trace::record(&mut cuda, &prompt, following.len(), Some(&following))?;
        kl.extend(reference.compare(&ours).divergence.kl);
    }
    let mean = kl.iter().sum::<f64>() / kl.len() as f64;
    eprintln!("mean KL divergence {mean:.2e} over {} positions", kl.len());
    check(mean <= 5e-4, format!("mean KL divergence {mean:e}"))
}

/// Text of the model itself, drawn on the CPU.
fn story(model: &Model, cpu: &mut CpuBackend, tokens: usize) -> anyhow::Result<Vec<u32>> {
    let params = SamplingParams {
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        repeat_penalty: 1.0,
        repeat_last_n: 0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        seed: 7,
    };
    let mut text = Vec::new();
    let mut sampler = Sampler::new(params, &[], Vec::new());
    while text.len() < tokens {
        let mut token = made_up_tokens(text.len() + 1, model.decoder.vocab_size)[text.len()];
        for position in 0..500 {
            text.push(token);
            token = sampler.sample(common::decode(cpu, token, position)?)?;
        }
    }
    Ok(text)
}

/// The difference to the CPU comes from 8-bit activations, about 0.4% a product, and from the float16 cache; float weights
/// meet only the latter.
fn every_tensor_type_and_architecture_follows_the_cpu() -> TestResult {
    use TensorType::*;
    for tensor_type in TYPES {
        for architecture in ["qwen3", "qwen2", "llama"] {
            for head_dim in [64, 128, 256] {
                let random = RandomModel {
                    head_dim,
                    ..RandomModel::new(architecture, tensor_type)
                };
                let name = format!("{architecture} {} heads of {head_dim}", tensor_type.name());
                let model = random.model()?;
                let context_len = model.decoder.context_length.min(256);
                let prompt = made_up_tokens(40, model.decoder.vocab_size);
                let mut cpu = CpuBackend::new(model.decoder.clone(), context_len, 0)?;
                let options = Options {
                    context_len: Some(context_len),
                    ..Options::default()
                };
                let reference = Trace::record(&mut cpu, &prompt, 20, None)?;
                let ours = Trace::record(
                    &mut gpu::open(&model, &options)?,
                    &prompt,
                    20,
                    Some(&reference.tokens),
                )?;
                let error = relative_error(
                    reference.logits.iter().copied(),
                    ours.logits.iter().copied(),
                );
                let bound = if matches!(tensor_type, F16 | BF16 | F32) {
                    2e-3
                } else {
                    4e-2
                };
                eprintln!("{name}: relative error {error:.1e}");
                check(
                    error <= bound,
                    format!("{name}: relative error {error:e} is over {bound:e}"),
                )?;
            }
        }
    }
    Ok(())
}

/// Float rows need not be a multiple of anything. Bound as for float weights above.
fn feed_forwards_of_any_length_follow_the_cpu() -> TestResult {
    for tensor_type in [TensorType::F16, TensorType::BF16, TensorType::F32] {
        for feed_forward_length in [523, 1026] {
            let random = RandomModel {
                feed_forward_length,
                ..RandomModel::new("llama", tensor_type)
            };
            let name = format!("{} by {feed_forward_length}", tensor_type.name());
            let model = random.model()?;
            let mut cpu = CpuBackend::new(model.decoder.clone(), 128, 0)?;
            let mut cuda = chunked(&model, 128, 100)?;
            let prompt = made_up_tokens(70, model.decoder.vocab_size);
            let reference = Trace::record(&mut cpu, &prompt, 20, None)?;
            let ours = Trace::record(&mut cuda, &prompt, 20, Some(&reference.tokens))?;
            let error = relative_error(
                reference.logits.iter().copied(),
                ours.logits.iter().copied(),
            );
            eprintln!("{name}: relative error {error:.1e}");
            check(error <= 2e-3, format!("{name}: relative error {error:e}"))?;
        }
    }
    Ok(())
}

fn nothing_is_allocated_once_generation_has_begun() -> TestResult {
    let model = demo();
    let prompt = made_up_tokens(70, model.decoder.vocab_size);
    // As they are; and in tiles, with tokens evicted behind the prompt.
    let compressed = KvOptions {
        tiles: Some(Tiles::of(4, 4)),
        budget: Some(68),
    };
    for kv in [KvOptions::default(), compressed] {
        let options = Options {
            context_len: Some(2048),
            step_kernel: StepKernel::Always,
            kv,
            ..Options::default()
        };
        let mut cuda = gpu::open(&model, &options)?;
        // The first tokens load the kernels and capture the graph, which the driver takes memory for.
        Trace::record(&mut cuda, &prompt, 3, None)?;
        let state = |cuda: &CudaBackend| -> anyhow::Result<(usize, usize)> {
            Ok((
                cuda.device_handle().allocations(),
                cuda.device_handle().memory()?.0,
            ))
        };
        let before = state(&cuda)?;
        Trace::record(&mut cuda, &prompt, 300, None)?;
        let after = state(&cuda)?;
        check(
            before == after,
            format!("{kv:?}: allocations and free bytes went from {before:?} to {after:?}"),
        )?;
    }
    Ok(())
}

fn weights_take_little_more_than_the_file() -> TestResult {
    let model = demo();
    let (device, file) = (
        backend(&model, false).weights_bytes() as u64,
        model.gguf.file_bytes(),
    );
    check(
        device <= file + file / 20,
        format!("{device} bytes on the device for a file of {file}"),
    )
}

fn a_plan_is_what_a_run_takes() -> TestResult {
    let model = demo();
    let device = Device::open(0)?;
    let allocations = device.allocations();
    let plan = cuda::plan(&device, &model.decoder, &Options::default())?;
    check(device.allocations() == allocations, "planning takes memory")?;
    let run = gpu::open(&model, &Options::default())?;
    let planned = (plan.context_len, plan.needs.chunk_len, plan.needs.weights);
    let limits = run.limits();
    let taken = (limits.context_len, limits.chunk_len, run.weights_bytes());
    check(planned == taken, format!("{planned:?} is not {taken:?}"))
}

fn a_context_that_does_not_fit_is_refused_with_every_part() -> TestResult {
    let options = Options {
        context_len: Some(1 << 30),
        ..Options::default()
    };
    let Err(error) = gpu::open(&demo(), &options) else {
        return Err("a context of 2^30 tokens was accepted".into());
    };
    let message = format!("{error:#}");
    for part in ["weights", "KV cache", "scratch", "free"] {
        check(
            message.contains(part),
            format!("{message:?} does not mention {part:?}"),
        )?;
    }
    Ok(())
}

fn a_type_without_kernels_is_refused_by_name() -> TestResult {
    let file = RandomModel::new("qwen3", TensorType::TQ1_0)
        .file()
        .to_bytes();
    let model = Arc::new(Model::from_gguf(Gguf::from_bytes("odd.gguf", file)?)?);
    let Err(error) = gpu::open(&model, &Options::default()) else {
        return Err("TQ1_0 has no kernels".into());
    };
    let message = format!("{error:#}");
    check(
        message.contains("token_embd.weight") && message.contains("TQ1_0"),
        format!("{message:?} names neither the tensor nor its type"),
    )
}

fn reading_a_prompt_follows_the_cpu_for_every_chunk_length() -> TestResult {
    prompts_follow_the_cpu(&demo(), &golden(), 5e-6)
}

fn reading_a_prompt_of_smollm2_follows_the_cpu_for_every_chunk_length() -> TestResult {
    let path = common::smollm2_path().ok_or("the file is gone")?;
    let golden = include_str!("data/smollm2-golden.json");
    let golden: Vec<serde_json::Value> = serde_json::from_str(golden)?;
    prompts_follow_the_cpu(&Arc::new(Model::open(&path)?), &golden, 5e-5)
}

/// Weights and activations in float16, for a chunk of one token as well: a mean KL divergence of 1e-6 on the demo model and of
/// 6e-6 on SmolLM2, which 8-bit activations take 1e-2 away.
fn prompts_follow_the_cpu(
    model: &Arc<Model>,
    golden: &[serde_json::Value],
    bound: f64,
) -> TestResult {
    let mut cpu = CpuBackend::new(model.decoder.clone(), 2048, 0)?;
    let mut references = Vec::new();
    for case in golden {
        references.push(Trace::record(&mut cpu, &ids(case, "prompt_ids"), 1, None)?);
    }
    for chunk_len in [1, 2, 3, 31, 32, 33, 127, 128, 512, 2048] {
        let mut cuda = chunked(model, 2048, chunk_len)?;
        let mut kl = Vec::new();
        for (case, reference) in golden.iter().zip(&references) {
            let prompt = ids(case, "prompt_ids");
            let ours = Trace::record(&mut cuda, &prompt, 1, None)?;
            let again = Trace::record(&mut cuda, &prompt, 1, None)?;
            check(
                ours.compare(&again).first_difference.is_none(),
                format!("chunks of {chunk_len}: other bits the second time"),
            )?;
            kl.extend(reference.compare(&ours).divergence.kl);
            let margin = case["greedy_margins"][0].as_f64().expect("a margin");
            check(
                margin < 0.1 || ours.tokens == ids(case, "greedy_ids")[..1],
                format!("chunks of {chunk_len}: another top token, margin {margin}"),
            )?;
        }
        let mean = kl.iter().sum::<f64>() / kl.len() as f64;
        eprintln!("chunks of {chunk_len}: mean KL divergence {mean:.1e}");
        check(
            mean <= bound,
            format!("chunks of {chunk_len}: mean KL divergence {mean:e}"),
        )?;
    }
    Ok(())
}

/// Weights and activations in float16: about 2^-11 a product.
fn every_tensor_type_reads_prompts() -> TestResult {
    let mut worst = 0f64;
    for tensor_type in TYPES {
        for (architecture, head_dim) in [("qwen3", 64), ("qwen2", 128), ("llama", 256)] {
            let random = RandomModel {
                head_dim,
                ..RandomModel::new(architecture, tensor_type)
            };
            let name = format!("{architecture} {}", tensor_type.name());
            let model = random.model()?;
            let context_len = model.decoder.context_length.min(256);
            let mut cpu = CpuBackend::new(model.decoder.clone(), context_len, 0)?;
            let mut cuda = chunked(&model, context_len, context_len)?;
            for len in [2, 33, 100] {
                let prompt = made_up_tokens(len, model.decoder.vocab_size);
                let reference = Trace::record(&mut cpu, &prompt, 1, None)?;
                let ours = Trace::record(&mut cuda, &prompt, 1, Some(&reference.tokens))?;
                let error = relative_error(
                    reference.logits.iter().copied(),
                    ours.logits.iter().copied(),
                );
                worst = worst.max(error);
                check(
                    error <= 5e-3,
                    format!("{name}, {len} tokens: relative error {error:e}"),
                )?;
            }
        }
    }
    eprintln!("largest relative error {worst:.1e}");
    Ok(())
}

/// Float weights meet unquantized activations on both ways, so that only float16's rounding is left.
fn the_cache_after_reading_is_the_one_after_decoding() -> TestResult {
    let random = RandomModel::new("qwen3", TensorType::F16);
    let model = random.model()?;
    let prompt = made_up_tokens(100, model.decoder.vocab_size);
    let cache = |cuda: &CudaBackend| -> anyhow::Result<Vec<f32>> {
        Ok(cuda.download_cache()?.into_iter().map(f32::from).collect())
    };
    let mut cuda = chunked(&model, 128, 100)?;
    common::read(&mut cuda, &prompt, 0)?;
    let read = cache(&cuda)?;
    let mut cuda = chunked(&model, 128, 100)?;
    for (position, &token) in prompt.iter().enumerate() {
        common::decode(&mut cuda, token, position)?;
    }
    let decoded = cache(&cuda)?;
    let error = relative_error(decoded.iter().copied(), read.iter().copied());
    eprintln!("relative error {error:.1e}");
    check(error <= 1e-3, format!("relative error {error:e}"))
}

fn perplexity_is_the_same_read_in_chunks_or_token_by_token() -> TestResult {
    let model = demo();
    let mut cpu = CpuBackend::new(model.decoder.clone(), 2048, 0)?;
    let tokens = story(&model, &mut cpu, 2_000)?;
    let perplexity = |chunk_len| -> anyhow::Result<f64> {
        let mut progress = |_, _| ControlFlow::Continue(());
        let mut cuda = chunked(&model, 2048, chunk_len)?;
        Ok(evaluate(&mut cuda, None, &tokens, 500, None, &mut progress)?.perplexity())
    };
    let (decoded, read) = (perplexity(1)?, perplexity(2048)?);
    eprintln!("token by token {decoded:.4}, in chunks {read:.4}");
    check(
        (read / decoded - 1.0).abs() <= 1e-3,
        format!("{decoded} token by token, {read} in chunks"),
    )
}

fn a_session_reads_only_what_is_new() -> TestResult {
    let model = demo();
    let tokens = made_up_tokens(300, model.decoder.vocab_size);
    let mut session = Session::new(Box::new(backend(&model, false)));
    let mut read = |prompt: &[u32]| -> anyhow::Result<(usize, Vec<f32>)> {
        let mut first = None;
        let logits = session.prefill(prompt, &mut |done, _| {
            first.get_or_insert(done);
            ControlFlow::Continue(())
        })?;
        let logits = logits.expect("nobody stops it").to_vec();
        Ok((prompt.len() - first.unwrap_or(0), logits))
    };
    let other: Vec<u32> = tokens[..120].iter().copied().chain([1, 2, 3]).collect();
    for (prompt, new) in [
        (&tokens[..200], 200),
        (&tokens[..], 100),
        (&other[..], 3),
        (&tokens[..50], 1),
    ] {
        let (computed, logits) = read(prompt)?;
        check(
            computed == new,
            format!("{computed} tokens were read where {new} are new"),
        )?;
        let fresh = Trace::record(&mut backend(&model, true), prompt, 1, None)?;
        let error = relative_error(fresh.logits.iter().copied(), logits.into_iter());
        eprintln!("relative error {error:.1e}");
        // The last tokens may have been computed in a chunk of another length.
        check(
            error <= 2e-3,
            format!("relative error {error:e} to a fresh session"),
        )?;
    }
    Ok(())
}
