//! Opening model files: good ones by what they say, bad ones by the message that they end in.

mod common;

use std::{fs, path::Path};

use anyhow::Result;
use common::gguf_writer::{GgufFile, RandomModel, Value};
use sharpi::{
    model::{
        Decoder, Gguf, RopeOptions, arch,
        decoder::{KeyValues, Layer, RopeScaling, RopeStyle, Yarn},
        ops::Op,
    },
    quant::TensorType,
};

/// Reads the file as far as its tensors reach, under the name `model.gguf`.
fn load(bytes: Vec<u8>) -> Result<Decoder> {
    let gguf = Gguf::from_bytes("model.gguf", bytes)?;
    arch::describe(&gguf, arch::ALL, &RopeOptions::default())
}

fn qwen3() -> GgufFile {
    RandomModel::new("qwen3", TensorType::Q4_K).file()
}

/// Checks that `result` is an error of one line that contains every part.
#[track_caller]
fn assert_refused<T>(result: Result<T>, parts: &[&str]) {
    let message = format!("{:#}", result.err().expect("the file was accepted"));
    for part in parts {
        assert!(message.contains(part), "no {part:?} in: {message}");
    }
    assert!(!message.contains('\n'), "more than one line: {message}");
}

/// The same for a qwen3 model after `change`.
#[track_caller]
fn assert_change_refused(change: impl FnOnce(&mut GgufFile), parts: &[&str]) {
    let mut file = qwen3();
    change(&mut file);
    assert_refused(load(file.to_bytes()), parts);
}

#[test]
fn a_model_of_each_architecture_loads_with_its_own_traits() {
    for (name, rope_style, qk_norm, qkv_bias) in [
        ("llama", RopeStyle::Interleaved, false, false),
        ("qwen2", RopeStyle::Neox, false, true),
        ("qwen3", RopeStyle::Neox, true, false),
    ] {
        let file = RandomModel::new(name, TensorType::Q4_K).file();
        let decoder = load(file.to_bytes()).unwrap();
        assert_eq!(decoder.layers.len(), 2);
        let attention = &decoder.layers[1].attention;
        let KeyValues::Own(own) = &attention.kv else {
            panic!("{name}: keys and values of another layer");
        };
        assert_eq!(attention.rope.style, rope_style, "{name}");
        assert_eq!(attention.q_norm.is_some(), qk_norm, "{name}");
        assert_eq!(own.k_norm.is_some(), qk_norm, "{name}");
        let v = own.v.as_ref().expect("a matrix of values");
        for linear in [&attention.q, &own.k, v] {
            assert_eq!(linear.bias.is_some(), qkv_bias, "{name}");
        }
    }
}

#[test]
fn hyper_parameters_are_those_of_the_file() {
    let mut file = qwen3();
    file.set("qwen3.rope.scaling.type", "linear")
        .set("qwen3.rope.scaling.factor", 4.0f32)
        .set("qwen3.rope.dimension_count", 32u32)
        .set("qwen3.rope.freq_base", 1e6f32);
    let decoder = load(file.to_bytes()).unwrap();
    assert_eq!(decoder.context_length, 128);
    assert_eq!(decoder.layers.len(), 2);
    assert_eq!(decoder.hidden_size, 256);
    assert_eq!(decoder.vocab_size, 264);
    let Layer {
        attention,
        feed_forward,
        ..
    } = &decoder.layers[1];
    assert_eq!(feed_forward.gate.weights.rows(), 512);
    assert_eq!(
        (
            attention.head_count,
            attention.head_count_kv,
            attention.head_dim
        ),
        (4, 2, 64)
    );
    assert_eq!(attention.norm.as_ref().unwrap().epsilon, 1e-6);
    assert_eq!(attention.scale, 0.125);
    assert_eq!(attention.rope.base, 1e6);
    assert_eq!(attention.rope.dimensions, 32);
    assert_eq!(attention.rope.scaling, RopeScaling::Linear(4.0));
}

#[test]
fn hyper_parameters_that_a_file_may_leave_out_have_their_defaults() {
    let mut file = qwen3();
    for key in [
        "attention.key_length",
        "attention.value_length",
        "rope.freq_base",
    ] {
        file.unset(&format!("qwen3.{key}"));
    }
    let decoder = load(file.to_bytes()).unwrap();
    let attention = &decoder.layers[0].attention;
    assert_eq!(attention.head_dim, 64);
    assert_eq!(attention.rope.dimensions, 64);
    assert_eq!(attention.rope.base, 10_000.0);
    assert_eq!(attention.rope.scaling, RopeScaling::None);
}

#[test]
fn heads_may_be_counted_for_each_layer() {
    const KEY: &str = "qwen3.attention.head_count_kv";
    let mut file = qwen3();
    file.set(KEY, vec![2u32, 1]);
    for name in ["blk.1.attn_k.weight", "blk.1.attn_v.weight"] {
        let tensor = file.tensor(name);
        tensor.shape[1] /= 2;
        tensor.data.truncate(tensor.data.len() / 2);
    }
    let decoder = load(file.to_bytes()).unwrap();
    let counts = decoder.layers.iter().map(|l| l.attention.head_count_kv);
    assert_eq!(counts.collect::<Vec<_>>(), [2, 1]);

    for (counts, parts) in [
        (vec![2u32], ["1 elements", "2 layers"]),
        (
            vec![2, 3],
            ["3 for layer 1", "divisor of its 4 query heads"],
        ),
        (vec![2, 0], ["0 for layer 1", "expected 1 to"]),
    ] {
        file.set(KEY, counts);
        assert_refused(load(file.to_bytes()), &[KEY, parts[0], parts[1]]);
    }
}

#[test]
fn positions_are_scaled_as_llama_cpp_reads_the_keys() {
    let scaling = |keys: &[(&str, Value)]| {
        let mut file = RandomModel::new("qwen2", TensorType::Q8_0).file();
        for (key, value) in keys {
            file.set(&format!("qwen2.rope.{key}"), value.clone());
        }
        load(file.to_bytes()).unwrap().layers[0]
            .attention
            .rope
            .scaling
    };
    let (four, eight) = (Value::F32(4.0), Value::F32(8.0));
    let linear = RopeScaling::Linear(4.0);
    assert_eq!(scaling(&[("scaling.factor", four.clone())]), linear);
    assert_eq!(scaling(&[("scale_linear", four.clone())]), linear);
    let both = [("scaling.factor", four.clone()), ("scale_linear", eight)];
    assert_eq!(scaling(&both), linear);
    assert_eq!(scaling(&[("scale_linear", 0f32.into())]), RopeScaling::None);
    let none = [
        ("scaling.type", "none".into()),
        ("scaling.factor", four.clone()),
    ];
    assert_eq!(scaling(&none), RopeScaling::None);
    let yarn = [
        ("scaling.type", "yarn".into()),
        ("scaling.factor", four),
        ("scaling.original_context_length", 32_768u32.into()),
        ("scaling.yarn_beta_fast", 16f32.into()),
    ];
    let expected = Yarn {
        factor: 4.0,
        original_context: 32_768,
        beta_fast: 16.0,
        beta_slow: 1.0,
        ext_factor: 1.0,
    };
    assert_eq!(scaling(&yarn), RopeScaling::Yarn(expected));
}

#[test]
fn what_nothing_uses_is_refused_by_name_unless_it_changes_nothing() {
    let vector = |file: &mut GgufFile, name: &str| {
        file.push(name, &[64], TensorType::F32, vec![0; 256]);
    };
    for name in [
        "blk.0.attn_sinks.weight",
        "blk.1.post_attention_norm.weight",
        "blk.2.attn_norm.weight",
        "rope_factors_long.weight",
        "v.patch_embd.weight",
    ] {
        assert_change_refused(|file| vector(file, name), &[name, "qwen3"]);
    }
    for (architecture, name) in [
        ("qwen2", "blk.0.attn_q_norm.weight"),
        ("qwen2", "blk.0.attn_shift.weight"),
        ("llama", "blk.0.attn_sinks.weight"),
    ] {
        let mut file = RandomModel::new(architecture, TensorType::Q8_0).file();
        vector(&mut file, name);
        assert_refused(load(file.to_bytes()), &[name, architecture]);
    }
    let mut file = qwen3();
    vector(&mut file, "blk.0.attn_rot_embd.weight");
    file.set("qwen3.vocab_size", 264u32)
        .set("qwen3.rope.scaling.finetuned", false)
        .set("qwen3.logit_scale", 1f32)
        .set("qwen3.final_logit_softcapping", 0f32)
        .set("qwen3.a_new_key", "of no weight");
    load(file.to_bytes()).unwrap();
    for (key, value) in [
        ("attention.scale", 0.5f32.into()),
        ("attn_logit_softcapping", 50f32.into()),
        ("logit_scale", 0.0625f32.into()),
        ("rope.dimension_sections", vec![16u32, 24, 24, 0].into()),
        ("use_parallel_residual", true.into()),
    ] {
        let key = format!("qwen3.{key}");
        let change = |file: &mut GgufFile| {
            file.set(&key, Value::clone(&value));
        };
        assert_change_refused(change, &[&key, "changes the result"]);
    }
}

/// The matrix that gives logits.
fn output(decoder: &Decoder) -> &str {
    let mut weights = decoder.ops.iter().rev().filter_map(Op::weights);
    weights.next().expect("a model has matrices").name()
}

#[test]
fn the_output_matrix_is_the_embedding_where_the_file_has_none() {
    let tied = load(qwen3().to_bytes()).unwrap();
    assert_eq!(output(&tied), "token_embd.weight");
    let model = RandomModel {
        tied: false,
        ..RandomModel::new("qwen3", TensorType::Q4_K)
    };
    let separate = load(model.file().to_bytes()).unwrap();
    assert_eq!(output(&separate), "output.weight");
}

#[test]
fn rope_factors_divide_the_frequencies_of_llama() {
    let mut file = RandomModel::new("llama", TensorType::Q8_0).file();
    let frequencies = |file: &GgufFile| {
        load(file.to_bytes()).unwrap().layers[1]
            .attention
            .rope
            .frequencies()
    };
    let without = frequencies(&file);
    let factors: Vec<f32> = (0..32).map(|i| 1.0 + i as f32).collect();
    let data = factors
        .iter()
        .flat_map(|factor| factor.to_le_bytes())
        .collect();
    file.push("rope_freqs.weight", &[32], TensorType::F32, data);
    let factors = factors.into_iter().map(f64::from);
    let divided = without.iter().zip(factors);
    let divided: Vec<f64> = divided
        .map(|(frequency, factor)| frequency / factor)
        .collect();
    assert_eq!(without[0], 1.0);
    assert_eq!(frequencies(&file), divided);
}

#[test]
fn tensor_bytes_are_those_written_for_every_type_and_alignment() {
    for alignment in [None, Some(8u32), Some(64), Some(4096)] {
        for tensor_type in [
            TensorType::F32,
            TensorType::F16,
            TensorType::BF16,
            TensorType::Q4_0,
            TensorType::Q4_1,
            TensorType::Q5_0,
            TensorType::Q5_1,
            TensorType::Q8_0,
            TensorType::Q2_K,
            TensorType::Q3_K,
            TensorType::Q4_K,
            TensorType::Q5_K,
            TensorType::Q6_K,
        ] {
            let mut file = RandomModel {
                layers: 1,
                ..RandomModel::new("qwen3", tensor_type)
            }
            .file();
            if let Some(alignment) = alignment {
                file.set("general.alignment", alignment);
            }
            let gguf = Gguf::from_bytes("model.gguf", file.to_bytes()).unwrap();
            for written in &file.tensors {
                let read = gguf.tensor(&written.name).unwrap();
                let shape: Vec<u64> = read
                    .shape()
                    .iter()
                    .map(|&dimension| dimension as u64)
                    .collect();
                assert_eq!(shape, written.shape);
                assert!(
                    read.bytes() == written.data,
                    "{} as {tensor_type:?}",
                    written.name
                );
            }
        }
    }
}

#[test]
fn metadata_is_read_by_type_or_refused_by_key() {
    let mut file = qwen3();
    file.set("a.string", "text")
        .set("a.float", 1.5f32)
        .set("a.nan", f32::NAN);
    let gguf = Gguf::from_bytes("model.gguf", file.to_bytes()).unwrap();
    assert_eq!(gguf.str("a.string").unwrap(), Some("text"));
    assert_eq!(gguf.str("a.missing").unwrap(), None);
    assert_eq!(gguf.f64("a.float").unwrap(), Some(1.5));
    assert_eq!(
        gguf.bool("tokenizer.ggml.add_bos_token").unwrap(),
        Some(false)
    );
    assert_eq!(
        gguf.array("tokenizer.ggml.merges").unwrap().unwrap().len(),
        5
    );
    assert_refused(gguf.u64("a.string"), &["a.string", "\"text\"", "integer"]);
    assert_refused(gguf.u64("a.float"), &["a.float", "1.5", "integer"]);
    assert_refused(gguf.f64("a.nan"), &["a.nan", "NaN"]);
    assert_refused(gguf.bool("a.string"), &["a.string", "true or false"]);
    assert_refused(
        gguf.str("tokenizer.ggml.merges"),
        &["tokenizer.ggml.merges", "array of 5"],
    );
}

#[test]
fn a_path_without_a_readable_model_is_refused_by_path() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    fs::write(path("empty.gguf"), b"").unwrap();
    fs::write(path("text.gguf"), b"once upon a time, there was a fox").unwrap();
    fs::write(path("short.gguf"), b"GG").unwrap();
    assert_refused(
        Gguf::open(&path("none.gguf")),
        &["none.gguf", "No such file"],
    );
    assert_refused(
        Gguf::open(dir.path()),
        &[dir.path().to_str().unwrap(), "directory"],
    );
    assert_refused(Gguf::open(&path("empty.gguf")), &["empty.gguf", "empty"]);
    assert_refused(
        Gguf::open(&path("text.gguf")),
        &["text.gguf", "not a GGUF", "\"once\""],
    );
    assert_refused(
        Gguf::open(&path("short.gguf")),
        &["short.gguf", "byte 0", "ends after 2"],
    );
}

#[cfg(unix)]
#[test]
fn a_pipe_is_refused_without_waiting_for_a_writer() {
    let dir = tempfile::tempdir().unwrap();
    let pipe = dir.path().join("pipe.gguf");
    assert!(
        std::process::Command::new("mkfifo")
            .arg(&pipe)
            .status()
            .unwrap()
            .success()
    );
    assert_refused(Gguf::open(&pipe), &["pipe.gguf", "not a regular file"]);
}

#[test]
fn an_unknown_version_is_refused_by_number() {
    for version in [0, 1, 4, 1 << 30] {
        assert_change_refused(
            |file| file.version = version,
            &[&format!("version {version} ")],
        );
    }
    let mut version_2 = qwen3();
    version_2.version = 2;
    load(version_2.to_bytes()).unwrap();
}

#[test]
fn a_big_endian_file_is_recognized() {
    assert_change_refused(|file| file.version = 3u32.swap_bytes(), &["big-endian"]);
    let mut swapped_magic = qwen3().to_bytes();
    swapped_magic[..4].copy_from_slice(b"FUGG");
    assert_refused(load(swapped_magic), &["big-endian"]);
}

#[test]
fn a_file_cut_off_at_any_byte_is_refused() {
    let file = RandomModel {
        layers: 1,
        ..RandomModel::new("llama", TensorType::Q2_K)
    }
    .file();
    let whole = file.to_bytes();
    for len in 0..file.header().len() {
        assert_refused(load(whole[..len].to_vec()), &["model.gguf", "byte"]);
    }
    let data_end = whole.len() - 1;
    let step = whole.len() / 97;
    for len in (file.header().len()..data_end).step_by(step) {
        assert_refused(
            load(whole[..len].to_vec()),
            &["tensor \"", &format!("ends at byte {len}")],
        );
    }
}

#[test]
fn counts_that_the_file_cannot_hold_are_refused() {
    for (at, things) in [(8, "tensors"), (16, "metadata entries")] {
        for count in [1u64 << 20, 1 << 60, u64::MAX] {
            let mut bytes = qwen3().header();
            bytes[at..at + 8].copy_from_slice(&count.to_le_bytes());
            assert_refused(load(bytes), &[things, &count.to_string()]);
        }
    }
}

#[test]
fn lengths_that_the_file_cannot_hold_are_refused_by_key() {
    let find = |bytes: &[u8], text: &str| {
        let at = bytes
            .windows(text.len())
            .position(|window| window == text.as_bytes());
        at.unwrap() + text.len()
    };
    let bytes = qwen3().to_bytes();
    for len in [1u64 << 24, 1 << 30, 1 << 62, u64::MAX] {
        for (key, length_at) in [("general.name", 4), ("tokenizer.ggml.tokens", 8)] {
            let mut bytes = bytes.clone();
            let at = find(&bytes, key) + length_at;
            bytes[at..at + 8].copy_from_slice(&len.to_le_bytes());
            assert_refused(load(bytes), &[key, &len.to_string()]);
        }
    }
}

#[test]
fn metadata_that_gguf_rs_would_misread_is_refused_by_key() {
    let raw = |value_type: u32, bytes: &[u8]| {
        let mut file = GgufFile::default().header();
        file[16] = 1;
        file.extend(3u64.to_le_bytes());
        file.extend(b"key");
        file.extend(value_type.to_le_bytes());
        file.extend(bytes);
        load(file)
    };
    let broken_utf8 = [&2u64.to_le_bytes()[..], &[0xff, 0xfe]].concat();
    assert_refused(raw(8, &broken_utf8), &["\"key\"", "byte 47", "UTF-8"]);
    let nested = [&9u32.to_le_bytes()[..], &1u64.to_le_bytes()].concat();
    assert_refused(raw(9, &nested), &["\"key\"", "arrays of arrays"]);
    assert_refused(raw(13, &[0; 8]), &["\"key\"", "value type 13"]);
    let many_bytes = [
        &0u32.to_le_bytes()[..],
        &(1u64 << 20).to_le_bytes(),
        &[0; 1 << 20],
    ]
    .concat();
    assert_refused(raw(9, &many_bytes), &["\"key\"", "1048576", "limit 524288"]);
}

#[test]
fn a_second_key_or_tensor_of_the_same_name_is_refused() {
    let again = |file: &mut GgufFile| {
        file.metadata
            .push(("general.name".to_owned(), Value::U32(1)))
    };
    assert_change_refused(again, &["\"general.name\"", "second time"]);
    let again = |file: &mut GgufFile| file.tensors[1] = file.tensors[0].clone();
    assert_change_refused(again, &["\"token_embd.weight\"", "second time"]);
}

#[test]
fn an_unsupported_tensor_type_is_refused_by_its_ggml_name() {
    for (id, name) in [
        (9, "Q8_1"),
        (28, "F64"),
        (36, "IQ4_NL_4_4"),
        (40, "NVFP4"),
        (4_000, "unknown"),
    ] {
        assert_change_refused(
            |file| file.tensor("blk.1.ffn_up.weight").type_id = id,
            &[
                "\"blk.1.ffn_up.weight\"",
                &format!("{name} (id {id})"),
                "F32",
                "Q6_K",
            ],
        );
    }
}

#[test]
fn an_impossible_shape_is_refused_by_tensor() {
    const NAME: &str = "blk.0.attn_q.weight";
    for (shape, reason) in [
        (vec![256, 0], "[256, 0]"),
        (vec![], "0 dimensions"),
        (vec![256, 1, 1, 1, 1], "5 dimensions"),
        (vec![100, 256], "rows of 100 values"),
        (vec![1 << 40, 1 << 40], "impossibly large"),
        (vec![256, 1 << 40], "the file ends at byte"),
        (vec![256, 128], "[256, 128], expected [256, 256]"),
        (vec![256, 256, 2], "overlaps"),
    ] {
        assert_change_refused(|file| file.tensor(NAME).shape = shape, &[NAME, reason]);
    }
}

#[test]
fn a_tensor_outside_the_file_or_out_of_place_is_refused() {
    const NAME: &str = "blk.0.ffn_down.weight";
    for (offset, reason) in [
        (1 << 40, "the file ends at byte"),
        (u64::MAX - 31, "impossibly large"),
        (33, "alignment 32"),
        (0, "overlaps tensor"),
    ] {
        assert_change_refused(
            |file| file.tensor(NAME).offset = Some(offset),
            &[NAME, reason],
        );
    }
}

#[test]
fn an_impossible_alignment_is_refused() {
    for alignment in [0u32, 4, 24, 1 << 30] {
        assert_change_refused(
            |file| {
                file.set("general.alignment", alignment);
            },
            &[
                "\"general.alignment\"",
                &alignment.to_string(),
                "power of two",
            ],
        );
    }
    assert_change_refused(
        |file| {
            file.set("general.alignment", "32");
        },
        &["\"general.alignment\"", "\"32\""],
    );
}

#[test]
fn an_unsupported_architecture_is_refused_by_name() {
    assert_change_refused(
        |file| {
            file.set("general.architecture", "mamba");
        },
        &["\"mamba\"", "llama", "qwen2", "qwen3"],
    );
}

#[test]
fn a_missing_key_is_refused_by_name() {
    for key in [
        "general.architecture",
        "qwen3.context_length",
        "qwen3.block_count",
        "qwen3.embedding_length",
        "qwen3.feed_forward_length",
        "qwen3.attention.head_count",
        "qwen3.attention.layer_norm_rms_epsilon",
        "tokenizer.ggml.tokens",
    ] {
        assert_change_refused(
            |file| {
                file.unset(key);
            },
            &[key, "missing"],
        );
    }
}

#[test]
fn an_impossible_hyper_parameter_is_refused_by_key_and_value() {
    let cases: [(&str, Value, &str); 20] = [
        ("context_length", 0u32.into(), "is 0"),
        ("context_length", u64::MAX.into(), "is 18446744073709551615"),
        ("block_count", 100_000u32.into(), "is 100000"),
        ("block_count", "2".into(), "is the string \"2\""),
        ("embedding_length", (-1i32).into(), "is -1"),
        ("feed_forward_length", 1.5f32.into(), "is 1.5"),
        ("attention.head_count", 0u32.into(), "is 0"),
        (
            "attention.head_count_kv",
            3u32.into(),
            "is 3 for layer 0, expected a divisor of its 4",
        ),
        ("attention.head_count_kv", 0u32.into(), "is 0"),
        ("attention.head_count_kv", "2".into(), "is the string \"2\""),
        (
            "attention.key_length",
            63u32.into(),
            "is 63, expected an even number",
        ),
        (
            "attention.value_length",
            32u32.into(),
            "is 32, expected the key length 64",
        ),
        (
            "attention.layer_norm_rms_epsilon",
            f32::NAN.into(),
            "is NaN",
        ),
        ("attention.layer_norm_rms_epsilon", (-1f32).into(), "is -1"),
        ("rope.freq_base", 0f32.into(), "is 0"),
        ("rope.dimension_count", 66u32.into(), "is 66"),
        ("rope.dimension_count", 31u32.into(), "is 31"),
        ("rope.scaling.type", "longrope".into(), "is \"longrope\""),
        ("expert_count", 8u32.into(), "is 8"),
        ("attention.sliding_window", 4096u32.into(), "is 4096"),
    ];
    for (key, value, found) in cases {
        let key = format!("qwen3.{key}");
        assert_change_refused(
            |file| {
                file.set(&key, value);
            },
            &[&key, found],
        );
    }
}

#[test]
fn a_linear_scaling_factor_must_be_there_and_usable() {
    let linear = |factor: Option<f32>| {
        move |file: &mut GgufFile| {
            file.set("qwen3.rope.scaling.type", "linear");
            if let Some(factor) = factor {
                file.set("qwen3.rope.scaling.factor", factor);
            }
        }
    };
    assert_change_refused(linear(None), &["qwen3.rope.scaling.factor", "missing"]);
    assert_change_refused(linear(Some(0.0)), &["qwen3.rope.scaling.factor", "is 0"]);
}

#[test]
fn a_vocabulary_and_an_embedding_that_disagree_are_refused_with_both_sizes() {
    assert_change_refused(
        |file| {
            file.set("tokenizer.ggml.tokens", vec!["a".to_owned(); 260]);
        },
        &["260 tokens", "264 rows"],
    );
}

#[test]
fn a_missing_tensor_is_refused_by_name() {
    let names: Vec<String> = qwen3()
        .tensors
        .into_iter()
        .map(|tensor| tensor.name)
        .collect();
    for name in names {
        assert_change_refused(
            |file| file.tensors.retain(|tensor| tensor.name != name),
            &[&name, "missing"],
        );
    }
    let mut qwen2 = RandomModel::new("qwen2", TensorType::Q4_K).file();
    qwen2
        .tensors
        .retain(|tensor| tensor.name != "blk.1.attn_k.bias");
    assert_refused(load(qwen2.to_bytes()), &["blk.1.attn_k.bias", "missing"]);
}

/// Writes the parts of a split model and returns their paths.
fn write_parts(dir: &Path, parts: &[GgufFile]) -> Vec<std::path::PathBuf> {
    let paths: Vec<_> = (1..=parts.len())
        .map(|number| dir.join(format!("m-{number:05}-of-{:05}.gguf", parts.len())))
        .collect();
    for (path, part) in paths.iter().zip(parts) {
        fs::write(path, part.to_bytes()).unwrap();
    }
    paths
}

#[test]
fn a_split_model_opens_from_its_first_part() {
    let dir = tempfile::tempdir().unwrap();
    let whole = qwen3();
    let paths = write_parts(dir.path(), &whole.split(3));
    let gguf = Gguf::open(&paths[0]).unwrap();
    assert_eq!(gguf.tensors().count(), whole.tensors.len());
    for written in &whole.tensors {
        assert!(
            gguf.tensor(&written.name).unwrap().bytes() == written.data,
            "{}",
            written.name
        );
    }
    let bytes_on_disk: u64 = paths
        .iter()
        .map(|path| fs::metadata(path).unwrap().len())
        .sum();
    assert_eq!(gguf.file_bytes(), bytes_on_disk);
    arch::describe(&gguf, arch::ALL, &RopeOptions::default()).unwrap();
}

#[test]
fn a_later_part_of_a_split_model_says_which_file_to_open() {
    let dir = tempfile::tempdir().unwrap();
    let paths = write_parts(dir.path(), &qwen3().split(3));
    assert_refused(
        Gguf::open(&paths[1]),
        &["part 2", "3", paths[0].to_str().unwrap()],
    );
}

#[test]
fn a_missing_part_of_a_split_model_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let paths = write_parts(dir.path(), &qwen3().split(3));
    fs::remove_file(&paths[2]).unwrap();
    assert_refused(
        Gguf::open(&paths[0]),
        &[paths[2].to_str().unwrap(), "part 3 of 3", "No such file"],
    );
}

#[test]
fn parts_that_do_not_belong_together_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let parts = qwen3().split(3);

    let swapped = [parts[0].clone(), parts[2].clone(), parts[1].clone()];
    let paths = write_parts(dir.path(), &swapped);
    assert_refused(
        Gguf::open(&paths[0]),
        &[paths[1].to_str().unwrap(), "part 2 of 3", "part 3 of 3"],
    );

    let mut unmarked = parts.clone();
    unmarked[1].unset("split.no");
    let paths = write_parts(dir.path(), &unmarked);
    assert_refused(
        Gguf::open(&paths[0]),
        &[paths[1].to_str().unwrap(), "split.no"],
    );

    let mut repeated = parts.clone();
    repeated[1].tensors[0] = repeated[0].tensors[0].clone();
    let paths = write_parts(dir.path(), &repeated);
    assert_refused(
        Gguf::open(&paths[0]),
        &[
            paths[1].to_str().unwrap(),
            "\"token_embd.weight\"",
            "earlier part",
        ],
    );

    let mut short = parts.clone();
    short[2].tensors.pop();
    let paths = write_parts(dir.path(), &short);
    let total = qwen3().tensors.len();
    let expected = [
        &format!("is {total}")[..],
        &format!("{} tensors", total - 1),
    ];
    assert_refused(
        Gguf::open(&paths[0]),
        &["split.tensors.count", expected[0], expected[1]],
    );
}

/// Merged files often keep the name of their first part.
#[test]
fn a_whole_model_opens_whatever_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let mut merged = qwen3();
    for (name, count) in [
        ("a-00001-of-00003.gguf", None),
        ("b-00002-of-00002.gguf", Some(0u16)),
    ] {
        if let Some(count) = count {
            merged.set("split.count", count).set("split.no", 0u16);
        }
        let path = dir.path().join(name);
        fs::write(&path, merged.to_bytes()).unwrap();
        let gguf = Gguf::open(&path).unwrap();
        assert_eq!(gguf.tensors().count(), merged.tensors.len(), "{name}");
    }
}

#[test]
fn a_renamed_part_says_what_its_name_should_end_in() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    fs::write(&path, qwen3().split(3)[0].to_bytes()).unwrap();
    assert_refused(
        Gguf::open(&path),
        &[path.to_str().unwrap(), "part 1 of 3", "00001-of-00003.gguf"],
    );
}
