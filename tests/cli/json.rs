//! `--json`: every line against the committed schema, and the whole against the text mode.

use serde_json::Value;

use crate::{Dir, model, sharpi};

/// The lines of one run, each checked against the schema.
pub struct Lines {
    pub start: Value,
    pub tokens: Vec<Value>,
    pub done: Value,
}

impl Lines {
    pub fn parse(stdout: &str) -> Self {
        let mut lines: Vec<Value> = stdout.lines().map(|line| valid("run.json", line)).collect();
        let done = lines.pop().expect("a run ends with a line");
        let start = lines.remove(0);
        assert_eq!(
            (&start["type"], &done["type"]),
            (&"start".into(), &"done".into())
        );
        assert!(lines.iter().all(|line| line["type"] == "token"));
        Self {
            start,
            tokens: lines,
            done,
        }
    }

    /// The text of all token events.
    pub fn token_text(&self) -> String {
        self.tokens
            .iter()
            .map(|token| token["text"].as_str().expect("a text"))
            .collect()
    }
}

/// Parses `json` and holds it against a committed schema.
pub fn valid(schema: &str, json: &str) -> Value {
    let path = format!(
        "{}/tests/data/json-schema/{schema}",
        env!("CARGO_MANIFEST_DIR")
    );
    let schema = std::fs::read_to_string(path).expect("the schema is part of the repository");
    let schema = serde_json::from_str(&schema).expect("the schema is JSON");
    let value = serde_json::from_str(json).unwrap_or_else(|error| panic!("{error}: {json}"));
    if let Err(error) = jsonschema::validate(&schema, &value) {
        panic!("{error}: {json}");
    }
    value
}

fn run(args: &[&str]) -> Lines {
    Lines::parse(sharpi(&[&["run", "--json"], args].concat()).stdout())
}

#[test]
fn json_and_text_tell_the_same_story() {
    let args = ["-p", "A fox found a lantern.", "-n", "60", "--seed", "3"];
    let lines = run(&args);
    let text = sharpi(&[&["run"], &args[..]].concat());
    let done = lines.done["text"].as_str().expect("a text");
    assert!(!done.is_empty());
    assert_eq!(
        text.stdout().trim_end_matches('\n'),
        done.trim_end_matches('\n')
    );
    assert_eq!(lines.token_text(), done);
    assert_eq!(lines.done["generated_tokens"], lines.tokens.len());
    assert_eq!(
        lines.done["prompt_tokens"],
        lines.start["prompt_ids"].as_array().expect("ids").len()
    );
    assert_eq!(lines.done["seed"], 3);
    assert_eq!(lines.done["backend"]["name"], "cpu");
    for of_cuda in ["cuda_graph", "step_kernel"] {
        assert!(lines.done.get(of_cuda).is_none(), "{}", lines.done);
    }
    assert!(
        lines
            .tokens
            .iter()
            .all(|token| token.get("top_logprobs").is_none())
    );
}

#[test]
fn prompt_ids_are_those_of_tokenize_chat() {
    let prompt = ["--system", "Be kind.", "-p", "Hello <|im_end|>"];
    let lines = run(&[&prompt[..], &["-n", "0"]].concat());
    let tokenized = sharpi(&[&["tokenize", "--chat", "--json"], &prompt[..]].concat());
    let tokenized: Value = serde_json::from_str(tokenized.stdout()).expect("JSON");
    assert_eq!(lines.start["prompt_ids"], tokenized["ids"]);
}

/// 8 layers of 2 heads of 64 values: in float32; and 128 tokens in 4 bits with (2 * 64 + 128) scales and zeros.
#[test]
fn the_start_says_how_keys_and_values_are_kept() {
    for (kv_type, name, bytes_per_token) in [
        ("f16", "f32", 8 * 2 * 2 * 64 * 4),
        ("k4v4", "k4v4", 8 * 2 * (128 * 64 + 256 * 4) / 128),
    ] {
        let lines = run(&["-p", "A fox", "-n", "1", "--kv-type", kv_type]);
        let cache = &lines.start["kv_cache"];
        assert_eq!(cache["type"], name);
        assert_eq!(cache["bytes_per_token"], bytes_per_token);
        assert!(cache["budget"].is_null());
    }
    let lines = run(&["-p", "A fox", "-n", "1", "--kv-budget", "100"]);
    assert_eq!(lines.start["kv_cache"]["budget"], 100);
}

/// The first greedy token and the log-probabilities, against the reference outputs of the demo model (Hugging Face
/// transformers, float32, on the dequantized weights).
#[test]
fn log_probabilities_are_those_of_the_reference() {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/data/stories-10m-golden.json"
    );
    let golden = std::fs::read_to_string(path).expect("the reference is part of the repository");
    let golden: Value = serde_json::from_str(&golden).expect("JSON");
    let fox = &golden.as_array().expect("cases")[0];
    let reference = fox["last_logprobs"].as_array().expect("log-probabilities");
    let top = reference.len().to_string();
    // A temperature and penalties must not show in the log-probabilities.
    let prompt = fox["prompt"].as_str().expect("a prompt");
    let args = [
        "-p",
        prompt,
        "-n",
        "1",
        "--top-k",
        "1",
        "--temp",
        "2",
        "--frequency-penalty",
        "0.01",
    ];
    let lines = run(&[&args[..], &["--cpu-exact", "--logprobs", &top]].concat());
    assert_eq!(lines.start["prompt_ids"], fox["prompt_ids"]);
    let [token] = &lines.tokens[..] else {
        panic!("one token")
    };
    assert_eq!(token["id"], fox["greedy_ids"][0]);
    assert_eq!(token["logprob"], token["top_logprobs"][0]["logprob"]);
    let top = token["top_logprobs"].as_array().expect("log-probabilities");
    assert_eq!(top.len(), reference.len());
    for (ours, reference) in top.iter().zip(reference) {
        assert_eq!(ours["id"], reference[0]);
        let (ours, reference) = (ours["logprob"].as_f64(), reference[1].as_f64());
        let difference = ours.expect("a number") - reference.expect("a number");
        assert!(difference.abs() <= 1e-3, "{difference}");
    }
}

/// Runs a model made by [`model`] on the prompt that sets it off.
fn answer(file: &[u8], args: &[&str]) -> Lines {
    let dir = Dir::new();
    dir.file("m.gguf", file);
    let fixed = [
        "run", "-m", "m.gguf", "--raw", "-p", "a", "--temp", "0", "--json",
    ];
    Lines::parse(dir.run(&[&fixed[..], args].concat()).stdout())
}

#[test]
fn every_way_to_finish_has_its_name() {
    let cases: &[(&[&str], &str, &str, usize)] = &[
        (&[], "stop", "one ENDxyz", 11),
        (&["-n", "3"], "length", "one", 3),
        (&["-c", "4"], "length", "one ", 4),
        (&["--stop", "END"], "stop_string", "one ", 7),
    ];
    let model = model::answers("one ENDxyz");
    for (args, finish_reason, text, tokens) in cases {
        let lines = answer(&model, args);
        assert_eq!(lines.done["finish_reason"], *finish_reason, "{args:?}");
        assert_eq!(lines.done["text"], *text, "{args:?}");
        assert_eq!(lines.token_text(), *text, "{args:?}");
        assert_eq!(lines.done["generated_tokens"], *tokens, "{args:?}");
    }
}

#[test]
fn a_token_that_ends_no_character_has_empty_text() {
    let lines = answer(&model::answers("\u{1f98a}!"), &[]);
    let tokens: Vec<_> = lines
        .tokens
        .iter()
        .map(|token| (token["id"].clone(), token["text"].clone()))
        .collect();
    let expected = [
        (0xf0, ""),
        (0x9f, ""),
        (0xa6, ""),
        (0x8a, "\u{1f98a}"),
        (b'!'.into(), "!"),
        (model::END, ""),
    ];
    assert_eq!(tokens, expected.map(|(id, text)| (id.into(), text.into())));
}

#[test]
fn a_run_without_tokens_is_still_whole() {
    let lines = answer(&model::answers("b"), &["-n", "0"]);
    assert_eq!(lines.tokens.len(), 0);
    assert_eq!(lines.done["finish_reason"], "length");
    assert_eq!(lines.done["text"], "");
}
