//! What the names of files say: which of them make one model, and how it is quantized.

use std::{collections::BTreeSet, path::Path, sync::LazyLock};

use regex::Regex;

use crate::model::SplitName;

/// A GGUF file, or all parts of a split one.
pub struct ModelFiles {
    /// In order, at least one.
    pub parts: Vec<String>,
    /// In capital letters; `None` where the name does not say it, or the file goes with a model without being one.
    pub quant: Option<String>,
}

impl ModelFiles {
    /// The models that are there whole among the files called `names`.
    pub fn among<'a>(names: impl IntoIterator<Item = &'a str>) -> Vec<Self> {
        let names: BTreeSet<_> = names
            .into_iter()
            .filter(|name| is_model_file(name))
            .collect();
        let whole = |parts: &Vec<String>| parts.iter().all(|part| names.contains(&part[..]));
        let models = names.iter().filter_map(|name| {
            let parts = Some(parts(name)?).filter(whole)?;
            let quant = quant(name);
            Some(Self { parts, quant })
        });
        models.collect()
    }
}

/// All parts of the model whose first part, or only file, is called `name`.
fn parts(name: &str) -> Option<Vec<String>> {
    let path = Path::new(name);
    let Some(split) = SplitName::parse(path) else {
        return Some(vec![name.to_owned()]);
    };
    let part = |number| split.part(path, number).to_str().map(str::to_owned);
    (split.number == 1)
        .then(|| (1..=split.count).map(part).collect())
        .flatten()
}

/// Whether `name` can be a GGUF file's below a directory: a path that does not leave it, on one line.
pub fn is_model_file(name: &str) -> bool {
    let plain = |part: &str| !matches!(part, "" | "." | ".." | ".gguf");
    name.ends_with(".gguf")
        && name.split('/').all(plain)
        && !name.contains(|c: char| c == '\\' || c.is_control())
}

/// The last part of the path `name` that is a quantization's.
fn quant(name: &str) -> Option<String> {
    static QUANT: LazyLock<Regex> = LazyLock::new(|| {
        Regex::new(r"(?i)(?:^|[-._/])((?:UD-)?I?Q[0-9](?:_[A-Z0-9]+)*|TQ[0-9]_[0-9]|MXFP4(?:_MOE)?|BF16|F16|F32)(?:[-./]|$)")
            .expect("the expression is well-formed")
    });
    let file = name.rsplit('/').next().unwrap_or(name);
    // Of a model that sees, the part that does; and what a quantization was made with.
    if file.contains("mmproj") || file.contains("imatrix") {
        return None;
    }
    let found = QUANT.captures_iter(name).last()?;
    Some(found[1].to_ascii_uppercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_the_quantization() {
        for (name, expected) in [
            ("Qwen3-8B-Q4_K_M.gguf", Some("Q4_K_M")),
            ("qwen2.5-coder-1.5b-instruct-q4_k_m.gguf", Some("Q4_K_M")),
            ("SmolLM2-135M-Instruct.Q4_1.gguf", Some("Q4_1")),
            ("gemma_iq4_xs.gguf", Some("IQ4_XS")),
            ("m-UD-Q2_K_XL.gguf", Some("UD-Q2_K_XL")),
            ("BF16/m-BF16-00001-of-00002.gguf", Some("BF16")),
            ("Q8_0/m.gguf", Some("Q8_0")),
            ("m-Q4_K_M-imat.gguf", Some("Q4_K_M")),
            ("gpt-oss-20b-mxfp4.gguf", Some("MXFP4")),
            ("q8_0.gguf", Some("Q8_0")),
            ("mmproj-m-F16.gguf", None),
            ("m-imatrix-Q8_0.gguf", None),
            ("Qwen3-8B.gguf", None),
        ] {
            assert_eq!(quant(name).as_deref(), expected, "{name}");
        }
    }

    #[test]
    fn a_split_model_is_one_and_must_be_whole() {
        let names = [
            "a-Q8_0-00002-of-00002.gguf",
            "a-Q8_0-00001-of-00002.gguf",
            "b-00001-of-00003.gguf",
            "b-00003-of-00003.gguf",
            "README.md",
            "../evil.gguf",
        ];
        let models = ModelFiles::among(names);
        let parts: Vec<_> = models.iter().map(|model| &model.parts[..]).collect();
        assert_eq!(parts, [[names[1], names[0]]]);
    }
}
