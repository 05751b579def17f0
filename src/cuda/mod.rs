//! The CUDA backend: Q8_1 activations on the file's own quantized weights, a float16 KV cache, and a decode step that is
//! captured into a CUDA graph and replayed.
//!
//! `device` is the only folder that talks to the driver about memory, launches and graphs; `decode.rs` lists the launches of a
//! token and `prefill.rs` those of a chunk of a prompt, `launches` knows their grids by operation, `params.rs` what crosses
//! to a kernel, `tensor_types.rs` what a tensor type needs, and `kernels/*.cu` computes.

mod ceiling;
mod decode;
pub mod device;
pub mod launches;
pub mod params;
mod prefill;
mod scratch;
pub mod tensor_types;
mod upload;
mod weights;

use std::{sync::Arc, time::Instant};

use anyhow::{Context, Result, ensure};
use half::f16;

use self::{
    device::{Graph, Launch, PinnedBuffer},
    launches::Chunk,
    prefill::{Logits, Prefill},
    scratch::{ChunkScratch, KvCache, LOGITS_LEN, Scratch, Sizing},
    weights::DeviceWeights,
};
use crate::{
    engine::{Backend, GraphReport},
    model::Model,
};

pub use ceiling::{gemm_ceiling, read_ceiling};
pub use device::{ARCHS, Device, DeviceInfo, Gpus, list};
pub use tensor_types::UNIT;
pub use weights::Matrix;

/// Tokens of a prompt that are read at once, where nothing else is asked for: more gain little on Qwen3-8B
/// (docs/performance.md).
pub const DEFAULT_CHUNK_LEN: usize = 2048;

/// How to run a model on a GPU.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Tokens of the KV cache; `None`: the model's own length, or what fits.
    pub context_len: Option<usize>,
    /// Tokens of a prompt that are read at once; `None`: [`DEFAULT_CHUNK_LEN`]. No more than the context are used.
    pub chunk_len: Option<usize>,
    /// Why decoding must not be captured into a graph, if so; `None`: it is.
    pub graph_disabled: Option<String>,
}

/// Computes logits on a GPU.
pub struct CudaBackend {
    device: Arc<Device>,
    model: Arc<Model>,
    /// The launches of one token. Before the memory that they name, so that it is dropped first.
    region: Vec<Launch>,
    graph: GraphState,
    report: GraphReport,
    weights: DeviceWeights,
    scratch: Scratch,
    chunk_scratch: ChunkScratch,
    /// Tokens that `chunk_scratch` has room for.
    chunk_len: usize,
    cache: KvCache,
    /// i32 (2 + chunk_len): token, position; the chunk's tokens
    inputs: PinnedBuffer,
    /// f32 (vocab_size, LOGITS_LEN)
    logits: PinnedBuffer,
}

/// Whether there is a graph of the decode region, or why not.
enum GraphState {
    /// Nothing has run yet: the first token is launched directly, which loads every kernel.
    Cold,
    /// The next token captures.
    Warm,
    Ready(Graph),
    /// Direct launches for good.
    Ineligible,
}

impl CudaBackend {
    /// Sizes everything, takes it, and uploads the weights. `progress` hears the bytes uploaded and their total.
    ///
    /// # Errors
    /// A model that does not fit, or that the kernels cannot run, and whatever the driver meets.
    pub fn new(
        device: Arc<Device>,
        model: Arc<Model>,
        options: &Options,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Self> {
        let config = &model.config;
        let (free, _) = device.memory()?;
        let weights_bytes = DeviceWeights::bytes(&model)?;
        let most = options.context_len.unwrap_or(config.context_length);
        let chunk = Chunk {
            tokens: options
                .chunk_len
                .unwrap_or(DEFAULT_CHUNK_LEN)
                .clamp(1, most),
        };
        let sizing = Sizing::new(&device, &model, weights_bytes, chunk)?;
        let context_len =
            sizing.choose_context(options.context_len, config.context_length, free)?;
        for part in sizing.parts(context_len) {
            tracing::debug!("{}: {} bytes", part.name, part.bytes);
        }

        let start = Instant::now();
        let weights = DeviceWeights::upload(&device, &model, progress)
            .with_context(|| format!("uploading {} to {}", model.gguf.name(), device.name()))?;
        tracing::debug!(
            "weights: {} bytes on the device, uploaded in {:.0?}",
            weights.device_bytes(),
            start.elapsed()
        );
        let scratch = Scratch::new(&device, config)?;
        let cache = KvCache::new(&device, config, context_len)?;
        let region = decode::region(&device, config, &weights, &scratch, &cache)?;
        let chunk_scratch = ChunkScratch::new(&device, &model, chunk)?;
        let inputs = device.allocate_pinned((2 + chunk.tokens) * size_of::<i32>())?;
        let logits = device.allocate_pinned(LOGITS_LEN * config.vocab_size * size_of::<f32>())?;
        let mut backend = Self {
            device,
            region,
            graph: GraphState::Cold,
            report: GraphReport::default(),
            weights,
            scratch,
            chunk_scratch,
            chunk_len: chunk.tokens,
            cache,
            inputs,
            logits,
            model,
        };
        backend.set_graph(options.graph_disabled.clone());
        Ok(backend)
    }

    /// The device, and with it what it has counted.
    pub fn device_handle(&self) -> &Arc<Device> {
        &self.device
    }

    /// The KV cache: for each layer keys, then values, each (head_dim, context_len, head_count_kv), head_dim contiguous.
    pub fn download_cache(&self) -> Result<Vec<f16>> {
        self.cache.download()
    }

    /// The launches of a decoded token, in order.
    pub fn decode_launches(&self) -> &[Launch] {
        &self.region
    }

    /// Bytes that the weights take on the device.
    pub fn weights_bytes(&self) -> usize {
        self.weights.device_bytes()
    }

    /// Queues the computation of `token` at `position`.
    fn step(&mut self, token: u32, position: usize) -> Result<()> {
        self.set_inputs(token, position)?;
        if let GraphState::Warm = self.graph {
            self.capture();
        }
        match &self.graph {
            GraphState::Ready(graph) => {
                graph.launch()?;
                self.report.replays += 1;
            }
            state => {
                let first = matches!(state, GraphState::Cold);
                self.launch_region()?;
                self.report.direct_tokens += 1;
                if first {
                    tracing::debug!("warmed up: {} kernels launched directly", self.region.len());
                    self.graph = GraphState::Warm;
                }
            }
        }
        Ok(())
    }

    /// Makes a graph of the region. Where that fails, the run goes on without.
    fn capture(&mut self) {
        // SAFETY: the graph is dropped before the memory that the region names.
        let captured = unsafe { Graph::capture(&self.device, || self.launch_region()) };
        self.graph = match captured {
            Ok(graph) => {
                tracing::debug!(
                    "captured {} nodes in {:.1?}",
                    graph.nodes(),
                    graph.capture_time()
                );
                self.report.captures += 1;
                self.report.nodes = graph.nodes();
                GraphState::Ready(graph)
            }
            Err(error) => {
                tracing::warn!(
                    "the CUDA graph could not be captured, going on with direct launches: {error:#}"
                );
                self.report.enabled = false;
                self.report.disabled_reason = Some(format!("{error:#}"));
                GraphState::Ineligible
            }
        };
    }

    fn launch_region(&self) -> Result<()> {
        for launch in &self.region {
            // SAFETY: `decode::region` gave each kernel its own parameter, and the buffers live as long as `self`.
            unsafe { self.device.launch(launch)? };
        }
        Ok(())
    }

    /// Queues the reading of a chunk of a prompt.
    fn read_chunk(&mut self, tokens: &[u32], position: usize, logits: Logits) -> Result<()> {
        let bytes = bytemuck::cast_slice::<u32, u8>(tokens);
        let head = 2 * size_of::<i32>();
        self.inputs[head..][..bytes.len()].copy_from_slice(bytes);
        self.set_inputs(tokens[0], position)?;
        let source = &self.inputs[head..][..bytes.len()];
        // SAFETY: `compute` waits for the stream before the inputs are written again.
        unsafe { self.chunk_scratch.memory().upload_later(0, source)? };
        let prefill = Prefill {
            device: &self.device,
            config: &self.model.config,
            weights: &self.weights,
            decode: &self.scratch,
            scratch: &self.chunk_scratch,
            cache: &self.cache,
        };
        let chunk = Chunk {
            tokens: tokens.len(),
        };
        prefill.run(chunk, position + tokens.len(), logits, &mut |launch| {
            // SAFETY: each kernel is given its own parameter, and the buffers live as long as `self`.
            unsafe { self.device.launch(&launch) }
        })
    }

    /// Queues the upload of a token's id and position.
    fn set_inputs(&mut self, token: u32, position: usize) -> Result<()> {
        let input = &mut self.inputs[..2 * size_of::<i32>()];
        input.copy_from_slice(bytemuck::bytes_of(&[token, position as u32]));
        // SAFETY: `compute` waits for the stream before the inputs are written again.
        unsafe { self.scratch.memory().upload_later(0, input) }
    }

    /// Queues with `queue` the computation of `tokens` at `position`; waits, and returns the logits that it leaves, `rows` times
    /// those of a token.
    fn compute(
        &mut self,
        tokens: &[u32],
        position: usize,
        rows: usize,
        queue: impl FnOnce(&mut Self) -> Result<()>,
    ) -> Result<&[f32]> {
        let vocab_size = self.model.config.vocab_size;
        ensure!(
            (1..=self.chunk_len).contains(&tokens.len())
                && position + tokens.len() <= self.cache.context_len
                && tokens.iter().all(|&token| (token as usize) < vocab_size),
            "{} tokens from position {position} on do not fit a context of {} or a vocabulary of {vocab_size}",
            tokens.len(),
            self.cache.context_len
        );
        let doing = format!("computing position {position} on {}", self.device.name());
        let bytes = rows * vocab_size * size_of::<f32>();
        let queued = queue(self).and_then(|()| {
            let offset = (self.scratch.logits - self.scratch.inputs) as usize;
            let target = &mut self.logits[..bytes];
            // SAFETY: nothing touches the buffer before the wait that follows.
            unsafe { self.scratch.memory().download_later(offset, target) }
        });
        // Where queueing failed as well: what was queued before reads the inputs.
        let waited = self.device.synchronize();
        queued.and(waited).context(doing)?;
        Ok(bytemuck::cast_slice(&self.logits[..bytes]))
    }
}

impl Backend for CudaBackend {
    fn name(&self) -> &'static str {
        "cuda"
    }

    fn device(&self) -> &str {
        self.device.name()
    }

    fn context_len(&self) -> usize {
        self.cache.context_len
    }

    fn chunk_len(&self) -> usize {
        self.chunk_len
    }

    fn logits_len(&self) -> usize {
        LOGITS_LEN.min(self.chunk_len)
    }

    fn forward(&mut self, tokens: &[u32], position: usize) -> Result<&[f32]> {
        self.compute(tokens, position, 1, |cuda| {
            cuda.read_chunk(tokens, position, Logits::Last)
        })
    }

    fn forward_all(&mut self, tokens: &[u32], position: usize) -> Result<&[f32]> {
        ensure!(
            tokens.len() <= LOGITS_LEN,
            "logits of {} tokens were asked for at once, and there is room for {LOGITS_LEN}",
            tokens.len()
        );
        self.compute(tokens, position, tokens.len(), |cuda| {
            cuda.read_chunk(tokens, position, Logits::All)
        })
    }

    fn decode(&mut self, token: u32, position: usize) -> Result<&[f32]> {
        self.compute(&[token], position, 1, |cuda| cuda.step(token, position))
    }

    fn bytes_per_token(&self, position: usize) -> u64 {
        self.model.weights.bytes_per_token() + (position * self.cache.bytes_per_token) as u64
    }

    fn set_graph(&mut self, ineligible: Option<String>) {
        if let Some(reason) = &ineligible {
            tracing::debug!("no CUDA graph: {reason}");
        }
        self.graph = match ineligible {
            Some(_) => GraphState::Ineligible,
            None => GraphState::Cold,
        };
        self.report = GraphReport {
            enabled: ineligible.is_none(),
            disabled_reason: ineligible,
            ..GraphReport::default()
        };
    }

    fn graph_report(&self) -> Option<&GraphReport> {
        Some(&self.report)
    }
}
