//! Writes the seeds: small files of every kind of model, vocabulary and tensor to `corpus/load`, chat templates to
//! `corpus/template` and lines of many scripts to `corpus/text`.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use sharpi::{
    model::{Gguf, demo},
    quant::TensorType,
};
use sharpi_fuzz::{
    GgufFile, PRE_TOKENIZERS, Random, RandomModel, Value, byte_vocabulary, piece_vocabulary,
};

/// Tokens that are left of a real vocabulary. Few of the changes to a longer one would touch what matters.
const KEPT_TOKENS: usize = 600;

fn main() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let corpus = |target: &str| -> Result<PathBuf> {
        let dir = root.join("corpus").join(target);
        fs::create_dir_all(&dir)?;
        Ok(dir)
    };
    let data = root.join("../tests/data");
    let templates = fs::read_to_string(data.join("chat-templates.jinja"))?;
    let templates: Vec<(&str, &str)> = (templates.split("\n=== ").skip(1))
        .map(|part| part.split_once('\n').context("a name and a template"))
        .collect::<Result<_>>()?;

    let dir = corpus("load")?;
    for (name, file) in files(&data)? {
        fs::write(dir.join(name), file.to_bytes())?;
    }
    for (name, template) in &templates {
        let mut file = GgufFile {
            metadata: byte_vocabulary(),
            ..GgufFile::default()
        };
        file.set("tokenizer.chat_template", *template);
        fs::write(dir.join(format!("template-{name}")), file.to_bytes())?;
    }

    let dir = corpus("text")?;
    let texts: serde_json::Value =
        serde_json::from_slice(&fs::read(data.join("vocab/tokens.json"))?)?;
    for (number, text) in (1..).zip(texts.as_array().context("a list")?) {
        let text = text["text"].as_str().context("a text")?;
        fs::write(dir.join(format!("text-{number}")), text)?;
    }

    let dir = corpus("template")?;
    for (name, template) in templates {
        fs::write(dir.join(name), template)?;
    }
    let lines = fs::read_to_string(data.join("jinja-lines.txt"))?;
    for (number, line) in (1..).zip(lines.lines()) {
        fs::write(dir.join(format!("line-{number}")), line)?;
    }
    Ok(())
}

/// Models, vocabularies and tensors, with names for them.
fn files(data: &Path) -> Result<Vec<(String, GgufFile)>> {
    let mut files = Vec::new();
    for architecture in ["llama", "qwen2", "qwen3"] {
        for tied in [false, true] {
            let model = RandomModel {
                layers: 1,
                hidden_size: 32,
                feed_forward_length: 32,
                head_dim: 8,
                tied,
                ..RandomModel::new(architecture, TensorType::Q8_0)
            };
            files.push((format!("{architecture}-{tied}"), model.file()));
        }
    }

    // A block of each type.
    let mut tensors = GgufFile::default();
    for &tensor_type in TensorType::ALL {
        let block_len = tensor_type.block_len();
        let block = Random(1).blocks(tensor_type, block_len, 1.0);
        tensors.push(tensor_type.name(), &[block_len as u64], tensor_type, block);
    }
    files.push(("tensor-types".to_owned(), tensors));

    let vocabulary = |metadata| GgufFile {
        metadata,
        ..GgufFile::default()
    };
    for pre in PRE_TOKENIZERS {
        let mut file = vocabulary(byte_vocabulary());
        file.set("tokenizer.ggml.pre", pre);
        files.push((format!("pre-{pre}"), file));
    }
    for model in ["llama", "gemma4"] {
        files.push((
            format!("pieces-{model}"),
            vocabulary(piece_vocabulary(model)),
        ));
    }
    files.push(("vocabulary-demo".to_owned(), shortened(&demo()?)?));
    for name in ["phi-3", "gemma-4"] {
        let packed = fs::read(data.join(format!("vocab/{name}.gguf.xz")))?;
        let mut bytes = Vec::new();
        lzma_rs::xz_decompress(&mut packed.as_slice(), &mut bytes)?;
        let file = shortened(&Gguf::from_bytes(name, bytes)?)?;
        files.push((format!("vocabulary-{name}"), file));
    }
    Ok(files)
}

/// The file's keys about text, with its first tokens and the merges among those.
fn shortened(gguf: &Gguf) -> Result<GgufFile> {
    let texts = |key: &str| -> Vec<String> {
        let items = gguf.get(key).and_then(serde_json::Value::as_array);
        let text = |item: &serde_json::Value| item.as_str().unwrap_or_default().to_owned();
        items.into_iter().flatten().map(text).collect()
    };
    let mut tokens = texts("tokenizer.ggml.tokens");
    tokens.truncate(KEPT_TOKENS);
    let mut merges = texts("tokenizer.ggml.merges");
    merges.retain(|merge| {
        let mut parts = merge.split(' ').map(str::to_owned);
        let whole = merge.replace(' ', "");
        tokens.contains(&whole) && parts.all(|part| tokens.contains(&part))
    });

    let mut file = GgufFile::default();
    for (key, value) in gguf.metadata() {
        let value: Value = match (key, value) {
            ("tokenizer.ggml.tokens", _) => tokens.clone().into(),
            ("tokenizer.ggml.merges", _) => merges.clone().into(),
            ("tokenizer.ggml.scores", serde_json::Value::Array(scores)) => {
                let scores = scores.iter().filter_map(serde_json::Value::as_f64);
                let scores: Vec<f32> = scores.map(|score| score as f32).collect();
                scores[..tokens.len()].to_vec().into()
            }
            ("tokenizer.ggml.token_type", serde_json::Value::Array(types)) => {
                let types = types.iter().filter_map(serde_json::Value::as_i64);
                let types: Vec<i32> = types.map(|kind| kind as i32).collect();
                types[..tokens.len()].to_vec().into()
            }
            (_, serde_json::Value::String(text)) => text.clone().into(),
            (_, serde_json::Value::Bool(value)) => (*value).into(),
            (_, serde_json::Value::Number(number)) if key.starts_with("tokenizer.") => {
                (number.as_u64().context("an id")? as u32).into()
            }
            _ => continue,
        };
        file.set(key, value);
    }
    Ok(file)
}
