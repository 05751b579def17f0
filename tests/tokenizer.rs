//! Token ids against other implementations' ids, and broken vocabularies against clear errors.

mod common;

use common::gguf_writer::{
    GgufFile, Random, Value, byte_vocabulary, byte_vocabulary_with, qwen3_vocabulary,
    scored_vocabulary,
};
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

/// The demo model's vocabulary, under another pre-tokenizer, and the merges that tests/make_pre_tokenizer_vectors.py adds.
fn demo_vocabulary(pre: &str) -> Vec<(String, Value)> {
    let demo = demo();
    let array = |key| demo.array(key).expect(key).expect(key);
    let texts = |key| -> Vec<String> {
        let texts = array(key).iter().map(|text| text.as_str().expect(key));
        texts.map(str::to_owned).collect()
    };
    let types = array("tokenizer.ggml.token_type").iter();
    let mut types: Vec<i32> = types.map(|t| t.as_i64().expect("a type") as i32).collect();
    let mut tokens = texts("tokenizer.ggml.tokens");
    let mut merges = texts("tokenizer.ggml.merges");
    for merge in ["1 2", "12 3", "3 4", "4 5", "Ġ 1", "Ċ Ċ", ") {"] {
        merges.push(merge.to_owned());
        let token = merge.replace(' ', "");
        if !tokens.contains(&token) {
            tokens.push(token);
            types.push(1);
        }
    }
    vec![
        ("tokenizer.ggml.model".into(), "gpt2".into()),
        ("tokenizer.ggml.pre".into(), pre.into()),
        ("tokenizer.ggml.tokens".into(), tokens.into()),
        ("tokenizer.ggml.token_type".into(), types.into()),
        ("tokenizer.ggml.merges".into(), merges.into()),
    ]
}

fn set(vocabulary: &mut Vec<(String, Value)>, key: &str, value: impl Into<Value>) {
    vocabulary.retain(|(other, _)| other != key);
    vocabulary.push((key.to_owned(), value.into()));
}

fn tokenizer(vocabulary: Vec<(String, Value)>) -> Tokenizer {
    Tokenizer::from_gguf(&gguf(vocabulary)).expect("a good vocabulary")
}

/// Of the files of real models, without their weights.
fn real_vocabulary(name: &str) -> Gguf {
    let path = format!(
        "{}/tests/data/vocab/{name}.gguf.xz",
        env!("CARGO_MANIFEST_DIR")
    );
    let packed = std::fs::read(path).expect("the vocabulary is part of the repository");
    let mut bytes = Vec::new();
    lzma_rs::xz_decompress(&mut packed.as_slice(), &mut bytes).expect("valid xz");
    Gguf::from_bytes(name, bytes).expect("a readable file")
}

fn refusal(vocabulary: Vec<(String, Value)>) -> String {
    match Tokenizer::from_gguf(&gguf(vocabulary)) {
        Ok(_) => panic!("a broken vocabulary was taken"),
        Err(error) => format!("{error:#}"),
    }
}

fn encode(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    tokenizer.encode(&Prompt::raw(text))
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
        assert_eq!(tokenizer.encode(&prompt), golden.prompt_ids);
    }
}

#[test]
fn every_pre_tokenizer_splits_as_its_reference_does() {
    let vectors: Vec<Vector> = data(include_str!("data/pre-tokenizers.json"));
    let mut names: Vec<&str> = vectors.iter().map(|vector| &vector.pre[..]).collect();
    names.dedup();
    assert_eq!((names.len(), vectors.len()), (23, 23 * 13));
    for pre in names {
        let tokenizer = tokenizer(demo_vocabulary(pre));
        for vector in vectors.iter().filter(|vector| vector.pre == pre) {
            assert_eq!(
                encode(&tokenizer, &vector.text),
                vector.ids,
                "{pre}: {:?}",
                vector.text
            );
        }
    }
}

/// As llama.cpp reads them: where they cut, whether they take a word that no merge reaches, and whether they begin with
/// a token that the file names.
#[test]
fn names_of_one_pre_tokenizer_split_alike() {
    let text = "it's THE'S the  123456 ok!!\n\n   cafe\u{301} HTTPServer x";
    let vocabulary = |pre: &str| {
        let mut vocabulary = demo_vocabulary(pre);
        for (key, value) in &mut vocabulary {
            match value {
                Value::Strings(tokens) if key.ends_with("tokens") => {
                    tokens.extend(["ĠHTTPServer", "<begin>"].map(str::to_owned));
                }
                Value::I32s(types) => types.extend([1, 3]),
                _ => {}
            }
        }
        let begin = Tokenizer::from_gguf(&gguf(vocabulary.clone())).expect("a good vocabulary");
        set(
            &mut vocabulary,
            "tokenizer.ggml.bos_token_id",
            begin.vocab_size() as u32 - 1,
        );
        vocabulary
    };
    let families: [&[&str]; 9] = [
        &["qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez"],
        &[
            "llama-bpe",
            "llama3",
            "llama-v3",
            "falcon3",
            "falcon-h1",
            "pixtral",
            "midm-2.0",
            "lfm2",
            "jina-v5-nano",
        ],
        &[
            "gpt-2",
            "phi-2",
            "jina-es",
            "jina-de",
            "jina-v2-es",
            "jina-v2-de",
            "gigachat",
            "a.x-4.0",
            "mellum",
            "modern-bert",
            "exaone4",
            "jais",
            "trillion",
            "granite-docling",
        ],
        &[
            "smollm",
            "starcoder",
            "refact",
            "codeshell",
            "exaone",
            "minerva-7b",
            "mellum2",
        ],
        &["gpt-4o", "llama4", "kanana2", "minimax-m2"],
        &["mpt", "olmo"],
        &["deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"],
        &["bailingmoe", "bailingmoe2", "llada-moe", "stablelm2"],
        &["glm4", "glm5"],
    ];
    for names in families {
        let mut ids = names
            .iter()
            .map(|name| encode(&tokenizer(vocabulary(name)), text));
        let first = ids.next().expect("a name");
        assert!(ids.all(|others| others == first), "{names:?}");
    }
    for name in ["default", "viking", "stablelm2", "dbrx"] {
        tokenizer(demo_vocabulary(name));
    }
}

/// A backtracking expression gives up there. Blanks merge in pairs, from the left as far as they go.
#[test]
fn the_last_of_a_million_blanks_goes_to_the_word() {
    // Runs of 2, 4 and up to 512 blanks, from id 264 on.
    let runs: Vec<String> = (1..10).map(|power| "Ġ".repeat(1 << power)).collect();
    let extra: Vec<(&str, i32)> = runs.iter().map(|run| (&run[..], 1)).collect();
    let half = |run: &String| run[..run.len() / 2].to_owned();
    let mut merges: Vec<String> = (runs.iter())
        .map(|run| format!("{} {}", half(run), half(run)))
        .collect();
    merges.push("Ġ t".to_owned());
    for pre in ["qwen2", "llama-bpe", "gpt-2", "smollm"] {
        let mut vocabulary = byte_vocabulary_with(&extra);
        set(&mut vocabulary, "tokenizer.ggml.pre", pre);
        set(&mut vocabulary, "tokenizer.ggml.merges", merges.clone());
        let tokenizer = tokenizer(vocabulary);
        for blanks in [998_000, 1_000_000] {
            let mut left = blanks - 1;
            let mut expected = Vec::new();
            for power in (0..10).rev() {
                let id = if power == 0 { 32 } else { 263 + power };
                expected.extend(vec![id; left >> power]);
                left %= 1 << power;
            }
            expected.push(256); // " t"
            let ids = encode(&tokenizer, &(" ".repeat(blanks) + "t"));
            assert!(ids == expected, "{pre}, {blanks}: {} ids", ids.len());
        }
    }
}

/// Of SentencePiece for Phi 3 and Hugging Face tokenizers for Gemma 4, without a beginning-of-sequence token.
#[test]
fn real_vocabularies_give_the_ids_of_their_own_tokenizers() {
    #[derive(Deserialize)]
    struct OfVocabulary {
        vocab: String,
        text: String,
        ids: Vec<u32>,
    }
    let vectors: Vec<OfVocabulary> = data(include_str!("data/vocab/tokens.json"));
    for (name, prefix, ends) in [
        ("phi-3", " ", &[2, 32000, 32007][..]),
        ("gemma-4", "", &[1, 50, 106]),
    ] {
        let gguf = real_vocabulary(name);
        let tokenizer = Tokenizer::from_gguf(&gguf).expect("a real vocabulary");
        assert_eq!(tokenizer.end_of_generation(), ends, "{name}");
        let of_this = vectors.iter().filter(|vector| vector.vocab == name);
        assert_eq!(of_this.clone().count(), 101);
        for OfVocabulary { text, ids, .. } in of_this {
            let encoded = encode(&tokenizer, text);
            assert_eq!(encoded[0], tokenizer.bos().expect("a beginning"));
            assert_eq!(encoded[1..], ids[..], "{name}: {text:?}");
            // A literal U+2581 comes back as the blank that it stands for.
            let back = text.replace('\u{2581}', " ");
            let prefix = if text.is_empty() { "" } else { prefix };
            assert_eq!(decode(&tokenizer, ids), format!("{prefix}{back}"), "{name}");
        }
    }
}

#[test]
fn phi_3_takes_blanks_after_a_mark_with_it() {
    let tokenizer = Tokenizer::from_gguf(&real_vocabulary("phi-3")).expect("a real vocabulary");
    let ids = encode(&tokenizer, "<|user|>\nThe quick<|end|>\n<|assistant|>\n");
    assert_eq!(ids, [1, 32010, 450, 4996, 32007, 32001]);
}

#[test]
fn sentence_pieces_merge_by_score_and_fall_back_to_bytes() {
    let pieces = [
        ("\u{2581}", -1.0, 1), // 259
        ("a", -2.0, 1),
        ("b", -3.0, 1),
        ("ab", -5.0, 1),        // 262
        ("ba", -4.0, 1),        // 263: before ab
        ("aa", -6.0, 1),        // 264
        ("aaa", -7.0, 1),       // 265
        ("\u{2581}a", -9.0, 1), // 266
        ("bb", -8.0, 5),        // 267: never
        ("<mark>", 0.0, 4),     // 268
    ];
    let mut vocabulary = scored_vocabulary(&pieces);
    let with_prefix = tokenizer(vocabulary.clone());
    // SentencePiece's own defaults: <s> first and a blank before the text.
    assert_eq!(encode(&with_prefix, "a"), [1, 266]);
    assert_eq!(encode(&with_prefix, "aba"), [1, 266, 263]);
    assert_eq!(encode(&with_prefix, "a<mark>a"), [1, 266, 268, 266]);
    assert_eq!(encode(&with_prefix, ""), [1]);
    assert_eq!(with_prefix.end_of_generation(), [2]);

    set(&mut vocabulary, "tokenizer.ggml.add_space_prefix", false);
    set(&mut vocabulary, "tokenizer.ggml.add_bos_token", false);
    let plain = tokenizer(vocabulary.clone());
    for (text, ids) in [
        ("aba", &[260, 263][..]),
        ("aaaaa", &[264, 265]), // the leftmost of equals
        ("bbb", &[261, 261, 261]),
        ("a\u{e9} ", &[260, 3 + 0xc3, 3 + 0xa9, 259]),
        ("<mark>\n", &[268, 3 + 10]),
        ("<s>a</s>", &[1, 260, 2]),
    ] {
        assert_eq!(encode(&plain, text), ids, "{text:?}");
    }
    assert_eq!(
        decode(&plain, &[266, 3 + 0xc3, 3 + 0xa9, 268, 1, 267]),
        " a\u{e9}<mark>"
    );

    // No byte tokens: a run of unknown characters is one unknown token.
    for (key, value) in &mut vocabulary {
        match value {
            Value::I32s(types) if key.ends_with("token_type") => types[3..259].fill(5),
            _ => {}
        }
    }
    assert_eq!(
        encode(&tokenizer(vocabulary), "a\u{e9}\u{e9}a"),
        [260, 0, 260]
    );
}

#[test]
fn some_pre_tokenizers_take_a_word_that_no_merge_reaches() {
    for (pre, ids) in [
        ("llama-bpe", vec![264]),
        ("pixtral", vec![264]),
        ("glm4", vec![264]),
        ("qwen2", vec![102, 111, 120]),
        ("dbrx", vec![102, 111, 120]),
    ] {
        let mut vocabulary = byte_vocabulary_with(&[("fox", 1)]);
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
    let tokenizer = tokenizer(byte_vocabulary_with(&[("<think>", 4), ("[PAD0]", 5)]));
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
    let tokenizer = tokenizer(byte_vocabulary_with(&[
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
        ("llama3", None, vec![261, 257]),
        ("tekken", None, vec![261, 257]),
        ("gpt-4o", None, vec![257]),
        ("glm4", None, vec![257]),
    ] {
        let mut vocabulary = byte_vocabulary_with(&[]);
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

/// What an answer is to continue has no end.
#[test]
fn nothing_is_put_behind_a_prompt() {
    for key in ["add_eos_token", "add_sep_token"] {
        let mut vocabulary = byte_vocabulary_with(&[]);
        set(&mut vocabulary, &format!("tokenizer.ggml.{key}"), true);
        assert_eq!(encode(&tokenizer(vocabulary), "he"), [257], "{key}");
    }
}

/// As Hugging Face tokenizers and llama.cpp have it.
#[test]
fn a_control_token_that_is_a_word_is_one_wherever_a_raw_prompt_spells_it() {
    let tokenizer = tokenizer(byte_vocabulary_with(&[("user", 3)]));
    assert_eq!(encode(&tokenizer, "a users"), [97, 32, 264, 115]);
}

#[test]
fn suppressed_tokens_are_those_of_the_file_that_exist() {
    let mut vocabulary = byte_vocabulary_with(&[]);
    let ids = vec![5i32, -1, 263, 264];
    set(&mut vocabulary, "tokenizer.ggml.suppress_tokens", ids);
    assert_eq!(tokenizer(vocabulary).suppressed(), [5, 263]);
}

/// Tokens and their types after [`byte_vocabulary`]'s own, and which of them end an answer.
fn ends(extra: &[(&str, i32)], keys: &[(&str, Value)]) -> Vec<String> {
    let mut vocabulary = byte_vocabulary_with(extra);
    for (key, value) in keys {
        set(
            &mut vocabulary,
            &format!("tokenizer.ggml.{key}"),
            value.clone(),
        );
    }
    let tokenizer = tokenizer(vocabulary);
    let ends = tokenizer.end_of_generation().iter();
    assert!((0..264).all(|id| tokenizer.is_end_of_generation(id) == [261, 263].contains(&id)));
    ends.filter(|&&id| id >= 264)
        .map(|&id| tokenizer.piece(id).to_owned())
        .collect()
}

#[test]
fn every_token_that_ends_a_generation_is_known() {
    let keys = [
        ("eos_token_id", Value::U32(264)),
        ("eot_token_id", Value::U32(265)),
        ("eom_token_id", Value::U32(266)),
        ("eos_token_ids", vec![261u32, 267].into()),
        ("fim_pad_token_id", Value::U32(268)),
    ];
    let named = [
        ("stop", 1),
        ("halt", 3),
        ("b1", 3),
        ("b2", 3),
        ("b3", 3),
        ("<|fim_pad|>", 3),
    ];
    assert_eq!(ends(&named, &keys), ["stop", "halt", "b1", "b2", "b3"]);

    // By their text, whatever their type; of fill-in-the-middle's one each.
    for token_type in [1, 3, 4] {
        let known = [
            "<|eot_id|>",
            "<end_of_turn>",
            "<\u{ff5c}end\u{2581}of\u{2581}sentence\u{ff5c}>",
            "[PAD]",
        ];
        let extra = known.map(|text| (text, token_type));
        assert_eq!(ends(&extra, &[]), known, "type {token_type}");
    }
    assert_eq!(
        ends(
            &[("<PAD>", 3), ("<|fim_pad|>", 3), ("<|repo_name|>", 3)],
            &[]
        ),
        ["<|fim_pad|>", "<|repo_name|>"]
    );
    assert_eq!(
        ends(&[("<|think|>", 3), ("<|im_start|>2", 3)], &[]),
        [""; 0]
    );
}

#[test]
fn an_end_that_the_vocabulary_uses_otherwise_is_none() {
    // HTML, where turns have an end of their own; Gemma's tags.
    assert_eq!(ends(&[("</s>", 1)], &[]), [""; 0]);
    assert_eq!(ends(&[("</s>", 4), ("</b>", 4)], &[]), [""; 0]);
    assert_eq!(
        ends(&[("</s>", 3), ("<|tool_response>", 4)], &[]),
        ["<|tool_response>"]
    );
    assert_eq!(ends(&[("</s>", 4)], &[]), ["</s>"]);
    // A message's end, of which an answer has several.
    let harmony = [("<|end|>", 3), ("<|return|>", 3), ("<|call|>", 3)];
    assert_eq!(ends(&harmony, &[]), ["<|return|>", "<|call|>"]);
    assert_eq!(ends(&harmony[..2], &[]), ["<|end|>", "<|return|>"]);
    // Text that merges spell.
    let spelled = |key: &str, token_type: i32| {
        let mut vocabulary = byte_vocabulary_with(&[
            ("[E", token_type),
            ("OT", 1),
            ("OT]", 1),
            ("[EOT]", token_type),
        ]);
        let merges = ["[ E", "O T", "OT ]", "[E OT]"].map(str::to_owned);
        set(&mut vocabulary, key, merges.to_vec());
        tokenizer(vocabulary).is_end_of_generation(267)
    };
    assert!(!spelled("tokenizer.ggml.merges", 1));
    assert!(spelled("tokenizer.ggml.merges", 3));
}

/// A token that marks a turn is no text, whatever its type: content cannot spell it, and it prints nothing.
#[test]
fn tokens_that_mark_turns_are_control_tokens_whatever_their_type() {
    for token_type in [1, 4] {
        let extra = [
            "<|start_header_id|>",
            "<end_of_turn>",
            "<stop>",
            "<think>",
            "stop",
        ]
        .map(|text| (text, token_type));
        let mut vocabulary = byte_vocabulary_with(&extra);
        set(&mut vocabulary, "tokenizer.ggml.eos_token_id", 266u32);
        let tokenizer = tokenizer(vocabulary);
        for id in 264..=266 {
            assert!(
                tokenizer.token_bytes(id).is_empty(),
                "{id}, type {token_type}"
            );
            assert_eq!(encode(&tokenizer, tokenizer.piece(id)), [id]);
        }
        assert_eq!(decode(&tokenizer, &[267, 268]), "<think>stop");
    }
}

/// What nothing depends on is no reason to refuse a file.
#[test]
fn optional_keys_may_be_wrong_or_missing() {
    for key in [
        "bos_token_id",
        "eos_token_id",
        "eot_token_id",
        "fim_pad_token_id",
    ] {
        let values: [Value; 3] = [264u32.into(), u32::MAX.into(), "x".into()];
        for value in values {
            let mut vocabulary = byte_vocabulary();
            set(&mut vocabulary, &format!("tokenizer.ggml.{key}"), value);
            assert_eq!(encode(&tokenizer(vocabulary), "he"), [257], "{key}");
        }
    }
    for ends in [
        Value::U32(1),
        vec![u32::MAX].into(),
        vec!["x".to_owned()].into(),
    ] {
        let mut vocabulary = byte_vocabulary();
        set(&mut vocabulary, "tokenizer.ggml.eos_token_ids", ends);
        assert_eq!(tokenizer(vocabulary).end_of_generation(), [261, 263]);
    }
    let mut vocabulary = byte_vocabulary_with(&[("", 1), ("", 5)]);
    set(&mut vocabulary, "tokenizer.ggml.add_bos_token", true);
    for key in ["tokenizer.ggml.token_type", "tokenizer.ggml.pre"] {
        vocabulary.retain(|(other, _)| other != key);
    }
    let tokenizer = tokenizer(vocabulary);
    assert_eq!(
        encode(&tokenizer, "<|im_start|>he<|im_end|>"),
        [262, 257, 263]
    );
    assert_eq!(tokenizer.end_of_generation(), [261, 263]);
}

#[test]
fn what_is_not_supported_is_named() {
    for (key, value, expected) in [
        (
            "tokenizer.ggml.model",
            "bert",
            "tokenizer.ggml.model is \"bert\"; supported are \"gpt2\"",
        ),
        (
            "tokenizer.ggml.pre",
            "chameleon",
            "tokenizer.ggml.pre is \"chameleon\", which is not supported; supported are qwen2, qwen35",
        ),
    ] {
        let mut vocabulary = byte_vocabulary();
        set(&mut vocabulary, key, value);
        let error = refusal(vocabulary);
        assert!(error.contains(expected), "{error}");
    }
    for key in ["model", "tokens", "merges"] {
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
    let cases: [(&str, Value, &str); 7] = [
        (
            "merges",
            merges("h"),
            "merges: entry 1 is \"h\", not two tokens",
        ),
        (
            "merges",
            merges("he zz"),
            "merges: entry 1 is \"he zz\", but the vocabulary has no token zz",
        ),
        (
            "merges",
            merges("z z"),
            "merges: entry 1 is \"z z\", but the vocabulary has no token zz",
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
            "token_type: entry 0 is 7; known are 0 to 6",
        ),
    ];
    for (key, value, expected) in cases {
        let mut vocabulary = byte_vocabulary();
        set(&mut vocabulary, &format!("tokenizer.ggml.{key}"), value);
        let error = refusal(vocabulary);
        assert!(
            error.starts_with("reading the tokenizer: tokenizer.ggml."),
            "{error}"
        );
        assert!(error.contains(expected), "{error}");
    }
    let error = refusal(byte_vocabulary_with(&[("he", 1)]));
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
        let mut vocabulary = byte_vocabulary_with(&[("<think>", 4), ("", 1)]);
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
                    error.starts_with("reading the tokenizer: tokenizer.ggml."),
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
