//! The GGUF container: mapped into memory, checked for everything that a file can lie about, and parsed by gguf-rs.
//!
//! [`Inspection`] reads what a file has to say, whole or not; a [`Gguf`] is one without a fault.

mod file_type;
mod fingerprint;
mod header;
mod inspection;
mod mapping;
mod split_name;

use std::{
    collections::BTreeMap,
    fs::{self, File},
    ops::Range,
    path::Path,
    sync::Arc,
};

use anyhow::{Context, Result, bail, ensure};
use gguf_rs::GGUFModel;
use serde_json::Value;

use crate::quant::TensorType;

pub use file_type::FileType;
pub use header::ValueType;
pub use inspection::{Inspection, ListedTensor, Part};
pub use mapping::{Mapping, mapped_file};
pub use split_name::SplitName;

/// A parsed and checked GGUF file (all parts of a split one).
pub struct Gguf {
    name: String,
    file_bytes: u64,
    /// The header of the first part; the others carry no metadata of the model.
    header: GGUFModel,
    /// Of each part, its bytes, and how many of them come before the tensors' data.
    parts: Vec<(FileBytes, usize)>,
    tensors: BTreeMap<String, Tensor>,
}

impl Gguf {
    /// Maps and checks the file at `path`, and where its metadata says that it is the first of several parts, named
    /// `-00001-of-0000N.gguf`, those as well. (A merged file may have kept the name of its first part.)
    pub fn open(path: &Path) -> Result<Self> {
        Inspection::open(path)?.into_gguf()
    }

    /// Checks a file that lies in memory. `name` stands for the path in messages.
    pub fn from_bytes(name: &str, bytes: impl AsRef<[u8]> + Send + Sync + 'static) -> Result<Self> {
        Inspection::from_bytes(name, bytes)?.into_gguf()
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
