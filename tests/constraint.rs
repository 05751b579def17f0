//! Texts that are held to a grammar, chosen at random: every one matches it, by another implementation's judgement.

use std::{collections::BTreeMap, fs, ops::ControlFlow};

use serde_json::Value;
use sharpi::{
    cpu::CpuBackend,
    engine::{
        Constraint, FinishReason, GenerateOptions, Generation, Grammar, Observer, SamplingParams,
        Session, TokenEvent, generate,
    },
    model::Model,
};

const CONTEXT: usize = 512;

/// Of each of the twenty schemas.
const TEXTS: usize = 50;

struct Nobody;

impl Observer for Nobody {
    fn interrupted(&self) -> bool {
        false
    }

    fn prefill_progress(&mut self, _done: usize, _total: usize) {}

    fn token(&mut self, _event: &TokenEvent) -> anyhow::Result<()> {
        Ok(())
    }
}

/// As likely as not the wildest texts: all tokens, and the unlikely ones nearly as often as the likely.
fn sampling(seed: u64) -> SamplingParams {
    SamplingParams {
        temperature: 1.5,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        repeat_penalty: 1.0,
        repeat_last_n: 0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        seed,
    }
}

struct Writer {
    model: Model,
    session: Session,
}

impl Writer {
    fn new() -> Self {
        let model = Model::demo().expect("the demo model");
        let backend = CpuBackend::new(model.decoder.clone(), CONTEXT, 0).expect("memory");
        let mut session = Session::new(Box::new(backend));
        // Read once; every text goes on behind it.
        session
            .prefill(&[1], &mut |_, _| ControlFlow::Continue(()))
            .expect("reading the prompt");
        Self { model, session }
    }

    fn constraint(&self, grammar: &Grammar) -> Constraint {
        Constraint::new(grammar, &self.model.tokenizer).expect("a vocabulary")
    }

    fn write(&mut self, constraint: &Constraint, seed: u64, most: usize) -> Generation {
        let options = GenerateOptions {
            max_tokens: Some(most),
            stop: vec![],
            ignore_eos: false,
            logprobs: None,
            sampling: sampling(seed),
            constraint: Some(constraint.clone()),
        };
        generate(
            &mut self.session,
            &self.model.tokenizer,
            &[1],
            &options,
            &mut Nobody,
        )
        .expect("a text")
    }
}

fn schemas() -> BTreeMap<String, Value> {
    let text = fs::read_to_string("tests/data/schemas.json").expect("the schemas");
    serde_json::from_str(&text).expect("the schemas are JSON")
}

#[test]
fn a_thousand_documents_chosen_at_random_are_valid() {
    let mut writer = Writer::new();
    let schemas = schemas();
    assert_eq!(schemas.len() * TEXTS, 1000);
    for (name, schema) in schemas {
        let validator = jsonschema::options()
            .should_validate_formats(true)
            .build(&schema)
            .expect("a schema");
        let constraint = writer.constraint(&Grammar::json_schema(&schema).expect("a schema"));
        let (mut whole, mut seed, mut different) = (0, 0, Vec::new());
        while whole < TEXTS {
            seed += 1;
            assert!(
                seed < 4 * TEXTS as u64,
                "{name}: {whole} of {seed} are whole"
            );
            let generation = writer.write(&constraint, seed, CONTEXT - 1);
            if !generation.whole {
                assert_eq!(generation.finish_reason, FinishReason::Length, "{name}");
                continue;
            }
            let text = &generation.text;
            let document = serde_json::from_str(text)
                .unwrap_or_else(|error| panic!("{name}: {error}: {text}"));
            let error = validator.iter_errors(&document).next();
            assert!(
                error.is_none(),
                "{name}: {}: {text}",
                error.expect("an error")
            );
            assert!(!text.contains('\n'), "{name}: {text}");
            different.push(generation.text);
            whole += 1;
        }
        different.sort();
        different.dedup();
        assert!(
            different.len() >= 5,
            "{name}: always the same {different:?}"
        );
    }
}

#[test]
fn texts_chosen_at_random_match_their_expression() {
    let mut writer = Writer::new();
    for regex in [
        "[A-Z][a-z]{1,8} [0-9]{3}",
        "(yes|no)",
        r"\d{4}-\d{2}-\d{2}",
        "[äöü€🦊]{2,5}x?",
    ] {
        let constraint = writer.constraint(&Grammar::regex(regex).expect("an expression"));
        let expression = regex::Regex::new(&format!("^(?:{regex})$")).expect("an expression");
        for seed in 0..25 {
            let generation = writer.write(&constraint, seed, 100);
            assert!(generation.whole, "{regex}: {generation:?}");
            assert!(
                expression.is_match(&generation.text),
                "{regex}: {generation:?}"
            );
        }
    }
}

#[test]
fn what_cannot_be_held_to_is_refused_by_name() {
    let cases = [
        (r#"{"type": "strin"}"#, "strin"),
        (r#"{"type": "array", "uniqueItems": true}"#, "uniqueItems"),
        (
            r#"{"type": "array", "contains": {"type": "null"}}"#,
            "contains",
        ),
        (r#"{"not": {"type": "null"}}"#, "not"),
        (r#"{"if": {"type": "null"}, "then": false}"#, "if"),
        (
            r#"{"dependentRequired": {"a": ["b"]}}"#,
            "dependentRequired",
        ),
        (r#"{"propertyNames": {"pattern": "a"}}"#, "propertyNames"),
        (
            r#"{"unevaluatedProperties": false}"#,
            "unevaluatedProperties",
        ),
        (r#"{"type": "string", "format": "zip"}"#, "zip"),
        (r#"{"type": "string", "pattern": "(?=a)b"}"#, "look-ahead"),
        (
            r#"{"$ref": "http://example.com/s.json"}"#,
            "http://example.com/s.json",
        ),
        (r##"{"$ref": "#/$defs/missing"}"##, "missing"),
        (
            r#"{"oneOf": [{"type": "string"}, {"minLength": 3}]}"#,
            "oneOf",
        ),
        (r#"{"x-guidance": {"lenient": true}}"#, "x-guidance"),
        (r#"{"type": "integer", "minimum": 3, "maximum": 2}"#, ""),
        ("false", "no document"),
        ("3", "a schema is"),
    ];
    for (schema, named) in cases {
        let json = serde_json::from_str(schema).expect("JSON");
        let error = Grammar::json_schema(&json).err().expect(schema);
        let message = format!("{error:#}");
        assert!(message.contains(named), "{schema}: {message}");
    }
}
