//! Everything that a run writes to on the device: sized before anything is taken, taken once, never grown.

use std::sync::Arc;

use anyhow::{Result, bail};
use cudarc::driver::sys::CUdeviceptr;
use half::f16;

use super::{
    device::{Device, DeviceBuffer},
    launches::{self, Chunk, Normed, SplitKWorkspace},
    params::Activation,
    prefill,
    tensor_types::UNIT,
};
use crate::model::{Config, Model};

/// The most tokens whose logits one call computes.
pub const LOGITS_LEN: usize = 32;

/// Where every buffer begins: enough for every vector access.
const ALIGNMENT: usize = 256;

/// Memory that is left alone: what the driver takes later, for kernels and graphs.
const RESERVE: usize = 256 << 20;

/// A named part of the device memory that a run needs.
#[derive(Debug, Clone, Copy)]
pub struct Part {
    pub name: &'static str,
    pub bytes: usize,
}

/// What a run needs on the device, before any of it is taken.
pub struct Sizing {
    weights_bytes: usize,
    scratch: Vec<Part>,
    kv_bytes_per_token: usize,
}

impl Sizing {
    /// `weights_bytes`: what the weights take. `chunk`: the largest part of a prompt that is read at once.
    pub fn new(device: &Device, model: &Model, weights_bytes: usize, chunk: Chunk) -> Result<Self> {
        let mut scratch = parts(device, &model.config);
        scratch.extend(chunk_parts(device, model, chunk)?);
        Ok(Self {
            weights_bytes,
            scratch,
            kv_bytes_per_token: kv_bytes_per_token(&model.config),
        })
    }

    /// The context to use: `asked`, or as much of the model's own length as fits.
    ///
    /// # Errors
    /// One that lists every part, what is free, and the largest context that would fit.
    pub fn choose_context(
        &self,
        asked: Option<usize>,
        trained: usize,
        free: usize,
    ) -> Result<usize> {
        let fits = self.largest_context(free);
        let context_len = asked.unwrap_or(trained.min(fits));
        if context_len == 0 || context_len > fits {
            let mut parts = format!("weights {}", Megabytes(self.weights_bytes));
            for part in self.parts(context_len.max(1)) {
                parts += &format!(", {} {}", part.name, Megabytes(part.bytes));
            }
            let advice = match fits {
                0 => "not even a context of one token fits: use a smaller model, free memory on the GPU, or --device cpu"
                    .to_owned(),
                _ => format!("the largest context that fits is {fits} tokens"),
            };
            bail!(
                "a context of {} tokens does not fit on the GPU: {parts}, kept free for the driver {}; free are {}; {advice}",
                context_len.max(1),
                Megabytes(RESERVE),
                Megabytes(free)
            );
        }
        Ok(context_len)
    }

    /// Scratch and KV cache by part.
    pub fn parts(&self, context_len: usize) -> impl Iterator<Item = Part> {
        let cache = Part {
            name: "KV cache",
            // A context that nobody has memory for must end in a refusal, not in a small number.
            bytes: context_len.saturating_mul(self.kv_bytes_per_token),
        };
        self.scratch.iter().copied().chain([cache])
    }

    fn largest_context(&self, free: usize) -> usize {
        let fixed =
            self.weights_bytes + RESERVE + self.parts(0).map(|part| part.bytes).sum::<usize>();
        free.saturating_sub(fixed) / self.kv_bytes_per_token
    }
}

/// Bytes in a message.
struct Megabytes(usize);

impl std::fmt::Display for Megabytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.1} MB", self.0 as f64 / 1e6)
    }
}

/// Bytes that one token adds to the cache: a float16 key and value for every key/value head of every layer.
fn kv_bytes_per_token(config: &Config) -> usize {
    2 * 2 * config.block_count * config.head_count_kv * config.head_dim
}

/// The buffers of a decode step. Shapes as in [`Config`].
pub struct Scratch {
    memory: DeviceBuffer,
    /// i32 (2): the token to compute and its position
    pub inputs: CUdeviceptr,
    /// f32 (hidden_size): the residual stream
    pub hidden: CUdeviceptr,
    /// f32 (head_count * head_dim)
    pub q: CUdeviceptr,
    /// f32 (head_count_kv * head_dim)
    pub k: CUdeviceptr,
    /// f32 (head_count_kv * head_dim)
    pub v: CUdeviceptr,
    /// The residual stream times the next norm's weights, quantized
    pub normed: Normed,
    /// The output of attention, then of the feed-forward's first half, quantized: as wide as the widest product's input
    pub activation: Activation,
    /// f32 (head_dim + 2, head_count, splits)
    pub attention_partial: CUdeviceptr,
    /// u32, zero between launches
    pub attention_counters: CUdeviceptr,
    /// f32 (vocab_size, LOGITS_LEN): the first row, of a decoded token or of a prompt's last
    pub logits: CUdeviceptr,
}

impl Scratch {
    pub fn new(device: &Arc<Device>, config: &Config) -> Result<Self> {
        let (memory, addresses) = take(device, &parts(device, config))?;
        let mut addresses = addresses.into_iter();
        let mut next = || addresses.next().expect("every buffer is a part");
        let (inputs, hidden) = (next(), next());
        let (q, k, v) = (next(), next(), next());
        let mut activation = || Activation {
            q: next(),
            scale: next(),
            value: next(),
        };
        let normed = activation();
        let activation = activation();
        Ok(Self {
            inputs,
            hidden,
            q,
            k,
            v,
            normed: Normed {
                activation: normed,
                squares: next(),
            },
            activation,
            attention_partial: next(),
            attention_counters: next(),
            logits: next(),
            memory,
        })
    }

    /// The memory behind all addresses.
    pub fn memory(&self) -> &DeviceBuffer {
        &self.memory
    }
}

/// The buffers of [`Scratch`] in its order.
fn parts(device: &Device, config: &Config) -> Vec<Part> {
    let q_dim = config.head_count * config.head_dim;
    let kv_dim = config.head_count_kv * config.head_dim;
    let group = config.head_count / config.head_count_kv;
    let hidden = config.hidden_size.next_multiple_of(UNIT);
    let widest = q_dim.max(config.feed_forward_length).next_multiple_of(UNIT);
    let splits = launches::decode_attention_splits(device, config.head_count_kv, group);
    let partial = (config.head_dim + 2) * config.head_count * splits;
    let counters = launches::decode_attention_counters(config.head_count_kv, group);
    [
        ("token and position", 2 * 4),
        ("residual stream", config.hidden_size * 4),
        ("queries", q_dim * 4),
        ("keys", kv_dim * 4),
        ("values", kv_dim * 4),
        ("Q8_1 residual stream", hidden),
        ("its scales", hidden / 32 * 4),
        ("its float values", hidden * 4),
        ("Q8_1 activations", widest),
        ("their scales", widest / 32 * 4),
        ("their float values", widest * 4),
        ("sums of squares", hidden / 32 * 4),
        ("attention partial sums", partial * 4),
        ("attention counters", counters * 4),
        ("logits", LOGITS_LEN * config.vocab_size * 4),
    ]
    .map(Part::from)
    .to_vec()
}

/// The buffers of a chunk of a prompt, `tokens` being its most tokens. Shapes as in [`Config`].
pub struct ChunkScratch {
    memory: DeviceBuffer,
    /// i32 (tokens)
    pub tokens: CUdeviceptr,
    /// f32 (hidden_size, tokens): the residual stream
    pub hidden: CUdeviceptr,
    /// f16 (hidden_size, tokens), as products read it
    pub normed: CUdeviceptr,
    /// f32 (head_count * head_dim, tokens)
    pub q: CUdeviceptr,
    /// f32 (head_count_kv * head_dim, tokens)
    pub k: CUdeviceptr,
    /// f32 (head_count_kv * head_dim, tokens)
    pub v: CUdeviceptr,
    /// f16 (head_dim, head_count, tokens)
    pub rotated_q: CUdeviceptr,
    /// f16 (head_count * head_dim, tokens), as products read it
    pub attended: CUdeviceptr,
    /// f16 (feed_forward_length, tokens), as products read it
    pub gated: CUdeviceptr,
    /// f32 (feed_forward_length, tokens), where gate and up cannot be one product
    pub gate: CUdeviceptr,
    /// likewise
    pub up: CUdeviceptr,
    /// A float matrix in f16, where the model has any
    pub half_weights: CUdeviceptr,
    pub gemm_workspace: SplitKWorkspace,
    pub attention_workspace: SplitKWorkspace,
}

impl ChunkScratch {
    pub fn new(device: &Arc<Device>, model: &Model, chunk: Chunk) -> Result<Self> {
        let (memory, addresses) = take(device, &chunk_parts(device, model, chunk)?)?;
        let mut addresses = addresses.into_iter();
        let mut next = || addresses.next().expect("every buffer is a part");
        Ok(Self {
            tokens: next(),
            hidden: next(),
            normed: next(),
            q: next(),
            k: next(),
            v: next(),
            rotated_q: next(),
            attended: next(),
            gated: next(),
            gate: next(),
            up: next(),
            half_weights: next(),
            gemm_workspace: SplitKWorkspace {
                partial: next(),
                finished: next(),
            },
            attention_workspace: SplitKWorkspace {
                partial: next(),
                finished: next(),
            },
            memory,
        })
    }

    /// The memory behind all addresses.
    pub fn memory(&self) -> &DeviceBuffer {
        &self.memory
    }
}

/// The buffers of [`ChunkScratch`] in its order.
fn chunk_parts(device: &Device, model: &Model, chunk: Chunk) -> Result<Vec<Part>> {
    let config = &model.config;
    let tokens = chunk.tokens;
    let q_dim = config.head_count * config.head_dim;
    let kv_dim = config.head_count_kv * config.head_dim;
    let group = config.head_count / config.head_count_kv;
    let separate_gate = model
        .weights
        .layers
        .iter()
        .any(|layer| !prefill::is_one_product(layer));
    let gate_len = if separate_gate {
        config.feed_forward_length * tokens
    } else {
        0
    };
    let tiles = launches::flash_attention_tiles(tokens, group)?;
    let attention_partial =
        launches::flash_attention_partial_len(device, config.head_dim, tiles, config.head_count_kv);
    Ok([
        ("prompt: tokens", tokens * 4),
        ("prompt: residual stream", config.hidden_size * tokens * 4),
        ("prompt: normed", chunk.tile_bytes(config.hidden_size)),
        ("prompt: queries", q_dim * tokens * 4),
        ("prompt: keys", kv_dim * tokens * 4),
        ("prompt: values", kv_dim * tokens * 4),
        ("prompt: rotated queries", q_dim * tokens * 2),
        ("prompt: attention output", chunk.tile_bytes(q_dim)),
        (
            "prompt: gated",
            chunk.tile_bytes(config.feed_forward_length),
        ),
        ("prompt: gate", gate_len * 4),
        ("prompt: up", gate_len * 4),
        (
            "prompt: half-precision weights",
            prefill::half_weights_bytes(model)?,
        ),
        (
            "prompt: product partial sums",
            launches::gemm_partial_len(device) * 4,
        ),
        (
            "prompt: product counters",
            launches::gemm_counters(device) * 4,
        ),
        ("prompt: attention partial sums", attention_partial * 4),
        (
            "prompt: attention counters",
            tiles * config.head_count_kv * 4,
        ),
    ]
    .map(Part::from)
    .to_vec())
}

impl From<(&'static str, usize)> for Part {
    fn from((name, bytes): (&'static str, usize)) -> Self {
        Self {
            name,
            bytes: bytes.next_multiple_of(ALIGNMENT),
        }
    }
}

/// Takes one zeroed piece of memory for all parts, and says where each begins.
fn take(device: &Arc<Device>, parts: &[Part]) -> Result<(DeviceBuffer, Vec<CUdeviceptr>)> {
    let memory = device.allocate(parts.iter().map(|part| part.bytes).sum())?;
    memory.clear()?;
    let mut offset = 0;
    let addresses = parts.iter().map(|part| {
        let address = memory.at(offset);
        offset += part.bytes;
        address
    });
    let addresses = addresses.collect();
    Ok((memory, addresses))
}

/// Keys and values of all tokens so far, float16: for each layer keys, then values, each (head_dim, context_len,
/// head_count_kv), head_dim contiguous. Another format, or an eviction, changes this struct and the attention kernel.
pub struct KvCache {
    memory: DeviceBuffer,
    pub context_len: usize,
    /// Bytes of one layer's keys, or values.
    plane_bytes: usize,
    pub bytes_per_token: usize,
}

impl KvCache {
    pub fn new(device: &Arc<Device>, config: &Config, context_len: usize) -> Result<Self> {
        let bytes_per_token = kv_bytes_per_token(config);
        let memory = device.allocate(context_len * bytes_per_token)?;
        memory.clear()?;
        Ok(Self {
            memory,
            context_len,
            plane_bytes: context_len * bytes_per_token / config.block_count / 2,
            bytes_per_token,
        })
    }

    /// All keys and values, as they lie on the device.
    pub fn download(&self) -> Result<Vec<f16>> {
        let mut values = vec![f16::ZERO; self.memory.bytes() / size_of::<f16>()];
        self.memory
            .download(0, bytemuck::cast_slice_mut(&mut values))?;
        Ok(values)
    }

    /// Where a layer's keys begin.
    pub fn keys(&self, layer: usize) -> CUdeviceptr {
        self.memory.at(2 * layer * self.plane_bytes)
    }

    /// Where a layer's values begin.
    pub fn values(&self, layer: usize) -> CUdeviceptr {
        self.memory.at((2 * layer + 1) * self.plane_bytes)
    }
}
