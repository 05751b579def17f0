//! Token ids against other implementations' ids, and broken vocabularies against clear errors.

mod common;

use common::gguf_writer::{GgufFile, Random, Value, byte_vocabulary, qwen3_vocabulary};
use serde::{Deserialize, de::DeserializeOwned};
use sharpi::model::{ChatTemplate, Gguf, Message, Prompt, TemplateOptions, Tokenizer};

#[derive(Deserialize)]
struct Vector {
    #[serde(default)]
    pre: String,
    text: String,
    ids: Vec<u32>,
}

#[derive(Deserialize)]
struct Golden {
    prompt: String,
    chat: bool,
    text: String,
    prompt_ids: Vec<u32>,
}

fn data<T: DeserializeOwned>(json: &str) -> T {
    serde_json::from_str(json).expect("the test data is what it was")
}

fn gguf(vocabulary: Vec<(String, Value)>) -> Gguf {
    let file = GgufFile {
        metadata: vocabulary,
        ..GgufFile::default()
    };
    Gguf::from_bytes("test.gguf", file.to_bytes()).expect("a readable file")
}

fn demo() -> Gguf {
    let bytes = include_bytes!("../assets/stories-10m-q4_k_m.gguf");
    Gguf::from_bytes("demo", bytes).expect("the demo model is readable")
}

/// The demo model's vocabulary, under another pre-tokenizer.
fn demo_vocabulary(pre: &str) -> Vec<(String, Value)> {
    let demo = demo();
    let array = |key| demo.array(key).expect(key).expect(key);
    let texts = |key| -> Vec<String> {
        let texts = array(key).iter().map(|text| text.as_str().expect(key));
        texts.map(str::to_owned).collect()
    };
    let types = array("tokenizer.ggml.token_type").iter();
    let types: Vec<i32> = types.map(|t| t.as_i64().expect("a type") as i32).collect();
    vec![
        ("tokenizer.ggml.model".into(), "gpt2".into()),
        ("tokenizer.ggml.pre".into(), pre.into()),
        (
            "tokenizer.ggml.tokens".into(),
            texts("tokenizer.ggml.tokens").into(),
        ),
        ("tokenizer.ggml.token_type".into(), types.into()),
        (
            "tokenizer.ggml.merges".into(),
            texts("tokenizer.ggml.merges").into(),
        ),
    ]
}

fn set(vocabulary: &mut Vec<(String, Value)>, key: &str, value: impl Into<Value>) {
    vocabulary.retain(|(other, _)| other != key);
    vocabulary.push((key.to_owned(), value.into()));
}

/// The bytes, a few words, and special tokens: 256 to 260 are `Ġt he Ġthe in Ġa`, 261 to 263 are control tokens, then
/// come `extra` with their types.
fn small_vocabulary(extra: &[(&str, i32)]) -> Vec<(String, Value)> {
    let mut vocabulary = byte_vocabulary();
    for (_, value) in &mut vocabulary {
        match value {
            Value::Strings(tokens) if tokens.len() > 256 => {
                tokens.extend(extra.iter().map(|(text, _)| text.to_string()));
            }
            Value::I32s(types) => types.extend(extra.iter().map(|(_, token_type)| token_type)),
            _ => {}
        }
    }
    vocabulary
}

fn tokenizer(vocabulary: Vec<(String, Value)>) -> Tokenizer {
    Tokenizer::from_gguf(&gguf(vocabulary)).expect("a good vocabulary")
}

fn refusal(vocabulary: Vec<(String, Value)>) -> String {
    match Tokenizer::from_gguf(&gguf(vocabulary)) {
        Ok(_) => panic!("a broken vocabulary was taken"),
        Err(error) => format!("{error:#}"),
    }
}

fn encode(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    tokenizer.encode(&Prompt::raw(text)).expect("text has ids")
}

fn decode(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let bytes = ids
        .iter()
        .flat_map(|&id| tokenizer.token_bytes(id))
        .collect();
    String::from_utf8(bytes).expect("whole characters")
}

#[test]
fn qwen3_ids_equal_those_of_hugging_face() {
    let tokenizer = tokenizer(qwen3_vocabulary());
    assert_eq!(tokenizer.vocab_size(), 151_936);
    for vector in data::<Vec<Vector>>(include_str!("data/qwen3-tokens.json")) {
        assert_eq!(
            encode(&tokenizer, &vector.text),
            vector.ids,
            "{:?}",
            vector.text
        );
    }
}

#[test]
fn demo_prompts_have_the_ids_of_the_reference() {
    let gguf = demo();
    let tokenizer = Tokenizer::from_gguf(&gguf).expect("the demo model's tokenizer");
    let template = ChatTemplate::from_gguf(&gguf, &tokenizer).expect("readable");
    let template = template.expect("the demo model has a template");
    for golden in data::<Vec<Golden>>(include_str!("data/stories-10m-golden.json")) {
        let message = Message::new("user", golden.prompt.clone());
        let prompt = match golden.chat {
            true => template
                .render(&[message], &TemplateOptions::default())
                .expect("rendered"),
            false => Prompt::raw(golden.prompt),
        };
        assert_eq!(prompt.text(), golden.text);
        assert_eq!(tokenizer.encode(&prompt).expect("ids"), golden.prompt_ids);
    }
}

#[test]
fn every_pre_tokenizer_splits_as_its_reference_does() {
    let vectors: Vec<Vector> = data(include_str!("data/pre-tokenizers.json"));
    for pre in ["qwen2", "smollm", "llama-bpe", "gpt-2"] {
        let mut vocabulary = demo_vocabulary(pre);
        set(&mut vocabulary, "tokenizer.ggml.bos_token_id", 0u32);
        set(&mut vocabulary, "tokenizer.ggml.add_bos_token", false);
        let tokenizer = tokenizer(vocabulary);
        let of_this = vectors.iter().filter(|vector| vector.pre == pre);
        assert_eq!(of_this.clone().count(), 11);
        for vector in of_this {
            assert_eq!(
                encode(&tokenizer, &vector.text),
                vector.ids,
                "{pre}: {:?}",
                vector.text
            );
        }
    }
}

#[test]
fn only_llama_takes_a_word_that_no_merge_reaches() {
    for (pre, ids) in [("llama-bpe", vec![264]), ("qwen2", vec![102, 111, 120])] {
        let mut vocabulary = small_vocabulary(&[("fox", 1)]);
        set(&mut vocabulary, "tokenizer.ggml.pre", pre);
        assert_eq!(encode(&tokenizer(vocabulary), "fox"), ids, "{pre}");
    }
}

#[test]
fn decoding_gives_the_text_back() {
    let text = "for (int i = 0; i < 10; ++i)\n\t{ naïve 你好 🦊 }\u{0}\u{7f}\u{ad}";
    let qwen3 = tokenizer(qwen3_vocabulary());
    assert_eq!(decode(&qwen3, &encode(&qwen3, text)), text);

    // One token a byte, in the byte's own place.
    let bytes = tokenizer(byte_vocabulary());
    assert!((0..=255u8).all(|byte| bytes.token_bytes(byte.into()) == [byte]));
}

#[test]
fn special_tokens_stand_for_their_text_or_for_none() {
    let tokenizer = tokenizer(small_vocabulary(&[("<think>", 4), ("[PAD0]", 5)]));
    let ids = encode(&tokenizer, "<|im_start|>the<think>[PAD0]");
    assert_eq!(ids[..4], [262, 116, 257, 264]);
    assert_eq!(decode(&tokenizer, &ids), "the<think>[PAD0]");
    assert!(tokenizer.token_bytes(262).is_empty());
    assert!(tokenizer.token_bytes(265).is_empty());
    assert_eq!(tokenizer.piece(262), "<|im_start|>");
    assert_eq!(tokenizer.piece(258), "Ġthe");
    assert_eq!(tokenizer.piece(u32::MAX), "");
}

#[test]
fn overlapping_special_tokens_go_to_the_leftmost_longest() {
    let tokenizer = tokenizer(small_vocabulary(&[
        ("<a>", 3),
        ("<a><b>", 3),
        ("<b><c>", 3),
    ]));
    assert_eq!(encode(&tokenizer, "<a><b><c>"), [265, 60, 99, 62]);
    assert_eq!(encode(&tokenizer, "<b><c><a>"), [266, 264]);
}

#[test]
fn a_prompt_starts_with_one_beginning_of_sequence_token() {
    for (pre, add_bos, expected) in [
        ("qwen2", None, vec![257]),
        ("qwen2", Some(true), vec![261, 257]),
        ("llama-bpe", None, vec![261, 257]),
        ("llama-bpe", Some(false), vec![257]),
    ] {
        let mut vocabulary = small_vocabulary(&[]);
        vocabulary.retain(|(key, _)| key != "tokenizer.ggml.add_bos_token");
        set(&mut vocabulary, "tokenizer.ggml.pre", pre);
        set(&mut vocabulary, "tokenizer.ggml.bos_token_id", 261u32);
        if let Some(add_bos) = add_bos {
            set(&mut vocabulary, "tokenizer.ggml.add_bos_token", add_bos);
        }
        let tokenizer = tokenizer(vocabulary);
        assert_eq!(encode(&tokenizer, "he"), expected, "{pre}, {add_bos:?}");
        assert_eq!(encode(&tokenizer, "<|endoftext|>he"), [261, 257]);
    }
}

#[test]
fn every_token_that_ends_a_generation_is_known() {
    let mut vocabulary =
        small_vocabulary(&[("<|eot_id|>", 3), ("</s>", 1), ("stop", 1), ("halt", 3)]);
    set(&mut vocabulary, "tokenizer.ggml.eos_token_id", 266u32);
    set(&mut vocabulary, "tokenizer.ggml.eot_token_id", 267u32);
    let tokenizer = tokenizer(vocabulary);
    let ends: Vec<u32> = (0..tokenizer.vocab_size() as u32)
        .filter(|&id| tokenizer.is_end_of_generation(id))
        .collect();
    // <|endoftext|> and <|im_end|>, <|eot_id|>, the two that keys name; not the plain text </s>.
    assert_eq!(ends, [261, 263, 264, 266, 267]);
}

#[test]
fn what_is_not_supported_is_named() {
    for (key, value, expected) in [
        (
            "tokenizer.ggml.model",
            "llama",
            "tokenizer.ggml.model is \"llama\"; supported is \"gpt2\"",
        ),
        (
            "tokenizer.ggml.pre",
            "tekken",
            "tokenizer.ggml.pre is \"tekken\"; supported are qwen2, smollm",
        ),
    ] {
        let mut vocabulary = byte_vocabulary();
        set(&mut vocabulary, key, value);
        let error = refusal(vocabulary);
        assert!(error.contains(expected), "{error}");
    }
    for key in ["model", "pre", "tokens", "token_type", "merges"] {
        let key = format!("tokenizer.ggml.{key}");
        let mut vocabulary = byte_vocabulary();
        vocabulary.retain(|(other, _)| *other != key);
        let error = refusal(vocabulary);
        assert!(error.contains(&format!("{key} is missing")), "{error}");
    }
}

#[test]
fn a_broken_vocabulary_is_refused_with_the_entry_at_fault() {
    let merges = |merge: &str| Value::Strings(vec!["h e".into(), merge.into()]);
    let cases: [(&str, Value, &str); 10] = [
        (
            "merges",
            merges("h"),
            "merges: entry 1 is \"h\", not two tokens",
        ),
        (
            "merges",
            merges("he zz"),
            "merges names what is no token: Token `zz`",
        ),
        (
            "merges",
            merges("z z"),
            "merges names what is no token: Token `zz`",
        ),
        (
            "merges",
            merges("<|endoftext|> <|im_start|>"),
            "the vocabulary has no token <|endoftext|><|im_start|>",
        ),
        (
            "merges",
            vec![1u32].into(),
            "merges: entry 0 is 1, not two tokens",
        ),
        (
            "token_type",
            vec![1i32; 9].into(),
            "tokens has 264 entries, but tokenizer.ggml.token_type has 9",
        ),
        (
            "token_type",
            vec![7i32; 264].into(),
            "token_type: entry 0 is 7; known are 1 to 6",
        ),
        (
            "eos_token_id",
            264u32.into(),
            "eos_token_id is 264, but the vocabulary has 264 tokens",
        ),
        (
            "bos_token_id",
            u32::MAX.into(),
            "bos_token_id is 4294967295, but the vocabulary has 264",
        ),
        (
            "add_bos_token",
            true.into(),
            "add_bos_token is true, but tokenizer.ggml.bos_token_id is missing",
        ),
    ];
    for (key, value, expected) in cases {
        let mut vocabulary = byte_vocabulary();
        set(&mut vocabulary, &format!("tokenizer.ggml.{key}"), value);
        let error = refusal(vocabulary);
        assert!(
            error.starts_with("test.gguf: reading the tokenizer: tokenizer.ggml."),
            "{error}"
        );
        assert!(error.contains(expected), "{error}");
    }
    let error = refusal(small_vocabulary(&[("he", 1)]));
    assert!(
        error.contains("tokens: entries 257 and 264 are both \"he\""),
        "{error}"
    );
}

#[test]
fn shuffled_vocabularies_end_in_ids_or_an_error() {
    let mut random = Random(7);
    let (mut taken, mut refused) = (0, 0);
    for _ in 0..500 {
        let mut vocabulary = small_vocabulary(&[("<think>", 4), ("", 1)]);
        for _ in 0..=random.below(3) {
            let entry = random.below(vocabulary.len());
            match &mut vocabulary[entry].1 {
                Value::Strings(texts) => {
                    let (from, to) = (random.below(texts.len()), random.below(texts.len()));
                    match random.below(3) {
                        0 => texts[to] = texts[from].clone(),
                        1 => texts.swap(from, to),
                        _ => texts[to] = texts[to].repeat(2),
                    }
                }
                Value::I32s(types) => {
                    let at = random.below(types.len());
                    types[at] = random.below(8) as i32;
                }
                Value::U32(id) => *id = random.below(300) as u32,
                _ => {}
            }
        }
        match Tokenizer::from_gguf(&gguf(vocabulary)) {
            Ok(tokenizer) => {
                let ids = encode(&tokenizer, "<|im_start|>the <think> 10 tin 🦊");
                assert!(ids.iter().all(|&id| (id as usize) < tokenizer.vocab_size()));
                taken += 1;
            }
            Err(error) => {
                let error = format!("{error:#}");
                assert!(
                    error.starts_with("test.gguf: reading the tokenizer: tokenizer.ggml."),
                    "{error}"
                );
                refused += 1;
            }
        }
    }
    assert!(
        taken > 50 && refused > 50,
        "{taken} taken, {refused} refused"
    );
}
