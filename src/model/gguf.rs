//! The GGUF container: mapped into memory, checked for everything that a file can lie about, and parsed by gguf-rs.

mod header;
mod mapping;

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context, Result, bail, ensure};
use gguf_rs::{ByteOrder, GGUFContainer, GGUFModel};
use serde_json::Value;

use self::mapping::Mapping;
use crate::quant::TensorType;

pub use mapping::mapped_file;

/// A parsed and checked GGUF file (all parts of a split one).
pub struct Gguf {
    name: String,
    file_bytes: u64,
    /// The header of the first part; the others carry no metadata of the model.
    header: GGUFModel,
    tensors: BTreeMap<String, Tensor>,
}

impl Gguf {
    /// Maps and checks the file at `path`, and where its metadata says that it is the first of several parts, named
    /// `-00001-of-0000N.gguf`, those as well. (A merged file may have kept the name of its first part.)
    pub fn open(path: &Path) -> Result<Self> {
        let mut gguf =
            Self::open_file(path).with_context(|| format!("cannot load {}", path.display()))?;
        let split = SplitName::parse(path).filter(|_| gguf.is_part());
        let Some(split) = split else {
            gguf.check_part(1, 1)?;
            return Ok(gguf);
        };
        if split.number != 1 {
            bail!(
                "{} is part {} of a model split into {}; open the first part, {}",
                path.display(),
                split.number,
                split.count,
                split.part(path, 1).display()
            );
        }
        gguf.check_part(1, split.count)?;
        for number in 2..=split.count {
            gguf.append(Self::open_part(
                &split.part(path, number),
                number,
                split.count,
            )?)?;
        }
        gguf.check_split_tensor_count()?;
        Ok(gguf)
    }

    /// Whether the metadata says that there are further parts.
    fn is_part(&self) -> bool {
        matches!(self.u64("split.count"), Ok(Some(2..)))
    }

    /// Checks a file that lies in memory. `name` stands for the path in messages.
    pub fn from_bytes(name: &str, bytes: impl AsRef<[u8]> + Send + Sync + 'static) -> Result<Self> {
        let gguf = Self::parse(name, FileBytes(Arc::new(bytes)))
            .with_context(|| format!("cannot load {name}"))?;
        gguf.check_part(1, 1)?;
        Ok(gguf)
    }

    fn open_file(path: &Path) -> Result<Self> {
        Self::parse(&path.display().to_string(), map(path)?)
    }

    fn open_part(path: &Path, number: u64, count: u64) -> Result<Self> {
        let part = Self::open_file(path).with_context(|| {
            format!(
                "cannot load {}, part {number} of {count} of the model",
                path.display()
            )
        })?;
        part.check_part(number, count)?;
        Ok(part)
    }

    fn parse(name: &str, bytes: FileBytes) -> Result<Self> {
        let len = bytes.as_ref().len() as u64;
        header::check(bytes.as_ref())?;
        let mut reader = io::Cursor::new(bytes.clone());
        reader.set_position(4); // gguf-rs counts from behind the magic
        let header = GGUFContainer::new(ByteOrder::LE, Box::new(reader), u64::MAX).decode()?;

        let mut gguf = Self {
            name: name.to_owned(),
            file_bytes: len,
            header,
            tensors: BTreeMap::new(),
        };
        let alignment = gguf.alignment()?;
        for info in gguf.header.tensors() {
            let tensor = Tensor::locate(info, gguf.header.data_offset(), alignment, &bytes)
                .with_context(|| format!("tensor {}", quoted(&info.name)))?;
            gguf.tensors.insert(info.name.clone(), tensor);
        }
        gguf.check_overlap()?;
        Ok(gguf)
    }

    /// Where tensors may start: at multiples of this many bytes.
    fn alignment(&self) -> Result<u64> {
        const KEY: &str = "general.alignment";
        let alignment = self.u64(KEY)?.unwrap_or(gguf_rs::GGUF_DEFAULT_ALIGNMENT);
        ensure!(
            alignment.is_power_of_two() && (8..=1 << 20).contains(&alignment),
            "metadata key \"{KEY}\" is {alignment}, expected a power of two from 8 to {}",
            1 << 20
        );
        Ok(alignment)
    }

    fn check_overlap(&self) -> Result<()> {
        let mut by_start: Vec<&Tensor> = self.tensors.values().collect();
        by_start.sort_by_key(|tensor| tensor.range.start);
        for pair in by_start.windows(2) {
            let (a, b) = (pair[0], pair[1]);
            ensure!(
                a.range.end <= b.range.start,
                "tensor {} at bytes {}..{} overlaps tensor {} at bytes {}..{}",
                quoted(&a.name),
                a.range.start,
                a.range.end,
                quoted(&b.name),
                b.range.start,
                b.range.end
            );
        }
        Ok(())
    }

    /// Checks that the file agrees to be part `number` of `count`.
    fn check_part(&self, number: u64, count: u64) -> Result<()> {
        let name = self.name();
        let says = |key| self.u64(key).with_context(|| format!("cannot load {name}"));
        let (no, says_count) = (says("split.no")?, says("split.count")?);
        if count == 1 && says_count.is_none_or(|says_count| says_count <= 1) {
            return Ok(()); // not split
        }
        let (Some(no), Some(says_count)) = (no, says_count) else {
            bail!(
                "{name} is named as part {number} of {count}, but lacks the metadata \"split.no\" and \"split.count\""
            );
        };
        ensure!(
            (no, says_count) == (number - 1, count),
            "{name} should be part {number} of {count} by its name, but is part {} of {says_count} by its metadata; \
             give each part the name it was made with, ending in {:05}-of-{says_count:05}.gguf for this one",
            no.saturating_add(1),
            no.saturating_add(1)
        );
        Ok(())
    }

    fn append(&mut self, part: Self) -> Result<()> {
        self.file_bytes += part.file_bytes;
        for (name, tensor) in part.tensors {
            ensure!(
                !self.tensors.contains_key(&name),
                "{}: tensor {} is also in an earlier part of the model",
                part.name,
                quoted(&name)
            );
            self.tensors.insert(name, tensor);
        }
        Ok(())
    }

    fn check_split_tensor_count(&self) -> Result<()> {
        const KEY: &str = "split.tensors.count";
        if let Some(count) = self
            .u64(KEY)
            .with_context(|| format!("cannot load {}", self.name))?
        {
            ensure!(
                count == self.tensors.len() as u64,
                "{}: metadata key \"{KEY}\" is {count}, but the parts hold {} tensors together",
                self.name,
                self.tensors.len()
            );
        }
        Ok(())
    }

    /// What messages call this file: its path.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes of the file, all parts together.
    pub fn file_bytes(&self) -> u64 {
        self.file_bytes
    }

    /// The metadata value under `key`. A number that is NaN or infinite is `Null`.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.header.metadata().get(key)
    }

    /// The string under `key`: `None` where it is missing, an error naming the key where it is no string.
    pub fn str(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a string", Value::as_str)
    }

    /// The non-negative integer under `key`, likewise.
    pub fn u64(&self, key: &str) -> Result<Option<u64>> {
        self.typed(key, "a non-negative integer", Value::as_u64)
    }

    /// The number under `key` (integers are converted), likewise.
    pub fn f64(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a finite number", Value::as_f64)
    }

    /// The boolean under `key`, likewise.
    pub fn bool(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", Value::as_bool)
    }

    /// The array under `key`, likewise.
    pub fn array(&self, key: &str) -> Result<Option<&[Value]>> {
        self.typed(key, "an array", |value| value.as_array().map(Vec::as_slice))
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        match read(value) {
            Some(read) => Ok(Some(read)),
            None => bail!(
                "metadata key \"{key}\" is {}, expected {expected}",
                describe(value)
            ),
        }
    }

    /// All metadata, sorted by key.
    pub fn metadata(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.header
            .metadata()
            .iter()
            .map(|(key, value)| (key.as_str(), value))
    }

    /// The tensor called `name`, if the file has it.
    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name)
    }

    /// All tensors, sorted by name.
    pub fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        self.tensors.values()
    }
}

/// A tensor inside a mapped file. Clones share the mapping.
#[derive(Clone)]
pub struct Tensor {
    name: String,
    tensor_type: TensorType,
    /// Contiguous dimension first, as in the file. One to four entries, each at least 1.
    shape: Vec<usize>,
    file: FileBytes,
    range: Range<usize>,
}

impl Tensor {
    /// Finds a tensor's bytes. `data_offset` is where the file's tensor data starts.
    fn locate(
        info: &gguf_rs::Tensor,
        data_offset: u64,
        alignment: u64,
        file: &FileBytes,
    ) -> Result<Self> {
        let tensor_type = header::tensor_type(info.kind)?;
        let len = header::tensor_bytes(&info.shape, tensor_type)?;
        let file_len = file.as_ref().len();
        ensure!(
            info.offset.is_multiple_of(alignment),
            "its offset {} is not a multiple of the file's alignment {alignment}",
            info.offset
        );
        let range = data_offset
            .checked_add(info.offset)
            .and_then(|start| Some(start..start.checked_add(len)?))
            .with_context(|| format!("its offset {} is impossibly large", info.offset))?;
        ensure!(
            range.end <= file_len as u64,
            "its data is at bytes {}..{}, but the file ends at byte {file_len}; it is truncated or damaged, fetch it again",
            range.start,
            range.end
        );
        Ok(Self {
            name: info.name.clone(),
            tensor_type,
            shape: info
                .shape
                .iter()
                .map(|&dimension| dimension as usize)
                .collect(),
            file: file.clone(),
            range: range.start as usize..range.end as usize,
        })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn tensor_type(&self) -> TensorType {
        self.tensor_type
    }

    /// Contiguous dimension first, as in the file.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Values in a row: the contiguous dimension, whole blocks.
    pub fn row_len(&self) -> usize {
        self.shape[0]
    }

    /// Rows: the product of the other dimensions.
    pub fn rows(&self) -> usize {
        self.shape[1..].iter().product()
    }

    /// Bytes of one row.
    pub fn row_bytes(&self) -> usize {
        self.row_len() / self.tensor_type.block_len() * self.tensor_type.block_bytes()
    }

    /// The blocks as they lie in the file, row after row.
    pub fn bytes(&self) -> &[u8] {
        &self.file.as_ref()[self.range.clone()]
    }

    /// Consecutive rows as a tensor of their own, (row_len, rows.len()).
    pub fn part(&self, rows: Range<usize>) -> Self {
        let offset = |rows: usize| self.range.start + rows * self.row_bytes();
        Self {
            name: format!("{}[{}..{}]", self.name, rows.start, rows.end),
            tensor_type: self.tensor_type,
            shape: vec![self.row_len(), rows.len()],
            file: self.file.clone(),
            range: offset(rows.start)..offset(rows.end),
        }
    }

    /// All values, for small tensors such as norms.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.row_len() * self.rows()];
        self.tensor_type.dequantize(self.bytes(), &mut out);
        out
    }
}

/// The bytes of one file, wherever they lie. Clones share them.
#[derive(Clone)]
struct FileBytes(Arc<dyn AsRef<[u8]> + Send + Sync>);

impl AsRef<[u8]> for FileBytes {
    fn as_ref(&self) -> &[u8] {
        (*self.0).as_ref()
    }
}

fn map(path: &Path) -> Result<FileBytes> {
    // Asked before opening: opening a pipe would wait for a writer.
    let kind = fs::metadata(path)?;
    ensure!(!kind.is_dir(), "it is a directory, expected a GGUF file");
    ensure!(
        kind.is_file(),
        "it is not a regular file, and only those can be mapped into memory"
    );
    ensure!(kind.len() > 0, "the file is empty");
    let file = File::open(path)?;
    let mapping = Mapping::new(&file, format!("{path:?}")).context("cannot map it into memory")?;
    Ok(FileBytes(Arc::new(mapping)))
}

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

/// Text from a file as a message shows it: in quotes, on one line, not endless.
pub(super) fn quoted(text: &str) -> String {
    const SHOWN: usize = 80;
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{:?}...", &text[..end]),
        None => format!("{text:?}"),
    }
}

/// A metadata value as a message shows it.
pub(super) fn describe(value: &Value) -> String {
    match value {
        Value::Null => "NaN or infinite".to_owned(),
        Value::String(text) => format!("the string {}", quoted(text)),
        Value::Array(items) => format!("an array of {} elements", items.len()),
        other => other.to_string(),
    }
}
