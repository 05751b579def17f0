//! One walk over a GGUF header that allocates nothing the file could inflate. It runs before gguf-rs, which trusts
//! lengths and counts, panics on one type id, drops duplicate keys and replaces broken UTF-8, and which then only makes
//! values of the metadata.
//!
//! The walk goes as far as it can and notes what is wrong, so that a file that must not be run can be looked at.
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>

use std::{
    borrow::Cow,
    collections::HashSet,
    io::{self, Read},
    ops::Range,
};

use anyhow::{Context, Error, Result, anyhow, bail, ensure};
use gguf_rs::{ByteOrder, GGUFContainer, GGUFModel};

use super::{FileBytes, quoted};
use crate::quant::TensorType;

/// Most array elements that the metadata may hold, those of one or two bytes counted eightfold. gguf-rs makes each a JSON
/// value of 32 bytes and puts the text of a string, and of a number too, into an allocation of its own. A vocabulary of
/// 262,144 tokens with their types and as many merges takes a fifth of this.
const MAX_ARRAY_ELEMENTS: u64 = 1 << 22;

/// More faults of one file are not told: a damaged one may have as many as tensors.
const MOST_FAULTS: usize = 50;

/// A header as far as it goes.
pub struct Header<'a> {
    pub version: u32,
    pub is_big_endian: bool,
    /// The whole entries of the metadata, in the file's order.
    pub keys: Vec<(Cow<'a, str>, ValueType)>,
    /// Entries that the file says it has.
    pub key_count: u64,
    /// What is described in full, in the file's order.
    pub tensors: Vec<TensorInfo<'a>>,
    /// Tensors that the file says it has.
    pub tensor_count: u64,
    /// Behind the last description; `None` where the header breaks off.
    pub end: Option<usize>,
    /// What is wrong, in the file's order.
    pub faults: Faults,
    /// The bytes of `keys` and their values.
    entries_at: Range<usize>,
}

/// What a tensor is said to be.
pub struct TensorInfo<'a> {
    pub name: Cow<'a, str>,
    /// Contiguous dimension first.
    pub shape: Vec<u64>,
    /// As ggml counts types.
    pub type_id: u32,
    /// From the beginning of the tensor data.
    pub offset: u64,
}

/// Errors in the order in which they were met, no more than [`MOST_FAULTS`].
#[derive(Default)]
pub struct Faults(Vec<Error>);

impl Faults {
    pub fn note(&mut self, fault: Error) {
        if self.0.len() < MOST_FAULTS {
            self.0.push(fault);
        }
    }

    /// Notes the error, if it is one.
    pub fn take<T>(&mut self, result: Result<T>) -> Option<T> {
        result.map_err(|fault| self.note(fault)).ok()
    }

    pub fn append(&mut self, others: Self) {
        others.0.into_iter().for_each(|fault| self.note(fault));
    }

    pub fn all(&self) -> &[Error] {
        &self.0
    }

    pub fn into_first(self) -> Option<Error> {
        self.0.into_iter().next()
    }
}

/// Reads everything from the magic to the last tensor description, or to where it breaks off.
///
/// # Errors
/// This is no GGUF file.
pub fn read(bytes: &[u8]) -> Result<Header<'_>> {
    let mut cursor = Cursor {
        bytes,
        position: 0,
        is_big_endian: false,
        has_short_lengths: false,
        array_elements: 0,
        not_utf8: None,
    };
    check_magic(&mut cursor)?;
    let mut header = Header {
        version: 0,
        is_big_endian: false,
        keys: Vec::new(),
        key_count: 0,
        tensors: Vec::new(),
        tensor_count: 0,
        end: None,
        faults: Faults::default(),
        entries_at: 0..0,
    };
    let walked = header.walk(&mut cursor);
    header.faults.take(walked);
    Ok(header)
}

impl<'a> Header<'a> {
    fn walk(&mut self, cursor: &mut Cursor<'a>) -> Result<()> {
        self.version = cursor.u32().context("file header")?;
        if (1..=3).contains(&self.version.swap_bytes()) {
            self.version = self.version.swap_bytes();
            self.is_big_endian = true;
        }
        cursor.is_big_endian = self.is_big_endian;
        cursor.has_short_lengths = self.version == 1;
        self.check_version(&cursor.bytes[..4]);
        let word = if cursor.has_short_lengths { 4 } else { 8 };
        // The fewest bytes are those of an empty name, one dimension, type and offset; of an empty key, the value's type and
        // one byte.
        self.tensor_count = self.count(cursor, "tensors", word + 4 + word + 4 + 8)?;
        self.key_count = self.count(cursor, "metadata entries", word + 4 + 1)?;
        self.walk_metadata(cursor)?;
        self.walk_tensors(cursor)?;
        self.end = Some(cursor.position);
        Ok(())
    }

    fn check_version(&mut self, magic: &[u8]) {
        if self.is_big_endian || magic == b"FUGG" {
            self.faults.note(anyhow!(
                "file header: this is a big-endian GGUF file, and sharpi reads little-endian ones; \
                 get the little-endian file or convert it (gguf_convert_endian.py in llama.cpp)"
            ));
        } else if !matches!(self.version, 2 | 3) {
            self.faults.note(anyhow!(
                "file header: GGUF version {} is not supported, only 2 and 3 are; convert the model again with a current tool",
                self.version
            ));
        }
    }

    /// A number of things that take at least `min_bytes` each. One that the file has no room for is noted and believed, for
    /// the file may be cut off.
    fn count(&mut self, cursor: &mut Cursor, things: &str, min_bytes: u64) -> Result<u64> {
        let at = cursor.position;
        let count = cursor.length();
        let count = count.with_context(|| format!("number of {things}"))?;
        self.faults
            .take(cursor.check_count(at, count, things, min_bytes));
        Ok(count)
    }

    fn walk_metadata(&mut self, cursor: &mut Cursor<'a>) -> Result<()> {
        let count = self.key_count;
        self.entries_at = cursor.position..cursor.position;
        let mut known = HashSet::new();
        for i in 1..=count {
            let key = cursor.string();
            let key = key.with_context(|| format!("key of metadata entry {i} of {count}"))?;
            let of_key = || format!("metadata key {}", quoted(&key));
            if !known.insert(key.clone()) {
                self.faults.note(anyhow!(
                    "byte {}: metadata key {} occurs a second time",
                    cursor.position,
                    quoted(&key)
                ));
            }
            let value_type = cursor.skip_value().with_context(of_key)?;
            self.faults.take(cursor.check_utf8().with_context(of_key));
            self.keys.push((key, value_type));
            self.entries_at.end = cursor.position;
        }
        Ok(())
    }

    fn walk_tensors(&mut self, cursor: &mut Cursor<'a>) -> Result<()> {
        let count = self.tensor_count;
        let mut known = HashSet::new();
        for i in 1..=count {
            let name = cursor.string();
            let name = name.with_context(|| format!("name of tensor {i} of {count}"))?;
            let of_tensor = || format!("tensor {}", quoted(&name));
            if !known.insert(name.clone()) {
                self.faults.note(anyhow!(
                    "byte {}: tensor {} occurs a second time",
                    cursor.position,
                    quoted(&name)
                ));
            }
            let (shape, type_id, offset) = cursor.tensor().with_context(of_tensor)?;
            self.faults
                .take(cursor.check_utf8().with_context(of_tensor));
            self.tensors.push(TensorInfo {
                name,
                shape,
                type_id,
                offset,
            });
        }
        Ok(())
    }

    /// The values of the whole entries, by key. `file` is what the header was read from.
    pub fn values(&self, file: &FileBytes) -> Result<GGUFModel> {
        let order = match self.is_big_endian {
            true => ByteOrder::BE,
            false => ByteOrder::LE,
        };
        let (version, word) = if self.version == 1 { (1, 4) } else { (3, 8) };
        let number = |number: u64, bytes: usize| match self.is_big_endian {
            true => number.to_be_bytes()[8 - bytes..].to_vec(),
            false => number.to_le_bytes()[..bytes].to_vec(),
        };
        // The version, no tensors, and the entries that are whole.
        let head = [
            number(version, 4),
            number(0, word),
            number(self.keys.len() as u64, word),
        ];
        let mut entries = io::Cursor::new(file.clone());
        entries.set_position(self.entries_at.start as u64);
        let entries = entries.take(self.entries_at.len() as u64);
        let reader = Box::new(io::Cursor::new(head.concat()).chain(entries));
        GGUFContainer::new(order, reader, u64::MAX).decode()
    }
}
/// # Errors
/// It is not that of a GGUF file.
fn check_magic(cursor: &mut Cursor) -> Result<()> {
    match cursor.take(4).context("file header")? {
        b"GGUF" | b"FUGG" => Ok(()),
        other => {
            let looks = looks_like(cursor.bytes).map_or(String::new(), |what| format!("; {what}"));
            bail!(
                "file header: this is not a GGUF file: it starts with \"{}\" instead of \"GGUF\"{looks}",
                other.escape_ascii()
            )
        }
    }
}

/// What a file is instead, by its first bytes, and what to do.
fn looks_like(bytes: &[u8]) -> Option<&'static str> {
    let text = bytes[..bytes.len().min(64)].trim_ascii_start();
    let begins = |with: &str| {
        let start = text.get(..with.len());
        start.is_some_and(|start| start.eq_ignore_ascii_case(with.as_bytes()))
    };
    Some(match bytes {
        [b'P', b'K', 3, 4, ..] => {
            "it looks like a zip archive, as PyTorch writes its checkpoints: get the model as GGUF, or convert it \
             (convert_hf_to_gguf.py in llama.cpp)"
        }
        [_, _, _, _, _, _, 0, 0, b'{', b'"', ..] => {
            "it looks like a safetensors file: get the model as GGUF, or convert it (convert_hf_to_gguf.py in llama.cpp)"
        }
        [b'l' | b'f', b'm', b'g', b'g', ..] | [b't', b'j', b'g', b'g', ..] => {
            "it is in a format of ggml's that came before GGUF: get a current file of the model"
        }
        [b'a', b'l', b'g', b'g', ..] => {
            "it is an adapter (LoRA) in a format of ggml's that came before GGUF"
        }
        [0x1f, 0x8b, ..] => "it looks like gzip: unpack it first",
        _ if begins("version https://git-lfs") => {
            "it is a pointer of Git LFS, which stands for the file: `git lfs pull` fetches that"
        }
        _ if begins("<!doctype") || begins("<html") => {
            "it looks like a web page: the download got a page, and not the file"
        }
        _ => return None,
    })
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

/// What ggml calls the type with this id.
pub fn type_name(id: u32) -> &'static str {
    TensorType::from_ggml_id(id).map_or_else(|| unsupported_type_name(id), TensorType::name)
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

/// The type of a metadata value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ValueType {
    /// Of the value, or of an array's elements.
    pub name: &'static str,
    pub is_array: bool,
}

/// Reads forward through a header; every error names the byte where it stood.
struct Cursor<'a> {
    bytes: &'a [u8],
    position: usize,
    is_big_endian: bool,
    /// Whether lengths and dimensions take 4 bytes, as in version 1, and not 8.
    has_short_lengths: bool,
    /// Array elements seen so far, see [`MAX_ARRAY_ELEMENTS`].
    array_elements: u64,
    /// Where the first string began that is not UTF-8.
    not_utf8: Option<usize>,
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

    /// An unsigned number of `N` bytes.
    fn number<const N: usize>(&mut self) -> Result<u64> {
        let mut number = [0; 8];
        number[..N].copy_from_slice(self.take(N as u64)?);
        if self.is_big_endian {
            number[..N].reverse();
        }
        Ok(u64::from_le_bytes(number))
    }

    fn u32(&mut self) -> Result<u32> {
        self.number::<4>().map(|number| number as u32)
    }

    fn u64(&mut self) -> Result<u64> {
        self.number::<8>()
    }

    /// A length, a dimension or a count.
    fn length(&mut self) -> Result<u64> {
        match self.has_short_lengths {
            true => self.number::<4>(),
            false => self.number::<8>(),
        }
    }

    /// Checks that `count` things, a number that stands at byte `at`, can follow with at least `min_bytes` each.
    fn check_count(&self, at: usize, count: u64, things: &str, min_bytes: u64) -> Result<()> {
        ensure!(
            count <= self.bytes_left() / min_bytes,
            "byte {at}: {count} {things} cannot fit into the {} bytes left; the file is truncated or damaged, fetch it again",
            self.bytes_left()
        );
        Ok(())
    }

    /// A string, with what is not UTF-8 in it replaced and noted for [`check_utf8`](Self::check_utf8).
    fn string(&mut self) -> Result<Cow<'a, str>> {
        let len = self.length()?;
        let start = self.position;
        let text = String::from_utf8_lossy(self.take(len)?);
        if matches!(text, Cow::Owned(_)) {
            self.not_utf8.get_or_insert(start);
        }
        Ok(text)
    }

    /// Checks all strings since the last time.
    fn check_utf8(&mut self) -> Result<()> {
        match self.not_utf8.take() {
            Some(start) => bail!("byte {start}: the string is not UTF-8"),
            None => Ok(()),
        }
    }

    fn skip_value(&mut self) -> Result<ValueType> {
        let value_type = self.u32()?;
        let is_array = value_type == ARRAY;
        let name = match value_type {
            STRING => {
                self.string()?;
                "string"
            }
            ARRAY => self.skip_array()?,
            scalar => {
                let (name, width) = self.scalar(scalar)?;
                self.take(width)?;
                name
            }
        };
        Ok(ValueType { name, is_array })
    }

    /// The name of the elements' type.
    fn skip_array(&mut self) -> Result<&'static str> {
        let item_type = self.u32()?;
        ensure!(
            item_type != ARRAY,
            "byte {}: arrays of arrays are not supported",
            self.position - 4
        );
        let (name, width) = match item_type {
            // At least its length.
            STRING => ("string", if self.has_short_lengths { 4 } else { 8 }),
            _ => self.scalar(item_type)?,
        };
        let at = self.position;
        let len = self.length().context("number of array elements")?;
        self.check_count(at, len, "array elements", width)?;
        // Narrow elements weigh more: as JSON values they grow by more.
        let weight = if width < 4 { 8 } else { 1 };
        self.array_elements += len * weight;
        ensure!(
            self.array_elements <= MAX_ARRAY_ELEMENTS,
            "byte {at}: with the {len} elements of this array the metadata is unreasonably large (limit {} elements)",
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
        Ok(name)
    }

    /// The name and the bytes of a number or boolean of the type just read.
    fn scalar(&self, value_type: u32) -> Result<(&'static str, u64)> {
        Ok(match value_type {
            0 => ("u8", 1),
            1 => ("i8", 1),
            2 => ("u16", 2),
            3 => ("i16", 2),
            4 => ("u32", 4),
            5 => ("i32", 4),
            6 => ("f32", 4),
            7 => ("bool", 1),
            10 => ("u64", 8),
            11 => ("i64", 8),
            12 => ("f64", 8),
            _ => bail!(
                "byte {}: unknown value type {value_type}",
                self.position - 4
            ),
        })
    }

    /// Shape, type and offset of a tensor.
    fn tensor(&mut self) -> Result<(Vec<u64>, u32, u64)> {
        let dimensions = self.u32()?;
        ensure!(
            (1..=4).contains(&dimensions),
            "byte {}: it has {dimensions} dimensions, expected 1 to 4",
            self.position - 4
        );
        let shape = (0..dimensions).map(|_| self.length());
        Ok((shape.collect::<Result<_>>()?, self.u32()?, self.u64()?))
    }
}

/// Value types that are no scalar.
const STRING: u32 = 8;
const ARRAY: u32 = 9;
