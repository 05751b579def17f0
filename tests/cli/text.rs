//! What stands on standard output and standard error when text is generated.

use std::process::{Command, Stdio};

use sharpi::quant::TensorType;

use crate::{Dir, Ran, common::gguf_writer::RandomModel, model, sharpi};

/// Runs a model made by [`model`] on the prompt that sets it off, with the likeliest token at every step.
fn answer(model: &[u8], args: &[&str]) -> Ran {
    let dir = Dir::new();
    dir.file("m.gguf", model);
    let fixed = ["run", "-m", "m.gguf", "--raw", "-p", "a", "--temp", "0"];
    dir.run(&[&fixed[..], args].concat())
}

#[test]
fn the_text_ends_with_exactly_one_newline() {
    assert_eq!(answer(&model::answers("bcd"), &[]).stdout(), "bcd\n");
    assert_eq!(answer(&model::answers("bcd\n"), &[]).stdout(), "bcd\n");
    assert_eq!(answer(&model::answers("\n"), &[]).stdout(), "\n");
    assert_eq!(answer(&model::answers(""), &[]).stdout(), "\n");
    assert_eq!(answer(&model::answers("bcd"), &["-n", "0"]).stdout(), "\n");
}

#[test]
fn a_character_split_over_four_tokens_is_never_broken() {
    let fox = model::answers("b\u{1f98a}!");
    assert_eq!(answer(&fox, &[]).stdout(), "b\u{1f98a}!\n");
    for tokens in ["2", "3", "4"] {
        assert_eq!(answer(&fox, &["-n", tokens]).stdout(), "b\n", "-n {tokens}");
    }
}

#[test]
fn a_stop_string_ends_the_text_before_it_even_across_tokens() {
    let model = model::answers("one ENDxyz");
    assert_eq!(answer(&model, &["--stop", "END"]).stdout(), "one \n");
    assert_eq!(
        answer(&model, &["--stop", "D", "--stop", "E"]).stdout(),
        "one \n"
    );
    assert_eq!(answer(&model, &["--stop", "o"]).stdout(), "\n");
    assert_eq!(answer(&model, &["--stop", "ENx"]).stdout(), "one ENDxyz\n");
}

#[test]
fn a_full_context_ends_the_text() {
    let ran = answer(&model::endless(128), &["-c", "16"]);
    // The prompt and 15 of the 16 tokens fill the context; the last one needs no room in it.
    assert_eq!(ran.stdout(), "bcbcbcbcbcbcbcbc\n");
}

#[test]
fn the_models_own_context_is_the_default() {
    let ran = answer(&model::endless(32), &[]);
    assert_eq!(ran.stdout().trim_end().len(), 32);
}

#[test]
fn ignore_eos_goes_on_where_the_answer_would_end() {
    let model = model::answers("bcd");
    assert_eq!(answer(&model, &["-n", "3"]).stdout(), "bcd\n");
    let ran = answer(&model, &["-n", "20", "--ignore-eos"]);
    assert!(ran.stdout().starts_with("bcd"));
    assert!(
        ran.stderr.contains("generated: 20 tokens"),
        "{}",
        ran.stderr
    );
}

#[test]
fn a_token_that_the_file_suppresses_is_never_generated() {
    let mut file = model::chain(&[b'a', b'b', b'c', b'd'].map(u32::from));
    let bytes = file.to_bytes();
    file.set("tokenizer.ggml.suppress_tokens", vec![i32::from(b'c')]);
    for flags in [&["-n", "4"][..], &["-n", "4", "--ignore-eos"]] {
        assert!(answer(&bytes, flags).stdout().starts_with("bcd"));
        let text = answer(&file.to_bytes(), flags).stdout().to_owned();
        assert!(text.starts_with('b') && !text.contains('c'), "{text:?}");
    }
}

#[test]
fn the_same_seed_gives_the_same_text_on_any_number_of_threads() {
    let tell = |args: &[&str]| {
        let fixed = ["run", "-p", "Tell me about a fox.", "-n", "40"];
        sharpi(&[&fixed[..], args].concat()).stdout().to_owned()
    };
    let one = tell(&["--seed", "7", "--threads", "1"]);
    assert!(one.len() > 40, "{one}");
    assert_eq!(one, tell(&["--seed", "7", "--threads", "2"]));
    assert_eq!(one, tell(&["--seed", "7"]));
    assert_ne!(one, tell(&["--seed", "8"]));
}

#[test]
fn the_seed_that_was_drawn_is_told_and_gives_the_text_again() {
    let first = sharpi(&["run", "-p", "A moon", "-n", "20"]);
    let (_, seed) = first
        .stderr
        .trim_end()
        .rsplit_once("seed ")
        .expect("the statistics end with the seed");
    let again = sharpi(&["run", "-p", "A moon", "-n", "20", "--seed", seed]);
    assert_eq!(first.stdout(), again.stdout());
}

#[test]
fn the_files_sampling_defaults_hold_until_a_flag_overrides_them() {
    let mut file = RandomModel::new("qwen3", TensorType::F16).file();
    file.set("general.sampling.temp", 0.0f32);
    let dir = Dir::new();
    dir.file("greedy.gguf", file.to_bytes());
    let run = |args: &[&str]| {
        let fixed = [
            "run",
            "-m",
            "greedy.gguf",
            "--raw",
            "-p",
            "abc",
            "-n",
            "30",
            "--ignore-eos",
        ];
        dir.run(&[&fixed[..], args].concat())
    };
    let greedy = run(&["--seed", "1"]);
    assert_eq!(greedy.stdout(), run(&["--seed", "2"]).stdout());
    assert_ne!(
        greedy.stdout(),
        run(&["--seed", "1", "--temp", "3", "--min-p", "0"]).stdout()
    );

    dir.file(
        "greedy.gguf",
        file.set("general.sampling.top_p", 2.0f32).to_bytes(),
    );
    let refused = run(&[]);
    let message = refused.error(1);
    assert!(
        message.contains("general.sampling.top_p is 2") && message.contains("--top-p"),
        "{message}"
    );
    assert_eq!(greedy.stdout(), run(&["--top-p", "0.9"]).stdout());
}

#[test]
fn one_closing_line_of_statistics_goes_to_standard_error() {
    let ran = answer(&model::answers("bcd"), &[]);
    let lines: Vec<_> = ran.stderr.lines().collect();
    assert_eq!(lines.len(), 1, "{}", ran.stderr);
    // Three letters and the token that ends the answer.
    for part in [
        "prompt: 1 tokens",
        "generated: 4 tokens",
        "tokens/s",
        "first token after",
    ] {
        assert!(lines[0].contains(part), "no {part}: {}", lines[0]);
    }
}

#[test]
fn the_demo_model_is_named_on_standard_error() {
    let ran = sharpi(&["run", "-p", "x", "-n", "1"]);
    ran.stdout();
    let lines: Vec<_> = ran.stderr.lines().collect();
    assert_eq!(lines.len(), 2, "{}", ran.stderr);
    assert!(lines[0].contains("demo model"), "{}", ran.stderr);
}

#[test]
fn quiet_says_nothing_and_verbose_says_more() {
    let args = ["run", "-p", "x", "-n", "3", "-c", "4096"];
    let quiet = sharpi(&[&args[..], &["-q"]].concat());
    quiet.stdout();
    assert_eq!(quiet.stderr, "");
    let verbose = sharpi(&[&args[..], &["-v"]].concat());
    verbose.stdout();
    assert!(
        verbose
            .stderr
            .lines()
            .any(|line| line.starts_with("debug: ")),
        "{}",
        verbose.stderr
    );
    assert!(
        sharpi(&["run", "-q", "-m", "missing.gguf", "-p", "x"])
            .error(1)
            .contains("missing.gguf")
    );
}

#[test]
fn no_progress_bar_is_drawn_where_standard_error_is_no_terminal() {
    let long = "A long story about the moon. ".repeat(150);
    let ran = sharpi(&["run", "--raw", "-p", &long, "-n", "1"]);
    ran.stdout();
    assert!(!ran.stderr.contains(['\r', '\u{1b}']), "{:?}", ran.stderr);
}

#[test]
fn standard_input_is_left_to_the_script_unless_asked_for() {
    let script = r#"printf 'one\ntwo\nthree\n' | while read -r line; do
        "$SHARPI" run -q -p "$line" -n 1 --temp 0 > /dev/null && echo "$line"
    done"#;
    let output = Command::new("sh")
        .args(["-c", script])
        .env("SHARPI", env!("CARGO_BIN_EXE_sharpi"))
        .stdin(Stdio::null())
        .output()
        .expect("starting sh");
    assert_eq!(Ran::from(output).stdout(), "one\ntwo\nthree\n");
}
