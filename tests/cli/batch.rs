//! `batch`: an answer or an error for each line, whatever the line, and an output that can be gone on with.

use std::{fs, path::Path};

use serde_json::{Value, json};

use crate::{
    Dir, Ran,
    common::gguf_writer::byte_vocabulary_with,
    json::{Lines, valid},
    model, sharpi,
};

/// The lines of an output, each held to the schema.
fn lines(output: &str) -> Vec<Value> {
    assert!(output.is_empty() || output.ends_with('\n'), "{output}");
    output
        .lines()
        .map(|line| valid("batch.json", line))
        .collect()
}

/// The lines of a file that a batch has written.
fn answers(dir: &Dir, name: &str) -> Vec<Value> {
    lines(&read(&dir.path().join(name)))
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).expect("the file is there")
}

fn jsonl(values: &[Value]) -> String {
    values.iter().map(|value| format!("{value}\n")).collect()
}

/// What was generated, of each line.
fn texts(lines: &[Value]) -> Vec<&str> {
    let text = |line: &Value| line["text"].as_str().map(|_| ());
    assert!(lines.iter().all(|line| text(line).is_some()), "{lines:?}");
    lines
        .iter()
        .filter_map(|line| line["text"].as_str())
        .collect()
}

#[test]
fn every_line_is_answered_in_order_under_its_id() {
    let dir = Dir::new();
    dir.file("m.gguf", model::answers("one ENDxyz"));
    let prompts = "\u{feff}{\"id\":\"first \\u001b\",\"prompt\":\"a\"}\r\n\
        \n  \n\
        {\"prompt\":\"a\",\"max_tokens\":3}\n\
        {\"id\":18446744073709551615,\"prompt\":\"a\",\"stop\":\"END\",\"seed\":7}\n\
        {\"id\":-1,\"prompt\":\"a\",\"stop\":[\"x\",\"ne\"],\"system\":null}";
    dir.file("prompts", prompts);
    let ran = dir.run(&[
        "batch", "-m", "m.gguf", "-i", "prompts", "--raw", "--temp", "0", "--seed", "3",
    ]);
    let answer = |id: Value, text: &str, reason: &str, tokens: usize, seed: u64| {
        json!({
            "id": id, "text": text, "finish_reason": reason, "prompt_tokens": 1, "generated_tokens": tokens, "seed": seed
        })
    };
    assert_eq!(
        lines(ran.stdout()),
        [
            answer("first \u{1b}".into(), "one ENDxyz", "stop", 11, 3),
            answer(4.into(), "one", "length", 3, 3),
            answer(u64::MAX.into(), "one ", "stop_string", 7, 7),
            answer((-1).into(), "o", "stop_string", 3, 3),
        ]
    );
    assert!(ran.stderr.contains("4 answers"), "{}", ran.stderr);
}

#[test]
fn a_line_that_cannot_be_answered_says_why_and_the_rest_go_on() {
    let dir = Dir::new();
    dir.file("m.gguf", model::answers("bc"));
    let long = "a".repeat(3000);
    // With whether the line can be read so far that its id is known.
    let cases: Vec<(Vec<u8>, bool, &str)> = [
        ("not JSON", false, "not JSON: expected ident at column 2"),
        ("{\"prompt\":\"a\"", false, "not JSON"),
        ("[1]", false, "expected an object"),
        (r#"{"id":1.5,"prompt":"a"}"#, false, "id: expected a text or a whole number"),
        (r#"{"id":{},"prompt":"a"}"#, false, "id: "),
        (r#"{"id":"x"}"#, true, "neither a prompt nor messages"),
        (r#"{"prompt":"a","messages":[{"role":"user","content":"a"}]}"#, true, "exclude each other"),
        (r#"{"prompt":5}"#, true, "prompt: invalid type"),
        (r#"{"prompt":"a","promt":"a"}"#, true, "no key \"promt\", only id, prompt,"),
        (r#"{"prompt":"a","temp":"hot"}"#, true, "temp: expected a number, found \"hot\""),
        (r#"{"prompt":"a","temp":-1}"#, true, "temp is -1: must not be negative"),
        (r#"{"prompt":"a","temperature":-1}"#, true, "temperature is -1"),
        (r#"{"prompt":"a","top_k":1.5}"#, true, "top_k is 1.5: expected a whole number"),
        (r#"{"prompt":"a","top_p":2}"#, true, "top_p is 2: must be between 0 and 1"),
        (r#"{"prompt":"a","repeat_last_n":-2}"#, true, "repeat_last_n is -2"),
        (r#"{"prompt":"a","seed":-1}"#, true, "seed is -1: expected a whole number"),
        (r#"{"prompt":"a","max_tokens":-1}"#, true, "max_tokens is -1: expected a whole number"),
        (r#"{"prompt":"a","max_tokens":"3"}"#, true, "max_tokens: "),
        (r#"{"prompt":"a","stop":[3]}"#, true, "stop: expected a text or a list of texts"),
        (r#"{"prompt":"a","stop":""}"#, true, "stop: an empty text"),
        (r#"{"prompt":"a","ignore_eos":1}"#, true, "ignore_eos: "),
        (r#"{"prompt":"a","date":"tomorrow"}"#, true, "date: expected a date"),
        (r#"{"prompt":"a","tools":{}}"#, true, "tools: "),
        (r#"{"messages":[]}"#, true, "messages: the conversation has no turns"),
        (r#"{"messages":[{"role":"user"}]}"#, true, "messages: missing field `content`"),
        (
            r#"{"system":"a","messages":[{"role":"system","content":"a"},{"role":"user","content":"a"}]}"#,
            true,
            "system is another",
        ),
        (r#"{"raw":true,"prompt":"a","system":"b"}"#, true, "system is for the chat template"),
        (r#"{"raw":true,"prompt":""}"#, true, "no tokens"),
        (r#"{"raw":true}"#, true, "there is no prompt"),
    ]
    .into_iter()
    .map(|(line, known, message)| (line.as_bytes().to_vec(), known, message))
    .chain([
        (b"{\"prompt\":\"caf\xe9\"}".to_vec(), false, "not UTF-8 text: byte 14 of the line"),
        (format!(r#"{{"raw":true,"prompt":"{long}"}}"#).into(), true, "3000 tokens long"),
    ])
    .collect();
    let good = br#"{"id":"good","raw":true,"prompt":"a"}"#;
    let mut prompts = Vec::new();
    for (line, _, _) in &cases {
        prompts.extend_from_slice(line);
        prompts.push(b'\n');
    }
    prompts.extend_from_slice(good);
    dir.file("prompts", prompts);
    let ran = dir.run(&["batch", "-m", "m.gguf", "-i", "prompts", "--temp", "0"]);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    let last = ran.stderr.lines().last();
    let summary = format!(
        "error: {} of {} lines gave an error",
        cases.len(),
        cases.len() + 1
    );
    assert!(
        last.is_some_and(|line| line.starts_with(&summary)),
        "{last:?}"
    );
    let lines = lines(&ran.stdout);
    assert_eq!(lines.len(), cases.len() + 1);
    for (number, ((text, known, expected), line)) in cases.iter().zip(&lines).enumerate() {
        let text = String::from_utf8_lossy(text);
        let id = match text.contains("\"id\":\"x\"") {
            true => "x".into(),
            false => Value::from(number + 1),
        };
        assert_eq!(line.get("id"), known.then_some(&id), "{line}");
        assert_eq!(line["line"], number + 1);
        let message = line["error"]["message"].as_str().expect("a message");
        assert!(message.contains(expected), "{message}");
    }
    assert_eq!(lines[cases.len()]["text"], "bc");
}

/// The session keeps what prompts share, here more than a chunk of tokens and the beginning of the answers.
#[test]
fn an_answer_is_what_a_run_of_its_own_gives() {
    let system =
        "You tell short stories to children, about animals that live in the forest. ".repeat(8);
    let options = [
        json!({"prompt": "A fox", "seed": 5, "temp": 1.5}),
        json!({"prompt": "A fox found a lantern", "seed": 6, "top_k": 0, "top_p": 0.5, "min_p": 0}),
        json!({"prompt": "A fox", "temperature": 0, "repeat_penalty": 1.3, "repeat_last_n": -1}),
        json!({"prompt": "Two owls", "seed": 8, "presence_penalty": 0.5, "frequency_penalty": -0.25}),
        json!({"prompt": "A fox", "seed": 5, "temp": 1.5, "system": "Be kind."}),
        json!({"prompt": "Once upon a time", "raw": true, "seed": 1, "ignore_eos": true}),
        json!({"prompt": "Once upon a time there", "raw": true, "seed": 2, "stop": [" a", " the"]}),
    ];
    let dir = Dir::new();
    dir.file("prompts", jsonl(&options));
    for extra in [&[][..], &["--kv-budget", "80"]] {
        let flags = ["-n", "12", "--device", "cpu"];
        let args = [
            &["batch", "-i", "prompts", "--system", &system][..],
            &flags,
            extra,
        ]
        .concat();
        let ran = dir.run(&args);
        let answers = lines(ran.stdout());
        assert_eq!(answers.len(), options.len());
        for (line, answer) in options.iter().zip(&answers) {
            let seed = answer["seed"].to_string();
            let mut args = vec![
                "run".to_owned(),
                "--json".to_owned(),
                "--seed".to_owned(),
                seed,
            ];
            let is_raw = line.get("raw").is_some();
            if !is_raw && line.get("system").is_none() {
                args.extend(["--system".to_owned(), system.clone()]);
            }
            for (key, value) in line.as_object().expect("an object") {
                let flag = format!("--{}", key.replace('_', "-"));
                match value {
                    _ if key == "seed" => {}
                    Value::Bool(_) => args.push(flag),
                    Value::Array(values) => {
                        for value in values {
                            args.extend([flag.clone(), value.as_str().expect("a text").to_owned()]);
                        }
                    }
                    Value::String(text) => args.extend([flag, text.clone()]),
                    other => args.extend([flag, other.to_string()]),
                }
            }
            let args: Vec<&str> = args.iter().map(String::as_str).collect();
            let run = Lines::parse(sharpi(&[&args[..], &flags, extra].concat()).stdout());
            for key in [
                "text",
                "finish_reason",
                "prompt_tokens",
                "generated_tokens",
                "seed",
            ] {
                assert_eq!(answer[key], run.done[key], "{key} of {line} {extra:?}");
            }
        }
    }
}

#[test]
fn conversations_and_the_system_message_reach_the_template() {
    let dir = Dir::new();
    let turns = json!([{"role": "user", "content": "Hi"}]);
    let with_system =
        json!([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]);
    let prompts = [
        json!({"prompt": "Hi"}),
        json!({"messages": turns}),
        json!({"messages": with_system}),
        json!({"messages": turns, "system": "Be kind."}),
    ];
    dir.file("prompts", jsonl(&prompts));
    let ran = dir.run(&[
        "batch",
        "-i",
        "prompts",
        "-n",
        "20",
        "--temp",
        "0",
        "--system",
        "Be brief and very clear.",
    ]);
    let answers = lines(ran.stdout());
    let tokens: Vec<_> = answers
        .iter()
        .map(|answer| answer["prompt_tokens"].as_u64())
        .collect();
    assert_eq!(tokens[0], tokens[1]);
    assert_eq!(tokens[2], tokens[3]);
    assert!(tokens[2] < tokens[0], "{tokens:?}");
    let texts = texts(&answers);
    assert_eq!(texts[0], texts[1]);
    assert_eq!(texts[2], texts[3]);
}

#[test]
fn seeds_are_drawn_for_each_line_unless_one_is_given() {
    let dir = Dir::new();
    dir.file("prompts", "{\"prompt\":\"x\"}\n".repeat(3));
    let seeds = |args: &[&str]| -> Vec<Value> {
        let ran = dir.run(&[&["batch", "-i", "prompts", "-n", "1"], args].concat());
        lines(ran.stdout())
            .iter()
            .map(|line| line["seed"].clone())
            .collect()
    };
    assert_eq!(seeds(&["--seed", "9"]), [9, 9, 9]);
    let drawn = seeds(&[]);
    assert!(drawn[0] != drawn[1] || drawn[1] != drawn[2], "{drawn:?}");
}

#[test]
fn reasoning_is_kept_apart_and_without_its_marks() {
    let dir = Dir::new();
    let vocabulary = byte_vocabulary_with(&[("<think>", 4), ("</think>", 4)]);
    let [a, b, c, newline] = *b"abc\n";
    let links = [
        a.into(),
        264,
        newline.into(),
        b.into(),
        265,
        b' '.into(),
        c.into(),
        model::END,
    ];
    dir.file("m.gguf", model::chain_over(vocabulary, &links).to_bytes());
    dir.file(
        "prompts",
        "{\"prompt\":\"a\"}\n{\"prompt\":\"a\",\"max_tokens\":3}\n",
    );
    let ran = dir.run(&[
        "batch", "-m", "m.gguf", "-i", "prompts", "--raw", "--temp", "0",
    ]);
    let [whole, cut] = &lines(ran.stdout())[..] else {
        panic!("two lines")
    };
    assert_eq!(
        (&whole["text"], &whole["reasoning"]),
        (&"c".into(), &"b".into())
    );
    assert_eq!((&cut["text"], &cut["reasoning"]), (&"".into(), &"b".into()));
}

#[test]
fn an_output_that_is_there_is_refused_and_kept() {
    let dir = Dir::new();
    dir.file("prompts", "{\"prompt\":\"a\"}\n");
    let output = dir.file("out", "precious");
    let ran = dir.run(&["batch", "-i", "prompts", "-o", "out"]);
    let message = ran.error(1);
    assert!(
        message.contains("out") && message.contains("--resume"),
        "{message}"
    );
    assert_eq!(read(&output), "precious");
    // Nothing is left of a batch whose model cannot be loaded.
    let ran = dir.run(&["batch", "-m", "missing.gguf", "-i", "prompts", "-o", "new"]);
    assert!(ran.error(1).contains("missing.gguf"));
    assert!(!dir.path().join("new").exists());
    let resumed = dir.run(&["batch", "-i", "prompts", "--resume"]);
    assert!(resumed.error(2).contains("--output"));
    let tools = dir.run(&["batch", "--tools", "-"]);
    assert!(tools.error(2).contains("--tools"));
}

#[test]
fn an_output_that_another_batch_writes_is_refused() {
    let dir = Dir::new();
    dir.file("prompts", "{\"prompt\":\"a\"}\n");
    let output = dir.file("out", "");
    let other = fs::OpenOptions::new()
        .write(true)
        .open(output)
        .expect("it is there");
    other.lock().expect("nobody else has locked it");
    let args = ["batch", "-i", "prompts", "-o", "out", "--resume", "-n", "1"];
    let message = dir.run(&args);
    assert!(message.error(1).contains("another process"), "{message:?}");
    drop(other);
    dir.run(&args).stdout();
    assert_eq!(answers(&dir, "out").len(), 1);
}

/// Small prompts for a model that answers `bc`, the third of which is none.
fn small(dir: &Dir) {
    dir.file("m.gguf", model::answers("bc"));
    let prompts = "{\"id\":\"\u{e9}\",\"prompt\":\"a\"}\n{\"prompt\":\"a\"}\n{}\n\n{\"prompt\":\"a\",\"max_tokens\":1}\n";
    dir.file("prompts", prompts);
}

fn small_batch(dir: &Dir, more: &[&str]) -> Ran {
    let args = [
        "batch", "-m", "m.gguf", "-i", "prompts", "-o", "out", "--raw", "--temp", "0", "--seed",
        "1", "-t", "1",
    ];
    dir.run(&[&args[..], more].concat())
}

#[test]
fn a_batch_resumes_from_every_byte_of_its_output() {
    let dir = Dir::new();
    small(&dir);
    let whole = small_batch(&dir, &["--resume"]);
    assert!(whole.error(1).contains("1 of 4 lines"), "{whole:?}");
    let output = dir.path().join("out");
    let expected = fs::read(&output).expect("the output");
    assert_eq!(answers(&dir, "out").len(), 4);
    for cut in 0..=expected.len() {
        fs::write(&output, &expected[..cut]).expect("writing the output");
        let ran = small_batch(&dir, &["--resume"]);
        // The error counts, whether it came now or before.
        assert!(ran.error(1).contains("1 of 4 lines"), "{cut}: {ran:?}");
        assert!(fs::read(&output).expect("the output") == expected, "{cut}");
    }
    assert!(
        small_batch(&dir, &["--resume"])
            .stderr
            .contains("4 lines are answered already; 1 of them")
    );
}

#[test]
fn an_output_of_other_prompts_is_refused_and_kept() {
    let dir = Dir::new();
    small(&dir);
    let answer = |id: Value| jsonl(&[json!({"id": id, "text": "x"})]);
    let five = ["\u{e9}".into(), 2.into(), 3.into(), 5.into(), 6.into()]
        .map(answer)
        .concat();
    for (held, expected) in [
        (
            answer("e".into()),
            "line 1 of out answers id \"e\", where line 1 of prompts is id \"\u{e9}\"",
        ),
        (
            answer("\u{e9}".into()) + "{\"text\":\"x\"}\n",
            "line 2 of out answers a line without an id, where line 2",
        ),
        (five, "not so many prompts"),
        (
            "precious\n".to_owned(),
            "line 1 of out is no line of a batch",
        ),
        (
            "{\"id\":\"\u{e9}\"}\n".to_owned(),
            "line 1 of out is no line of a batch",
        ),
    ] {
        // With what would be cut off, were it an output.
        let held = held + "torn";
        let output = dir.file("out", &held);
        let ran = small_batch(&dir, &["--resume"]);
        assert!(ran.error(1).contains(expected), "{ran:?}");
        assert_eq!(read(&output), held);
    }
}

#[test]
fn a_line_of_many_megabytes_is_a_line() {
    let dir = Dir::new();
    dir.file("m.gguf", model::answers("bc"));
    let huge = "a".repeat(8 << 20);
    let prompts = format!("{{\"prompt\":\"{huge}\"}}\n{{\"prompt\":\"a\"}}\n{huge}\n");
    let ran = dir.run_with_input(
        &["batch", "-m", "m.gguf", "--raw", "--temp", "0"],
        prompts.as_bytes(),
    );
    assert_eq!(ran.code, Some(1), "{ran:?}");
    let lines = lines(&ran.stdout);
    let message = lines[0]["error"]["message"].as_str().expect("a message");
    assert!(message.contains("8388608 tokens long"), "{message}");
    assert_eq!(lines[1]["text"], "bc");
    assert_eq!(lines[2]["line"], 3);
}

#[cfg(unix)]
mod processes {
    //! Batches that are ended, and those that run beside what feeds them.

    use std::{
        io::{BufRead, BufReader, Write},
        process::{Child, Stdio},
        thread,
        time::Duration,
    };

    use super::*;
    use crate::pipes::send;

    /// Starts a batch of lines of 30 tokens, with one that goes on for as long as a test cares to wait in the place of
    /// `endless`.
    fn start(dir: &Dir, endless: usize) -> Child {
        dir.file("m.gguf", model::endless(200_000));
        let line = |number| match number == endless {
            true => json!({"prompt": "a", "max_tokens": null}),
            false => json!({"prompt": "a", "max_tokens": 30 + number % 3}),
        };
        dir.file("prompts", jsonl(&(0..14).map(line).collect::<Vec<_>>()));
        dir.command(&ARGS).spawn().expect("starting sharpi")
    }

    const ARGS: [&str; 14] = [
        "batch", "-m", "m.gguf", "-i", "prompts", "-o", "out", "--raw", "--temp", "0", "--seed",
        "1", "--device", "cpu",
    ];

    /// Waits until the output holds so many lines.
    fn wait_for(dir: &Dir, lines: usize) {
        let path = dir.path().join("out");
        while fs::read_to_string(&path).map_or(0, |text| text.matches('\n').count()) < lines {
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Resumes the batch, with a line that ends in the place of the endless one, and asserts that it is as if it had never
    /// been interrupted.
    fn assert_resumes(dir: &Dir) {
        let prompts = read(&dir.path().join("prompts"));
        dir.file("prompts", prompts.replace("null", "5"));
        dir.run(&[&ARGS[..], &["--resume"]].concat()).stdout();
        let resumed = read(&dir.path().join("out"));
        fs::remove_file(dir.path().join("out")).expect("removing the output");
        dir.run(&ARGS).stdout();
        assert_eq!(resumed, read(&dir.path().join("out")));
        assert_eq!(lines(&resumed).len(), 14);
    }

    #[test]
    fn a_batch_resumes_after_it_was_killed() {
        for before in [1, 7] {
            let dir = Dir::new();
            let mut child = start(&dir, 10);
            wait_for(&dir, before);
            child.kill().expect("ending the batch");
            child.wait().expect("waiting for sharpi");
            assert_resumes(&dir);
        }
    }

    #[test]
    fn ctrl_c_leaves_whole_answers_and_130() {
        let dir = Dir::new();
        let child = start(&dir, 3);
        wait_for(&dir, 3);
        thread::sleep(Duration::from_millis(50));
        send("INT", &child);
        let ran = Ran::from(child.wait_with_output().expect("waiting for sharpi"));
        assert_eq!(ran.code, Some(130), "{ran:?}");
        assert_eq!(answers(&dir, "out").len(), 3, "{ran:?}");
        assert_resumes(&dir);
    }

    /// `sharpi batch` on a pipe, and what it writes.
    fn conversing(dir: &Dir) -> (Child, BufReader<std::process::ChildStdout>) {
        dir.file("m.gguf", model::answers("bc"));
        let mut command = dir.command(&["batch", "-m", "m.gguf", "--raw", "--temp", "0"]);
        let mut child = command
            .stdin(Stdio::piped())
            .spawn()
            .expect("starting sharpi");
        let stdout = child.stdout.take().expect("standard output is piped");
        (child, BufReader::new(stdout))
    }

    fn ask(child: &mut Child, id: usize) {
        let stdin = child.stdin.as_mut().expect("standard input is piped");
        writeln!(stdin, "{{\"id\":{id},\"prompt\":\"a\"}}").expect("writing to sharpi");
    }

    fn next(stdout: &mut impl BufRead) -> Value {
        let mut line = String::new();
        stdout.read_line(&mut line).expect("reading from sharpi");
        valid("batch.json", &line)
    }

    #[test]
    fn a_line_is_answered_before_the_next_one_comes() {
        let dir = Dir::new();
        let (mut child, mut stdout) = conversing(&dir);
        for id in 0..3 {
            ask(&mut child, id);
            assert_eq!(next(&mut stdout)["id"], id);
        }
        // Nothing is on its way: Ctrl-C has nothing to wait for.
        let stdin = child.stdin.take();
        send("INT", &child);
        let output = child.wait_with_output().expect("waiting for sharpi");
        assert_eq!(output.status.code(), Some(130));
        drop(stdin);
    }

    #[test]
    fn a_reader_that_leaves_ends_a_batch_quietly_with_0() {
        let dir = Dir::new();
        let (mut child, mut stdout) = conversing(&dir);
        ask(&mut child, 1);
        next(&mut stdout);
        drop(stdout);
        ask(&mut child, 2);
        let output = child.wait_with_output().expect("waiting for sharpi");
        assert_eq!(output.status.code(), Some(0));
        assert_eq!(output.stderr, b"");
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_full_disk_is_a_failure_that_names_the_output() {
        let ran = Dir::new().run_with_input(
            &["batch", "-o", "/dev/full", "-n", "1"],
            b"{\"prompt\":\"a\"}",
        );
        let message = ran.error(1);
        assert!(
            message.contains("/dev/full") && message.contains("No space left"),
            "{message}"
        );
    }
}
