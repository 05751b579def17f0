//! Architectures that are not the product's, described here alone and run by every backend: layers that differ from each
//! other, and everything that a layer can say.

mod common;

use std::{
    ops::{ControlFlow, Deref, DerefMut},
    sync::Arc,
};

use anyhow::Result;
use common::{
    gguf_writer::{GgufFile, Random, byte_vocabulary},
    gpu::{self, Test, TestResult, check},
    textbook,
};
use libtest_mimic::Trial;
use sharpi::{
    backend::Backend,
    cpu::CpuBackend,
    cuda::{CudaBackend, Device, Options},
    engine::{Session, made_up_tokens},
    model::{
        Architecture, Decoder, Gguf, Model, RopeOptions,
        arch::Source,
        decoder::{Activation, KeyValues, Layer, RopeStyle},
        ops,
    },
    quant::TensorType,
};

/// Even layers have biases and turn halves of a head; odd ones norm their heads and turn neighbours in a part of it.
const PATCHWORK: Architecture = Architecture {
    name: "patchwork",
    describe: patchwork,
};

/// Windows, shared keys and values, norms of values and behind every part, and scales.
const CROSSBREED: Architecture = Architecture {
    name: "crossbreed",
    describe: crossbreed,
};

fn patchwork(source: &Source) -> Result<Decoder> {
    let shape = source.shape()?;
    let halves = Arc::new(source.rope(RopeStyle::Neox, shape.head_dim)?);
    let mut neighbours = source.rope(RopeStyle::Interleaved, shape.head_dim)?;
    (neighbours.base, neighbours.dimensions) = (500.0, shape.head_dim / 2);
    let neighbours = Arc::new(neighbours);
    source.decoder(&shape, &source.ends(&shape)?, |tensors| {
        let mut attention;
        if tensors.index() % 2 == 0 {
            attention = tensors.attention(&halves)?;
            tensors.add_qkv_bias(&mut attention)?;
        } else {
            attention = tensors.attention(&neighbours)?;
            tensors.add_qk_norm(&mut attention, shape.head_dim, shape.head_dim)?;
        }
        tensors.pre_norm(attention, tensors.feed_forward(Activation::Silu)?)
    })
}

fn crossbreed(source: &Source) -> Result<Decoder> {
    let shape = source.shape()?;
    let rope = Arc::new(source.rope(RopeStyle::Neox, shape.head_dim)?);
    source.decoder(&shape, &source.ends(&shape)?, |tensors| {
        let mut attention = tensors.attention(&rope)?;
        attention.scale = 0.2;
        if let KeyValues::Own(own) = &mut attention.kv {
            own.v_norm = Some(tensors.norm("attn_v_norm", shape.head_dim)?);
        }
        match tensors.index() {
            1 => attention.window = Some(5),
            2 => attention.kv = KeyValues::SharedWith(0),
            _ => {}
        }
        let layer = tensors.pre_norm(attention, tensors.feed_forward(Activation::Silu)?)?;
        Ok(Layer {
            output_scale: Some(0.5),
            ..tensors.post_norm(layer)?
        })
    })
}

const HIDDEN: u64 = 256;
const HEAD_DIM: u64 = 64;
/// Of each layer.
const HEADS: [u32; 3] = [4, 4, 2];
const HEADS_KV: [u32; 3] = [2, 1, 2];
const FEED_FORWARD: [u32; 3] = [512, 256, 768];

/// A file with random weights for either architecture.
struct File {
    file: GgufFile,
    random: Random,
    tensor_type: TensorType,
}

impl Deref for File {
    type Target = GgufFile;

    fn deref(&self) -> &GgufFile {
        &self.file
    }
}

impl DerefMut for File {
    fn deref_mut(&mut self) -> &mut GgufFile {
        &mut self.file
    }
}

impl File {
    fn new(architecture: &str, tensor_type: TensorType) -> Self {
        let mut file = Self {
            file: GgufFile::default(),
            random: Random(11),
            tensor_type,
        };
        let key = |name: &str| format!("{architecture}.{name}");
        file.set("general.architecture", architecture)
            .set(&key("context_length"), 128u32)
            .set(&key("block_count"), 3u32)
            .set(&key("embedding_length"), HIDDEN as u32)
            .set(&key("feed_forward_length"), FEED_FORWARD.to_vec())
            .set(&key("attention.head_count"), HEADS.to_vec())
            .set(&key("attention.head_count_kv"), HEADS_KV.to_vec())
            .set(&key("attention.key_length"), HEAD_DIM as u32)
            .set(&key("attention.layer_norm_rms_epsilon"), 1e-6f32);
        file.metadata.extend(byte_vocabulary());
        file.matrix("token_embd", [HIDDEN, 264]);
        for layer in 0..3 {
            let name = |name: &str| format!("blk.{layer}.{name}");
            let q_dim = u64::from(HEADS[layer]) * HEAD_DIM;
            let kv_dim = u64::from(HEADS_KV[layer]) * HEAD_DIM;
            let feed_forward = u64::from(FEED_FORWARD[layer]);
            for (matrix, rows) in [("attn_q", q_dim), ("attn_k", kv_dim), ("attn_v", kv_dim)] {
                file.matrix(&name(matrix), [HIDDEN, rows]);
                if architecture == "patchwork" && layer % 2 == 0 {
                    file.vector(&name(&format!("{matrix}.bias")), rows, 0.0);
                }
            }
            let norms: &[&str] = match architecture {
                "patchwork" if layer % 2 == 1 => &["attn_q_norm", "attn_k_norm"],
                "patchwork" => &[],
                _ => &["attn_v_norm"],
            };
            for norm in norms {
                file.vector(&name(&format!("{norm}.weight")), HEAD_DIM, 1.0);
            }
            let norms: &[&str] = match architecture {
                "patchwork" => &["attn_norm", "ffn_norm"],
                _ => &[
                    "attn_norm",
                    "ffn_norm",
                    "post_attention_norm",
                    "post_ffw_norm",
                ],
            };
            for norm in norms {
                file.vector(&name(&format!("{norm}.weight")), HIDDEN, 1.0);
            }
            file.matrix(&name("attn_output"), [q_dim, HIDDEN]);
            file.matrix(&name("ffn_gate"), [HIDDEN, feed_forward]);
            file.matrix(&name("ffn_up"), [HIDDEN, feed_forward]);
            file.matrix(&name("ffn_down"), [feed_forward, HIDDEN]);
        }
        file.vector("output_norm.weight", HIDDEN, 1.0);
        file
    }

    fn matrix(&mut self, name: &str, shape: [u64; 2]) {
        let std = (shape[0] as f32).sqrt().recip();
        let values = (shape[0] * shape[1]) as usize;
        let data = self.random.blocks(self.tensor_type, values, std);
        self.file
            .push(&format!("{name}.weight"), &shape, self.tensor_type, data);
    }

    fn vector(&mut self, name: &str, len: u64, mean: f32) {
        let values = (0..len).flat_map(|_| (mean + self.random.centered(0.1)).to_le_bytes());
        let data = values.collect();
        self.file.push(name, &[len], TensorType::F32, data);
    }
}

fn model(architecture: Architecture, tensor_type: TensorType) -> Result<Arc<Model>> {
    let file = File::new(architecture.name, tensor_type).to_bytes();
    let gguf = Gguf::from_bytes(architecture.name, file)?;
    Ok(Arc::new(Model::of_architectures(
        gguf,
        &[architecture],
        &RopeOptions::default(),
    )?))
}

/// The logits after every token, read in several pieces and decoded at the end.
fn logits(backend: &mut dyn Backend, tokens: &[u32]) -> Result<Vec<f32>> {
    let mut logits = common::read_all(backend, &tokens[..21], 0)?.to_vec();
    logits.extend(common::read_all(backend, &tokens[21..34], 21)?);
    for (position, &token) in tokens.iter().enumerate().skip(34) {
        logits.extend(common::decode(backend, token, position)?);
    }
    Ok(logits)
}

/// The greatest difference, relative to the usual size.
fn greatest_error(expected: &[f64], logits: &[f32]) -> f64 {
    assert_eq!(expected.len(), logits.len());
    let pairs = expected.iter().zip(logits);
    let errors = pairs.map(|(expected, &logit)| (f64::from(logit) - expected).abs());
    errors.fold(0.0, f64::max) / textbook::size(expected)
}

fn main() {
    let mut trials: Vec<Trial> = [PATCHWORK, CROSSBREED]
        .map(|architecture| {
            let name = format!("the_cpu_computes_{}", architecture.name);
            Trial::test(name, move || the_cpu_computes(architecture))
        })
        .into();
    let on_cpu: [Test; 2] = [
        (
            "a_session_goes_back_further_than_a_ring_remembers",
            a_session_goes_back,
        ),
        (
            "layers_that_share_are_skipped_where_nobody_looks",
            skipping_changes_nothing,
        ),
    ];
    trials.extend(on_cpu.map(|(name, test)| Trial::test(name, test)));
    let on_gpu: [Test; 2] = [
        ("cuda_computes_patchwork", || cuda_computes(PATCHWORK)),
        ("cuda_computes_crossbreed", || cuda_computes(CROSSBREED)),
    ];
    trials.extend(gpu::trials(&on_gpu, &[]));
    gpu::run_trials(trials);
}

/// Bound as in `tests/cpu.rs`, for three layers and norms behind each part.
fn the_cpu_computes(architecture: Architecture) -> TestResult {
    let model = model(architecture, TensorType::F32)?;
    let tokens = made_up_tokens(40, model.decoder.vocab_size);
    let mut cpu = CpuBackend::new(model.decoder.clone(), tokens.len(), 2)?;
    let expected = textbook::logits(&model, &tokens);
    let error = greatest_error(&expected, &logits(&mut cpu, &tokens)?);
    eprintln!("{}: largest error {error:.1e}", architecture.name);
    check(error < 1e-5, format!("off by {error:e} of the usual size"))
}

/// Longer than the ring of a layer whose window is 5 tokens.
const LONG: usize = 400;

fn long_cpu(model: &Model) -> Result<CpuBackend> {
    CpuBackend::new(model.decoder.clone(), LONG, 2)
}

fn a_session_goes_back() -> TestResult {
    let model = model(CROSSBREED, TensorType::F32)?;
    let tokens = made_up_tokens(LONG, model.decoder.vocab_size);
    let session = || anyhow::Ok(Session::new(Box::new(long_cpu(&model)?)));
    let mut quiet = |_, _| ControlFlow::Continue(());
    let mut wanderer = session()?;
    let last = wanderer.prefill(&tokens, &mut quiet)?;
    let last = last.expect("nobody interrupts").to_vec();
    let expected = textbook::logits(&model, &tokens);
    let expected = &expected[expected.len() - last.len()..];
    let error = greatest_error(expected, &last);
    check(
        error < 1e-5,
        format!("the ring is off by {error:e} of the usual size"),
    )?;

    for back in [LONG - 1, LONG - 130, 60, 3, 1] {
        check(
            wanderer.backend().remembers(back) == (back > LONG - 140),
            format!(
                "{back} tokens of {LONG} should need reading again where the ring has lost them"
            ),
        )?;
        let mut fresh = session()?;
        fresh.prefill(&tokens[..back], &mut quiet)?;
        let next = fresh.decode(tokens[back])?.to_vec();
        wanderer.rewind(back);
        check(
            wanderer.decode(tokens[back])? == next,
            format!("other logits after going back to {back} tokens"),
        )?;
        wanderer.prefill(&tokens, &mut quiet)?;
    }
    // A prompt that shares its beginning with the last one.
    let mut other = tokens[..100].to_vec();
    other.extend([7, 8, 9]);
    let expected = session()?.prefill(&other, &mut quiet)?.map(<[f32]>::to_vec);
    let logits = wanderer.prefill(&other, &mut quiet)?;
    check(
        logits == expected.as_deref(),
        "other logits after a shared beginning",
    )
}

/// The last layer shares keys and values: for tokens without logits it is of no use.
fn skipping_changes_nothing() -> TestResult {
    let model = model(CROSSBREED, TensorType::F32)?;
    let tokens = made_up_tokens(100, model.decoder.vocab_size);
    let all = common::read_all(&mut long_cpu(&model)?, &tokens, 0)?.to_vec();
    let last = common::read(&mut long_cpu(&model)?, &tokens, 0)?.to_vec();
    check(all.ends_with(&last), "skipping changes the logits")?;
    let operations = |tokens| model.decoder.operations(tokens) / tokens as f64;
    check(operations(100) < 0.9 * operations(1), "nothing is skipped")?;
    let model = Arc::into_inner(model).expect("nobody else has the model");
    let mut decoder = Arc::into_inner(model.decoder).expect("nor its decoder");
    ops::select_late(&mut decoder.ops);
    let mut unhurried = CpuBackend::new(decoder.into(), LONG, 2)?;
    check(
        common::read(&mut unhurried, &tokens, 0)? == last,
        "other logits where no layer is skipped",
    )?;
    Ok(())
}

/// Float16 weights meet float16 activations where a prompt is read, and a float16 cache.
fn cuda_computes(architecture: Architecture) -> TestResult {
    let model = model(architecture, TensorType::F16)?;
    let tokens = made_up_tokens(40, model.decoder.vocab_size);
    let options = Options {
        context_len: Some(tokens.len()),
        ..Options::default()
    };
    let mut cuda = CudaBackend::new(
        Device::open(0)?,
        model.decoder.clone(),
        &options,
        &mut |_, _| {},
    )?;
    let expected = textbook::logits(&model, &tokens);
    let error = greatest_error(&expected, &logits(&mut cuda, &tokens)?);
    eprintln!("{}: largest error {error:.1e}", architecture.name);
    check(error < 2e-2, format!("off by {error:e} of the usual size"))
}
