//! `sharpi info`: files of every kind, whole ones and others.

use serde_json::{Value, json};

use sharpi::quant::TensorType;

use crate::{
    Dir, Ran,
    common::gguf_writer::{self, GgufFile, Random, RandomModel},
    json::valid,
    sharpi,
};

const DEMO: &[u8] = include_bytes!("../../assets/stories-10m-q4_k_m.gguf");

/// What `info --json` says of a file, held to its schema, and its table.
fn described(bytes: &[u8]) -> (Value, String) {
    let dir = Dir::new();
    dir.file("m.gguf", bytes);
    described_at(&dir, "m.gguf")
}

fn described_at(dir: &Dir, name: &str) -> (Value, String) {
    let ran = dir.run(&["info", "-m", name, "--json"]);
    let info = valid("info.json", ran.stdout());
    (info, dir.run(&["info", "-m", name]).stdout().to_owned())
}

fn qwen3() -> GgufFile {
    RandomModel::new("qwen3", TensorType::Q4_K).file()
}

/// The value of a row of a table.
#[track_caller]
fn row<'a>(table: &'a str, label: &str) -> &'a str {
    let start = format!("{label:<20} ");
    let found = table.lines().find_map(|line| line.strip_prefix(&start));
    found.unwrap_or_else(|| panic!("no row {label:?}: {table}"))
}

/// Checks that the file cannot be run for a reason with these parts, and that `run` gives the same one.
#[track_caller]
fn cannot_run(bytes: &[u8], parts: &[&str]) -> (Value, String) {
    let dir = Dir::new();
    dir.file("m.gguf", bytes);
    let (info, table) = described_at(&dir, "m.gguf");
    let reason = info["cannot_run"].as_str().expect("a reason");
    for part in parts {
        assert!(reason.contains(part), "no {part:?}: {reason}");
    }
    assert_eq!(row(&table, "cannot be run"), reason);
    assert_eq!(info["hyper_parameters"], json!(null));
    assert_eq!(info["runs_on"], json!([]));
    let run = dir.run(&["run", "-m", "m.gguf", "-p", "x"]);
    assert!(run.error(1).contains(reason), "{reason}: {}", run.stderr);
    (info, table)
}

#[test]
fn info_lists_what_differs_from_layer_to_layer() {
    let mut file = RandomModel::new("qwen3", TensorType::F32).file();
    file.set("qwen3.attention.head_count_kv", vec![2u32, 1]);
    for name in ["blk.1.attn_k.weight", "blk.1.attn_v.weight"] {
        let tensor = file.tensor(name);
        tensor.shape[1] /= 2;
        tensor.data.truncate(tensor.data.len() / 2);
    }
    let dir = Dir::new();
    dir.file("m.gguf", file.to_bytes());
    let ran = dir.run(&["info", "-m", "m.gguf", "--json"]);
    let shape = &valid("info.json", ran.stdout())["hyper_parameters"];
    assert_eq!(shape["head_count_kv"], json!([2, 1]));
    assert_eq!(shape["head_count"], 4);
    let table = dir.run(&["info", "-m", "m.gguf"]);
    assert!(
        table
            .stdout()
            .contains("2 (in 1) or 1 (in 1) for keys and values"),
        "{}",
        table.stdout()
    );
}

/// Figures of the demo model as its description gives them, and the sizes of ggml's blocks.
#[test]
fn info_tells_shape_types_and_tokenizer() {
    let ran = sharpi(&["info", "--json"]);
    let info = valid("info.json", ran.stdout());
    let file_bytes = include_bytes!("../../assets/stories-10m-q4_k_m.gguf").len();
    assert_eq!(info["file_bytes"], file_bytes);
    assert_eq!(info["architecture"], "qwen3");
    assert_eq!(info["name"], "sharpi-stories-10M");
    assert_eq!(info["cannot_run"], json!(null));
    let shape = &info["hyper_parameters"];
    let expected = json!({
        "context_length": 2048, "block_count": 8, "hidden_size": 256, "feed_forward_length": 1024,
        "vocab_size": 4096, "head_count": 8, "head_count_kv": 2, "head_dim": 64, "rope_freq_base": 1e6,
        "rope_dimension_count": 64,
    });
    for (key, value) in expected.as_object().expect("an object") {
        assert_eq!(shape[key].as_f64(), value.as_f64(), "{key}");
    }
    // Embedding; per layer q, k, v, output, gate, up, down, two norms and two head norms; the last norm.
    let layer = 256 * 512 * 2 + 256 * 128 * 2 + 3 * 256 * 1024 + 2 * 256 + 2 * 64;
    assert_eq!(info["parameter_count"], 4096 * 256 + 8 * layer + 256);
    let types = info["tensor_types"].as_array().expect("types");
    let tensors: u64 = types
        .iter()
        .map(|kind| kind["tensors"].as_u64().expect("a count"))
        .sum();
    assert_eq!(tensors, 90);
    assert_eq!(
        types[0],
        json!({"type": "F32", "tensors": 33, "bytes": 4 * (8 * (2 * 256 + 2 * 64) + 256)})
    );
    assert_eq!(info["tokenizer"]["pre"], "qwen2");
    assert_eq!(info["tokenizer"]["vocab_size"], 4096);
    let ends = info["tokenizer"]["end_of_generation"]
        .as_array()
        .expect("tokens");
    assert!(
        ends.contains(&json!({"id": 2, "piece": "<|im_end|>"})),
        "{ends:?}"
    );
    assert_eq!(info["chat_template"], true);

    let table = sharpi(&["info"]);
    for part in [
        "qwen3",
        "2,048",
        "Q4_K",
        "Q6_K",
        "sharpi-stories-10M",
        "<|im_end|>",
    ] {
        assert!(table.stdout().contains(part), "no {part}: {}", table.stdout);
    }
}

/// Files that hold no more than a vocabulary, or a model that nobody here knows.
#[test]
fn info_and_tokenize_need_only_the_vocabulary() {
    let dir = Dir::new();
    let mut file = RandomModel::new("llama", TensorType::F32).file();
    file.tensors.clear();
    for (architecture, reason) in [
        ("llama", "it has no tensors"),
        ("mamba", "the architecture \"mamba\" is not supported"),
    ] {
        file.set("general.architecture", architecture);
        dir.file("m.gguf", file.to_bytes());
        let ran = dir.run(&["info", "-m", "m.gguf", "--json"]);
        let info = valid("info.json", ran.stdout());
        assert_eq!(info["architecture"], architecture);
        assert_eq!(info["hyper_parameters"], json!(null));
        let why = info["cannot_run"].as_str().expect("a reason");
        assert!(why.contains(reason), "{why}");
        assert_eq!(info["tokenizer"]["vocab_size"], 264);
        let table = dir.run(&["info", "-m", "m.gguf"]);
        assert!(table.stdout().contains(reason), "{}", table.stdout);
        let ran = dir.run(&["tokenize", "-m", "m.gguf", "--chat", "-p", "he"]);
        assert!(
            ran.stdout().starts_with("262\t<|im_start|>\n"),
            "{}",
            ran.stdout
        );
        assert!(
            dir.run(&["run", "-m", "m.gguf", "-p", "he"])
                .error(1)
                .contains(reason)
        );
    }
    // And info not even one that can be used.
    file.set("general.architecture", "bert")
        .set("tokenizer.ggml.model", "bert");
    dir.file("m.gguf", file.to_bytes());
    let ran = dir.run(&["info", "-m", "m.gguf", "--json"]);
    let info = valid("info.json", ran.stdout());
    assert_eq!(info["tokenizer"]["vocab_size"], 264);
    let refused = dir.run(&["tokenize", "-m", "m.gguf", "-p", "he"]);
    assert!(refused.error(1).contains("tokenizer.ggml.model is"));
}

#[test]
fn a_download_in_progress_is_described_with_what_it_lacks() {
    let (whole, _) = described(DEMO);
    let cut = &DEMO[..3_000_000];
    let (info, table) = cannot_run(
        cut,
        &["blk.3.attn_output.weight", "the file ends at byte 3000000"],
    );
    for same in [
        "name",
        "architecture",
        "parameter_count",
        "tensor_types",
        "quantization",
        "tokenizer",
    ] {
        assert_eq!(info[same], whole[same], "{same}");
    }
    assert_eq!(info["missing_bytes"], DEMO.len() - cut.len());
    assert_eq!(
        row(&table, "missing"),
        "3.18 MiB of 6.04 MiB: is the download complete?"
    );
    assert_eq!(row(&table, "context length"), "2,048");
}

/// Whatever is left of a file is described, or it is said why nothing can be.
#[test]
fn a_file_cut_off_anywhere_is_described() {
    let file = RandomModel {
        layers: 1,
        ..RandomModel::new("llama", TensorType::Q2_K)
    }
    .file();
    let (bytes, header_len) = (file.to_bytes(), file.header().len());
    let dir = Dir::new();
    let mut keys = 0;
    for len in (0..header_len)
        .step_by(211)
        .chain([1, 3, 4, 7, 8, 15, 16, 23, 24, 25])
    {
        dir.file("m.gguf", &bytes[..len]);
        let ran = dir.run(&["info", "-m", "m.gguf", "--json", "--metadata"]);
        if len < 4 {
            ran.error(1);
            continue;
        }
        let info = valid("info.json", ran.stdout());
        let reason = info["cannot_run"].as_str().expect("a reason");
        assert!(reason.contains("truncated"), "{len}: {reason}");
        keys = keys.max(info["metadata"].as_object().expect("keys").len());
        let table = dir.run(&["info", "-m", "m.gguf"]);
        assert!(!row(table.stdout(), "cannot be run").is_empty());
    }
    // The last cuts are among the tensors.
    assert_eq!(keys, file.metadata.len());
    let (info, table) = described(&bytes[..header_len - 5]);
    let described = file.tensors.len() - 1;
    assert_eq!(
        row(&table, "header"),
        format!(
            "{keys} of {keys} metadata keys and {described} of {} tensors can be read",
            file.tensors.len()
        )
    );
    assert_eq!(info["name"], "random llama");
}

#[test]
fn damage_ends_in_a_description_or_a_message() {
    let mut random = Random(5);
    let dir = Dir::new();
    let header_len = 120_000;
    for round in 0..60 {
        let mut bytes = DEMO[..header_len + 60_000].to_vec();
        for _ in 0..=random.below(6) {
            let at = match random.below(2) {
                0 => random.below(1000),
                _ => random.below(header_len),
            };
            bytes[at] = random.u64() as u8;
        }
        dir.file("m.gguf", &bytes);
        let ran = dir.run(&["info", "-m", "m.gguf", "--json", "--metadata"]);
        match ran.code {
            Some(0) => drop(valid("info.json", ran.stdout())),
            _ => drop(ran.error(1)),
        }
        let lines = dir.run(&["info", "-m", "m.gguf", "--metadata"]);
        assert_eq!(lines.code, ran.code, "round {round}: {lines:?}");
    }
}

#[test]
fn what_is_not_understood_is_named_and_the_rest_described() {
    let mut future = qwen3();
    future.tensor("blk.1.ffn_up.weight").type_id = 99;
    let (info, _) = cannot_run(
        &future.to_bytes(),
        &["blk.1.ffn_up.weight", "unknown (id 99)"],
    );
    let unknown = &info["tensor_types"].as_array().expect("types")[2];
    let bytes = 256 * 512 / 256 * 144;
    assert_eq!(
        *unknown,
        json!({"type": "unknown", "tensors": 1, "bytes": bytes})
    );

    let mut unsupported = qwen3();
    unsupported
        .set("general.architecture", "mamba")
        .set("mamba.block_count", 48u32);
    let (_, table) = cannot_run(&unsupported.to_bytes(), &["\"mamba\" is not supported"]);
    assert_eq!(row(&table, "layers"), "48");

    let mut version = qwen3();
    version.version = 4;
    let (info, table) = cannot_run(&version.to_bytes(), &["version 4 is not supported"]);
    assert_eq!(
        (&info["gguf_version"], &info["name"]),
        (&json!(4), &json!("random qwen3"))
    );
    assert_eq!(row(&table, "context length"), "128");

    let mut twice = qwen3();
    twice
        .metadata
        .push(("general.name".to_owned(), "another".into()));
    cannot_run(
        &twice.to_bytes(),
        &["\"general.name\" occurs a second time"],
    );

    let mut absurd = qwen3();
    absurd.tensor("blk.0.attn_q.weight").shape = vec![1 << 62, 1 << 62];
    let (info, _) = cannot_run(
        &absurd.to_bytes(),
        &["blk.0.attn_q.weight", "impossibly large"],
    );
    assert_eq!(info["parameter_count"], u64::MAX);

    let mut wrong = qwen3();
    wrong
        .set("general.name", 7u32)
        .set("general.file_type", "q4");
    let (info, _) = described(&wrong.to_bytes());
    assert_eq!(
        (&info["name"], &info["quantization"]),
        (&json!(null), &json!("Q4_K"))
    );
}

/// Version 1 has lengths of 32 bits; a big-endian file every number the other way round.
#[test]
fn files_of_other_versions_and_byte_orders_are_described() {
    let file = |version: u32, big_endian: bool| {
        let number = |number: u64, bytes: usize| match big_endian {
            true => number.to_be_bytes()[8 - bytes..].to_vec(),
            false => number.to_le_bytes()[..bytes].to_vec(),
        };
        let word = if version == 1 { 4 } else { 8 };
        let string =
            |text: &str| [number(text.len() as u64, word), text.as_bytes().to_vec()].concat();
        let mut bytes = [
            b"GGUF".to_vec(),
            number(version.into(), 4),
            number(1, word),
            number(3, word),
        ];
        let mut entry = |key: &str, kind: u64, value: Vec<u8>| {
            bytes[3].extend([string(key), number(kind, 4), value].concat());
        };
        entry("general.architecture", 8, string("llama"));
        entry("llama.context_length", 4, number(4096, 4));
        let tokens = [number(8, 4), number(2, word), string("a"), string("b")].concat();
        entry("tokenizer.ggml.tokens", 9, tokens);
        let tensor = [
            string("w"),
            number(2, 4),
            number(32, word),
            number(3, word),
            number(0, 4),
            number(0, 8),
        ];
        let mut bytes = [bytes.concat(), tensor.concat()].concat();
        bytes.resize(bytes.len().next_multiple_of(32) + 32 * 3 * 4, 0);
        bytes
    };
    for (version, big_endian, reason) in [
        (1, false, "version 1 is not supported"),
        (1, true, "big-endian"),
        (3, true, "big-endian"),
    ] {
        let (info, table) = cannot_run(&file(version, big_endian), &[reason]);
        assert_eq!(info["gguf_version"], version);
        assert_eq!(row(&table, "context length"), "4,096");
        assert_eq!(info["tokenizer"]["vocab_size"], 2);
        assert_eq!(
            info["tensor_types"],
            json!([{"type": "F32", "tensors": 1, "bytes": 384}])
        );
        assert_eq!(info["missing_bytes"], 0);
    }
}

#[test]
fn other_kinds_than_models_are_told() {
    for (kind, architecture, reason) in [
        ("adapter", "llama", "an adapter (LoRA)"),
        ("mmproj", "clip", "images or sound"),
        ("imatrix", "", "statistics"),
    ] {
        let mut file = GgufFile::default();
        file.set("general.type", kind);
        if !architecture.is_empty() {
            file.set("general.architecture", architecture);
        }
        file.push("x.lora_a", &[64, 4], TensorType::F32, vec![0; 1024]);
        let (info, table) = cannot_run(&file.to_bytes(), &[reason]);
        assert_eq!(info["kind"], kind);
        assert_eq!(row(&table, "kind"), kind);
    }
    let mut vocabulary = qwen3();
    vocabulary.tensors.clear();
    let (info, _) = cannot_run(&vocabulary.to_bytes(), &["no tensors"]);
    assert_eq!(
        (&info["kind"], &info["quantization"]),
        (&json!("vocabulary"), &json!(null))
    );
}

#[test]
fn what_is_no_gguf_file_at_all_is_named() {
    let dir = Dir::new();
    let safetensors = [&300u64.to_le_bytes()[..], b"{\"__metadata__\":{}}"].concat();
    for (bytes, name) in [
        (&b"PK\x03\x04data.pkl"[..], "zip archive"),
        (&safetensors, "safetensors"),
        (b"tjgg\x03\0\0\0", "before GGUF"),
        (b"lmgg\x03\0\0\0", "before GGUF"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
            "git lfs pull",
        ),
        (b"\n<!doctype HTML><title>404</title>", "web page"),
        (b"\x1f\x8b\x08\0", "gzip"),
    ] {
        dir.file("m.gguf", bytes);
        let ran = dir.run(&["info", "-m", "m.gguf"]);
        let error = ran.error(1);
        assert!(
            error.contains("not a GGUF file") && error.contains(name),
            "{error}"
        );
    }
}

#[test]
fn parts_of_a_split_model_say_which_are_missing() {
    let dir = Dir::new();
    let parts = qwen3().split(3);
    let name = |number: usize| format!("m-{number:05}-of-00003.gguf");
    for (index, part) in parts.iter().enumerate() {
        dir.file(&name(index + 1), part.to_bytes());
    }
    let (info, _) = described_at(&dir, &name(1));
    assert_eq!(info["split"], json!({"part": 1, "parts": 3, "missing": []}));
    assert_eq!(info["cannot_run"], json!(null));
    let all = info["parameter_count"].as_u64().expect("a count");

    std::fs::remove_file(dir.path().join(name(3))).expect("a part");
    let (info, table) = described_at(&dir, &name(1));
    assert_eq!(info["split"]["missing"], json!([name(3)]));
    assert!(
        info["cannot_run"]
            .as_str()
            .expect("a reason")
            .contains("part 3 of 3")
    );
    assert_eq!(
        (row(&table, "part"), row(&table, "missing parts")),
        ("1 of 3", &name(3)[..])
    );
    assert!(info["parameter_count"].as_u64().expect("a count") < all);

    let (info, _) = described_at(&dir, &name(2));
    assert_eq!(
        info["split"],
        json!({"part": 2, "parts": 3, "missing": [name(3)]})
    );
    let reason = info["cannot_run"].as_str().expect("a reason");
    assert!(
        reason.contains(&format!("open the first part, {}", name(1))),
        "{reason}"
    );
}

#[test]
fn the_quantization_is_the_files_own_name_unless_nothing_of_it_is_there() {
    let named = |file_type: Option<u32>| {
        let mut file = qwen3();
        if let Some(file_type) = file_type {
            file.set("general.file_type", file_type);
        }
        let (info, table) = described(&file.to_bytes());
        let bits = info["bits_per_weight"].as_f64().expect("bits");
        // The norms are in 32 bits.
        assert!((4.5..4.6).contains(&bits), "{bits}");
        let text = row(&table, "quantization").to_owned();
        let name = info["quantization"].as_str().expect("a name").to_owned();
        (
            name,
            text.split_once(", ").expect("a name and bits").0.to_owned(),
        )
    };
    for (file_type, name, text) in [
        (Some(15), "Q4_K_M", "Q4_K_M"),
        (Some(14), "Q4_K_S", "Q4_K_S"),
        (Some(1024 + 15), "Q4_K_M", "Q4_K_M"),
        (Some(7), "Q4_K", "mostly Q4_K (the file says Q8_0)"),
        (Some(999), "Q4_K", "mostly Q4_K"),
        (None, "Q4_K", "mostly Q4_K"),
    ] {
        assert_eq!(
            named(file_type),
            (name.to_owned(), text.to_owned()),
            "{file_type:?}"
        );
    }
}

/// The whole row stands in memory at once where a run does without flags: file and KV cache, 8 layers of 2 heads of 64 keys
/// and values in float32.
#[test]
fn the_memory_on_the_cpu_is_what_a_run_takes() {
    let ran = sharpi(&["info", "--json"]);
    let info = valid("info.json", ran.stdout());
    let cpu = &info["runs_on"][0];
    assert_eq!(
        (&cpu["device"], &cpu["cannot_run"]),
        (&json!("cpu"), &json!(null))
    );
    let memory = &cpu["memory"];
    assert_eq!(memory["context_length"], 2048);
    assert_eq!(memory["weights_bytes"], DEMO.len());
    assert_eq!(memory["kv_cache_bytes"], 2048 * 8 * 2 * 2 * 64 * 4);
    let run = sharpi(&["run", "-p", "x", "-n", "1", "-v", "--device", "cpu"]);
    let told = format!("KV cache: {} bytes", memory["kv_cache_bytes"]);
    assert!(run.stderr.contains(&told), "{}", run.stderr);
}

#[test]
fn metadata_is_listed_with_types_and_given_whole() {
    let dir = Dir::new();
    let mut file = qwen3();
    file.set("a.text", "one\ntwo\u{1b}[31m")
        .set("a.long", "x".repeat(200))
        .set("a.float", 0.1f32)
        .set("a.nan", f32::NAN)
        .set("a.flag", true)
        .set("a.numbers", (0..100).collect::<Vec<u32>>())
        .set("a.texts", vec!["p q".to_owned(), "r\ns".to_owned()]);
    dir.file("m.gguf", file.to_bytes());
    let info = |args: &[&str]| dir.run(&[&["info", "-m", "m.gguf"], args].concat());
    let lines = info(&["--metadata"]).stdout().to_owned();
    assert_eq!(lines.lines().count(), file.metadata.len());
    let line = |key: &str| {
        let mut lines = lines
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>());
        lines
            .find(|words| words[0] == key)
            .expect("the key")
            .join(" ")
    };
    for (key, expected) in [
        ("a.text", r"a.text string one\ntwo\u{1b}[31m"),
        ("a.float", "a.float f32 0.1"),
        ("a.nan", "a.nan f32 NaN or infinite"),
        ("a.flag", "a.flag bool true"),
        ("a.texts", r#"a.texts [string] ["p q", "r\ns"]"#),
        ("qwen3.context_length", "qwen3.context_length u32 128"),
    ] {
        assert_eq!(line(key), expected);
    }
    assert!(
        line("a.long").ends_with("x... (200 letters)"),
        "{}",
        line("a.long")
    );
    assert!(line("a.numbers").starts_with("a.numbers [u32] [0, 1, 2, "));
    assert!(line("a.numbers").ends_with(", ...] (100 elements)"));

    assert_eq!(
        info(&["--metadata=a.text"]).stdout(),
        "one\ntwo\u{1b}[31m\n"
    );
    assert_eq!(info(&["--metadata=a.float"]).stdout(), "0.1\n");
    assert_eq!(info(&["--metadata=a.texts"]).stdout(), "p q\nr\\ns\n");
    let numbers = info(&["--metadata=a.numbers"]);
    assert_eq!(numbers.stdout().lines().count(), 100);
    assert_eq!(
        info(&["--metadata=a.texts", "--json"]).stdout(),
        "[\"p q\",\"r\\ns\"]\n"
    );
    assert!(
        info(&["--metadata=b"])
            .error(1)
            .contains("no metadata key \"b\"")
    );

    let whole = valid("info.json", info(&["--metadata", "--json"]).stdout());
    let metadata = &whole["metadata"];
    assert_eq!(metadata["a.float"], json!({"type": "f32", "value": 0.1}));
    assert_eq!(metadata["a.nan"], json!({"type": "f32", "value": null}));
    assert_eq!(
        metadata["a.numbers"]["value"].as_array().map(Vec::len),
        Some(100)
    );
    assert_eq!(
        metadata["tokenizer.ggml.tokens"]["value"]
            .as_array()
            .map(Vec::len),
        Some(264)
    );
}

#[test]
fn templates_are_printed_as_they_are() {
    let dir = Dir::new();
    let mut file = RandomModel {
        vocabulary: gguf_writer::byte_vocabulary(),
        ..RandomModel::new("llama", TensorType::F32)
    }
    .file();
    let template = "{{ messages }}\n{# \u{1b}[31m #}";
    file.set("tokenizer.chat_template", template)
        .set("tokenizer.chat_template.tool_use", "for tools");
    dir.file("m.gguf", file.to_bytes());
    let info = |args: &[&str]| dir.run(&[&["info", "-m", "m.gguf"], args].concat());
    assert_eq!(info(&["--template"]).stdout(), template);
    assert_eq!(info(&["--template=tool_use"]).stdout(), "for tools");
    let none = info(&["--template=rag"]);
    assert!(none.error(1).contains("--template=tool_use"), "{none:?}");
    assert!(info(&[]).stdout().contains("by name: tool_use"));

    file.unset("tokenizer.chat_template")
        .unset("tokenizer.chat_template.tool_use");
    dir.file("m.gguf", file.to_bytes());
    let none: Ran = info(&["--template"]);
    assert!(none.error(1).contains("has no chat template"), "{none:?}");
    info(&["--template", "--json"]).error(2);
}

#[test]
fn a_model_needs_no_flag() {
    let dir = Dir::new();
    dir.file("m.gguf", qwen3().to_bytes());
    let told = dir.run(&["info", "m.gguf", "--metadata=general.name"]);
    assert_eq!(told.stdout(), "random qwen3\n");
    let tokens = dir.run(&["tokenize", "m.gguf", "-p", "x"]);
    assert_eq!(tokens.stdout(), "120\tx\n");
    dir.run(&["info", "m.gguf", "-m", "m.gguf"]).error(2);
}
