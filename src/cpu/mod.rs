//! The CPU backend: activations of 8 bits, or float32 ones on exactly dequantized weights.
//!
//! `forward.rs` reads from token ids to logits; what it calls is in files of their own. The same bits come out for
//! every number of threads, every instruction set and every way of cutting a prompt into chunks.

mod attention;
mod cores;
mod elementwise;
mod eviction;
mod forward;
mod integer;
mod kv_cache;
mod matmul;
mod processor;
mod products;
mod rope;
mod simd;
mod tiles;
mod workers;

pub use processor::describe_all as describe_processor;

use std::{ops::ControlFlow, sync::Arc};

use anyhow::{Context, Result};
use rayon::prelude::*;

use self::{
    attention::AttentionScratch,
    eviction::Eviction,
    forward::{Activations, forward, longest_row},
    integer::Detected,
    kv_cache::KvCache,
    matmul::MatmulScratch,
};
use crate::{
    backend::{
        Backend, Batch, KvFormat, KvLayout, KvOptions, KvPart, Limits, NEWEST, Results, Watch,
        Written,
    },
    model::Decoder,
};

/// Tokens that share one reading of the weights.
pub const CHUNK_LEN: usize = 128;

/// A worker's own memory.
struct Scratch {
    matmul: MatmulScratch,
    attention: AttentionScratch,
}

type Workers = workers::Workers<Scratch>;

/// How products with quantized weights are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arithmetic {
    /// Weights are dequantized, and multiplied in float32.
    Exact,
    /// Activations are quantized to 8 bits, and multiplied in integers.
    EightBits,
}

/// How to compute.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Workers; 0: as many as are sensible, which is one for each core.
    pub threads: usize,
    pub kv: KvOptions,
    pub arithmetic: Arithmetic,
}

impl Options {
    /// The reference.
    pub fn exact(threads: usize) -> Self {
        Self {
            threads,
            kv: KvOptions::default(),
            arithmetic: Arithmetic::Exact,
        }
    }
}

/// Computes logits on the host.
pub struct CpuBackend {
    decoder: Arc<Decoder>,
    context_len: usize,
    workers: Workers,
    cache: KvCache,
    /// Where the cache has a budget.
    eviction: Option<Eviction>,
    activations: Activations,
    device: String,
}

impl CpuBackend {
    /// With [`Options::exact`].
    ///
    /// # Errors
    ///
    /// As [`with_options`](Self::with_options).
    pub fn new(decoder: Arc<Decoder>, context_len: usize, threads: usize) -> Result<Self> {
        Self::with_options(decoder, context_len, Options::exact(threads))
    }

    /// Allocates the KV cache for `context_len` tokens and all scratch, and starts the workers.
    ///
    /// # Errors
    ///
    /// Where there is no memory for the context or the threads cannot be started.
    pub fn with_options(
        decoder: Arc<Decoder>,
        context_len: usize,
        options: Options,
    ) -> Result<Self> {
        let Options {
            threads,
            kv,
            arithmetic,
        } = options;
        let layout = KvLayout::new(
            &decoder,
            context_len,
            CHUNK_LEN,
            KvFormat::F32,
            kv,
            CHUNK_LEN,
        );
        let bytes_per_token = layout.bytes_per_token();
        KvLayout::log_size(context_len, bytes_per_token, layout.ring_bytes());
        let no_memory = || {
            format!(
                "cannot allocate the KV cache for a context of {context_len} tokens ({bytes_per_token} bytes a token)"
            )
        };
        let cache = KvCache::new(layout, context_len).with_context(no_memory)?;
        let eviction = kv
            .budget
            .map(|_| Eviction::new(&decoder, cache.layout(), context_len).with_context(no_memory))
            .transpose()?;
        let activations =
            Activations::new(&decoder, CHUNK_LEN, arithmetic).with_context(no_memory)?;
        let longest_row = match arithmetic {
            Arithmetic::Exact => 0,
            Arithmetic::EightBits => longest_row(&decoder),
        };
        let widest = decoder.layers.iter().map(|layer| layer.attention.head_dim);
        let widest = widest.max().unwrap_or(0);
        let workers = Workers::new(threads, || {
            Ok(Scratch {
                matmul: MatmulScratch::new(CHUNK_LEN, longest_row),
                attention: AttentionScratch::new(widest, context_len).with_context(no_memory)?,
            })
        })?;
        if activations.are_in_8_bits() {
            let instructions = Detected::best().name();
            tracing::debug!("quantized weights are multiplied in 8 bits: {instructions}");
        }
        let device = processor::describe(workers.threads());
        Ok(Self {
            context_len,
            workers,
            cache,
            eviction,
            activations,
            device,
            decoder,
        })
    }
}

impl Backend for CpuBackend {
    fn name(&self) -> &'static str {
        "cpu"
    }

    fn device(&self) -> &str {
        &self.device
    }

    fn limits(&self) -> Limits {
        Limits {
            context_len: self.context_len,
            chunk_len: CHUNK_LEN,
            results_len: CHUNK_LEN,
            last_len: self.eviction.as_ref().map_or(1, |_| NEWEST),
            vocab_size: self.decoder.vocab_size,
        }
    }

    fn arithmetic(&self) -> String {
        let numbers = if self.activations.are_in_8_bits() {
            "8 bits"
        } else {
            "float32"
        };
        format!("{} in {numbers}", self.name())
    }

    fn remembers(&self, position: usize) -> bool {
        self.cache
            .layout()
            .remembers(position, self.cache.written())
    }

    fn compute(&mut self, batch: Batch) -> Result<Results<'_>> {
        let results = self.compute_watched(batch, &mut |_| ControlFlow::Continue(()))?;
        Ok(results.expect("nobody broke it off"))
    }

    fn compute_watched(&mut self, batch: Batch, watch: Watch) -> Result<Option<Results<'_>>> {
        batch.check(self.limits(), self.remembers(batch.position))?;
        let logits = forward(
            &self.decoder,
            &self.workers,
            &mut self.cache,
            self.eviction.as_mut(),
            &mut self.activations,
            &batch,
            watch,
        );
        Ok(logits.map(|logits| Results { logits }))
    }

    fn kv_layout(&self) -> &KvLayout {
        self.cache.layout()
    }

    fn written(&self) -> Written {
        self.cache.written()
    }

    fn export_kv(
        &mut self,
        part: KvPart,
        written: Written,
        take: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let pieces = self.cache.memory(part, written);
        pieces.into_iter().try_for_each(|piece| take(piece))
    }

    fn import_kv(&mut self, written: Written, state: &[u8]) -> Result<()> {
        let pieces = |cache: &mut KvCache, part| -> usize {
            let pieces = cache.memory(part, written);
            pieces.iter().map(|piece| piece.len()).sum()
        };
        let [rings, rest] = [KvPart::Rings, KvPart::Rest].map(|part| pieces(&mut self.cache, part));
        self.kv_layout().check_state(state.len(), rings + rest)?;
        let mut state = state;
        for part in [KvPart::Rings, KvPart::Rest] {
            let pieces = self.cache.memory(part, written).into_iter();
            let copies: Vec<_> = pieces
                .map(|piece| {
                    let source = state.split_off(..piece.len());
                    (piece, source.expect("as many bytes as all pieces have"))
                })
                .collect();
            let copies = copies.into_par_iter();
            copies.for_each(|(piece, source)| piece.copy_from_slice(source));
        }
        self.cache.set_written(written);
        Ok(())
    }

    fn bytes_per_token(&self, position: usize) -> u64 {
        self.decoder.bytes_per_token() + {
            let cache = &self.cache;
            cache.layout().bytes_read(position, cache.written())
        }
    }
}
