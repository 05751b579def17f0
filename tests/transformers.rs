//! Each architecture against Hugging Face transformers, on small random models (tests/make_architecture_vectors.py).

mod common;

use std::sync::Arc;

use anyhow::Result;
use common::{
    gguf_writer::{GgufFile, Value, byte_vocabulary},
    gpu::{self, Test, TestResult, check},
    textbook,
};
use half::f16;
use libtest_mimic::Trial;
use serde::Deserialize;
use sharpi::{
    backend::Backend,
    cpu::CpuBackend,
    cuda::{CudaBackend, Device, Options},
    model::{Gguf, Model, RopeOptions, arch},
    quant::TensorType,
};

#[derive(Deserialize)]
struct Case {
    name: String,
    architecture: String,
    metadata: serde_json::Map<String, serde_json::Value>,
    /// Names and shapes, as transformers has them: rows first.
    tensors: Vec<(String, Vec<u64>)>,
    /// Further tensors of one dimension, with their values.
    vectors: serde_json::Map<String, serde_json::Value>,
    tokens: Vec<u32>,
    /// Those whose logits follow.
    positions: Vec<usize>,
    logits: Vec<Vec<f64>>,
}

fn cases() -> Vec<Case> {
    let cases: Vec<Case> =
        serde_json::from_str(include_str!("data/architectures.json")).expect("our own file");
    assert_eq!(cases.len(), 12);
    cases
}

impl Case {
    fn model(&self) -> Result<Arc<Model>> {
        let mut file = GgufFile::default();
        file.set("general.architecture", self.architecture.as_str());
        for (key, value) in &self.metadata {
            let value = match value.as_u64() {
                Some(value) => Value::U32(value as u32),
                None => Value::F32(value.as_f64().expect("a number") as f32),
            };
            file.set(key, value);
        }
        file.metadata.extend(byte_vocabulary());
        for (name, rows_first) in &self.tensors {
            let shape: Vec<u64> = rows_first.iter().rev().copied().collect();
            let values = weights(name, shape.iter().product());
            let (tensor_type, data) = match shape[..] {
                [columns, _] => {
                    let width = (3.0 / columns as f64).sqrt();
                    let halves =
                        values.map(|value| f16::from_f32((value * width) as f32).to_le_bytes());
                    (TensorType::F16, halves.flatten().collect())
                }
                _ => {
                    let mean = f64::from(u8::from(name.contains("norm")));
                    let floats = values.map(|value| (value * 0.3 + mean) as f32);
                    (TensorType::F32, floats.flat_map(f32::to_le_bytes).collect())
                }
            };
            file.push(name, &shape, tensor_type, data);
        }
        for (name, values) in &self.vectors {
            let values: Vec<f32> = serde_json::from_value(values.clone())?;
            let data = values.iter().flat_map(|value| value.to_le_bytes());
            file.push(
                name,
                &[values.len() as u64],
                TensorType::F32,
                data.collect(),
            );
        }
        let gguf = Gguf::from_bytes(&self.name, file.to_bytes())?;
        let rope = RopeOptions {
            context_len: Some(self.tokens.len()),
            ..RopeOptions::default()
        };
        let model = Model::of_architectures(gguf, arch::ALL, &rope)?;
        Ok(Arc::new(model))
    }

    /// The greatest difference of logits read in two pieces and decoded at the end, relative to their usual size.
    fn error(&self, backend: &mut dyn Backend) -> Result<f64> {
        let (prompt, decoded) = self.tokens.split_at(self.tokens.len() - 3);
        let mut logits = common::read_all(backend, &prompt[..9], 0)?.to_vec();
        logits.extend(common::read_all(backend, &prompt[9..], 9)?);
        for (i, &token) in decoded.iter().enumerate() {
            logits.extend(common::decode(backend, token, prompt.len() + i)?);
        }
        let logits: Vec<&[f32]> = logits.chunks(logits.len() / self.tokens.len()).collect();
        let mut greatest = 0f64;
        for (&position, expected) in self.positions.iter().zip(&self.logits) {
            assert_eq!(expected.len(), logits[position].len());
            let pairs = expected.iter().zip(logits[position]);
            let errors = pairs.map(|(expected, &ours)| (f64::from(ours) - expected).abs());
            greatest = greatest.max(errors.fold(0.0, f64::max) / textbook::size(expected));
        }
        Ok(greatest)
    }
}

/// As in the script: SplitMix64 from the FNV-1a hash of the name, even between -1 and 1.
fn weights(name: &str, count: u64) -> impl Iterator<Item = f64> {
    let hash = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
    let seed = name.bytes().fold(0xcbf2_9ce4_8422_2325, hash);
    (1..=count).map(move |i| {
        let mut z = i.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(seed);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f64 / f64::from(1 << 23) - 1.0
    })
}

fn main() {
    let mut trials: Vec<Trial> = cases()
        .into_iter()
        .map(|case| {
            let name = format!("the_cpu_computes_{}", case.name);
            Trial::test(name, move || the_cpu_computes(&case))
        })
        .collect();
    let on_gpu: [Test; 1] = [("cuda_computes_them_or_says_why_not", on_cuda)];
    trials.extend(gpu::trials(&on_gpu, &[]));
    gpu::run_trials(trials);
}

/// Both compute in float32.
fn the_cpu_computes(case: &Case) -> TestResult {
    let mut cpu = CpuBackend::new(case.model()?.decoder.clone(), case.tokens.len(), 2)?;
    let error = case.error(&mut cpu)?;
    eprintln!("{}: largest error {error:.1e}", case.name);
    check(error < 3e-5, format!("off by {error:e} of the usual size"))
}

/// Bound as in `tests/architecture.rs`: float16 activations, a float16 cache.
fn on_cuda() -> TestResult {
    for case in cases() {
        let options = Options {
            context_len: Some(case.tokens.len()),
            ..Options::default()
        };
        let opened = CudaBackend::new(
            Device::open(0)?,
            case.model()?.decoder.clone(),
            &options,
            &mut |_, _| {},
        );
        let lacking = match case.name.as_str() {
            "llama_biases" => Some("has a bias"),
            "olmo2" => Some("\"linear, linear, linear\""),
            _ => None,
        };
        let message = match (opened, lacking) {
            (Ok(mut cuda), None) => {
                let error = case.error(&mut cuda)?;
                eprintln!("{}: largest error {error:.1e}", case.name);
                check(error < 2e-2, format!("{}: off by {error:e}", case.name))?;
                continue;
            }
            (Err(error), _) => format!("{error:#}"),
            (Ok(_), Some(_)) => "no error".to_owned(),
        };
        let expected = lacking.is_some_and(|lacking| message.contains(lacking));
        check(
            expected && message.contains("--device cpu"),
            format!("{}: {message}", case.name),
        )?;
    }
    Ok(())
}
