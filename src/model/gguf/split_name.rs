//! How the files of a split model are named.

use std::path::{Path, PathBuf};

/// A file name of the form `<prefix>-00001-of-00003.gguf`, as llama.cpp's gguf-split writes it.
pub struct SplitName {
    prefix: String,
    /// From 1.
    pub number: u64,
    /// Of all parts.
    pub count: u64,
}

impl SplitName {
    /// `None` for the name of a file that is not split.
    pub fn parse(path: &Path) -> Option<Self> {
        let stem = path.file_name()?.to_str()?.strip_suffix(".gguf")?;
        let (rest, count) = stem.rsplit_once("-of-")?;
        let (prefix, number) = rest.rsplit_once('-')?;
        let five_digits = |text: &str| {
            let all_digits = text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
            all_digits.then(|| text.parse().ok()).flatten()
        };
        let (number, count) = (five_digits(number)?, five_digits(count)?);
        (1..=count).contains(&number).then(|| Self {
            prefix: prefix.to_owned(),
            number,
            count,
        })
    }

    /// The path of part `number`, beside `path`.
    pub fn part(&self, path: &Path, number: u64) -> PathBuf {
        path.with_file_name(format!(
            "{}-{number:05}-of-{:05}.gguf",
            self.prefix, self.count
        ))
    }
}
