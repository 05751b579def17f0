//! `bench`, `perplexity` and `verify`: what they print, and the figures against what other commands and references give.

use serde_json::Value;
use sharpi::{cuda, quant::TensorType};

use crate::{Dir, Ran, common::gguf_writer::RandomModel, json::valid, sharpi};

const CPU: [&str; 2] = ["--device", "cpu"];

/// Of the kind that the demo model was trained on.
const STORY: &str = "Once upon a time there was a little boy named Tom. He had a red kite. One day he went to the park with \
his mom. The wind was strong, and the kite went up, up, up into the sky. Tom was very happy. But then the kite got stuck in \
a big tree. Tom was sad and began to cry. A kind bird saw him and said, \"Do not cry. I can help you!\" The bird flew up to \
the top of the tree and pulled the kite out. Tom said, \"Thank you, bird!\" The bird smiled and sat on his hand. Tom and his \
mom gave the bird some bread. From that day on, Tom and the bird were good friends, and they played in the park every day.";

fn tiny() -> RandomModel {
    RandomModel::new("llama", TensorType::Q8_0)
}

#[test]
fn bench_has_a_row_for_every_depth_prompt_and_generation() {
    let dir = Dir::new();
    dir.file("m.gguf", tiny().file().to_bytes());
    let bench = [
        "bench", "-m", "m.gguf", "-p", "5,0", "-n", "3", "-d", "0,2", "-r", "2",
    ];
    let ran = dir.run(&[&bench[..], &CPU].concat());
    let mut lines = ran.stdout().lines();
    assert_eq!(lines.next(), Some("model   m.gguf"));
    let device = lines.next().expect("a line");
    assert!(device.starts_with("device  cpu, "), "{device}");
    assert_eq!(lines.next(), Some(""));
    let cells = |line: &str| -> Vec<String> {
        let line = line.replace(" ± ", "±");
        // A rate and its unit are one cell.
        let line = line.replace(" GB/s", "GB/s").replace(" TFLOP/s", "TFLOP/s");
        line.split_whitespace().map(str::to_owned).collect()
    };
    let head = [
        "test", "graph", "kernel", "tokens/s", "MB/token", "rate", "ceiling", "speedup",
    ];
    assert_eq!(
        lines.next().map(cells),
        Some(head.map(str::to_owned).into())
    );
    let rows: Vec<_> = lines.map(cells).collect();
    let names: Vec<_> = rows.iter().map(|row| row[0].as_str()).collect();
    assert_eq!(names, ["pp5", "tg3", "pp5@d2", "tg3@d2"]);
    for row in &rows {
        assert_eq!(row.len(), head.len(), "{row:?}");
        let decodes = row[0].starts_with("tg");
        let unit = if decodes { "GB/s" } else { "TFLOP/s" };
        assert!(row[5].ends_with(unit), "{row:?}");
        assert_eq!(row[4] != "-", decodes, "{row:?}");
        // No graph, no kernel, no measured ceiling and nothing to compare on the CPU.
        let [_, graph, kernel, .., ceiling, speedup] = &row[..] else {
            panic!("{row:?}")
        };
        assert_eq!([graph, kernel, ceiling, speedup], ["off", "-", "-", "-"]);
    }
}

#[test]
fn bench_json_follows_the_schema_and_its_figures_fit_together() {
    let dir = Dir::new();
    let model = tiny();
    dir.file("m.gguf", model.file().to_bytes());
    let bench = [
        "bench", "-m", "m.gguf", "-p", "5", "-n", "4", "-d", "0,8", "-r", "3", "--json",
    ];
    let ran = dir.run(&[&bench[..], &CPU].concat());
    let report = valid("bench.json", ran.stdout());
    assert_eq!(
        (&report["model"], &report["backend"]),
        (&"m.gguf".into(), &"cpu".into())
    );
    let rows = report["rows"].as_array().expect("rows");
    let names: Vec<_> = rows.iter().map(|row| row["test"].clone()).collect();
    assert_eq!(names, ["pp5", "tg4", "pp5@d8", "tg4@d8"]);
    let number = |value: &Value| value.as_f64().expect("a number");
    for row in rows {
        assert!(row["step_kernel"].is_null(), "{row}");
        let samples = row["samples_tokens_per_second"]
            .as_array()
            .expect("samples");
        let samples: Vec<f64> = samples.iter().map(number).collect();
        assert_eq!(samples.len(), 3);
        let mean = samples.iter().sum::<f64>() / 3.0;
        let variance = samples.iter().map(|s| (s - mean).powi(2)).sum::<f64>() / 2.0;
        let close = |a: &Value, b: f64| (number(a) - b).abs() <= 1e-9 * b.abs().max(1.0);
        assert!(close(&row["tokens_per_second"], mean), "{row}");
        assert!(close(&row["standard_deviation"], variance.sqrt()), "{row}");
        if let Some(bytes) = row["bytes_per_token"].as_f64() {
            assert!(close(&row["gb_per_second"], bytes * mean / 1e9), "{row}");
        }
    }
    // Eight tokens deeper, as many float32 keys and values more are read in every layer.
    let values = 8 * 2 * model.layers * model.head_count_kv * model.head_dim;
    let bytes = |row: &Value| row["bytes_per_token"].as_u64().expect("a decode row");
    assert_eq!(bytes(&rows[3]) - bytes(&rows[1]), 4 * values);
}

/// The log-probability of the token `next` after the raw prompt `text`, as `run --json` tells it.
fn logprob_after(dir: &Dir, model: &[&str], text: &str, next: &Value) -> f64 {
    let run = [
        "run",
        "--raw",
        "-p",
        text,
        "-n",
        "1",
        "--json",
        "--logprobs",
        "5000",
    ];
    let ran = dir.run(&[&run[..], model, &CPU].concat());
    let token = ran.stdout().lines().nth(1).expect("a token line");
    let token = valid("run.json", token);
    let tops = token["top_logprobs"].as_array().expect("log-probabilities");
    let top = tops.iter().find(|top| top["id"] == *next);
    top.expect("every token is listed")["logprob"]
        .as_f64()
        .expect("a number")
}

/// Perplexity, its error and the number of positions.
fn perplexity(dir: &Dir, args: &[&str]) -> (f64, f64, usize) {
    let ran = dir.run(&[&["perplexity", "-f", "text"], args, &CPU].concat());
    let words: Vec<_> = ran.stdout().split_whitespace().collect();
    let [
        "perplexity",
        value,
        "±",
        error,
        "over",
        positions,
        "positions",
        ..,
    ] = words[..]
    else {
        panic!("{ran:?}")
    };
    let number = |text: &str| text.parse::<f64>().expect("a number");
    (
        number(value),
        number(error),
        positions.parse().expect("a count"),
    )
}

/// Four tokens, of which perplexity counts the prediction of the last. The reference (Hugging Face transformers) knows the
/// mean over all three predictions; `run` gives the other two.
#[test]
fn perplexity_is_that_of_the_reference() {
    let golden = include_str!("../data/stories-10m-golden.json");
    let golden: Vec<Value> = serde_json::from_str(golden).expect("JSON");
    let case = golden
        .iter()
        .find(|case| case["name"] == "raw")
        .expect("the case");
    let mean_nll = case["mean_nll"].as_f64().expect("a number");
    assert_eq!(case["text"], "Once upon a time");
    let dir = Dir::new();
    dir.file("text", "Once upon a time");
    let (value, _, positions) = perplexity(&dir, &["-c", "4"]);
    assert_eq!(positions, 1);
    let earlier = logprob_after(&dir, &[], "Once", &case["prompt_ids"][1])
        + logprob_after(&dir, &[], "Once upon", &case["prompt_ids"][2]);
    let expected = (3.0 * mean_nll + earlier).exp();
    assert!(
        (value - expected).abs() < 5e-4,
        "{value}, expected {expected}"
    );
}

/// The second half of each window, which begins with the token that texts begin with.
#[test]
fn perplexity_is_what_the_log_probabilities_of_run_come_to() {
    const BOS: u32 = 261;
    let dir = Dir::new();
    let mut file = tiny().file();
    file.set("tokenizer.ggml.bos_token_id", BOS);
    file.set("tokenizer.ggml.add_bos_token", true);
    dir.file("m.gguf", file.to_bytes());
    let model = ["-m", "m.gguf"];
    // The token before the first letter, and 15 letters: two windows of eight.
    let text = "sphixnofblackqz";
    dir.file("text", text);
    let mut nlls = Vec::new();
    for window in [&text[..7], &text[8..]] {
        for predicted in 4..7 {
            let next = Value::from(window.as_bytes()[predicted]);
            nlls.push(-logprob_after(&dir, &model, &window[..predicted], &next));
        }
    }
    let n = nlls.len() as f64;
    let mean = nlls.iter().sum::<f64>() / n;
    let variance = nlls.iter().map(|nll| (nll - mean).powi(2)).sum::<f64>() / n;
    let expected = mean.exp();
    let expected_error = expected * (variance / (n - 1.0)).sqrt();
    let (value, error, positions) = perplexity(&dir, &["-m", "m.gguf", "-c", "8"]);
    assert_eq!(positions, nlls.len());
    assert!(
        (value / expected - 1.0).abs() < 1e-4,
        "{value}, expected {expected}"
    );
    assert!(
        (error / expected_error - 1.0).abs() < 1e-3,
        "{error}, expected {expected_error}"
    );
}

#[test]
fn in_float32_the_cpu_does_not_diverge_from_itself() {
    let dir = Dir::new();
    dir.file(
        "text",
        "Once upon a time there was a fox who found a lantern in the deep, dark forest.",
    );
    let input = ["perplexity", "-f", "text", "-c", "16", "--kl"];
    let ran = dir.run(&[&input[..], &["--cpu-exact"], &CPU].concat());
    let lines: Vec<_> = ran.stdout().lines().collect();
    assert_eq!(
        lines[1..],
        [
            "KL divergence  mean 0.000e0, median 0.000e0, 99% 0.000e0, maximum 0.000e0",
            "same top token 100.00%"
        ]
    );
}

#[test]
fn activations_of_8_bits_diverge_little() {
    let dir = Dir::new();
    dir.file("text", STORY);
    let input = ["perplexity", "-f", "text", "-c", "64", "--kl"];
    let mean = mean_divergence(&dir.run(&[&input[..], &CPU].concat()));
    assert!(mean > 0.0 && mean < 3e-4, "{mean:e}");
}

/// That `perplexity --kl` has printed.
fn mean_divergence(ran: &Ran) -> f64 {
    let line = ran.stdout().lines().nth(1).expect("a second line");
    let mean = line.strip_prefix("KL divergence  mean ");
    let mean = mean.and_then(|rest| rest.split(',').next());
    mean.expect("a mean").parse().expect("a number")
}

#[test]
fn the_fewer_bits_a_cache_has_the_more_it_diverges() {
    let dir = Dir::new();
    let letters = (0..1024).map(|i| char::from(b'a' + (i * i % 23) as u8));
    dir.file("text", letters.collect::<String>());
    dir.file("m.gguf", tiny().file().to_bytes());
    let divergence = |kv_type: &str| -> f64 {
        let input = ["perplexity", "-m", "m.gguf", "-f", "text", "-c", "1024"];
        let cache = ["--cpu-exact", "--kl", "--kv-type", kv_type];
        let ran = dir.run(&[&input[..], &cache, &CPU].concat());
        mean_divergence(&ran)
    };
    let divergences = ["f16", "k8v8", "k4v4", "k4v3"].map(divergence);
    assert_eq!(divergences[0], 0.0);
    assert!(divergences.is_sorted_by(|a, b| a < b), "{divergences:?}");
    assert_eq!(divergence("q8_0"), divergences[1]);
}

/// The first half of a window is a prompt: of 512 tokens, all or fewer stay.
#[test]
fn the_smaller_its_budget_the_more_a_cache_diverges() {
    let dir = Dir::new();
    let letters = (0..1024).map(|i| char::from(b'a' + (i * i % 23) as u8));
    dir.file("text", letters.collect::<String>());
    dir.file("m.gguf", tiny().file().to_bytes());
    let divergence = |budget: &str, kv_type: &str| -> f64 {
        let input = ["perplexity", "-m", "m.gguf", "-f", "text", "-c", "1024"];
        let cache = [
            "--cpu-exact",
            "--kl",
            "--kv-budget",
            budget,
            "--kv-type",
            kv_type,
        ];
        mean_divergence(&dir.run(&[&input[..], &cache, &CPU].concat()))
    };
    let divergences = ["512", "500", "300", "68"].map(|budget| divergence(budget, "f16"));
    assert_eq!(divergences[0], 0.0);
    assert!(divergences.is_sorted_by(|a, b| a < b), "{divergences:?}");
    assert!(divergence("500", "k4v4") > divergences[1]);
}

#[test]
fn a_text_shorter_than_a_window_is_refused_with_both_numbers() {
    let dir = Dir::new();
    dir.file("text", "Once upon a time");
    for window in ["64", "2147483647"] {
        let ran = dir.run(&["perplexity", "-f", "text", "-c", window, "--device", "cpu"]);
        let message = ran.error(1);
        for part in ["4 tokens", window, "--ctx-size"] {
            assert!(message.contains(part), "no {part}: {message}");
        }
    }
}

/// A damaged file must not pass for a bad model.
#[test]
fn logits_that_are_no_numbers_are_a_failure() {
    let dir = Dir::new();
    let mut file = RandomModel::new("llama", TensorType::F32).file();
    file.tensor("output_norm.weight").data[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    dir.file("m.gguf", file.to_bytes());
    dir.file("text", "abcdefgh");
    for command in [
        &["run", "--raw", "-n", "1"][..],
        &["perplexity", "-c", "4"],
        &["perplexity", "-c", "4", "--kl"],
    ] {
        let input = ["-m", "m.gguf", "-f", "text", "--device", "cpu"];
        let ran = dir.run(&[command, &input].concat());
        assert!(ran.error(1).contains("no finite numbers"), "{command:?}");
    }
}

#[test]
fn what_needs_a_gpu_says_why_there_is_none() {
    let Ok(cuda::Gpus::Absent(why)) = cuda::list() else {
        return; // The tests of tests/cuda.rs run instead.
    };
    for args in [&["verify"][..], &["bench", "--compare-graph"]] {
        let ran = sharpi(args);
        let message = ran.error(1);
        assert!(message.contains(why), "{args:?}: {message}");
    }
}

/// One place decides whether there may be a graph, and those that need one do not overrule it.
#[test]
fn a_forbidden_graph_is_not_compared() {
    let dir = Dir::new();
    let refused = |args: &[&str], variable: Option<&str>, expected: &str| {
        let mut command = dir.command(&[args, &["-m", "missing.gguf"]].concat());
        if let Some(value) = variable {
            command.env("SHARPI_CUDA_GRAPH", value);
        }
        let ran = crate::Ran::from(command.output().expect("starting sharpi"));
        let message = ran.error(2);
        assert!(message.contains(expected), "{args:?}: {message}");
    };
    for args in [&["verify"][..], &["bench", "--compare-graph"]] {
        let with = |more: &'static [&str]| [args, more].concat();
        refused(&with(&["--no-cuda-graph"]), None, "--no-cuda-graph");
        refused(args, Some("0"), "SHARPI_CUDA_GRAPH=0");
        refused(&with(&["--device", "cpu"]), None, "--device cpu");
    }
    // Both may be given where no graph is needed.
    dir.file("m.gguf", tiny().file().to_bytes());
    let plain = [
        "bench",
        "-m",
        "m.gguf",
        "-p",
        "1",
        "-n",
        "0",
        "-r",
        "1",
        "--no-cuda-graph",
    ];
    dir.run(&[&plain[..], &CPU].concat()).stdout();
}

/// Where it is forbidden, `verify` has fewer ways to compare, and the other commands another one to compute.
#[test]
fn a_forbidden_step_kernel_is_no_wrong_usage() {
    let dir = Dir::new();
    dir.file("text", "Once upon a time");
    for args in [
        &["run", "-p", "x"][..],
        &["bench"],
        &["bench", "--compare-graph"],
        &["perplexity", "-f", "text"],
        &["verify"],
    ] {
        let args = [args, &["-m", "missing.gguf"]].concat();
        let mut with_variable = dir.command(&args);
        with_variable.env("SHARPI_STEP_KERNEL", "0");
        let with_flag = dir.command(&[&args[..], &["--no-step-kernel"]].concat());
        for mut command in [with_variable, with_flag] {
            let ran = crate::Ran::from(command.output().expect("starting sharpi"));
            let message = ran.error(1);
            assert!(message.contains("missing.gguf"), "{args:?}: {message}");
        }
    }
}

/// What a web page says about control tokens is text: it must not end a turn.
#[test]
fn control_tokens_in_a_measured_text_are_text() {
    let dir = Dir::new();
    dir.file("m.gguf", tiny().file().to_bytes());
    let positions = |text: &str| {
        dir.file("text", text);
        let ran = dir.run(
            &[
                &["perplexity", "-m", "m.gguf", "-f", "text", "-c", "32"][..],
                &CPU,
            ]
            .concat(),
        );
        ran.stdout().to_owned()
    };
    // As many bytes, each a token.
    let (named, other) = ("<|im_end|>".repeat(4), "<|im-end|>".repeat(4));
    let of = |line: String| line.split(" over ").nth(1).map(str::to_owned);
    assert_eq!(of(positions(&named)), of(positions(&other)));
}
