//! Log-probabilities of small models against those of Hugging Face transformers: every bias that a file has is added, and
//! positions are scaled as its keys say. `tests/make_logit_vectors.py` writes the reference.

use serde::Deserialize;
use sharpi::quant::TensorType;

use crate::{
    Dir,
    common::gguf_writer::{GgufFile, Random, RandomModel, Value},
    json::Lines,
};

#[derive(Deserialize)]
struct Case {
    name: String,
    architecture: String,
    seed: u64,
    /// Of matrices that have none in [`RandomModel`].
    biases: Vec<String>,
    /// Keys of the architecture.
    metadata: serde_json::Map<String, serde_json::Value>,
    /// At each step the likeliest tokens, of which the first is taken.
    steps: Vec<Vec<(u32, f64)>>,
}

impl Case {
    fn file(&self) -> GgufFile {
        let mut architectures = ["llama", "qwen2", "qwen3"].into_iter();
        let architecture = architectures.find(|name| *name == self.architecture);
        let model = RandomModel {
            hidden_size: 32,
            feed_forward_length: 64,
            head_count: 2,
            head_count_kv: 1,
            head_dim: 16,
            seed: self.seed,
            ..RandomModel::new(architecture.expect("an architecture"), TensorType::F32)
        };
        let mut file = model.file();
        let mut random = Random(self.seed);
        for layer in 0..model.layers {
            for matrix in &self.biases {
                let matrix = format!("blk.{layer}.{matrix}");
                let rows = file.tensor(&format!("{matrix}.weight")).shape[1];
                let bias = (0..rows).flat_map(|_| random.centered(0.5).to_le_bytes());
                let bias = bias.collect();
                file.push(&format!("{matrix}.bias"), &[rows], TensorType::F32, bias);
            }
        }
        for (key, value) in &self.metadata {
            let value: Value = match value.as_str() {
                Some(text) => text.into(),
                None => (value.as_f64().expect("a number") as f32).into(),
            };
            file.set(&format!("{}.{key}", self.architecture), value);
        }
        file
    }
}

#[test]
fn biases_are_added_and_positions_are_scaled_as_in_transformers() {
    let cases: Vec<Case> =
        serde_json::from_str(include_str!("../data/logits.json")).expect("the test data");
    assert_eq!(cases.len(), 14);
    for case in cases {
        let dir = Dir::new();
        dir.file("m.gguf", case.file().to_bytes());
        let ran = dir.run(&[
            "run",
            "-m",
            "m.gguf",
            "--raw",
            "-p",
            "quick brown fox",
            "--temp",
            "0",
            "-n",
            "3",
            "--ignore-eos",
            "--device",
            "cpu",
            "--json",
            "--logprobs",
            "5",
        ]);
        let tokens = Lines::parse(ran.stdout()).tokens;
        assert_eq!(tokens.len(), case.steps.len(), "{}", case.name);
        for (token, likeliest) in tokens.iter().zip(&case.steps) {
            assert_eq!(token["id"], likeliest[0].0, "{}", case.name);
            let top = token["top_logprobs"].as_array().expect("log-probabilities");
            for (id, expected) in likeliest {
                let found = top.iter().find(|found| found["id"] == *id);
                let logprob = found.and_then(|found| found["logprob"].as_f64());
                let logprob = logprob.unwrap_or_else(|| panic!("{}: no {id}", case.name));
                let error = (logprob - expected).abs();
                assert!(error <= 5e-6, "{}, {id}: off by {error:e}", case.name);
            }
        }
    }
}
