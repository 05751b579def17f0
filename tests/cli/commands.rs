//! `tokenize` and `devices`, and the ways to give a prompt.

use serde_json::{Value, json};

use sharpi::quant::TensorType;

use crate::{Dir, Ran, common::gguf_writer::RandomModel, feed, json::valid, model, sharpi};

fn json(ran: &Ran) -> Value {
    serde_json::from_str(ran.stdout()).unwrap_or_else(|error| panic!("{error}: {ran:?}"))
}

#[test]
fn tokenize_takes_the_text_byte_for_byte() {
    let dir = Dir::new();
    dir.file("m.gguf", model::answers("b"));
    dir.file("text", "xy\n\n");
    let lines = dir.run(&["tokenize", "-m", "m.gguf", "-f", "text"]);
    assert_eq!(lines.stdout(), "120\tx\n121\ty\n10\t\\n\n10\t\\n\n");
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

#[test]
fn templates_are_told_of_tools_and_of_the_day() {
    let dir = Dir::new();
    let mut file = RandomModel::new("qwen3", TensorType::F32).file();
    let template = "{{ tools[0].function.name }} {{ strftime_now('%A, %-d %B %Y') }} {{ messages[0].content[0].text }}";
    file.set("tokenizer.chat_template", template);
    dir.file("m.gguf", file.to_bytes());
    // A byte order mark, as editors of Windows write it.
    dir.file(
        "tools.json",
        "\u{feff}[{\"type\":\"function\",\"function\":{\"name\":\"clock\"}}]",
    );
    dir.file(
        "turns.json",
        r#"[{"role":"user","content":[{"type":"text","text":"Hi"}]}]"#,
    );
    let tokenize = |more: &[&str]| {
        let chat = [
            "tokenize",
            "-m",
            "m.gguf",
            "--chat",
            "--json",
            "--messages",
            "turns.json",
            "--tools",
            "tools.json",
            "-v",
        ];
        dir.run(&[&chat, more].concat())
    };
    let fixed = tokenize(&["--date", "2026-01-31"]);
    assert_eq!(json(&fixed)["text"], "clock Saturday, 31 January 2026 Hi");
    assert!(!fixed.stderr.contains("--date"), "{fixed:?}");
    let today = tokenize(&[]);
    assert!(
        today
            .stderr
            .contains("debug: the chat template asks what day it is"),
        "{today:?}"
    );
    assert!(today.stderr.contains("--date"), "{today:?}");
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
        "" => &["built without CUDA"][..],
        _ => &["no NVIDIA driver", "shows no GPU", "compute capability"],
    };
    assert!(
        lines[1].starts_with("cuda") && expected.iter().any(|part| lines[1].contains(part)),
        "{}",
        ran.stdout
    );
}

/// A name, a key or a piece that a stranger wrote must not command the terminal; JSON has them as they are.
#[test]
fn control_characters_from_a_file_are_escaped_for_people() {
    const HOSTILE: &str = "a\u{1b}]0;title\u{7}b\u{9b}31mc\nd\u{7f}";
    let dir = Dir::new();
    let mut file = RandomModel::new("llama", TensorType::F32).file();
    file.set("general.name", HOSTILE);
    file.set(&format!("general.sampling.{HOSTILE}"), HOSTILE);
    let tokens = file
        .metadata
        .iter_mut()
        .find(|(key, _)| key == "tokenizer.ggml.tokens");
    let Some((_, crate::common::gguf_writer::Value::Strings(tokens))) = tokens else {
        panic!("the vocabulary is a list of strings")
    };
    *tokens.last_mut().expect("a token") = HOSTILE.to_owned();
    dir.file("m.gguf", file.to_bytes());
    let clean = |text: &str| {
        assert!(
            !text.contains(|c: char| c.is_control() && c != '\n'),
            "{text:?}"
        )
    };

    let table = dir.run(&["info", "-m", "m.gguf"]);
    clean(table.stdout());
    assert!(
        table
            .stdout
            .contains(r"a\u{1b}]0;title\u{7}b\u{9b}31mc\nd\u{7f}"),
        "{}",
        table.stdout
    );
    let info = valid(
        "info.json",
        dir.run(&["info", "-m", "m.gguf", "--json"]).stdout(),
    );
    assert_eq!(info["name"], HOSTILE);
    assert_eq!(info["sampling"][HOSTILE], HOSTILE);
    let ends = info["tokenizer"]["end_of_generation"].to_string();
    assert!(
        ends.contains("title"),
        "the hostile piece is among them: {ends}"
    );

    // In error messages, too: a template that refuses, and a type that does not exist.
    file.set(
        "tokenizer.chat_template",
        "{{ raise_exception('\u{1b}[31mno\u{9b}31m') }}",
    );
    dir.file("m.gguf", file.to_bytes());
    let refused = dir.run(&["run", "-m", "m.gguf", "-p", "x"]);
    clean(refused.error(1));
    file.set("general.architecture", HOSTILE);
    dir.file("m.gguf", file.to_bytes());
    clean(dir.run(&["run", "-m", "m.gguf", "-p", "x"]).error(1));
    clean(dir.run(&["info", "-m", "m.gguf"]).stdout());
    // And in the name that it goes by.
    let name = "m\u{1b}[31m.gguf";
    dir.file(name, "no model");
    clean(dir.run(&["info", "-m", name]).error(1));
}

/// A library that answers as a driver would, in the place where it is looked for.
#[cfg(target_os = "linux")]
#[test]
fn a_driver_that_fails_is_told_and_none_at_all_is_not() {
    let dir = Dir::new();
    let run = |code: &str, args: &[&str]| {
        let source = format!(
            "int cuInit(unsigned flags) {{ return {code}; }}
             int cuGetErrorString(int e, const char **s) {{ *s = \"it is broken\"; return 0; }}
             int cuGetErrorName(int e, const char **s) {{ *s = \"CUDA_ERROR_UNKNOWN\"; return 0; }}"
        );
        let source = dir.file("driver.c", source);
        let built = std::process::Command::new("cc")
            .args(["-shared", "-fPIC", "-o", "libcuda.so"])
            .arg(source)
            .current_dir(dir.path())
            .status()
            .expect("starting cc");
        assert!(built.success());
        let mut command = dir.command(args);
        command.env("LD_LIBRARY_PATH", dir.path());
        Ran::from(command.output().expect("starting sharpi"))
    };
    let text = ["run", "-p", "x", "-n", "1"];
    let warnings = |ran: &Ran| {
        ran.stdout();
        let warnings = ran
            .stderr
            .lines()
            .filter(|line| line.starts_with("warning: "));
        warnings.map(str::to_owned).collect::<Vec<_>>()
    };
    const NO_DEVICE: &str = "100";
    const UNKNOWN: &str = "999";
    assert_eq!(warnings(&run(NO_DEVICE, &text)), [""; 0]);
    let told = run(NO_DEVICE, &[&text[..], &["-v"]].concat());
    let told = told
        .stderr
        .lines()
        .find(|line| line.starts_with("debug: running on the CPU"));
    assert!(told.is_some());

    let broken = warnings(&run(UNKNOWN, &text));
    let devices = run(UNKNOWN, &["devices"]);
    if sharpi::cuda::ARCHS.is_empty() {
        // Without kernels, no driver is asked.
        assert_eq!(broken, [""; 0]);
        return;
    }
    assert_eq!(broken.len(), 1, "{broken:?}");
    assert!(
        broken[0].contains("CPU") && broken[0].contains("it is broken"),
        "{broken:?}"
    );
    assert!(devices.stdout().contains("it is broken"), "{devices:?}");
}

/// A flag gives what a file's key gives, bit by bit, and comes before it.
#[test]
fn flags_take_the_place_of_a_files_rotation() {
    let dir = Dir::new();
    let plain = RandomModel::new("qwen2", TensorType::F32).file();
    let mut scaled = plain.clone();
    for (key, value) in [
        ("factor", 4f32),
        ("yarn_beta_fast", 8.0),
        ("yarn_attn_factor", 0.9),
    ] {
        scaled.set(&format!("qwen2.rope.scaling.{key}"), value);
    }
    scaled
        .set("qwen2.rope.scaling.type", "yarn")
        .set("qwen2.rope.scaling.original_context_length", 32u32)
        .set("qwen2.rope.freq_base", 5000f32);
    dir.file("plain.gguf", plain.to_bytes());
    dir.file("scaled.gguf", scaled.to_bytes());
    let tokens = |model: &str, flags: &[&str]| {
        let run = [
            "run", "-m", model, "--raw", "-p", "the in a", "-n", "8", "--temp", "0", "--json",
        ];
        let ran = dir.run(&[&run[..], &["--ignore-eos", "--logprobs", "3"], flags].concat());
        let tokens = ran
            .stdout()
            .lines()
            .filter(|line| line.contains("\"token\""));
        tokens.map(str::to_owned).collect::<Vec<String>>()
    };
    let flags = [
        "--rope-scaling=yarn",
        "--rope-scale=4",
        "--rope-freq-base=5000",
        "--yarn-orig-ctx=32",
        "--yarn-beta-fast=8",
        "--yarn-attn-factor=0.9",
    ];
    let expected = tokens("scaled.gguf", &[]);
    assert_eq!(expected.len(), 8);
    assert_eq!(tokens("plain.gguf", &flags), expected);
    assert_ne!(tokens("plain.gguf", &[]), expected);
    let unscaled = ["--rope-scaling=none", "--rope-freq-base=10000"];
    assert_eq!(tokens("scaled.gguf", &unscaled), tokens("plain.gguf", &[]));
    for (flag, message) in [
        ("--rope-scale=0", "between 0.001"),
        ("--rope-scaling=ntk", "possible values"),
        ("--rope-freq-base=0.5", "at least 1"),
    ] {
        let ran = dir.run(&["run", "-m", "plain.gguf", "-p", "a", flag]);
        assert!(ran.error(2).contains(message), "{flag}");
    }
    let ran = dir.run(&["run", "-p", "a", "--rope-scale", "2"]);
    assert!(ran.error(2).contains("--model"));
}

#[test]
fn a_byte_order_mark_before_messages_is_ignored() {
    let dir = Dir::new();
    dir.file("m.gguf", model::answers("b"));
    let turns = r#"[{"role":"user","content":"Hi"}]"#;
    dir.file("plain.json", turns);
    dir.file("marked.json", format!("\u{feff}{turns}"));
    let chat = ["tokenize", "-m", "m.gguf", "--chat", "--json", "--messages"];
    let text = |file: &str| dir.run(&[&chat[..], &[file]].concat()).stdout().to_owned();
    let plain = text("plain.json");
    assert_eq!(text("marked.json"), plain);
    let marked = format!("\u{feff}{turns}");
    let piped = dir.run_with_input(&[&chat[..], &["-"]].concat(), marked.as_bytes());
    assert_eq!(piped.stdout(), plain);
}

#[test]
fn an_id_outside_the_vocabulary_is_told_and_not_used() {
    for key in ["bos_token_id", "eot_token_id", "eos_token_id"] {
        let dir = Dir::new();
        let mut file = RandomModel::new("qwen2", TensorType::F32).file();
        file.set(&format!("tokenizer.ggml.{key}"), u32::MAX);
        dir.file("m.gguf", file.to_bytes());
        let ran = dir.run(&["tokenize", "-m", "m.gguf", "-p", "hi", "--json"]);
        assert_eq!(json(&ran)["ids"], json!([104, 105]));
        let warnings: Vec<_> = (ran.stderr.lines())
            .filter(|line| line.starts_with("warning: "))
            .collect();
        assert_eq!(warnings.len(), 1, "{}", ran.stderr);
        assert!(warnings[0].contains(key), "{}", ran.stderr);
    }
}

/// Held against the system's own clock, a day apart where these zones are.
#[cfg(unix)]
#[test]
fn a_template_is_told_the_local_time() {
    let dir = Dir::new();
    let mut file = RandomModel::new("qwen3", TensorType::F32).file();
    file.set(
        "tokenizer.chat_template",
        "{% if strftime_now is defined %}{{ strftime_now('%Y-%m-%d %H %A, %d %B %b') }}{% endif %}",
    );
    dir.file("m.gguf", file.to_bytes());
    for zone in ["AAA-13", "AAA+11"] {
        let date = || {
            let mut date = std::process::Command::new("date");
            date.arg("+%Y-%m-%d %H %A, %d %B %b")
                .envs([("TZ", zone), ("LC_ALL", "C")]);
            String::from_utf8(date.output().expect("starting date").stdout).expect("a date")
        };
        let before = date();
        let chat = ["tokenize", "-m", "m.gguf", "--chat", "-p", "Hi", "--json"];
        let output = dir.command(&chat).env("TZ", zone).output();
        let told = json(&Ran::from(output.expect("starting sharpi")))["text"].clone();
        let told = told.as_str().expect("a text");
        assert!(
            [before, date()].iter().any(|date| date.trim_end() == told),
            "{zone}: {told}"
        );
    }
}

/// A byte-level vocabulary has a token for each byte: none of these is a character, and in the file's own spelling none is a byte.
#[test]
fn tokens_that_are_no_text_are_shown_as_bytes() {
    let dir = Dir::new();
    dir.file("m.gguf", model::answers("b"));
    let shown = dir.run(&["tokenize", "-m", "m.gguf", "-p", "\u{e9}\t "]);
    assert_eq!(shown.stdout(), "195\t<0xC3>\n169\t<0xA9>\n9\t\\t\n32\t \n");
}

const RAW: [&str; 6] = ["--raw", "--temp", "0", "--device", "cpu", "-q"];

#[test]
fn what_is_piped_is_the_prompt_where_there_is_no_other() {
    let dir = Dir::new();
    dir.file("m.gguf", model::answers("bcd"));
    let run = [&["run", "-m", "m.gguf"][..], &RAW].concat();
    assert_eq!(dir.run_with_input(&run, b"a").stdout(), "bcd\n");
    let both = [&run[..], &["-p", "a"]].concat();
    assert_eq!(dir.run_with_input(&both, b"b").stdout(), "bcd\n");
    assert!(dir.run_with_input(&run, b"").error(2).contains("no prompt"));
    let tokens = dir.run_with_input(&["tokenize", "-m", "m.gguf", "--json"], b"ab\n");
    assert_eq!(json(&tokens)["text"], "ab\n");
}

#[test]
fn a_model_and_a_prompt_need_no_flags() {
    let dir = Dir::new();
    dir.file("m.gguf", model::answers("bcd"));
    dir.file("other.gguf", model::answers("xyz"));
    let run = |args: &[&str], default: Option<&str>, input: &[u8]| {
        let args = [&["run"][..], args, &RAW].concat();
        let mut command = dir.command(&args);
        match default {
            Some(model) => command.env("SHARPI_MODEL", model),
            None => command.env_remove("SHARPI_MODEL"),
        };
        feed(command, input)
    };
    assert_eq!(run(&["m.gguf", "a"], None, b"").stdout(), "bcd\n");
    assert_eq!(run(&["m.gguf"], None, b"a").stdout(), "bcd\n");
    assert_eq!(run(&["-m", "m.gguf", "a"], None, b"").stdout(), "bcd\n");
    assert_eq!(run(&["a"], Some("m.gguf"), b"").stdout(), "bcd\n");
    assert_eq!(run(&["-p", "a"], Some("m.gguf"), b"").stdout(), "bcd\n");
    let other = run(&["other.gguf"], Some("m.gguf"), b"a");
    assert_eq!(other.stdout(), "xyz\n");
    for (args, flag) in [
        (&["-m", "m.gguf", "other.gguf", "a"][..], "--model"),
        (&["m.gguf", "a", "-p", "b"], "--prompt"),
        (&["m.gguf", "a", "--messages", "t.json"], "--messages"),
    ] {
        let ran = run(args, None, b"");
        assert!(ran.error(2).contains(flag), "{args:?}: {ran:?}");
    }
}

/// A text that was cut off looks like one that ended.
#[test]
fn the_closing_line_says_why_the_text_ends() {
    let dir = Dir::new();
    dir.file("m.gguf", model::answers("bcd"));
    dir.file("endless.gguf", model::endless(8));
    for (model, more, ending) in [
        ("m.gguf", &[][..], "the model ended its answer"),
        ("m.gguf", &["-n", "2"], "cut off by --max-tokens"),
        ("m.gguf", &["--stop", "c"], "ended at a stop string"),
        (
            "endless.gguf",
            &[],
            "cut off: the context is full (--ctx-size)",
        ),
    ] {
        let run = [
            "run", "-m", model, "-p", "a", "--raw", "--temp", "0", "--device", "cpu",
        ];
        let ran = dir.run(&[&run[..], more].concat());
        ran.stdout();
        let closing = ran.stderr.lines().last().expect("a closing line");
        assert!(closing.contains(&format!("; {ending}; seed ")), "{closing}");
    }
}

/// Every command and flag that a shell completes, and that the manual has.
#[test]
fn shells_and_manuals_know_the_commands() {
    for shell in ["bash", "zsh", "fish"] {
        let ran = sharpi(&["completions", shell]);
        for word in ["perplexity", "kv-budget", "no-cuda-graph"] {
            assert!(ran.stdout().contains(word), "{shell}: no {word}");
        }
    }
    assert!(sharpi(&["completions", "cmd"]).error(2).contains("bash"));
    let page = sharpi(&["man"]);
    assert!(page.stdout().contains(".TH sharpi 1"), "{page:?}");
    assert!(page.stdout().contains("perplexity"));
    let help = sharpi(&["help"]);
    let commands = help
        .stdout()
        .lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1);
    let names = commands.map_while(|line| line.split_whitespace().next());
    let names: Vec<&str> = names.filter(|name| *name != "help").collect();
    assert!(
        names.contains(&"run") && names.contains(&"man"),
        "{names:?}"
    );
    for name in names {
        let page = sharpi(&["man", name]);
        let title = format!(".TH sharpi-{name} 1");
        assert!(page.stdout().contains(&title), "{name}: {page:?}");
    }
    assert!(sharpi(&["man", "nonsense"]).error(2).contains("nonsense"));
    let page = sharpi(&["man", "run"]);
    for part in ["kv\\-budget", "keep N tokens in each head"] {
        assert!(page.stdout().contains(part), "no {part}: {page:?}");
    }
}
