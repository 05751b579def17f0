//! The GGUF container: mapped into memory, parsed by gguf-rs, and checked for everything that a file can lie about.

use std::{path::Path, sync::Arc};

use anyhow::Result;
use serde_json::Value;

use crate::quant::TensorType;

/// A parsed and checked GGUF file (all parts of a split one).
pub struct Gguf {}

impl Gguf {
    /// Maps and checks the file at `path`; a name ending in `-00001-of-0000N.gguf` opens all N parts.
    pub fn open(_path: &Path) -> Result<Self> {
        todo!()
    }

    /// Checks a file that is part of the executable. `name` stands for the path in messages.
    pub fn from_static(_name: &str, _bytes: &'static [u8]) -> Result<Self> {
        todo!()
    }

    /// What messages call this file: its path.
    pub fn name(&self) -> &str {
        todo!()
    }

    /// Bytes of the file, all parts together.
    pub fn file_bytes(&self) -> u64 {
        todo!()
    }

    /// The metadata value under `key`.
    pub fn get(&self, _key: &str) -> Option<&Value> {
        todo!()
    }

    /// The string under `key`: `None` where it is missing, an error naming the key where it is no string.
    pub fn str(&self, _key: &str) -> Result<Option<&str>> {
        todo!()
    }

    /// The non-negative integer under `key`, likewise.
    pub fn u64(&self, _key: &str) -> Result<Option<u64>> {
        todo!()
    }

    /// The number under `key` (integers are converted), likewise.
    pub fn f64(&self, _key: &str) -> Result<Option<f64>> {
        todo!()
    }

    /// The boolean under `key`, likewise.
    pub fn bool(&self, _key: &str) -> Result<Option<bool>> {
        todo!()
    }

    /// The array under `key`, likewise.
    pub fn array(&self, _key: &str) -> Result<Option<&[Value]>> {
        todo!()
    }

    /// All metadata, sorted by key.
    pub fn metadata(&self) -> impl Iterator<Item = (&str, &Value)> {
        std::iter::empty()
    }

    /// The tensor called `name`, if the file has it.
    pub fn tensor(&self, _name: &str) -> Option<&Tensor> {
        todo!()
    }

    /// All tensors, sorted by name.
    pub fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        std::iter::empty()
    }
}

/// A tensor inside a mapped file. Clones share the mapping.
#[derive(Clone)]
pub struct Tensor {
    name: String,
    tensor_type: TensorType,
    /// Contiguous dimension first, as in the file. One to four entries, each at least 1.
    shape: Vec<usize>,
    file: Arc<FileBytes>,
    range: std::ops::Range<usize>,
}

/// The bytes of one file, mapped or part of the executable.
enum FileBytes {
    Mapped(memmap2::Mmap),
    Static(&'static [u8]),
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
        match &*self.file {
            FileBytes::Mapped(map) => &map[self.range.clone()],
            FileBytes::Static(bytes) => &bytes[self.range.clone()],
        }
    }

    /// All values, for small tensors such as norms.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.row_len() * self.rows()];
        self.tensor_type.dequantize(self.bytes(), &mut out);
        out
    }
}
