//! What a run needs on the device, before any of it is taken: how much context fits, and how much of a prompt is read at
//! once.

use std::fmt;

use anyhow::Result;

use super::{
    DEFAULT_CHUNK_LEN, Options,
    device::Device,
    eviction, kv_cache,
    launches::Chunk,
    scratch::{Part, decode_parts, prompt_parts, step_parts},
    weights::{DeviceWeights, TablesIn},
};
use crate::{
    backend::{KvLayout, KvOptions, Tiles},
    model::Decoder,
};

/// Memory that is left alone: what the driver takes later, for kernels and graphs.
const RESERVE: usize = 256 << 20;

/// The smallest chunk that scratch shrinks to by itself: smaller ones save little.
const LEAST_CHUNK_LEN: usize = 128;

/// A context that is worth smaller chunks, where the model has that much.
const PLENTY: usize = 8192;

/// All that a run takes but the length of its context, in bytes.
#[derive(Debug, Clone)]
pub struct Needs {
    /// Tokens of a prompt that are read at once.
    pub chunk_len: usize,
    /// On the device.
    pub weights: usize,
    pub tables_in: TablesIn,
    pub scratch: usize,
    /// Of the KV cache, what does not grow with the context: layers with sliding windows, and near tokens where far ones are
    /// compressed.
    pub kv_rings: usize,
    pub kv_per_token: usize,
}

/// What a run takes.
pub struct Choice {
    pub needs: Needs,
    pub context_len: usize,
}

/// A model or a context for which the GPU has no room.
#[derive(Debug, Clone)]
pub struct DoesNotFit {
    pub needs: Needs,
    /// Tokens that were asked for, or 1.
    pub context_len: usize,
    pub free: usize,
    /// The longest context that fits with these chunks, 0 for none.
    pub longest: usize,
    /// A way to keep tokens that are far behind with which it would fit.
    pub tiles: Option<Tiles>,
    /// What can be done about it, where a caller knows: the last line of the message.
    pub advice: Option<String>,
}

/// Chooses the chunk and the context of a run: those asked for, or the largest that fit. Before a context is refused or
/// becomes shorter than [`PLENTY`], tables of which a token reads one row go to the host's memory, and scratch gives way,
/// down to chunks of [`LEAST_CHUNK_LEN`].
///
/// # Errors
/// [`DoesNotFit`], and a model that the kernels cannot run.
pub fn choose(
    device: &Device,
    decoder: &Decoder,
    options: &Options,
    free: usize,
) -> Result<Choice> {
    let trained = decoder.context_length;
    let weights = DeviceWeights::bytes(decoder)?;
    let fit = |options: &Options| -> Result<_> {
        let needs = needs(device, decoder, options, weights)?;
        let all: Vec<Needs> = needs.iter().map(|(needs, _)| needs.clone()).collect();
        let (index, context_len) = fit(&all, options.context_len, trained, free)?;
        Ok((
            needs.into_iter().nth(index).expect("one of them"),
            context_len,
        ))
    };
    let bits = |tiles: Tiles| tiles.key_bits + tiles.value_bits;
    let smaller = |tiles: &Tiles| {
        options
            .kv
            .tiles
            .is_none_or(|kept| bits(*tiles) < bits(kept))
    };
    let fits = |tiles: &Tiles| {
        let kv = KvOptions {
            tiles: Some(*tiles),
            ..options.kv
        };
        fit(&Options {
            kv,
            ..options.clone()
        })
        .is_ok()
    };
    let ((needs, parts), context_len) = fit(options).map_err(|mut error| {
        if let Some(does_not_fit) = error.downcast_mut::<DoesNotFit>() {
            let mut tiles = Tiles::ALL.into_iter().filter(smaller);
            does_not_fit.tiles = tiles.find(fits);
        }
        error
    })?;
    for Part { name, bytes } in &parts {
        tracing::debug!("{name}: {bytes} bytes");
    }
    let (_, tables) = weights;
    if tables > 0 {
        let place = match needs.tables_in {
            TablesIn::Device => "on the device",
            TablesIn::Host => "in the host's memory",
        };
        tracing::debug!("tables of which a token reads one row: {tables} bytes, {place}");
    }
    KvLayout::log_size(context_len, needs.kv_per_token, needs.kv_rings);
    Ok(Choice { needs, context_len })
}

/// What a run would take with each chunk and each place of tables, what is best first, and of which parts its scratch is.
/// `weights` and `tables` are [`DeviceWeights::bytes`].
fn needs(
    device: &Device,
    decoder: &Decoder,
    options: &Options,
    (weights, tables): (usize, usize),
) -> Result<Vec<(Needs, Vec<Part>)>> {
    let most = options.context_len.unwrap_or(decoder.context_length).max(1);
    let mut needs = Vec::new();
    for chunk_len in chunk_lens(options.chunk_len, most) {
        let mut parts = decode_parts(device, decoder);
        if options.step_kernel.disabled(device, decoder).is_none() {
            parts.extend(step_parts(device, decoder));
        }
        parts.extend(prompt_parts(device, decoder, Chunk { tokens: chunk_len })?);
        let layout = kv_cache::layout(decoder, usize::MAX, chunk_len, options.kv);
        let (eviction, eviction_per_token) = eviction::bytes(decoder, &layout);
        let on_device = Needs {
            chunk_len,
            weights,
            tables_in: TablesIn::Device,
            scratch: parts.iter().map(|part| part.bytes).sum(),
            kv_rings: layout.ring_bytes() + kv_cache::chunk_bytes(&layout, chunk_len) + eviction,
            kv_per_token: layout.bytes_per_token() + eviction_per_token,
        };
        let on_host = Needs {
            weights: weights - tables,
            tables_in: TablesIn::Host,
            ..on_device.clone()
        };
        needs.push((on_device, parts.clone()));
        if tables > 0 {
            needs.push((on_host, parts));
        }
    }
    Ok(needs)
}

/// The chunks to try, the largest first.
fn chunk_lens(asked: Option<usize>, most: usize) -> Vec<usize> {
    if let Some(asked) = asked {
        return vec![asked.clamp(1, most)];
    }
    let halves = std::iter::successors(Some(DEFAULT_CHUNK_LEN), |len| Some(len / 2));
    let mut lens: Vec<usize> = halves
        .take_while(|&len| len >= LEAST_CHUNK_LEN)
        .map(|len| len.min(most))
        .collect();
    lens.dedup();
    lens
}

/// Which of `needs` (what is best first) to take, and the context.
fn fit(
    needs: &[Needs],
    asked: Option<usize>,
    trained: usize,
    free: usize,
) -> Result<(usize, usize), DoesNotFit> {
    let wanted = asked.unwrap_or(trained.min(PLENTY));
    let enough = |needs: &Needs| needs.longest(free) >= wanted.max(1);
    let index = needs.iter().position(enough).unwrap_or(needs.len() - 1);
    let longest = needs[index].longest(free);
    let context_len = asked.unwrap_or(trained.min(longest));
    match (1..=longest).contains(&context_len) {
        true => Ok((index, context_len)),
        false => Err(DoesNotFit {
            needs: needs[index].clone(),
            context_len: context_len.max(1),
            free,
            longest,
            tiles: None,
            advice: None,
        }),
    }
}

impl Needs {
    /// Of the KV cache, for a context of `context_len` tokens.
    pub fn kv_bytes(&self, context_len: usize) -> usize {
        // A context that nobody has memory for must not become a small number.
        let grown = context_len.saturating_mul(self.kv_per_token);
        grown.saturating_add(self.kv_rings)
    }

    /// The longest context that fits into `free` bytes.
    fn longest(&self, free: usize) -> usize {
        let fixed = [self.weights, self.scratch, self.kv_rings, RESERVE];
        let fixed = fixed.into_iter().fold(0, usize::saturating_add);
        // Where every layer has a sliding window, a longer context takes no more.
        free.saturating_sub(fixed) / self.kv_per_token.max(1)
    }
}

impl fmt::Display for DoesNotFit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            needs,
            context_len,
            free,
            ..
        } = self;
        // A context that nobody has memory for must not become a small number.
        let cache = context_len.saturating_mul(needs.kv_per_token);
        let rings = match needs.kv_rings {
            0 => String::new(),
            rings => format!(", and {} whatever the context", Megabytes(rings)),
        };
        write!(
            f,
            "a context of {context_len} tokens does not fit on the GPU\n  \
             weights   {:>12}\n  \
             KV cache  {:>12}, {} bytes a token{rings}\n  \
             scratch   {:>12}, most of it to read {} tokens of a prompt at once\n  \
             free      {:>12}, of which the driver keeps {}",
            Megabytes(needs.weights).to_string(),
            Megabytes(cache).to_string(),
            needs.kv_per_token,
            Megabytes(needs.scratch).to_string(),
            needs.chunk_len,
            Megabytes(*free).to_string(),
            Megabytes(RESERVE)
        )?;
        match &self.advice {
            Some(advice) => write!(f, "\n{advice}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for DoesNotFit {}

/// Bytes in a message.
struct Megabytes(usize);

impl fmt::Display for Megabytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.1} MB", self.0 as f64 / 1e6)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: usize = 1 << 30;

    /// A model of 4 GiB with a cache of 128 KiB a token and scratch of 256 KiB for each token of a chunk.
    fn needs(chunk_lens: &[usize]) -> Vec<Needs> {
        let needs = |&chunk_len: &usize| Needs {
            chunk_len,
            weights: 4 * GIB,
            tables_in: TablesIn::Device,
            scratch: chunk_len << 18,
            kv_rings: 0,
            kv_per_token: 1 << 17,
        };
        chunk_lens.iter().map(needs).collect()
    }

    #[test]
    fn scratch_gives_way_before_the_context_does() {
        let needs = needs(&chunk_lens(None, 40_960));
        let lens: Vec<usize> = needs.iter().map(|needs| needs.chunk_len).collect();
        assert_eq!(lens, [2048, 1024, 512, 256, 128]);
        let fit = |asked, free| fit(&needs, asked, 40_960, free).unwrap();
        assert_eq!(fit(None, 80 * GIB), (0, 40_960));
        // What is left beside the largest chunk holds a long context: it is cut, the chunk is not.
        assert_eq!(fit(None, 6 * GIB), (0, 10_240));
        // 1.2 GiB are left for both.
        let (index, context_len) = fit(None, 4 * GIB + RESERVE + GIB * 6 / 5);
        assert_eq!(needs[index].chunk_len, 512);
        assert!(context_len >= PLENTY, "{context_len}");
        // Never enough for plenty: the smallest chunk leaves most.
        let (index, context_len) = fit(None, 4 * GIB + RESERVE + GIB / 10);
        assert_eq!((needs[index].chunk_len, context_len), (128, 563));
        // A context that was asked for takes as much of the scratch as it must.
        assert_eq!(fit(Some(100), 4 * GIB + RESERVE + GIB / 10), (3, 100));
    }

    #[test]
    fn what_does_not_fit_is_told_with_what_would() {
        let all = needs(&chunk_lens(None, 40_960));
        let error = fit(&all, Some(9000), 40_960, 5 * GIB).unwrap_err();
        assert_eq!((error.needs.chunk_len, error.longest), (128, 5888));
        let message = error.to_string();
        let lines: Vec<&str> = message.lines().collect();
        assert_eq!(lines.len(), 5, "{message}");
        for (line, part) in
            lines
                .iter()
                .zip(["9000 tokens", "weights", "KV cache", "scratch", "free"])
        {
            assert!(line.contains(part), "{line:?}");
        }
        assert_eq!(fit(&all, None, 40_960, GIB).unwrap_err().longest, 0);
        let endless = fit(&all, Some(usize::MAX), 40_960, 5 * GIB).unwrap_err();
        assert!(
            endless.to_string().contains("18446744073709.6 MB"),
            "{endless}"
        );
        // Chunks that were asked for stay.
        let asked = needs(&chunk_lens(Some(2048), 40_960));
        assert_eq!(asked.len(), 1);
        assert_eq!(
            fit(&asked, Some(5000), 40_960, 5 * GIB)
                .unwrap_err()
                .longest,
            2048
        );
    }
}
