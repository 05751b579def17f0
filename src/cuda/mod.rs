//! The CUDA backend: Q8_1 activations on the file's own quantized weights, a float16 KV cache, and a decode step that is
//! captured into a CUDA graph and replayed.
//!
//! `device` is the only folder that talks to the driver about memory, launches and graphs. `lowering.rs` groups a decoder's
//! operations as kernels do them; `decode.rs` makes of the groups the launches of a token and `step.rs` the one that does the
//! same, of which `region.rs` captures and replays one or the other; `prompt.rs` makes those of a chunk of a prompt. `launches` knows
//! their grids by operation, `params.rs` what crosses to a kernel, `tensor_types.rs` what a tensor type needs, and `kernels/*.cu`
//! computes. `sizing.rs` adds up what `weights.rs`, `scratch.rs` and `kv_cache.rs` take.

mod ceiling;
mod choice;
mod decode;
pub mod device;
mod eviction;
mod kv_cache;
pub mod launches;
mod lowering;
pub mod params;
mod prompt;
mod region;
mod scratch;
mod sizing;
mod step;
pub mod tensor_types;
mod transfer;
mod upload;
mod weights;

use std::{sync::Arc, time::Instant};

use anyhow::{Context, Result, ensure};
use half::f16;

use self::{
    choice::{Choice, Stream},
    device::{Launch, PinnedBuffer},
    eviction::Eviction,
    kv_cache::KvCache,
    launches::Chunk,
    lowering::token_groups,
    prompt::Prompt,
    region::Region,
    scratch::{ChunkScratch, INPUTS, LOGITS_LEN, Scratch},
    step::Step,
    weights::DeviceWeights,
};
use crate::{
    backend::{
        Backend, Batch, GraphReport, KvLayout, KvOptions, KvPart, Limits, NEWEST, Phase, Results,
        SamplingParams, StepReport, StreamStart, TokenStream, Written,
    },
    model::Decoder,
};

pub use ceiling::{gemm_ceiling, read_ceiling};
pub use device::{ARCHS, Device, DeviceInfo, Gpus, list};
pub use sizing::{DoesNotFit, Needs};
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
    /// Tokens of a prompt that are read at once; `None`: [`DEFAULT_CHUNK_LEN`], or fewer where memory is short. No more than
    /// the context are used.
    pub chunk_len: Option<usize>,
    /// Why decoding must not be captured into a graph, if so; `None`: it is.
    pub graph_disabled: Option<String>,
    pub step_kernel: StepKernel,
    pub kv: KvOptions,
}

/// When the step kernel computes tokens, where it can.
#[derive(Debug, Clone, Default, PartialEq)]
pub enum StepKernel {
    #[default]
    WhereFaster,
    Always,
    /// For the reason given.
    Never(String),
}

impl StepKernel {
    /// Why it is not even to be made ready, if so.
    fn disabled(&self, device: &Device, decoder: &Decoder) -> Option<String> {
        match self {
            Self::WhereFaster => step::slower(device, decoder),
            Self::Always => None,
            Self::Never(reason) => Some(reason.clone()),
        }
    }
}

/// What a run would take.
pub struct Plan {
    pub needs: Needs,
    /// Tokens of the KV cache.
    pub context_len: usize,
    /// Bytes that the device has free.
    pub free: usize,
}

/// What [`CudaBackend::new`] would take now, without taking any of it.
///
/// # Errors
/// [`DoesNotFit`], and a model that the kernels cannot run, as far as its tensors and operations show it.
pub fn plan(device: &Device, decoder: &Decoder, options: &Options) -> Result<Plan> {
    token_groups(decoder)?;
    let (free, _) = device.memory()?;
    let sizing::Choice { needs, context_len } = sizing::choose(device, decoder, options, free)?;
    Ok(Plan {
        needs,
        context_len,
        free,
    })
}

/// Computes logits on a GPU.
pub struct CudaBackend {
    device: Arc<Device>,
    decoder: Arc<Decoder>,
    /// The launches of one token and of its choice. Before the memory that they name, so that it is dropped first.
    region: Region,
    weights: DeviceWeights,
    scratch: Scratch,
    chunk_scratch: ChunkScratch,
    limits: Limits,
    cache: KvCache,
    /// Where the cache has a budget.
    eviction: Option<Eviction>,
    written: Written,
    choice: Choice,
    /// i32 (INPUTS + chunk_len): what a batch is told by; a chunk's tokens
    inputs: PinnedBuffer,
    /// f32 (vocab_size, LOGITS_LEN)
    logits: PinnedBuffer,
}

impl CudaBackend {
    /// Sizes everything, takes it, and uploads the weights. `progress` hears the bytes uploaded and their total.
    ///
    /// # Errors
    /// A model that does not fit, or that the kernels cannot run, and whatever the driver meets.
    pub fn new(
        device: Arc<Device>,
        decoder: Arc<Decoder>,
        options: &Options,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Self> {
        let (free, _) = device.memory()?;
        let sizing::Choice { needs, context_len } =
            sizing::choose(&device, &decoder, options, free)?;
        let tables_in = needs.tables_in;
        let chunk = Chunk {
            tokens: needs.chunk_len,
        };

        let start = Instant::now();
        let weights = DeviceWeights::upload(&device, &decoder, tables_in, progress)
            .with_context(|| format!("uploading the weights to {}", device.name()))?;
        tracing::debug!(
            "weights: {} bytes on the device, uploaded in {:.0?}",
            weights.device_bytes(),
            start.elapsed()
        );
        let scratch = Scratch::new(&device, &decoder)?;
        let layout = kv_cache::layout(&decoder, context_len, chunk.tokens, options.kv);
        let eviction = options.kv.budget.map(|budget| {
            let budget = budget.min(context_len);
            Eviction::new(
                &device,
                &decoder,
                &layout,
                budget,
                context_len,
                chunk.tokens,
            )
        });
        let eviction = eviction.transpose()?;
        let cache = KvCache::new(&device, layout, context_len, chunk.tokens)?;
        let launches = decode::lower(&device, &decoder, &weights, &scratch, &cache)?;
        // Its stages are megabytes: nobody waits for them who will not use them.
        let step = match options.step_kernel.disabled(&device, &decoder) {
            Some(reason) => Err(reason),
            None => Step::new(&device, &decoder, &weights, &scratch, &cache)
                .map_err(|error| format!("{error:#}")),
        };
        let chunk_scratch = ChunkScratch::new(&device, &decoder, chunk)?;
        let choice = Choice::new(&device, decoder.vocab_size, context_len)?;
        let choosing = choice.launches(&scratch)?;
        let choosing_allowed = choice.launches_among_allowed(&scratch)?;
        let inputs = device.allocate_pinned((INPUTS + chunk.tokens) * size_of::<i32>())?;
        let logits = device.allocate_pinned(LOGITS_LEN * decoder.vocab_size * size_of::<f32>())?;
        // SAFETY: each kernel was given its own parameter, and the backend drops the region before the memory.
        let mut region =
            unsafe { Region::new(&device, launches, step, choosing, choosing_allowed) };
        region.set_step(None);
        region.set_graph(options.graph_disabled.clone());
        Ok(Self {
            limits: Limits {
                context_len,
                chunk_len: chunk.tokens,
                results_len: LOGITS_LEN.min(chunk.tokens),
                last_len: options.kv.budget.map_or(1, |_| NEWEST),
                vocab_size: decoder.vocab_size,
            },
            device,
            region,
            weights,
            scratch,
            chunk_scratch,
            cache,
            eviction,
            written: Written::default(),
            choice,
            inputs,
            logits,
            decoder,
        })
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
        self.region.separate_launches()
    }

    /// Bytes that the weights take on the device.
    pub fn weights_bytes(&self) -> usize {
        self.weights.device_bytes()
    }

    /// Queues a batch.
    fn queue(&mut self, batch: &Batch) -> Result<()> {
        match batch.phase {
            Phase::Decode => {
                self.upload_inputs(batch.tokens[0], batch.position, batch.position)?;
                self.region.run()
            }
            Phase::Prompt => self.queue_prompt(batch),
        }
    }

    fn queue_prompt(&mut self, batch: &Batch) -> Result<()> {
        let bytes = bytemuck::cast_slice::<u32, u8>(batch.tokens);
        let head = INPUTS * size_of::<i32>();
        self.inputs[head..][..bytes.len()].copy_from_slice(bytes);
        let wanted = batch.position + batch.wanted().start;
        self.upload_inputs(batch.tokens[0], batch.position, wanted)?;
        let source = &self.inputs[head..][..bytes.len()];
        // SAFETY: `compute` waits for the stream before the inputs are written again.
        unsafe { self.chunk_scratch.memory().upload_later(0, source)? };
        let to_keep = self
            .cache
            .layout()
            .to_keep(batch.positions().end, self.written);
        let eviction = self
            .eviction
            .as_ref()
            .zip(to_keep.filter(|_| batch.ends_prompt));
        let prompt = Prompt {
            device: &self.device,
            decoder: &self.decoder,
            weights: &self.weights,
            decode: &self.scratch,
            scratch: &self.chunk_scratch,
            cache: &self.cache,
            evicted: self.written.evicted(),
            eviction,
        };
        let chunk = Chunk {
            tokens: batch.tokens.len(),
        };
        // SAFETY: each kernel is given its own parameter, and the buffers live as long as `self`.
        let mut launch = |launch: Launch| unsafe { self.device.launch(&launch) };
        prompt.run(chunk, batch.position, batch.want, &mut launch)?;
        if let Some((eviction, count)) = eviction {
            let end = batch.positions().end;
            let places = end - self.written.evicted();
            eviction.gather(&self.cache, places, count, &mut launch)?;
            self.written.evict(end, count);
        }
        Ok(())
    }

    /// Queues the upload of a token's id and position, and of the first position whose logits are wanted.
    fn upload_inputs(&mut self, token: u32, position: usize, wanted: usize) -> Result<()> {
        let whereabouts = |position: usize| [position, position - self.written.evicted()];
        let [[position, place], [wanted, wanted_place]] = [position, wanted].map(whereabouts);
        let inputs: [u32; INPUTS] = [
            token,
            position as u32,
            place as u32,
            wanted as u32,
            wanted_place as u32,
        ];
        let input = &mut self.inputs[..INPUTS * size_of::<i32>()];
        input.copy_from_slice(bytemuck::bytes_of(&inputs));
        // SAFETY: `compute` and a stream's end wait for the device before the inputs are written again.
        unsafe { self.scratch.memory().upload_later(0, input) }
    }
}

impl Backend for CudaBackend {
    fn name(&self) -> &'static str {
        "cuda"
    }

    fn device(&self) -> &str {
        self.device.name()
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn remembers(&self, position: usize) -> bool {
        self.cache.layout().remembers(position, self.written)
    }

    fn compute(&mut self, batch: Batch) -> Result<Results<'_>> {
        batch.check(self.limits, self.remembers(batch.position))?;
        self.written.add(batch.positions());
        let bytes = batch.wanted().len() * self.limits.vocab_size * size_of::<f32>();
        let queued = self.queue(&batch).and_then(|()| {
            if bytes == 0 {
                return Ok(());
            }
            let offset = (self.scratch.logits - self.scratch.inputs) as usize;
            let target = &mut self.logits[..bytes];
            // SAFETY: nothing touches the buffer before the wait that follows.
            unsafe { self.scratch.memory().download_later(offset, target) }
        });
        // Where queueing failed as well: what was queued before reads the inputs.
        let waited = self.device.synchronize();
        queued
            .and(waited)
            .map_err(|error| self.region.explain(error))
            .with_context(|| {
                format!(
                    "computing position {} on {}",
                    batch.position,
                    self.device.name()
                )
            })?;
        Ok(Results {
            logits: bytemuck::cast_slice(&self.logits[..bytes]),
        })
    }

    fn chooses(&self, sampling: &SamplingParams) -> bool {
        choice::covers(sampling)
    }

    fn stream(&mut self, start: &StreamStart) -> Result<Box<dyn TokenStream + '_>> {
        ensure!(
            self.chooses(start.sampling),
            "the GPU cannot choose tokens so: {}",
            start.sampling
        );
        let (&token, cached) = start.text.split_last().context("a text has tokens")?;
        let remembered = self.remembers(cached.len());
        Batch::decode(&token, cached.len()).check(self.limits, remembered)?;
        self.upload_inputs(token, cached.len(), cached.len())?;
        let stream = Stream::new(
            &mut self.choice,
            &mut self.region,
            &mut self.written,
            &self.scratch,
            start,
        )?;
        Ok(Box::new(stream))
    }

    fn kv_layout(&self) -> &KvLayout {
        self.cache.layout()
    }

    fn written(&self) -> Written {
        self.written
    }

    fn arithmetic(&self) -> String {
        format!("{} on {}", self.name(), self.device())
    }

    fn export_kv(
        &mut self,
        part: KvPart,
        written: Written,
        take: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        self.cache.export(&self.device, part, written, take)
    }

    fn import_kv(&mut self, written: Written, state: &[u8]) -> Result<()> {
        self.cache.import(&self.device, written, state)?;
        self.written = written;
        Ok(())
    }

    fn bytes_per_token(&self, position: usize) -> u64 {
        self.decoder.bytes_per_token() + self.cache.layout().bytes_read(position, self.written)
    }

    fn set_graph(&mut self, disabled: Option<String>) {
        self.region.set_graph(disabled);
    }

    fn graph_report(&self) -> Option<&GraphReport> {
        Some(self.region.report())
    }

    fn set_step(&mut self, disabled: Option<String>) {
        self.region.set_step(disabled);
    }

    fn step_report(&self) -> Option<&StepReport> {
        Some(self.region.step_report())
    }
}
