//! Which tokens end an answer: those that the file names, and those that are known by their text, whatever their type.

use crate::{
    Dir,
    common::gguf_writer::{Value, byte_vocabulary_with, retype},
    json::Lines,
    model,
};

/// Of the byte vocabulary.
const ENDOFTEXT: u32 = 261;
const IM_END: u32 = 263;
/// The first token behind the byte vocabulary's own.
const ADDED: u32 = 264;

/// A vocabulary in which `<|endoftext|>` is the end that the file names, with what else there is of tokens and keys.
fn vocabulary(extra: &[(&str, i32)], keys: &[(&str, Value)]) -> Vec<(String, Value)> {
    let mut vocabulary = byte_vocabulary_with(extra);
    vocabulary.retain(|(key, _)| key != "tokenizer.ggml.eos_token_id");
    vocabulary.push(("tokenizer.ggml.eos_token_id".to_owned(), ENDOFTEXT.into()));
    let keys = keys.iter().cloned();
    vocabulary.extend(keys.map(|(key, value)| (format!("tokenizer.ggml.{key}"), value)));
    vocabulary
}

/// Asserts that the token `end` ends an answer and is not printed.
fn assert_ends(vocabulary: Vec<(String, Value)>, end: u32) {
    let dir = Dir::new();
    let [a, b, c, d] = b"abcd".map(u32::from);
    let links = [a, b, end, c, d];
    dir.file("m.gguf", model::chain_over(vocabulary, &links).to_bytes());
    let run = ["run", "-m", "m.gguf", "--raw", "-p", "a", "--temp", "0"];
    let ran = dir.run(&[&run[..], &["-n", "8", "--json"]].concat());
    let lines = Lines::parse(ran.stdout());
    let ids: Vec<_> = lines.tokens.iter().map(|token| &token["id"]).collect();
    assert_eq!(ids, [b, end], "{}", ran.stdout);
    assert_eq!(lines.done["text"], "b");
    assert_eq!(lines.done["finish_reason"], "stop");
}

#[test]
fn a_token_that_ends_turns_ends_the_answer_whatever_its_type() {
    for token_type in [1, 3, 4] {
        let mut vocabulary = vocabulary(&[], &[]);
        retype(&mut vocabulary, IM_END, token_type);
        assert_ends(vocabulary, IM_END);
    }
    let mut untyped = vocabulary(&[], &[]);
    untyped.retain(|(key, _)| key != "tokenizer.ggml.token_type");
    assert_ends(untyped, IM_END);
    for (text, token_type) in [
        ("<|eot_id|>", 1),
        ("<|fim_pad|>", 3),
        ("<|repo_name|>", 3),
        ("<\u{ff5c}end\u{2581}of\u{2581}sentence\u{ff5c}>", 3),
    ] {
        assert_ends(vocabulary(&[(text, token_type)], &[]), ADDED);
    }
}

#[test]
fn a_token_that_the_file_names_ends_the_answer() {
    for (key, value) in [
        ("eos_token_ids", Value::U32s(vec![ENDOFTEXT, ADDED])),
        ("fim_pad_token_id", Value::U32(ADDED)),
        ("eot_token_id", Value::U32(ADDED)),
    ] {
        assert_ends(vocabulary(&[("<|over|>", 3)], &[(key, value)]), ADDED);
    }
}
