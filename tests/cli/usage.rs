//! Wrong usage and failures: one message each, and the exit code that goes with it.

use crate::{Dir, model, sharpi};

/// Every command line here names a model that does not exist: only loading it would give exit code 1.
#[test]
fn wrong_usage_exits_2_before_any_model_is_loaded() {
    let cases: &[(&[&str], &str)] = &[
        (&["run"], "no prompt"),
        (&["run", "--system", "Be brief."], "no prompt"),
        (&["run", "-p", "x", "--bogus"], "--bogus"),
        (&["run", "-p", "x", "--top-p", "2"], "--top-p"),
        (&["run", "-p", "x", "--min-p", "-0.1"], "--min-p"),
        (&["run", "-p", "x", "--temp", "-1"], "--temp"),
        (&["run", "-p", "x", "--temp", "nan"], "--temp"),
        (
            &["run", "-p", "x", "--presence-penalty", "inf"],
            "--presence-penalty",
        ),
        (&["run", "-p", "x", "--top-k", "-1"], "--top-k"),
        (&["run", "-p", "x", "-n", "-1"], "--max-tokens"),
        (&["run", "-p", "x", "-c", "many"], "--ctx-size"),
        (
            &["run", "-p", "x", "--repeat-penalty", "0"],
            "--repeat-penalty",
        ),
        (
            &["run", "-p", "x", "--repeat-last-n", "-2"],
            "--repeat-last-n",
        ),
        (&["run", "-p", "x", "--seed", "-1"], "--seed"),
        (&["run", "-p", "x", "--threads", "0"], "--threads"),
        (&["run", "-p", "x", "--stop", ""], "--stop"),
        (&["run", "-p", "x", "--device", "nonsense"], "cuda:N"),
        (&["run", "-p", "x", "--device", "cuda:x"], "cuda:N"),
        // A driver counts in 32 bits, in which this would be 0.
        (&["run", "-p", "x", "--device", "cuda:4294967296"], "cuda:N"),
        (&["run", "-p", "x", "--logprobs", "3"], "--json"),
        (
            &["run", "-p", "x", "--json", "--logprobs", "0"],
            "--logprobs",
        ),
        (&["run", "-p", "x", "-q", "-v"], "--verbose"),
        (&["run", "-p", "x", "--messages", "t.json"], "--messages"),
        (&["run", "-f", "x", "--messages", "t.json"], "--messages"),
        (
            &["run", "--system", "x", "--messages", "t.json"],
            "--messages",
        ),
        (&["run", "--raw", "--messages", "t.json"], "--raw"),
        (&["run", "--raw", "-p", "x", "--tools", "t.json"], "--raw"),
        (&["run", "-p", "x", "--date", "yesterday"], "2026-01-31"),
        (&["run", "--messages", "-", "--tools", "-"], "--tools"),
        (&["tokenize", "-p", "x", "--date", "2026-01-31"], "--chat"),
        (&["run", "--raw", "-p", "x", "--system", "y"], "--raw"),
        (&["run", "--raw", "-p", "x", "--no-think"], "--raw"),
        (&["tokenize"], "no prompt"),
        (&["tokenize", "-p", "x", "--system", "y"], "--chat"),
        (&["tokenize", "--messages", "t.json"], "--chat"),
        (&["tokenize", "-p", "x", "--no-think"], "--chat"),
    ];
    for (args, expected) in cases {
        let ran = sharpi(&[args, &["-m", "missing.gguf"][..]].concat());
        let message = ran.error(2);
        assert!(message.contains(expected), "{args:?}: {message}");
    }
    let ran = sharpi(&["nonsense"]);
    assert!(ran.error(2).contains("nonsense"));
}

#[test]
fn sizes_that_cannot_be_are_refused_by_flag_value_and_limit() {
    const HUGE: &str = "18446744073709551615";
    const HALF: &str = "9223372036854775808";
    const MOST: &str = "2147483647";
    let cases: &[(&[&str], &[&str])] = &[
        (&["bench", "-p", HUGE, "-d", "1"], &["--n-prompt", HUGE]),
        (&["bench", "-p", HALF, "-d", HALF], &["--n-prompt", HALF]),
        (
            &["bench", "-p", "0", "-n", HALF, "-d", HALF],
            &["--n-gen", HALF],
        ),
        (&["bench", "-n", HUGE], &["--n-gen", HUGE]),
        (&["bench", "-d", HUGE], &["--n-depth", HUGE]),
        (&["bench", "-p", "1,-1"], &["--n-prompt", "-1"]),
        (
            &["bench", "-p", MOST, "-d", "1"],
            &["pp2147483647@d1", "--n-prompt", "--n-depth", "2147483648"],
        ),
        (&["verify", "-n", HUGE], &["--max-tokens", HUGE]),
        (
            &["perplexity", "-f", "x", "-c", HUGE],
            &["--ctx-size", HUGE],
        ),
        (&["run", "-p", "x", "-c", HUGE], &["--ctx-size", HUGE]),
        (&["run", "-p", "x", "--ubatch", HUGE], &["--ubatch", HUGE]),
        (
            &["run", "-p", "x", "--kv-budget", "67"],
            &["--kv-budget", "67", "68"],
        ),
        (
            &["bench", "-p", "2147483648"],
            &["--n-prompt", "2147483648"],
        ),
    ];
    for (args, expected) in cases {
        let ran = sharpi(&[args, &["-m", "missing.gguf"][..]].concat());
        let message = ran.error(2);
        for part in expected.iter().chain(&[MOST]) {
            assert!(
                message.contains(part),
                "{args:?} does not say {part}: {message}"
            );
        }
    }
}

/// Where a number only has to be reached, any number will do.
#[test]
fn a_limit_beyond_all_sizes_is_no_limit() {
    let dir = Dir::new();
    dir.file("m.gguf", model::answers("bcd"));
    let huge = "18446744073709551615";
    let run = ["run", "-m", "m.gguf", "--raw", "-p", "a", "--temp", "0"];
    for flag in ["-n", "--top-k"] {
        let ran = dir.run(&[&run[..], &[flag, huge, "--device", "cpu"]].concat());
        assert_eq!(ran.stdout(), "bcd\n", "{flag}");
    }
    let json = ["--json", "--logprobs", huge, "--device", "cpu"];
    dir.run(&[&run[..], &json].concat()).stdout();
}

#[test]
fn failures_exit_1_and_say_what_is_wrong_and_with_what() {
    let dir = Dir::new();
    dir.file("text.gguf", "this is no model");
    dir.file("latin1.txt", b"caf\xe9");
    dir.file("empty.json", "[]");
    dir.file("broken.json", "[{");
    dir.file("unknown.json", r#"[{"role":"user","contents":"x"}]"#);
    let cases: &[(&[&str], &[&str])] = &[
        (
            &["run", "-p", "x", "-m", "missing.gguf"],
            &["missing.gguf", "No such file"],
        ),
        (&["run", "-p", "x", "-m", "."], &["."]),
        (
            &["run", "-p", "x", "-m", "text.gguf"],
            &["text.gguf", "GGUF"],
        ),
        (&["info", "-m", "text.gguf"], &["text.gguf", "GGUF"]),
        (
            &["tokenize", "-p", "x", "-m", "text.gguf"],
            &["text.gguf", "GGUF"],
        ),
        (
            &["run", "-f", "missing.txt"],
            &["--file", "missing.txt", "No such file"],
        ),
        (
            &["run", "-f", "latin1.txt"],
            &["latin1.txt", "UTF-8", "byte 3"],
        ),
        (
            &["run", "--messages", "empty.json"],
            &["empty.json", "no turns"],
        ),
        (
            &["run", "--messages", "broken.json"],
            &["broken.json", "line 1"],
        ),
        (
            &["run", "--messages", "unknown.json"],
            &["unknown.json", "content"],
        ),
        (
            &["run", "-p", "x", "--device", "cuda:99"],
            &["GPU 99", "sharpi devices"],
        ),
        (&["run", "--raw", "-p", ""], &["no tokens"]),
        // No machine has the memory. Each command names flags that it has.
        (
            &["run", "-p", "x", "-c", "2147483647", "--device", "cpu"],
            &["--ctx-size", "2147483647", "at most"],
        ),
        (
            &["bench", "-d", "2147483000", "--device", "cpu"],
            &["--n-depth", "2147483512", "at most"],
        ),
    ];
    for (args, expected) in cases {
        let ran = dir.run(args);
        let message = ran.error(1);
        for part in *expected {
            assert!(
                message.contains(part),
                "{args:?} does not say {part}: {message}"
            );
        }
    }
}

#[test]
fn a_prompt_longer_than_the_context_is_refused_with_both_numbers() {
    let dir = Dir::new();
    dir.file("m.gguf", model::answers("bcd"));
    let ran = dir.run(&[
        "run",
        "-m",
        "m.gguf",
        "--raw",
        "-p",
        "aaaaaaaaaaaaa",
        "-c",
        "7",
    ]);
    let message = ran.error(1);
    assert!(message.contains("13 tokens"), "{message}");
    assert!(message.contains("holds 7"), "{message}");
    assert!(message.contains("--ctx-size"), "{message}");
}

#[test]
fn a_model_without_a_template_asks_for_raw_and_takes_it() {
    let dir = Dir::new();
    let mut file = model::chain(&b"abc".map(u32::from));
    dir.file("m.gguf", file.unset("tokenizer.chat_template").to_bytes());
    let ran = dir.run(&["run", "-m", "m.gguf", "-p", "a"]);
    let message = ran.error(1);
    assert!(
        message.contains("chat template") && message.contains("--raw"),
        "{message}"
    );
    let raw = dir.run(&[
        "run", "-m", "m.gguf", "--raw", "-p", "a", "-n", "2", "--temp", "0",
    ]);
    assert_eq!(raw.stdout(), "bc\n");
}

#[test]
fn a_context_beyond_what_the_model_was_trained_for_is_allowed_with_a_warning() {
    let ran = sharpi(&["run", "-p", "x", "-n", "1", "-c", "4096"]);
    ran.stdout();
    let warnings: Vec<_> = ran
        .stderr
        .lines()
        .filter(|line| line.starts_with("warning: "))
        .collect();
    assert_eq!(warnings.len(), 1, "{}", ran.stderr);
    assert!(
        warnings[0].contains("4096") && warnings[0].contains("2048"),
        "{}",
        ran.stderr
    );
}

#[test]
fn help_and_version_go_to_standard_output() {
    let version = sharpi(&["--version"]);
    assert_eq!(
        version.stdout(),
        concat!("sharpi ", env!("CARGO_PKG_VERSION"), "\n")
    );
    let help = sharpi(&["help", "run"]);
    for flag in [
        "--prompt",
        "--n-predict",
        "--ctx-size",
        "--repeat-last-n",
        "--logprobs",
        "SHARPI_CUDA_GRAPH=0",
        "SHARPI_STEP_KERNEL=0",
        "Examples:",
    ] {
        assert!(help.stdout().contains(flag), "{flag}");
    }
}

#[test]
fn a_message_names_a_file_once() {
    let dir = Dir::new();
    dir.file("text.gguf", "this is no model");
    dir.file("latin1.txt", b"caf\xe9");
    dir.file("broken.json", "[{");
    let mut file = model::chain(&b"abc".map(u32::from));
    dir.file("mute.gguf", file.unset("tokenizer.ggml.merges").to_bytes());
    dir.file("shapeless.gguf", file.unset("llama.block_count").to_bytes());
    let models = ["missing.gguf", "text.gguf", "mute.gguf", "shapeless.gguf"];
    for (name, runs) in models.iter().zip([3, 3, 3, 2]) {
        let run = ["run", "--raw", "-p", "a", "-m", name];
        let bench = ["bench", "-m", name];
        let tokenize = ["tokenize", "-p", "a", "-m", name];
        for args in [&run[..], &bench, &tokenize].iter().take(runs) {
            let ran = dir.run(args);
            assert_eq!(
                ran.error(1).matches(name).count(),
                1,
                "{args:?}: {}",
                ran.stderr
            );
        }
    }
    let files = ["missing.txt", "latin1.txt", "broken.json"];
    for (flag, files) in [
        ("--file", &files[..2]),
        ("--messages", &files),
        ("--tools", &files),
    ] {
        for name in files {
            let prompt: &[&str] = if flag == "--tools" { &["-p", "a"] } else { &[] };
            let ran = dir.run(&[&["run", flag, name][..], prompt].concat());
            assert_eq!(
                ran.error(1).matches(name).count(),
                1,
                "{flag}: {}",
                ran.stderr
            );
        }
    }
}

#[test]
fn what_happens_inside_is_said_in_words() {
    let dir = Dir::new();
    dir.file("m.gguf", model::answers("bcd"));
    let run = [
        "run", "-m", "m.gguf", "--raw", "-p", "a", "-v", "--seed", "7",
    ];
    let flags = ["--temp", "0.5", "--repeat-penalty", "1.1"];
    let ran = dir.run(&[&run[..], &flags].concat());
    ran.stdout();
    let sampling = "temperature 0.5, top-k 40, top-p 0.95, min-p 0.05, penalties over 64 tokens (repeat 1.1, \
                    presence 0, frequency 0), seed 7";
    assert!(ran.stderr.contains(sampling), "{}", ran.stderr);
    assert!(!ran.stderr.contains(['{', '}']), "{}", ran.stderr);
}
