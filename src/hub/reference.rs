//! `hf:OWNER/REPO[:QUANT]`: how a person names a model of the hub.

use std::{fmt, str::FromStr};

use anyhow::{Result, bail};

use super::names::{ModelFiles, is_model_file};

const PREFIX: &str = "hf:";
const DEFAULT_QUANT: &str = "Q4_K_M";
const EXPECTED: &str = "expected hf:OWNER/REPO, hf:OWNER/REPO:QUANT or hf:OWNER/REPO:FILE.gguf";

/// A model of the hub. Shown, it is what [`FromStr`] reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    /// Owner and name, of characters that may stand in a path and a URL.
    pub(super) repo: String,
    wanted: Wanted,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Wanted {
    /// The only model in the repository that is quantized so.
    Quant(String),
    /// The model that this file belongs to.
    File(String),
}

impl Reference {
    /// Whether `name` is meant as a reference, and not as a file's path.
    pub fn is_meant_by(name: &str) -> bool {
        name.starts_with(PREFIX)
    }

    /// References to all of `models`, which are those of one repository, in the same order.
    pub(super) fn to_all(repo: &str, models: &[ModelFiles]) -> Vec<Self> {
        let only = |quant: &String| {
            let same = models
                .iter()
                .filter(|model| model.quant.as_ref() == Some(quant));
            same.count() == 1
        };
        let to = |model: &ModelFiles| Self {
            repo: repo.to_owned(),
            wanted: match model.quant.clone().filter(only) {
                Some(quant) => Wanted::Quant(quant),
                None => Wanted::File(model.parts[0].clone()),
            },
        };
        models.iter().map(to).collect()
    }

    /// Which of its repository's `models` it means.
    ///
    /// # Errors
    /// There are several: the message names them.
    pub(super) fn choose<'m>(&self, models: &'m [ModelFiles]) -> Result<Option<&'m ModelFiles>> {
        let mut matching = models.iter().filter(|model| match &self.wanted {
            Wanted::Quant(quant) => {
                let of_model = model.quant.as_ref();
                of_model.is_some_and(|of_model| of_model.eq_ignore_ascii_case(quant))
            }
            Wanted::File(name) => model.parts.contains(name),
        });
        let first = matching.next();
        let others: Vec<_> = matching.map(|model| &model.parts[0]).collect();
        if let (Some(first), false) = (first, others.is_empty()) {
            let mut message = format!("{self} may be any of these; name the file:");
            for name in [&first.parts[0]].into_iter().chain(others) {
                message += &format!("\n  {PREFIX}{}:{name}", self.repo);
            }
            bail!(message);
        }
        Ok(first)
    }

    /// Says that it means none of the repository's `models`, and which there are.
    pub(super) fn lacking(&self, models: &[ModelFiles]) -> String {
        if models.is_empty() {
            return format!(
                "{} holds no GGUF files; a repository that does often has a name that ends in -GGUF",
                self.repo
            );
        }
        let what = match &self.wanted {
            Wanted::Quant(quant) => format!("model in {quant}"),
            Wanted::File(name) => format!("file {name}, or not all parts of it"),
        };
        let mut message = format!("{} has no {what}. It has:", self.repo);
        for reference in Self::to_all(&self.repo, models) {
            message += &format!("\n  {reference}");
        }
        message
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Wanted::Quant(wanted) | Wanted::File(wanted)) = &self.wanted;
        write!(f, "{PREFIX}{}:{wanted}", self.repo)
    }
}

impl FromStr for Reference {
    type Err = String;

    /// Reads `hf:OWNER/REPO[:QUANT]`, where `hf:` may be missing.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let text = text.strip_prefix(PREFIX).unwrap_or(text);
        let (repo, wanted) = text.split_once(':').unwrap_or((text, DEFAULT_QUANT));
        let named = repo.split_once('/');
        if !named.is_some_and(|(owner, name)| is_repo_part(owner) && is_repo_part(name)) {
            return Err(EXPECTED.to_owned());
        }
        let wanted = match wanted {
            file if is_model_file(file) => Wanted::File(file.to_owned()),
            quant if is_repo_part(quant) => Wanted::Quant(quant.to_owned()),
            _ => return Err(EXPECTED.to_owned()),
        };
        Ok(Self {
            repo: repo.to_owned(),
            wanted,
        })
    }
}

/// What the hub lets an owner or a repository be called.
fn is_repo_part(text: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    !text.is_empty()
        && text.chars().all(allowed)
        && !text.contains("--")
        && !text.contains("..")
        && !text.starts_with(['-', '.'])
        && !text.ends_with(['-', '.'])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reference_names_a_quantization_or_a_file() {
        for (text, shown) in [
            ("hf:o/r", "hf:o/r:Q4_K_M"),
            ("o/r:q8_0", "hf:o/r:q8_0"),
            (
                "hf:Qwen/Qwen3-8B-GGUF:UD-Q2_K_XL",
                "hf:Qwen/Qwen3-8B-GGUF:UD-Q2_K_XL",
            ),
            ("hf:o/r:sub/a:b.gguf", "hf:o/r:sub/a:b.gguf"),
        ] {
            let reference: Reference = text.parse().unwrap();
            assert_eq!(reference.to_string(), shown);
            assert_eq!(shown.parse(), Ok(reference));
        }
    }

    #[test]
    fn what_could_leave_its_directory_is_no_reference() {
        for text in [
            "hf:",
            "hf:r",
            "hf:/r",
            "hf:o/",
            "hf:o/r/s",
            "hf:../r",
            "hf:o/..",
            "hf:o/r:",
            "hf:o/a--b",
            "hf:o/r?x",
            "hf:o/r:../x.gguf",
            "hf:o/r:/x.gguf",
            "hf:o/r:a//x.gguf",
            "hf:o/r:a\\x.gguf",
            "hf:o/r:a\nx.gguf",
            "hf:o/r:a/b",
            "hf:o/r:.gguf",
            "hf:o/r name",
        ] {
            assert!(text.parse::<Reference>().is_err(), "{text:?}");
        }
    }
}
