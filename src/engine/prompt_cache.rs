//! A prompt's KV cache in a file, so that a later run need not read the prompt again.
//!
//! The file holds what a session was when it had just read the prompt. Numbers are little-endian:
//!
//! | bytes | |
//! |---|---|
//! | 16 | [`MAGIC`] |
//! | 4 | [`VERSION`], u32 |
//! | 4 | length of the header, u32, up to [`MOST_HEADER_BYTES`] |
//! | 8 | length of the body, u64 |
//! | 8 | XXH3 of the header, u64 |
//! | 8 | XXH3 of the 40 bytes above, u64 |
//! | | the header: a [`Header`] as JSON |
//! | | the body: the prompt's tokens, u32 each; the logits behind its last one, f32 each; the KV cache as its backend hands it out, [`KvPart::Rings`](crate::backend::KvPart), then `Rest` |
//! | 8 a piece | XXH3 of each [`PIECE_BYTES`] of the body, the last one shorter, u64 |
//!
//! All lengths are held to the file's own before anything is read by them.

use std::{
    fs::{self, File},
    io::{BufWriter, ErrorKind, Read, Seek, SeekFrom, Write},
    ops::Range,
    path::Path,
};

use anyhow::{Context, Result, bail, ensure};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use super::Session;
use crate::{
    backend::{Backend, KvLayer, Written},
    model::{Decoder, gguf::Mapping},
    whole_file,
};

const MAGIC: [u8; 16] = *b"\x89sharpi prompt\r\n";

/// Of the file's layout. The bytes of a KV cache may change with each version of the program, which a header names.
const VERSION: u32 = 1;

const PREFIX_BYTES: usize = 48;
const MOST_HEADER_BYTES: usize = 1 << 20;
const PIECE_BYTES: usize = 4 << 20;

/// What two runs must have in common for one to go on behind the other's prompt, with the same bits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Of the program.
    version: String,
    model: String,
    /// [`Backend::arithmetic`]
    arithmetic: String,
    kv_type: String,
    kv_budget: Option<usize>,
    /// Tokens of a prompt that are read at once.
    chunk_len: usize,
    /// Of each layer that stores keys and values, tokens that its ring has room for; 0: it has none.
    rings: Vec<usize>,
}

#[derive(Serialize, Deserialize)]
struct Header {
    identity: Identity,
    /// How many.
    tokens: usize,
    logits: usize,
    written: Written,
}

/// A file that was read, and found whole.
pub struct PromptCache {
    file: Mapping,
    header: Header,
    /// Where the KV cache's bytes are.
    state: Range<usize>,
    tokens: Vec<u32>,
    logits: Vec<f32>,
}

/// Which model computes, in hexadecimal digits: the file, by its [fingerprint](crate::model::Gguf::fingerprint), and how its
/// positions turn.
pub fn model_id(fingerprint: u128, decoder: &Decoder) -> String {
    let mut hash = Xxh3::new();
    hash.update(&fingerprint.to_le_bytes());
    for layer in &decoder.layers {
        hash.update(format!("{:?}", layer.attention.rope).as_bytes());
    }
    format!("{:032x}", hash.digest128())
}

impl Identity {
    /// Of runs with the model of this [`model_id`] on a backend like this one.
    pub fn new(model_id: &str, backend: &dyn Backend) -> Self {
        let layout = backend.kv_layout();
        let ring = |(_, layer): (usize, &KvLayer)| match layer.is_ring {
            true => layer.capacity,
            false => 0,
        };
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            model: model_id.to_owned(),
            arithmetic: backend.arithmetic(),
            kv_type: layout.name(),
            kv_budget: layout.budget,
            chunk_len: backend.limits().chunk_len,
            rings: layout.owners().map(ring).collect(),
        }
    }

    /// Tokens of a prompt that each head keeps, if not all.
    pub fn kv_budget(&self) -> Option<usize> {
        self.kv_budget
    }

    /// Refuses another run's, and says what it has different.
    fn check(&self, here: &Self) -> Result<()> {
        let budget = |budget: Option<usize>| budget.map_or("none".to_owned(), |n| n.to_string());
        let named = [
            ("version of sharpi", &self.version, &here.version),
            ("device", &self.arithmetic, &here.arithmetic),
            ("--kv-type", &self.kv_type, &here.kv_type),
        ];
        for (what, there, here) in named {
            ensure!(
                there == here,
                "its {what} is {there:?}, and this run's is {here:?}"
            );
        }
        ensure!(
            self.model == here.model,
            "it belongs to another model, or to other --rope-* and --yarn-* options"
        );
        ensure!(
            self.kv_budget == here.kv_budget,
            "its --kv-budget is {}, and this run's is {}",
            budget(self.kv_budget),
            budget(here.kv_budget)
        );
        ensure!(
            self.chunk_len == here.chunk_len,
            "its prompt was read {} tokens at a time, and this run reads {} (--ubatch, and --ctx-size)",
            self.chunk_len,
            here.chunk_len
        );
        ensure!(
            self.rings == here.rings,
            "its context is longer or shorter than what near tokens take (--ctx-size), and this run's is not"
        );
        Ok(())
    }
}

impl PromptCache {
    /// Whether there is a file at `path` to be read. An empty one is as good as none.
    ///
    /// # Errors
    /// Something else is there, which must not be overwritten, or no directory for a file.
    pub fn is_at(path: &Path) -> Result<bool> {
        let kind = match fs::metadata(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let directory = whole_file::directory_of(path);
                ensure!(
                    directory.is_dir(),
                    "there is no directory {}",
                    directory.display()
                );
                return Ok(false);
            }
            kind => kind?,
        };
        ensure!(kind.is_file(), "it is not a regular file");
        let mut start = Vec::new();
        let file = File::open(path)?;
        file.take(MAGIC.len() as u64).read_to_end(&mut start)?;
        ensure!(
            MAGIC.starts_with(&start),
            "it is something else than a prompt cache, and stays as it is: name another file"
        );
        Ok(!start.is_empty())
    }

    /// Reads the file at `path`. It stays mapped: nothing but its tokens and logits is copied.
    ///
    /// # Errors
    /// What is wrong with it: it ends early, its checksums do not match, or another version wrote it.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path)?;
        let file = Mapping::new(&file, format!("{path:?}")).context("mapping it into memory")?;
        let bytes = file.as_ref();
        let (header, body, sums) = parts(bytes)?;
        let header: Header = serde_json::from_slice(header).context("its header is damaged")?;
        verify(body, sums)?;
        let numbers_of = |count: usize| count.checked_mul(size_of::<u32>());
        let lens = numbers_of(header.tokens).zip(numbers_of(header.logits));
        let numbers = lens.and_then(|(tokens, logits)| {
            let (tokens, rest) = body.split_at_checked(tokens)?;
            let (logits, rest) = rest.split_at_checked(logits)?;
            Some((tokens, logits, rest.len()))
        });
        let (tokens, logits, state_len) =
            numbers.context("its header says that it holds more than it does")?;
        let state_end = bytes.len() - sums.len();
        Ok(Self {
            tokens: bytemuck::pod_collect_to_vec(tokens),
            logits: bytemuck::pod_collect_to_vec(logits),
            state: state_end - state_len..state_end,
            header,
            file,
        })
    }

    /// The prompt.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Bytes of the file.
    pub fn file_bytes(&self) -> usize {
        self.file.as_ref().len()
    }

    /// How many tokens of `prompt` a session on this backend would not have to compute when it was restored.
    ///
    /// # Errors
    /// The file is not for a run like this one.
    pub fn reusable(
        &self,
        prompt: &[u32],
        here: &Identity,
        backend: &dyn Backend,
    ) -> Result<usize> {
        self.header.identity.check(here)?;
        let limits = backend.limits();
        let (len, written) = (self.tokens.len(), self.header.written);
        ensure!(
            len <= limits.context_len,
            "it holds {len} tokens, and the context {} (--ctx-size)",
            limits.context_len
        );
        ensure!(
            written.is_behind(len, limits.context_len) && self.logits.len() == limits.vocab_size,
            "its header contradicts itself, or the context is too short for it (--ctx-size)"
        );
        let shared = self.tokens.iter().zip(prompt).take_while(|(a, b)| a == b);
        let shared = shared.count();
        if shared == prompt.len() && shared == len {
            return Ok(shared);
        }
        let position = shared.min(prompt.len().saturating_sub(1));
        Ok(match backend.kv_layout().remembers(position, written) {
            true => position,
            false => 0,
        })
    }

    /// Makes `session` one that has just read the prompt. The file must have been found [`reusable`](Self::reusable).
    ///
    /// # Errors
    /// A KV cache of another size, and what the device meets.
    pub fn restore(&self, session: &mut Session) -> Result<()> {
        let state = &self.file.as_ref()[self.state.clone()];
        session.restore(
            &self.tokens,
            self.logits.clone(),
            self.header.written,
            state,
        )
    }

    /// Writes the prompt that `session` [kept](Session::keep_prompts) to the file at `path`, in the place of the one that was
    /// there, once all of it is on the disk. `go_on` is asked now and then whether to. Returns the bytes of the file, or `None`
    /// where no prompt was read to its end.
    ///
    /// # Errors
    /// `go_on` says no, and what the device and the file system meet. The old file stays.
    pub fn write(
        path: &Path,
        identity: &Identity,
        session: &mut Session,
        go_on: &dyn Fn() -> bool,
    ) -> Result<Option<u64>> {
        if session.prompt().is_none() {
            return Ok(None);
        }
        whole_file::replace(path, |file| write_to(file, identity, session, go_on)).map(Some)
    }
}

/// The header, the body and its checksums.
fn parts(bytes: &[u8]) -> Result<(&[u8], &[u8], &[u8])> {
    let (prefix, rest) = bytes
        .split_at_checked(PREFIX_BYTES)
        .with_context(|| format!("it is damaged: it ends after {} bytes", bytes.len()))?;
    let number = |at: usize| {
        let bytes = prefix[at..].first_chunk();
        u64::from_le_bytes(*bytes.expect("the prefix is that long"))
    };
    ensure!(
        prefix.starts_with(&MAGIC),
        "it is something else than a prompt cache"
    );
    let (version, header_len) = (number(16) as u32, (number(16) >> 32) as usize);
    ensure!(
        version == VERSION,
        "it is of version {version}, and this sharpi reads version {VERSION}"
    );
    ensure!(
        number(40) == xxh3_64(&prefix[..40]),
        "it is damaged: its first bytes do not match their checksum"
    );
    let body_len = usize::try_from(number(24)).ok();
    let sums_len = body_len.map(|len| len.div_ceil(PIECE_BYTES) * size_of::<u64>());
    let lens = body_len.zip(sums_len).filter(|(body_len, sums_len)| {
        let behind = body_len.checked_add(*sums_len);
        header_len <= MOST_HEADER_BYTES && behind == rest.len().checked_sub(header_len)
    });
    let Some((body_len, _)) = lens else {
        bail!(
            "it is damaged: it has {} bytes, and another length in its header",
            bytes.len()
        );
    };
    let (header, rest) = rest.split_at(header_len);
    ensure!(
        number(32) == xxh3_64(header),
        "it is damaged: its header does not match its checksum"
    );
    let (body, sums) = rest.split_at(body_len);
    Ok((header, body, sums))
}

/// Holds the pieces of a body to their checksums.
fn verify(body: &[u8], sums: &[u8]) -> Result<()> {
    let pieces = body.par_chunks(PIECE_BYTES);
    let pieces = pieces.zip(sums.par_chunks_exact(size_of::<u64>()));
    let damaged = pieces.position_first(|(piece, sum)| xxh3_64(piece).to_le_bytes() != *sum);
    match damaged {
        None => Ok(()),
        Some(piece) => bail!(
            "it is damaged: what follows byte {} of its body does not match its checksum",
            piece * PIECE_BYTES
        ),
    }
}

/// Writes everything, the prefix last: without it, no file is taken for a whole one.
fn write_to(
    file: &mut File,
    identity: &Identity,
    session: &mut Session,
    go_on: &dyn Fn() -> bool,
) -> Result<u64> {
    let prompt = session.prompt().context("no prompt was read to its end")?;
    let header = serde_json::to_vec(&Header {
        identity: identity.clone(),
        tokens: prompt.tokens.len(),
        logits: prompt.logits.len(),
        written: prompt.written,
    })?;
    let tokens: &[u8] = bytemuck::cast_slice(prompt.tokens);
    let numbers = [tokens, bytemuck::cast_slice(prompt.logits)].concat();
    file.write_all(&[0; PREFIX_BYTES])?;
    file.write_all(&header)?;
    let mut body = Body::new(file, go_on);
    body.push(&numbers)?;
    session.export_prompt(&mut |bytes| body.push(bytes))?;
    let body_len = body.finish()?;

    let mut prefix = Vec::with_capacity(PREFIX_BYTES);
    prefix.extend(MAGIC);
    prefix.extend(VERSION.to_le_bytes());
    prefix.extend((header.len() as u32).to_le_bytes());
    prefix.extend(body_len.to_le_bytes());
    prefix.extend(xxh3_64(&header).to_le_bytes());
    prefix.extend(xxh3_64(&prefix).to_le_bytes());
    let bytes = file.stream_position()?;
    file.seek(SeekFrom::Start(0))?;
    file.write_all(&prefix)?;
    Ok(bytes)
}

/// A body on its way to the file.
struct Body<'a> {
    out: BufWriter<&'a mut File>,
    go_on: &'a dyn Fn() -> bool,
    len: u64,
    /// Of the piece that has begun, and of those before it.
    hash: Xxh3,
    sums: Vec<u64>,
}

impl<'a> Body<'a> {
    fn new(file: &'a mut File, go_on: &'a dyn Fn() -> bool) -> Self {
        Self {
            out: BufWriter::with_capacity(1 << 20, file),
            go_on,
            len: 0,
            hash: Xxh3::new(),
            sums: Vec::new(),
        }
    }

    fn push(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            ensure!((self.go_on)(), "it was interrupted");
            let room = PIECE_BYTES - (self.len % PIECE_BYTES as u64) as usize;
            let (piece, rest) = bytes.split_at(bytes.len().min(room));
            self.out.write_all(piece)?;
            self.hash.update(piece);
            self.len += piece.len() as u64;
            if piece.len() == room {
                self.sums.push(self.hash.digest());
                self.hash.reset();
            }
            bytes = rest;
        }
        Ok(())
    }

    /// Writes the checksums, and returns the length of the body.
    fn finish(mut self) -> Result<u64> {
        if !self.len.is_multiple_of(PIECE_BYTES as u64) {
            self.sums.push(self.hash.digest());
        }
        for sum in &self.sums {
            self.out.write_all(&sum.to_le_bytes())?;
        }
        self.out.flush()?;
        Ok(self.len)
    }
}
