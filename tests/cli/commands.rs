//! `info`, `tokenize` and `devices`, and the ways to give a prompt.

use serde_json::{Value, json};

use crate::{Dir, Ran, json::valid, model, sharpi};

fn json(ran: &Ran) -> Value {
    serde_json::from_str(ran.stdout()).unwrap_or_else(|error| panic!("{error}: {ran:?}"))
}

#[test]
fn tokenize_takes_the_text_byte_for_byte() {
    let dir = Dir::new();
    dir.file("m.gguf", model::answers("b"));
    dir.file("text", "xy\n\n");
    let lines = dir.run(&["tokenize", "-m", "m.gguf", "-f", "text"]);
    assert_eq!(lines.stdout(), "120\tx\n121\ty\n10\t\u{10a}\n10\t\u{10a}\n");
    let object = dir.run(&["tokenize", "-m", "m.gguf", "-f", "text", "--json"]);
    assert_eq!(
        json(&object),
        json!({"text": "xy\n\n", "ids": [120, 121, 10, 10]})
    );
    let empty = dir.run(&["tokenize", "-m", "m.gguf", "-p", ""]);
    assert_eq!(empty.stdout(), "");
}

#[test]
fn a_prompt_a_blank_line_and_the_file_make_one_prompt() {
    let dir = Dir::new();
    dir.file("report.txt", "line one\nline two\n");
    let text = |ran: Ran| json(&ran)["text"].clone();
    let both = ["tokenize", "--json", "-p", "Summarise:", "-f"];
    let expected = "Summarise:\n\nline one\nline two\n";
    assert_eq!(
        text(dir.run(&[&both[..], &["report.txt"]].concat())),
        expected
    );
    let piped = dir.run_with_input(&[&both[..], &["-"]].concat(), b"line one\nline two\n");
    assert_eq!(text(piped), expected);
    let alone = dir.run_with_input(&["tokenize", "--json", "-f", "-"], b"all of it\n");
    assert_eq!(text(alone), "all of it\n");
    let bytes = dir.run_with_input(&["tokenize", "-f", "-"], b"ab\xff");
    assert!(
        bytes.error(1).contains("standard input is not UTF-8"),
        "{}",
        bytes.stderr
    );
}

#[test]
fn a_prompt_may_begin_with_a_hyphen() {
    let ran = sharpi(&["tokenize", "--json", "-p", "-5 + 3"]);
    assert_eq!(json(&ran)["text"], "-5 + 3");
}

#[test]
fn messages_are_the_conversation_that_prompt_and_system_make() {
    let dir = Dir::new();
    let turns = r#"[{"role":"system","content":"Be brief."},{"role":"user","content":"Hi"}]"#;
    dir.file("turns.json", turns);
    let text = |ran: Ran| json(&ran)["text"].clone();
    let from_file = text(dir.run(&["tokenize", "--chat", "--json", "--messages", "turns.json"]));
    let expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(from_file, expected);
    let from_flags = dir.run(&[
        "tokenize",
        "--chat",
        "--json",
        "--system",
        "Be brief.",
        "-p",
        "Hi",
    ]);
    assert_eq!(text(from_flags), expected);
    let piped = ["tokenize", "--chat", "--json", "--messages", "-"];
    assert_eq!(text(dir.run_with_input(&piped, turns.as_bytes())), expected);
    let run = |args: &[&str]| dir.run(&[&["run", "-n", "8", "--temp", "0"], args].concat());
    let told = run(&["--messages", "turns.json"]);
    assert_eq!(
        told.stdout(),
        run(&["--system", "Be brief.", "-p", "Hi"]).stdout()
    );
}

/// Figures of the demo model as its description gives them, and the sizes of ggml's blocks.
#[test]
fn info_tells_shape_types_and_tokenizer() {
    let ran = sharpi(&["info", "--json"]);
    let info = valid("info.json", ran.stdout());
    let file_bytes = include_bytes!("../../assets/stories-10m-q4_k_m.gguf").len();
    assert_eq!(info["file_bytes"], file_bytes);
    assert_eq!(info["architecture"], "qwen3");
    assert_eq!(info["name"], "sharpi-stories-10M");
    let shape = &info["hyper_parameters"];
    let expected = json!({
        "context_length": 2048, "block_count": 8, "hidden_size": 256, "feed_forward_length": 1024,
        "vocab_size": 4096, "head_count": 8, "head_count_kv": 2, "head_dim": 64, "rope_freq_base": 1e6,
        "rope_dimension_count": 64,
    });
    for (key, value) in expected.as_object().expect("an object") {
        assert_eq!(shape[key].as_f64(), value.as_f64(), "{key}");
    }
    // Embedding; per layer q, k, v, output, gate, up, down, two norms and two head norms; the last norm.
    let layer = 256 * 512 * 2 + 256 * 128 * 2 + 3 * 256 * 1024 + 2 * 256 + 2 * 64;
    assert_eq!(info["parameter_count"], 4096 * 256 + 8 * layer + 256);
    let types = info["tensor_types"].as_array().expect("types");
    let tensors: u64 = types
        .iter()
        .map(|kind| kind["tensors"].as_u64().expect("a count"))
        .sum();
    assert_eq!(tensors, 90);
    assert_eq!(
        types[0],
        json!({"type": "F32", "tensors": 33, "bytes": 4 * (8 * (2 * 256 + 2 * 64) + 256)})
    );
    assert_eq!(info["tokenizer"]["pre"], "qwen2");
    assert_eq!(info["tokenizer"]["vocab_size"], 4096);
    let ends = info["tokenizer"]["end_of_generation"]
        .as_array()
        .expect("tokens");
    assert!(
        ends.contains(&json!({"id": 2, "piece": "<|im_end|>"})),
        "{ends:?}"
    );
    assert_eq!(info["chat_template"], true);

    let table = sharpi(&["info"]);
    for part in [
        "qwen3",
        "2,048",
        "Q4_K",
        "Q6_K",
        "sharpi-stories-10M",
        "<|im_end|>",
    ] {
        assert!(table.stdout().contains(part), "no {part}: {}", table.stdout);
    }
}

#[test]
fn devices_lists_the_processor_and_what_the_binary_was_built_for() {
    let ran = sharpi(&["devices"]);
    let lines: Vec<_> = ran.stdout().lines().collect();
    assert!(
        lines[0].starts_with("cpu ") && lines[0].contains("threads"),
        "{}",
        ran.stdout
    );
    // What it was built for is known here, what the machine has is not.
    let expected = match sharpi::cuda::ARCHS {
        "" => ["built without CUDA", "built without CUDA"],
        _ => ["no NVIDIA driver", "compute capability"],
    };
    assert!(
        lines[1].starts_with("cuda") && expected.iter().any(|part| lines[1].contains(part)),
        "{}",
        ran.stdout
    );
}
