//! One walk over a GGUF header that allocates nothing the file could inflate. It runs before gguf-rs, which trusts
//! lengths and counts, panics on one type id, drops duplicate keys and replaces broken UTF-8.
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>

use std::collections::HashSet;

use anyhow::{Context, Result, bail, ensure};

use super::quoted;
use crate::quant::TensorType;

/// Most array elements that the metadata may hold, those of one or two bytes counted eightfold. gguf-rs makes each a JSON
/// value of 32 bytes and puts the text of a string, and of a number too, into an allocation of its own. A vocabulary of
/// 262,144 tokens with their types and as many merges takes a fifth of this.
const MAX_ARRAY_ELEMENTS: u64 = 1 << 22;

/// Fewest bytes that a metadata entry takes: an empty key, the value's type and one byte.
const MIN_ENTRY_BYTES: u64 = 8 + 4 + 1;

/// Fewest bytes that a tensor's description takes: an empty name, one dimension, type and offset.
const MIN_TENSOR_BYTES: u64 = 8 + 4 + 8 + 4 + 8;

/// Checks everything from the magic to the last tensor description, so that gguf-rs can parse it as it is.
pub fn check(bytes: &[u8]) -> Result<()> {
    let mut cursor = Cursor {
        bytes,
        position: 0,
        array_elements: 0,
    };
    check_magic_and_version(&mut cursor).context("file header")?;
    let tensor_count = cursor.count("tensors", MIN_TENSOR_BYTES)?;
    let entry_count = cursor.count("metadata entries", MIN_ENTRY_BYTES)?;

    let mut keys = HashSet::new();
    for i in 1..=entry_count {
        let key = cursor
            .string()
            .with_context(|| format!("key of metadata entry {i} of {entry_count}"))?;
        ensure!(
            keys.insert(key),
            "byte {}: metadata key {} occurs a second time",
            cursor.position,
            quoted(key)
        );
        cursor
            .skip_value()
            .with_context(|| format!("metadata key {}", quoted(key)))?;
    }

    let mut names = HashSet::new();
    for i in 1..=tensor_count {
        let name = cursor
            .string()
            .with_context(|| format!("name of tensor {i} of {tensor_count}"))?;
        ensure!(
            names.insert(name),
            "byte {}: tensor {} occurs a second time",
            cursor.position,
            quoted(name)
        );
        check_tensor(&mut cursor).with_context(|| format!("tensor {}", quoted(name)))?;
    }
    Ok(())
}

fn check_magic_and_version(cursor: &mut Cursor) -> Result<()> {
    const BIG_ENDIAN: &str = "this is a big-endian GGUF file, and sharpi reads little-endian ones; \
                              get the little-endian file or convert it (gguf_convert_endian.py in llama.cpp)";
    match cursor.take(4)? {
        b"GGUF" => {}
        b"FUGG" => bail!(BIG_ENDIAN),
        other => bail!(
            "this is not a GGUF file: it starts with \"{}\" instead of \"GGUF\"",
            other.escape_ascii()
        ),
    }
    match cursor.u32()? {
        2 | 3 => Ok(()),
        version if (1..=3).contains(&version.swap_bytes()) => bail!(BIG_ENDIAN),
        version => bail!(
            "GGUF version {version} is not supported, only 2 and 3 are; convert the model again with a current tool"
        ),
    }
}

fn check_tensor(cursor: &mut Cursor) -> Result<()> {
    let dimensions = cursor.u32()?;
    ensure!(
        (1..=4).contains(&dimensions),
        "byte {}: it has {dimensions} dimensions, expected 1 to 4",
        cursor.position - 4
    );
    let mut shape = [0; 4];
    let shape = &mut shape[..dimensions as usize];
    for dimension in &mut *shape {
        *dimension = cursor.u64()?;
    }
    let tensor_type = tensor_type(cursor.u32()?)?;
    let _offset = cursor.u64()?;
    tensor_bytes(shape, tensor_type).map(drop)
}

/// The type with this ggml id, or an error that gives it its ggml name.
pub fn tensor_type(id: u32) -> Result<TensorType> {
    TensorType::from_ggml_id(id).with_context(|| {
        let supported: Vec<_> = (0..=u8::MAX)
            .filter_map(|id| TensorType::from_ggml_id(id.into()))
            .map(TensorType::name)
            .collect();
        format!(
            "its type is {} (id {id}), supported are {}",
            unsupported_type_name(id),
            supported.join(", ")
        )
    })
}

/// What ggml calls the tensor types that sharpi cannot read (`enum ggml_type` in ggml.h).
fn unsupported_type_name(id: u32) -> &'static str {
    match id {
        4 => "Q4_2",
        5 => "Q4_3",
        9 => "Q8_1",
        15 => "Q8_K",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        31 => "Q4_0_4_4",
        32 => "Q4_0_4_8",
        33 => "Q4_0_8_8",
        36 => "IQ4_NL_4_4",
        37 => "IQ4_NL_4_8",
        38 => "IQ4_NL_8_8",
        40 => "NVFP4",
        _ => "unknown",
    }
}

/// Bytes of a tensor with this shape (contiguous dimension first), if such a tensor can exist.
pub fn tensor_bytes(shape: &[u64], tensor_type: TensorType) -> Result<u64> {
    ensure!(
        shape.iter().all(|&dimension| dimension > 0),
        "its shape {shape:?} has a dimension of zero"
    );
    let block_len = tensor_type.block_len() as u64;
    ensure!(
        shape[0].is_multiple_of(block_len),
        "its rows of {} values do not split into {} blocks of {block_len}",
        shape[0],
        tensor_type.name()
    );
    shape[1..]
        .iter()
        .try_fold(shape[0] / block_len, |product, &dimension| {
            product.checked_mul(dimension)
        })
        .and_then(|blocks| blocks.checked_mul(tensor_type.block_bytes() as u64))
        .with_context(|| format!("its shape {shape:?} is impossibly large"))
}

/// Reads forward through a header; every error names the byte where it stood.
struct Cursor<'a> {
    bytes: &'a [u8],
    position: usize,
    /// Array elements seen so far, see [`MAX_ARRAY_ELEMENTS`].
    array_elements: u64,
}

impl<'a> Cursor<'a> {
    fn bytes_left(&self) -> u64 {
        (self.bytes.len() - self.position) as u64
    }

    fn take(&mut self, len: u64) -> Result<&'a [u8]> {
        ensure!(
            len <= self.bytes_left(),
            "byte {}: {len} bytes should follow, but the file ends after {}; it is truncated or damaged, fetch it again",
            self.position,
            self.bytes_left()
        );
        let start = self.position;
        self.position += len as usize;
        Ok(&self.bytes[start..self.position])
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N as u64)?);
        Ok(out)
    }

    fn u32(&mut self) -> Result<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// A number of things that take at least `min_bytes` each.
    fn count(&mut self, things: &str, min_bytes: u64) -> Result<u64> {
        let count = self.u64().with_context(|| format!("number of {things}"))?;
        ensure!(
            count <= self.bytes_left() / min_bytes,
            "byte {}: {count} {things} cannot fit into the {} bytes left; the file is truncated or damaged, fetch it again",
            self.position - 8,
            self.bytes_left()
        );
        Ok(count)
    }

    fn string(&mut self) -> Result<&'a str> {
        let len = self.u64()?;
        let start = self.position;
        std::str::from_utf8(self.take(len)?)
            .with_context(|| format!("byte {start}: the string is not UTF-8"))
    }

    fn skip_value(&mut self) -> Result<()> {
        match self.u32()? {
            STRING => self.string().map(drop),
            ARRAY => self.skip_array(),
            value_type => {
                let width = self.scalar_width(value_type)?;
                self.take(width).map(drop)
            }
        }
    }

    fn skip_array(&mut self) -> Result<()> {
        let item_type = self.u32()?;
        ensure!(
            item_type != ARRAY,
            "byte {}: arrays of arrays are not supported",
            self.position - 4
        );
        let width = match item_type {
            STRING => 8, // at least its length
            _ => self.scalar_width(item_type)?,
        };
        let len = self.count("array elements", width)?;
        // Narrow elements weigh more: as JSON values they grow by more.
        let weight = if width < 4 { 8 } else { 1 };
        self.array_elements += len * weight;
        ensure!(
            self.array_elements <= MAX_ARRAY_ELEMENTS,
            "byte {}: with the {len} elements of this array the metadata is unreasonably large (limit {} elements)",
            self.position - 8,
            MAX_ARRAY_ELEMENTS / weight
        );
        if item_type == STRING {
            for i in 0..len {
                self.string()
                    .with_context(|| format!("element {i} of {len}"))?;
            }
        } else {
            self.take(len * width)?;
        }
        Ok(())
    }

    /// Bytes of a number or boolean of the type just read.
    fn scalar_width(&self, value_type: u32) -> Result<u64> {
        match value_type {
            0 | 1 | 7 => Ok(1), // u8, i8, bool
            2 | 3 => Ok(2),     // u16, i16
            4..=6 => Ok(4),     // u32, i32, f32
            10..=12 => Ok(8),   // u64, i64, f64
            _ => bail!(
                "byte {}: unknown value type {value_type}",
                self.position - 4
            ),
        }
    }
}

/// Value types that are no scalar.
const STRING: u32 = 8;
const ARRAY: u32 = 9;
