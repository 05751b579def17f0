//! Texts that are held to a grammar, chosen at random: every one matches it, by another implementation's judgement.

mod common;

use std::{
    collections::BTreeMap,
    fs,
    process::{Command, ExitCode},
    sync::Arc,
    thread,
};

use anyhow::Result;
use libtest_mimic::{Arguments, Trial};
use serde_json::Value;
use sharpi::{
    backend::{Backend, Batch, KvFormat, KvLayout, Limits, Results},
    cpu::CpuBackend,
    engine::{
        Constraint, FinishReason, GenerateOptions, Generation, Grammar, Observer, SamplingParams,
        Session, TokenEvent, generate,
    },
    model::{Model, Tokenizer},
};

const TESTS: [(&str, fn()); 5] = [
    (
        "a_thousand_documents_chosen_at_random_are_valid",
        a_thousand_documents_chosen_at_random_are_valid,
    ),
    (
        "texts_chosen_at_random_match_their_expression",
        texts_chosen_at_random_match_their_expression,
    ),
    (
        "bytes_that_are_no_text_do_not_match",
        bytes_that_are_no_text_do_not_match,
    ),
    ("numbers_come_to_an_end", numbers_come_to_an_end),
    (
        "what_cannot_be_held_to_is_refused_by_name",
        what_cannot_be_held_to_is_refused_by_name,
    ),
];

fn main() -> ExitCode {
    let trial = |(name, test): (_, fn())| {
        Trial::test(name, move || {
            test();
            Ok(())
        })
    };
    let mut trials: Vec<_> = TESTS.into_iter().map(trial).collect();
    let smollm2 = common::smollm2_path();
    if smollm2.is_none() {
        eprintln!("smollm2 is not here, its test is ignored: run tests/fetch-smollm2.sh");
    }
    let ignored = smollm2.is_none();
    let document = trial(("smollm2_writes_documents", smollm2_writes_documents));
    trials.push(document.with_ignored_flag(ignored));
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

const CONTEXT: usize = 512;

/// Of each schema, from a backend that knows nothing, and from the demo model: a thousand of all twenty-five.
const TEXTS: [usize; 2] = [38, 2];

/// Holds every token for as likely as any other, but those of one byte more, so that strings come to an end.
struct Ignorant {
    kv_layout: KvLayout,
    logits: Vec<f32>,
}

impl Ignorant {
    fn new(tokenizer: &Tokenizer) -> Self {
        let ids = 0..tokenizer.vocab_size() as u32;
        let logit = |id| match tokenizer.token_bytes(id).len() {
            1 => 8.0,
            _ => 0.0,
        };
        Self {
            kv_layout: KvLayout {
                format: KvFormat::F32,
                budget: None,
                layers: Vec::new(),
            },
            logits: ids.map(logit).collect(),
        }
    }
}

impl Backend for Ignorant {
    fn name(&self) -> &'static str {
        "ignorant"
    }

    fn device(&self) -> &str {
        "none"
    }

    fn kv_layout(&self) -> &KvLayout {
        &self.kv_layout
    }

    fn limits(&self) -> Limits {
        Limits {
            context_len: CONTEXT,
            chunk_len: CONTEXT,
            results_len: 1,
            last_len: 1,
            vocab_size: self.logits.len(),
        }
    }

    fn bytes_per_token(&self, _position: usize) -> u64 {
        0
    }

    fn compute(&mut self, _batch: Batch) -> Result<Results<'_>> {
        Ok(Results {
            logits: &self.logits,
        })
    }
}

struct Nobody;

impl Observer for Nobody {
    fn interrupted(&self) -> bool {
        false
    }

    fn prefill_progress(&mut self, _done: usize, _total: usize) {}

    fn token(&mut self, _event: &TokenEvent) -> Result<()> {
        Ok(())
    }
}

struct Writer {
    model: Arc<Model>,
    session: Session,
}

impl Writer {
    fn ignorant(model: &Arc<Model>) -> Self {
        Self {
            session: Session::new(Box::new(Ignorant::new(&model.tokenizer))),
            model: Arc::clone(model),
        }
    }

    fn demo(model: &Arc<Model>) -> Self {
        let backend = CpuBackend::new(model.decoder.clone(), CONTEXT, 1).expect("memory");
        Self {
            session: Session::new(Box::new(backend)),
            model: Arc::clone(model),
        }
    }

    fn write(&mut self, constraint: &Constraint, seed: u64, most: usize) -> Generation {
        let options = GenerateOptions {
            max_tokens: Some(most),
            stop: vec![],
            ignore_eos: false,
            logprobs: None,
            // All tokens, and the unlikely ones nearly as often as the likely.
            sampling: SamplingParams {
                temperature: 1.5,
                top_k: 0,
                top_p: 1.0,
                min_p: 0.0,
                repeat_penalty: 1.0,
                repeat_last_n: 0,
                presence_penalty: 0.0,
                frequency_penalty: 0.0,
                seed,
            },
            constraint: Some(constraint.clone()),
        };
        let tokenizer = &self.model.tokenizer;
        generate(&mut self.session, tokenizer, &[1], &options, &mut Nobody).expect("a text")
    }

    /// The first `count` whole documents of the seeds. Those that are cut off are said to be.
    fn documents(&mut self, name: &str, constraint: &Constraint, count: usize) -> Vec<String> {
        let mut documents = Vec::new();
        for seed in 1.. {
            if documents.len() == count {
                break;
            }
            let of = documents.len();
            assert!(seed < 8 * count as u64, "{name}: {of} of {seed} are whole");
            let generation = self.write(constraint, seed, CONTEXT - 1);
            match generation.whole {
                true => documents.push(generation.text),
                false => assert_eq!(generation.finish_reason, FinishReason::Length, "{name}"),
            }
        }
        documents
    }
}

fn demo() -> Arc<Model> {
    Arc::new(Model::demo().expect("the demo model"))
}

fn schemas() -> BTreeMap<String, Value> {
    let text = fs::read_to_string("tests/data/schemas.json").expect("the schemas");
    serde_json::from_str(&text).expect("the schemas are JSON")
}

fn check_documents(model: &Arc<Model>, name: &str, schema: &Value) {
    let validator = jsonschema::options()
        .should_validate_formats(true)
        .build(schema)
        .expect("a schema");
    let grammar = Grammar::json_schema(schema).unwrap_or_else(|error| panic!("{name}: {error:#}"));
    let constraint = Constraint::new(&grammar, &model.tokenizer).expect("a vocabulary");
    let writers = [Writer::ignorant(model), Writer::demo(model)];
    let mut documents = Vec::new();
    for (mut writer, count) in writers.into_iter().zip(TEXTS) {
        documents.extend(writer.documents(name, &constraint, count));
    }
    for text in &documents {
        let document = serde_json::from_str(text);
        let document = document.unwrap_or_else(|error| panic!("{name}: {error}: {text:?}"));
        if let Some(error) = validator.iter_errors(&document).next() {
            panic!("{name}: {error}: {text:?}");
        }
        let one_line = text.chars().all(|character| !character.is_ascii_control());
        assert!(one_line && text == text.trim(), "{name}: {text:?}");
    }
    documents.sort();
    documents.dedup();
    assert!(
        documents.len() >= 5,
        "{name}: always the same {documents:?}"
    );
}

fn a_thousand_documents_chosen_at_random_are_valid() {
    let model = demo();
    let schemas: Vec<_> = schemas().into_iter().collect();
    assert_eq!(schemas.len() * TEXTS.iter().sum::<usize>(), 1000);
    thread::scope(|scope| {
        for schemas in schemas.chunks(schemas.len().div_ceil(2)) {
            let model = &model;
            scope.spawn(move || {
                for (name, schema) in schemas {
                    check_documents(model, name, schema);
                }
            });
        }
    });
}

fn texts_chosen_at_random_match_their_expression() {
    let model = demo();
    let mut writer = Writer::ignorant(&model);
    for regex in [
        "[A-Z][a-z]{1,8} [0-9]{3}",
        "(yes|no)",
        r"\d{4}-\d{2}-\d{2}",
        "[äöü€🦊]{2,5}x?",
        r"^(?i)ab[^c].{0,3}$",
        r"[\w&&[^a-z]]{3}/\s",
        "",
    ] {
        let grammar = Grammar::regex(regex).expect("an expression");
        let constraint = Constraint::new(&grammar, &model.tokenizer).expect("a vocabulary");
        let expression = regex::Regex::new(&format!("^(?:{regex})$")).expect("an expression");
        for seed in 0..100 {
            let generation = writer.write(&constraint, seed, 100);
            assert!(generation.whole, "{regex}: {generation:?}");
            assert_eq!(generation.finish_reason, FinishReason::Stop);
            let matches = expression.is_match(&generation.text);
            assert!(matches, "{regex}: {generation:?}");
        }
    }
}

fn bytes_that_are_no_text_do_not_match() {
    let model = demo();
    let grammar = Grammar::lark("start: X\nX: ~/a/").expect("a grammar");
    let constraint = Constraint::new(&grammar, &model.tokenizer).expect("a vocabulary");
    let mut writer = Writer::ignorant(&model);
    let mut not_text = 0;
    for seed in 0..50 {
        let generation = writer.write(&constraint, seed, 20);
        if generation.text.contains(char::REPLACEMENT_CHARACTER) {
            assert!(!generation.whole, "{generation:?}");
            not_text += 1;
        }
    }
    assert!(not_text > 10, "{not_text}");
}

fn numbers_come_to_an_end() {
    let model = demo();
    let grammar = Grammar::json_schema(&serde_json::json!({"type": "number"})).expect("a schema");
    let constraint = Constraint::new(&grammar, &model.tokenizer).expect("a vocabulary");
    let digit = (0..model.tokenizer.vocab_size() as u32)
        .find(|&id| model.tokenizer.token_bytes(id) == b"9")
        .expect("a digit");
    let allows = |allowed: &[u32], id: u32| allowed[id as usize / 32] >> (id % 32) & 1 == 1;
    let mut guide = constraint.begin();
    let mut digits = 0;
    while allows(&guide.allowed().expect("tokens"), digit) {
        guide.accept(digit).expect("a digit");
        digits += 1;
    }
    assert_eq!(digits, 200);
    assert!(guide.matches());
}

fn what_cannot_be_held_to_is_refused_by_name() {
    let cases = [
        (r#"{"type": "strin"}"#, "strin"),
        (r#"{"type": "string", "maxlength": 3}"#, "maxlength"),
        (r#"{"type": "array", "uniqueItems": true}"#, "uniqueItems"),
        (
            r#"{"properties": {"a": {"items": {"uniqueItems": true}}}}"#,
            "#/properties/a/items: the keyword \"uniqueItems\"",
        ),
        (
            r#"{"type": "array", "contains": {"type": "null"}}"#,
            "contains",
        ),
        (r#"{"type": "array", "items": [true]}"#, "#/items"),
        (r#"{"not": {"type": "null"}}"#, "not"),
        (r#"{"if": {"type": "null"}, "then": false}"#, "if"),
        (
            r#"{"dependentRequired": {"a": ["b"]}}"#,
            "dependentRequired",
        ),
        (r#"{"dependencies": {"a": ["b"]}}"#, "dependencies"),
        (r#"{"propertyNames": {"pattern": "a"}}"#, "propertyNames"),
        (
            r#"{"unevaluatedProperties": false}"#,
            "unevaluatedProperties",
        ),
        (r##"{"$dynamicRef": "#a"}"##, "$dynamicRef"),
        (r#"{"properties": {"a": {"$id": "b"}}}"#, "$id"),
        (r#"{"type": "string", "nullable": true}"#, "nullable"),
        (r#"{"type": "string", "format": "zip"}"#, "zip"),
        (r#"{"type": "string", "format": "unknown"}"#, "unknown"),
        (r#"{"type": "string", "pattern": "(?=a)b"}"#, "look-ahead"),
        (r#"{"type": "string", "pattern": "(?i)a"}"#, "flags"),
        (r#"{"type": "string", "pattern": "\\bfoo"}"#, "\\b"),
        (r#"{"type": "string", "pattern": "(a)\\1"}"#, "\\1"),
        (r#"{"type": "string", "pattern": "\\x1b"}"#, "\\x1b"),
        (r#"{"patternProperties": {"[a--b]": true}}"#, "hyphens"),
        (r#"{"patternProperties": {"a": true, "b": {}}}"#, "disjoint"),
        (
            r#"{"$ref": "http://example.com/s.json"}"#,
            "http://example.com/s.json",
        ),
        (r##"{"$ref": "#/$defs/missing"}"##, "missing"),
        (r##"{"$ref": "#"}"##, "nothing"),
        (
            r#"{"oneOf": [{"type": "string"}, {"minLength": 3}]}"#,
            "use anyOf",
        ),
        (
            r#"{"oneOf": [{"type": "integer"}, {"type": "number"}]}"#,
            "use anyOf",
        ),
        (r#"{"oneOf": [{"const": 1}, {"const": 1.0}]}"#, "use anyOf"),
        (
            r#"{"oneOf": [{"required": ["a"]}, {"required": ["b"]}]}"#,
            "use anyOf",
        ),
        (r#"{"x-guidance": {"lenient": true}}"#, "x-guidance"),
        (r#"{"type": "integer", "minimum": 3, "maximum": 2}"#, ""),
        (
            r#"{"const": 9007199254740993}"#,
            "9007199254740993 cannot be enforced",
        ),
        (r#"{"enum": [{"a": "\u0001"}]}"#, "control character"),
        (r#"{"exclusiveMinimum": true}"#, "exclusiveMinimum"),
        (r#"{"multipleOf": 0}"#, "multipleOf"),
        (r#"{"multipleOf": 123456789}"#, "multipleOf"),
        (r#"{"minProperties": 2}"#, "minProperties"),
        ("false", "no document"),
        ("3", "is no schema"),
    ];
    for (schema, named) in cases {
        let json = serde_json::from_str(schema).expect("JSON");
        let error = Grammar::json_schema(&json).err().expect(schema);
        let message = format!("{error:#}");
        assert!(message.contains(named), "{schema}: {message}");
        assert!(!message.contains("coerce"), "{schema}: {message}");
    }
    for (grammar, named) in [
        ("start: a", "unknown name: \"a\""),
        ("start: <think> /a/", "special token: \"<think>\""),
        ("start: <[5]>", "tokens"),
        ("start: <[*]>", "tokens"),
        ("start: %json {\"type\": \"null\"}", "%json"),
        ("start: a\na[temperature=0.1]: /a/", "temperature="),
        ("start: a\na[stop=\"b\"]: /a*/", "stop="),
        (
            "%llguidance {\"allow_invalid_utf8\": true}\nstart: /a/",
            "allow_invalid_utf8",
        ),
    ] {
        let error = Grammar::lark(grammar).err().expect(grammar);
        let message = format!("{error:#}");
        assert!(message.contains(named), "{grammar}: {message}");
        assert!(!message.contains("<|tool|>"), "{grammar}: {message}");
    }
    for (expression, named) in [
        ("[a", "unclosed character class"),
        ("a(?=b)", "look-ahead"),
        (r"\bab", "lookarounds"),
        (r"[^\s\S]", "nothing can come next"),
    ] {
        let error = Grammar::regex(expression).err().expect(expression);
        let message = format!("{error:#}");
        assert!(message.contains(named), "{expression}: {message}");
        assert!(!message.contains("start:"), "{expression}: {message}");
    }
}

/// The command, with a vocabulary of byte-level BPE.
fn smollm2_writes_documents() {
    let schema = serde_json::json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 20},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
        },
        "required": ["name", "age"],
        "additionalProperties": false,
    });
    let model = common::smollm2_path().expect("the test is ignored without it");
    for sampling in [
        &["--temp", "0"][..],
        &["--temp", "1.5", "--top-k", "0", "--top-p", "1"],
    ] {
        let ran = Command::new(env!("CARGO_BIN_EXE_sharpi"))
            .args([
                "run",
                "-p",
                "Anna is 34. Give name and age as JSON.",
                "--seed",
                "1",
            ])
            .args(["--json-schema", &schema.to_string(), "-m"])
            .arg(&model)
            .args(sampling)
            .output()
            .expect("starting sharpi");
        assert!(ran.status.success(), "{ran:?}");
        let document = serde_json::from_slice(&ran.stdout).expect("a document");
        jsonschema::validate(&schema, &document).expect("a document of the schema");
        if sampling == ["--temp", "0"] {
            assert_eq!(document, serde_json::json!({"name": "Anna", "age": 34}));
        }
    }
}
