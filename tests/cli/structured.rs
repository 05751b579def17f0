//! Answers that must match a schema, an expression or a grammar, and reasoning that is kept apart from the answer.

use serde_json::Value;

use crate::{
    Dir, Ran,
    common::gguf_writer::byte_vocabulary_with,
    json::Lines,
    model::{END, chain_over},
    sharpi,
};

/// Tokens behind those of the byte vocabulary.
const THINK: u32 = 264;
const END_THINK: u32 = 265;

const SCHEMA: &str = r#"{
  "type": "object",
  "properties": {
    "name": {"type": "string", "minLength": 1, "maxLength": 12},
    "age": {"type": "integer", "minimum": 0, "maximum": 120},
    "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2}
  },
  "required": ["name", "age", "tags"],
  "additionalProperties": false
}"#;

/// Standard output of a run that went well: one document of the schema and a newline.
fn document(ran: &Ran, schema: &str) -> Value {
    let line = ran
        .stdout()
        .strip_suffix('\n')
        .expect("a newline at the end");
    assert!(!line.contains('\n') && line == line.trim(), "{line:?}");
    let document = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
    let schema = serde_json::from_str(schema).expect("a schema");
    jsonschema::validate(&schema, &document).unwrap_or_else(|error| panic!("{error}: {line}"));
    document
}

/// Runs a model that goes on with these tokens behind `a`.
fn run_chain(chain: &[u32], args: &[&str]) -> Ran {
    let dir = Dir::new();
    let marks = byte_vocabulary_with(&[("<think>", 4), ("</think>", 4)]);
    let links = [&[u32::from(b'a')], chain].concat();
    dir.file("m.gguf", chain_over(marks, &links).to_bytes());
    let fixed = ["run", "-m", "m.gguf", "--raw", "-p", "a", "--temp", "0"];
    dir.run(&[&fixed[..], args].concat())
}

/// A chain of bytes and marks.
fn links(parts: &[&str]) -> Vec<u32> {
    let tokens = parts.iter().flat_map(|part| match *part {
        "<think>" => vec![THINK],
        "</think>" => vec![END_THINK],
        text => text.bytes().map(u32::from).collect(),
    });
    tokens.chain([END]).collect()
}

#[test]
fn a_schema_gives_one_document_whatever_is_chosen() {
    let dir = Dir::new();
    dir.file("schema.json", format!("\u{feff}{SCHEMA}"));
    for (seed, given) in [("1", SCHEMA), ("2", "schema.json"), ("3", "schema.json")] {
        let wild = [
            "--temp", "1.5", "--top-k", "0", "--top-p", "1", "--min-p", "0",
        ];
        let args = [
            "run",
            "-p",
            "A child.",
            "--seed",
            seed,
            "--json-schema",
            given,
        ];
        document(&dir.run(&[&args[..], &wild].concat()), SCHEMA);
    }
    let from_stdin = ["run", "-p", "A child.", "-n", "60", "--json-schema", "-"];
    document(&dir.run_with_input(&from_stdin, SCHEMA.as_bytes()), SCHEMA);
    let anything = [
        "run",
        "-p",
        "A child.",
        "--temp",
        "0",
        "--json-schema",
        "{\"enum\": [5, \"x\"]}",
    ];
    document(&dir.run(&anything), "{\"enum\": [5, \"x\"]}");
}

#[test]
fn an_answer_that_can_only_end_ends_by_itself() {
    // The model would go on with c.
    let ran = run_chain(&links(&["bcd"]), &["--regex", "b", "--json"]);
    let lines = Lines::parse(ran.stdout());
    assert_eq!(lines.done["text"], "b");
    assert_eq!(lines.done["finish_reason"], "stop");
    assert_eq!(lines.done["generated_tokens"], 1);
}

#[test]
fn an_expression_and_a_grammar_hold_the_model_to_them() {
    // Greedily the model would say bcd.
    let ran = run_chain(&links(&["bcd"]), &["--regex", "b[x-z]{3}"]);
    assert_eq!(ran.stdout().trim_end().len(), 4);
    assert!(ran.stdout.starts_with('b'), "{}", ran.stdout);
    let dir = Dir::new();
    dir.file("dice.lark", "start: NUMBER \"d\" NUMBER\nNUMBER: /[1-9]/\n");
    let ran = dir.run(&["run", "-p", "Roll.", "--grammar", "dice.lark"]);
    let [number, b'd', sides, b'\n'] = ran.stdout().as_bytes() else {
        panic!("{}", ran.stdout);
    };
    assert!(number.is_ascii_digit() && sides.is_ascii_digit());
}

#[test]
fn an_answer_that_is_cut_off_is_a_failure_that_says_so() {
    let message = "only the beginning of";
    for (flags, text, why) in [
        (&["--regex", "bcde", "-n", "2"][..], "bc\n", "--max-tokens"),
        (
            &["--regex", "bcde", "-c", "3"],
            "bcd\n",
            "the context is full",
        ),
        // Ends where the expression does not, while the model has nothing else to say.
        (&["--json-schema", SCHEMA, "-n", "1"], "{\n", "--max-tokens"),
    ] {
        let ran = run_chain(&links(&["bcde"]), flags);
        assert_eq!((ran.code, ran.stdout.as_str()), (Some(1), text), "{ran:?}");
        let last = ran.stderr.lines().last().expect("a message");
        assert!(
            last.starts_with("error: ") && last.contains(message),
            "{last}"
        );
        assert!(last.contains(why), "{last}");
    }
    // What matches where it is cut off is whole.
    let ran = run_chain(&links(&["bcde"]), &["--regex", "b[a-z]*", "-n", "2"]);
    assert_eq!(ran.stdout(), "bc\n");
    // JSON lines end as ever, and the exit code tells.
    let ran = run_chain(&links(&["bcde"]), &["--regex", "bcde", "-n", "2", "--json"]);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert_eq!(Lines::parse(&ran.stdout).done["finish_reason"], "length");
}

#[test]
fn reasoning_that_the_prompt_opens_is_free_and_goes_to_standard_error() {
    let run = |args: &[&str]| {
        let dir = Dir::new();
        let marks = byte_vocabulary_with(&[("<think>", 4), ("</think>", 4)]);
        let links = [&[THINK][..], &links(&["xy", "</think>", "bc"])].concat();
        dir.file("m.gguf", chain_over(marks, &links).to_bytes());
        let fixed = [
            "run", "-m", "m.gguf", "--raw", "-p", "a<think>", "--temp", "0",
        ];
        dir.run(&[&fixed[..], args].concat())
    };
    let ran = run(&["--regex", "bc"]);
    assert_eq!(ran.stdout(), "bc\n");
    assert!(ran.stderr.starts_with("xy</think>\nprompt: "), "{ran:?}");
    // The reasoning took all that there was room for.
    let ran = run(&["--regex", "bc", "-n", "2"]);
    assert_eq!((ran.code, ran.stdout.as_str()), (Some(1), "\n"), "{ran:?}");
    assert!(ran.stderr.starts_with("xy\nprompt: "), "{ran:?}");
}

#[test]
fn reasoning_that_the_model_opens_comes_before_what_must_match() {
    let chain = links(&["<think>", "xy", "</think>", " b"]);
    let ran = run_chain(&chain, &["--regex", " b"]);
    // The white space is the answer's.
    assert_eq!(ran.stdout(), " b\n");
    assert!(
        ran.stderr.starts_with("<think>xy</think>\nprompt: "),
        "{ran:?}"
    );
    let ran = run_chain(&chain, &["--regex", " b", "-q"]);
    assert_eq!((ran.stdout(), ran.stderr.as_str()), (" b\n", ""));
}

#[test]
fn reasoning_goes_where_it_is_sent() {
    let chain = links(&["<think>", "x\x1by", "</think>", "\n\tb c"]);
    let run = |args: &[&str]| run_chain(&chain, args);
    assert_eq!(run(&[]).stdout(), "<think>x\x1by</think>\n\tb c\n");
    assert_eq!(
        run(&["--reasoning", "show"]).stdout(),
        "<think>x\x1by</think>\n\tb c\n"
    );
    let ran = run(&["--reasoning", "hide"]);
    assert_eq!(ran.stdout(), "b c\n");
    assert!(ran.stderr.starts_with("prompt: "), "{ran:?}");
    let ran = run(&["--reasoning", "stderr"]);
    assert_eq!(ran.stdout(), "b c\n");
    let expected = "<think>x\\u{1b}y</think>\nprompt: ";
    assert!(ran.stderr.starts_with(expected), "{ran:?}");
    // The text of JSON lines has all of it.
    let lines = Lines::parse(run(&["--json"]).stdout());
    assert_eq!(lines.done["text"], "<think>x\x1by</think>\n\tb c");
    // Cut off within, there is no answer, and the line of statistics is on its own.
    let ran = run(&["--reasoning", "stderr", "-n", "2"]);
    assert_eq!(ran.stdout(), "\n");
    assert!(ran.stderr.starts_with("<think>x\nprompt: "), "{ran:?}");
}

#[test]
fn what_may_begin_a_stop_string_stays_on_its_side_of_reasoning() {
    // `b` may begin the stop string where reasoning begins, and `x` where it ends.
    let chain = links(&["b", "<think>", "x", "</think>", "cy"]);
    let run = |args: &[&str]| run_chain(&chain, args);
    let ran = run(&["--stop", "bz", "--stop", "xz", "--reasoning", "hide"]);
    assert_eq!(ran.stdout(), "bcy\n");
    let ran = run(&[
        "--stop",
        "bz",
        "--stop",
        "</think>z",
        "--reasoning",
        "stderr",
    ]);
    assert_eq!(ran.stdout(), "bcy\n");
    assert!(ran.stderr.starts_with("<think>x</think>\n"), "{ran:?}");
    let ran = run(&["--stop", "cy", "--reasoning", "hide"]);
    assert_eq!(ran.stdout(), "b\n");
}

#[test]
fn what_cannot_be_held_to_is_said_before_the_model_is_looked_at() {
    let dir = Dir::new();
    dir.file(
        "unique.json",
        "{\"properties\": {\"a\": {\"uniqueItems\": true}}}",
    );
    dir.file("cut.json", "{\"type\":");
    dir.file("unknown.lark", "start: word\n");
    let cases: &[(&[&str], &[&str])] = &[
        (
            &["--json-schema", "unique.json"],
            &[
                "--json-schema unique.json",
                "#/properties/a",
                "\"uniqueItems\"",
            ],
        ),
        (
            &["--json-schema", "{\"type\": \"strin\"}"],
            &["--json-schema", "strin"],
        ),
        (
            &["--json-schema", "cut.json"],
            &["cut.json", "EOF", "line 1"],
        ),
        (&["--json-schema", "{"], &["--json-schema", "EOF"]),
        (
            &["--json-schema", "false"],
            &["--json-schema", "no document"],
        ),
        (&["--regex", "[a"], &["--regex", "unclosed character class"]),
        (
            &["--grammar", "unknown.lark"],
            &["--grammar unknown.lark", "1(8)", "\"word\"", "start: word"],
        ),
        (
            &["--regex", "a", "--grammar", "x"],
            &["--regex", "--grammar"],
        ),
        (
            &["--regex", "a", "--json-schema", "x"],
            &["--regex", "--json-schema"],
        ),
        (
            &["--grammar", "a", "--json-schema", "x"],
            &["--grammar", "--json-schema"],
        ),
        (&["--regex", "a", "--stop", "x"], &["--regex", "--stop"]),
        (
            &["--regex", "a", "--ignore-eos"],
            &["--regex", "--ignore-eos"],
        ),
        (
            &["--regex", "a", "--reasoning", "show"],
            &["--reasoning show"],
        ),
        (
            &["--json", "--reasoning", "hide"],
            &["--json", "--reasoning"],
        ),
        (
            &["--json-schema", "-", "-f", "-"],
            &["standard input", "once"],
        ),
    ];
    for (args, expected) in cases {
        let ran = dir.run(&[&["run", "-m", "missing.gguf", "-p", "x"], *args].concat());
        let message = ran.error(2);
        for part in *expected {
            assert!(message.contains(part), "{args:?}: {message}");
        }
    }
    let ran = sharpi(&[
        "run",
        "-m",
        "missing.gguf",
        "-p",
        "x",
        "--grammar",
        "missing.lark",
    ]);
    assert!(ran.error(1).contains("missing.lark"));
}
