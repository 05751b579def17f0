//! The CUDA backend: Q8_1 activations on the file's own quantized weights, a float16 KV cache, and a decode step that is
//! captured into a CUDA graph and replayed.
//!
//! [`device`] is the only file that talks to the driver about memory and launches, [`graph`] the only one that captures;
//! [`decode`] lists the launches of a token, [`kernels`] knows their grids, and `kernels/*.cu` computes.

mod ceiling;
mod decode;
mod device;
mod graph;
mod kernels;
mod scratch;
mod upload;
mod weights;

use std::{sync::Arc, time::Instant};

use anyhow::{Context, Result, ensure};

use self::{
    device::{Launch, PinnedBuffer},
    graph::Graph,
    scratch::{KvCache, Scratch, Sizing},
    weights::DeviceWeights,
};
use crate::{
    engine::{Backend, GraphReport},
    model::Model,
};

pub use ceiling::read_ceiling;
pub use device::{ARCHS, Device, DeviceInfo, list};

/// Tokens of a prompt between two chances to stop.
const CHUNK_LEN: usize = 32;

/// How to run a model on a GPU.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Tokens of the KV cache; `None`: the model's own length, or what fits.
    pub context_len: Option<usize>,
    /// Always launch kernels one by one.
    pub no_graph: bool,
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
    cache: KvCache,
    /// i32 (2, CHUNK_LEN): token and position of every step that may be under way
    inputs: PinnedBuffer,
    /// f32 (vocab_size, CHUNK_LEN)
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

/// Why the decode region must not be captured: the one place that decides it. KV formats and evictions whose launches
/// change from token to token will ask here as well.
fn graph_ineligible(options: &Options) -> Option<String> {
    if options.no_graph {
        return Some("--no-cuda-graph".to_owned());
    }
    if std::env::var_os("SHARPI_CUDA_GRAPH").is_some_and(|value| value == "0") {
        return Some("SHARPI_CUDA_GRAPH=0".to_owned());
    }
    None
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
        let sizing = Sizing::new(&device, config, DeviceWeights::bytes(&model)?);
        let (free, _) = device.memory()?;
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
        let inputs = device.allocate_pinned(CHUNK_LEN * 2 * size_of::<i32>())?;
        let logits = device.allocate_pinned(CHUNK_LEN * config.vocab_size * size_of::<f32>())?;
        let mut backend = Self {
            device,
            region,
            graph: GraphState::Cold,
            report: GraphReport::default(),
            weights,
            scratch,
            cache,
            inputs,
            logits,
            model,
        };
        backend.set_graph(graph_ineligible(options));
        Ok(backend)
    }

    /// The device, and with it what it has counted.
    pub fn device_handle(&self) -> &Arc<Device> {
        &self.device
    }

    /// Bytes that the weights take on the device.
    pub fn weights_bytes(&self) -> usize {
        self.weights.device_bytes()
    }

    /// Queues the computation of `token` at `position`. `slot` tells apart the steps that are under way.
    fn step(&mut self, token: u32, position: usize, slot: usize) -> Result<()> {
        let bytes = 2 * size_of::<i32>();
        let input = &mut self.inputs[slot * bytes..][..bytes];
        input.copy_from_slice(bytemuck::bytes_of(&[token, position as u32]));
        self.scratch.memory().upload(0, input)?;
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
            // SAFETY: `decode::region` gave each kernel its own arguments, and the buffers live as long as `self`.
            unsafe { self.device.launch(launch)? };
        }
        Ok(())
    }

    /// Queues a copy of the logits to row `slot` of the host's buffer.
    fn fetch_logits(&mut self, slot: usize) -> Result<()> {
        let bytes = self.model.config.vocab_size * size_of::<f32>();
        let offset = (self.scratch.logits - self.scratch.inputs) as usize;
        let row = &mut self.logits[slot * bytes..][..bytes];
        // SAFETY: every caller waits for the stream before the buffer is read or written again.
        unsafe { self.scratch.memory().download_later(offset, row) }
    }

    fn compute(&mut self, tokens: &[u32], position: usize, all: bool) -> Result<&[f32]> {
        let vocab_size = self.model.config.vocab_size;
        ensure!(
            (1..=CHUNK_LEN).contains(&tokens.len())
                && position + tokens.len() <= self.cache.context_len
                && tokens.iter().all(|&token| (token as usize) < vocab_size),
            "{} tokens from position {position} on do not fit a context of {} or a vocabulary of {vocab_size}",
            tokens.len(),
            self.cache.context_len
        );
        let doing = format!("computing position {position} on {}", self.device.name());
        let rows = if all { tokens.len() } else { 1 };
        let mut run = || {
            for (i, &token) in tokens.iter().enumerate() {
                self.step(token, position + i, i)?;
                if all {
                    self.fetch_logits(i)?;
                }
            }
            if !all {
                self.fetch_logits(0)?;
            }
            self.device.synchronize()
        };
        run().context(doing)?;
        Ok(&bytemuck::cast_slice(&self.logits)[..rows * vocab_size])
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
        CHUNK_LEN
    }

    fn forward(&mut self, tokens: &[u32], position: usize) -> Result<&[f32]> {
        self.compute(tokens, position, false)
    }

    fn forward_all(&mut self, tokens: &[u32], position: usize) -> Result<&[f32]> {
        self.compute(tokens, position, true)
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
