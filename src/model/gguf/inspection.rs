//! What a file has to say, read as far as it goes, with what keeps it from being used.

use std::{
    collections::BTreeMap,
    mem,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context, Error, Result, anyhow, bail, ensure};

use super::{
    FileBytes, Gguf, SplitName, Tensor,
    header::{self, Faults, Header, TensorInfo, ValueType},
    map, quoted,
};

/// A file (all parts of a split one that are there), whole or not.
pub struct Inspection {
    /// The metadata that could be read, and the tensors that are whole. It is what it says it is only without faults.
    gguf: Gguf,
    pub version: u32,
    pub is_big_endian: bool,
    /// The keys of the metadata with their types, in the file's order.
    pub keys: Vec<(String, ValueType)>,
    /// Keys that the file says it has.
    pub key_count: u64,
    /// All tensors that are described.
    pub tensors: Vec<ListedTensor>,
    /// Tensors that the file says it has.
    pub tensor_count: u64,
    /// Of the data of described tensors, what the file lacks.
    pub missing_bytes: u64,
    /// Where the file is one of several.
    pub part: Option<Part>,
    faults: Faults,
}

/// A tensor as its file describes it.
pub struct ListedTensor {
    pub name: String,
    /// As ggml counts types, and its name for it, `unknown` where we know none.
    pub type_id: u32,
    pub type_name: &'static str,
    /// Values, as far as they can be counted.
    pub value_count: u64,
    /// Bytes in the file; for a type that is not supported, up to the next tensor.
    pub bytes: u64,
}

/// Which part of a split model a file is.
pub struct Part {
    /// From 1.
    pub number: u64,
    pub count: u64,
    /// Those of the other parts that are not beside it.
    pub missing: Vec<PathBuf>,
}

impl Inspection {
    /// Reads the file at `path`, and where it is the first of several parts, the others.
    ///
    /// # Errors
    /// It cannot be mapped, or is no GGUF file.
    pub fn open(path: &Path) -> Result<Self> {
        let mut whole =
            Self::open_file(path).with_context(|| format!("cannot load {}", path.display()))?;
        let split = SplitName::parse(path).filter(|_| whole.is_part());
        let Some(split) = split else {
            let checked = whole.check_part(1, 1);
            whole.faults.take(checked);
            return Ok(whole);
        };
        let (number, count) = (split.number, split.count);
        let mut missing = Vec::new();
        if number == 1 {
            let checked = whole.check_part(1, count);
            whole.faults.take(checked);
            for number in 2..=count {
                let path = split.part(path, number);
                let part = whole
                    .append_part(&path, number, count)
                    .with_context(|| format!("{}, part {number} of {count}", path.display()));
                if whole.faults.take(part).is_none() && !path.exists() {
                    missing.push(path);
                }
            }
            if missing.is_empty() {
                let checked = whole.check_split_tensor_count();
                whole.faults.take(checked);
            }
        } else {
            let own = mem::take(&mut whole.faults);
            whole.faults.note(anyhow!(
                "it is part {number} of a model split into {count}; open the first part, {}",
                split.part(path, 1).display()
            ));
            whole.faults.append(own);
            let others = (1..=count).map(|number| split.part(path, number));
            missing.extend(others.filter(|path| !path.exists()));
        }
        whole.part = Some(Part {
            number,
            count,
            missing,
        });
        Ok(whole)
    }

    /// Reads a file that lies in memory. `name` stands for the path in messages.
    ///
    /// # Errors
    /// It is no GGUF file.
    pub fn from_bytes(name: &str, bytes: impl AsRef<[u8]> + Send + Sync + 'static) -> Result<Self> {
        let mut file = Self::parse(name, FileBytes(Arc::new(bytes)))
            .with_context(|| format!("cannot load {name}"))?;
        let checked = file.check_part(1, 1);
        file.faults.take(checked);
        Ok(file)
    }

    fn open_file(path: &Path) -> Result<Self> {
        Self::parse(&path.display().to_string(), map(path)?)
    }

    fn parse(name: &str, bytes: FileBytes) -> Result<Self> {
        let header = header::read(bytes.as_ref())?;
        let mut file = Self {
            gguf: Gguf {
                name: name.to_owned(),
                file_bytes: bytes.as_ref().len() as u64,
                header: header.values(&bytes)?,
                parts: vec![(bytes.clone(), header.end.unwrap_or_default())],
                tensors: BTreeMap::new(),
            },
            version: header.version,
            is_big_endian: header.is_big_endian,
            keys: Vec::new(),
            key_count: header.key_count,
            tensors: Vec::new(),
            tensor_count: header.tensor_count,
            missing_bytes: 0,
            part: None,
            faults: Faults::default(),
        };
        file.list_tensors(&header);
        let located = match header.end {
            Some(end) => file.locate_tensors(&header.tensors, end as u64, &bytes),
            None => Faults::default(),
        };
        file.keys = header
            .keys
            .into_iter()
            .map(|(key, value_type)| (key.into_owned(), value_type))
            .collect();
        file.faults = header.faults;
        file.faults.append(located);
        Ok(file)
    }

    fn list_tensors(&mut self, header: &Header) {
        let mut offsets: Vec<u64> = header.tensors.iter().map(|tensor| tensor.offset).collect();
        let data_at = header.end.unwrap_or_default() as u64;
        offsets.push(self.gguf.file_bytes.saturating_sub(data_at));
        offsets.sort_unstable();
        self.tensors = header
            .tensors
            .iter()
            .map(|info| {
                let next = offsets.partition_point(|&offset| offset <= info.offset);
                let gap = offsets.get(next).map_or(0, |next| next - info.offset);
                ListedTensor {
                    name: info.name.to_string(),
                    type_id: info.type_id,
                    type_name: header::type_name(info.type_id),
                    value_count: (info.shape.iter())
                        .fold(1, |product, &len| u64::saturating_mul(product, len)),
                    bytes: info.bytes().unwrap_or(gap),
                }
            })
            .collect();
    }

    /// Takes those tensors into `gguf` that are whole. Their data begins behind `header_end`, aligned.
    fn locate_tensors(
        &mut self,
        infos: &[TensorInfo],
        header_end: u64,
        bytes: &FileBytes,
    ) -> Faults {
        let mut faults = Faults::default();
        let alignment = faults.take(self.gguf.alignment());
        let alignment = alignment.unwrap_or(gguf_rs::GGUF_DEFAULT_ALIGNMENT);
        let data_at = header_end.next_multiple_of(alignment);
        let file_len = self.gguf.file_bytes;
        let mut cut: Option<(&TensorInfo, Range<u64>)> = None;
        for info in infos {
            let range = info.range(data_at, alignment);
            let range = range.with_context(|| format!("tensor {}", quoted(&info.name)));
            let Some(range) = faults.take(range) else {
                continue;
            };
            if range.end <= file_len {
                let tensor = info.located(range, bytes);
                self.gguf.tensors.insert(tensor.name.clone(), tensor);
                continue;
            }
            self.missing_bytes = self.missing_bytes.max(range.end - file_len);
            if cut
                .as_ref()
                .is_none_or(|(_, first)| range.start < first.start)
            {
                cut = Some((info, range));
            }
        }
        if let Some((info, range)) = cut {
            faults.note(anyhow!(
                "tensor {}: its data is at bytes {}..{}, but the file ends at byte {file_len}; it is truncated or damaged, \
                 fetch it again",
                quoted(&info.name),
                range.start,
                range.end
            ));
        }
        faults.take(self.gguf.check_overlap());
        faults
    }

    /// The file without its faults: of what it holds, what can be told.
    pub fn gguf(&self) -> &Gguf {
        &self.gguf
    }

    /// What keeps the file from being used, first the one that [`into_gguf`](Self::into_gguf) fails with. Of many, the first.
    pub fn faults(&self) -> &[Error] {
        self.faults.all()
    }

    /// The file, to be used.
    ///
    /// # Errors
    /// It has a fault.
    pub fn into_gguf(self) -> Result<Gguf> {
        match self.faults.into_first() {
            Some(fault) => Err(fault.context(format!("cannot load {}", self.gguf.name))),
            None => Ok(self.gguf),
        }
    }

    /// Whether the metadata says that there are further parts.
    fn is_part(&self) -> bool {
        matches!(self.gguf.u64("split.count"), Ok(Some(2..)))
    }

    /// Checks that the file agrees to be part `number` of `count`.
    fn check_part(&self, number: u64, count: u64) -> Result<()> {
        let says = |key| self.gguf.u64(key);
        let (no, says_count) = (says("split.no")?, says("split.count")?);
        if count == 1 && says_count.is_none_or(|says_count| says_count <= 1) {
            return Ok(()); // not split
        }
        let (Some(no), Some(says_count)) = (no, says_count) else {
            bail!(
                "it is named as part {number} of {count}, but lacks the metadata \"split.no\" and \"split.count\""
            );
        };
        ensure!(
            (no, says_count) == (number - 1, count),
            "it should be part {number} of {count} by its name, but is part {} of {says_count} by its metadata; \
             give each part the name it was made with, ending in {:05}-of-{says_count:05}.gguf for this one",
            no.saturating_add(1),
            no.saturating_add(1)
        );
        Ok(())
    }

    /// Adds the tensors of part `number` of `count`.
    fn append_part(&mut self, path: &Path, number: u64, count: u64) -> Result<()> {
        let part = Self::open_file(path)?;
        part.check_part(number, count)?;
        self.gguf.file_bytes += part.gguf.file_bytes;
        self.gguf.parts.extend(part.gguf.parts);
        self.missing_bytes += part.missing_bytes;
        self.tensor_count += part.tensor_count;
        self.tensors.extend(part.tensors);
        for (name, tensor) in part.gguf.tensors {
            ensure!(
                !self.gguf.tensors.contains_key(&name),
                "tensor {} is also in an earlier part of the model",
                quoted(&name)
            );
            self.gguf.tensors.insert(name, tensor);
        }
        match part.faults.into_first() {
            Some(fault) => Err(fault),
            None => Ok(()),
        }
    }

    fn check_split_tensor_count(&self) -> Result<()> {
        const KEY: &str = "split.tensors.count";
        if let Some(count) = self.gguf.u64(KEY)? {
            ensure!(
                count == self.tensors.len() as u64,
                "metadata key \"{KEY}\" is {count}, but the parts hold {} tensors together",
                self.tensors.len()
            );
        }
        Ok(())
    }
}

impl Gguf {
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
}

impl TensorInfo<'_> {
    /// Bytes of the data.
    fn bytes(&self) -> Result<u64> {
        header::tensor_bytes(&self.shape, header::tensor_type(self.type_id)?)
    }

    /// Where the data lies in the file, whether or not that reaches so far. `data_at` is where all tensor data starts.
    fn range(&self, data_at: u64, alignment: u64) -> Result<Range<u64>> {
        let len = self.bytes()?;
        ensure!(
            self.offset.is_multiple_of(alignment),
            "its offset {} is not a multiple of the file's alignment {alignment}",
            self.offset
        );
        data_at
            .checked_add(self.offset)
            .and_then(|start| Some(start..start.checked_add(len)?))
            .with_context(|| format!("its offset {} is impossibly large", self.offset))
    }

    /// The tensor at `range` of `file`, which holds all of it.
    fn located(&self, range: Range<u64>, file: &FileBytes) -> Tensor {
        Tensor {
            name: self.name.to_string(),
            tensor_type: header::tensor_type(self.type_id).expect("it was told by its bytes"),
            shape: (self.shape.iter())
                .map(|&dimension| dimension as usize)
                .collect(),
            file: file.clone(),
            range: range.start as usize..range.end as usize,
        }
    }
}
