//! Everything but the KV cache that a run writes to on the device: sized before anything is taken, taken once, never grown.
//! Where layers differ, each buffer is as long as the layer takes that needs most.

use std::{ops::Range, sync::Arc};

use anyhow::Result;
use bytemuck::Zeroable;
use cudarc::driver::sys::CUdeviceptr;

use super::{
    device::{Device, DeviceBuffer},
    launches::{self, Chunk, Normed, SplitKWorkspace},
    params::{Activation, ChoiceSettings, HEAD_KINDS, StepParams, StepVector},
    prompt,
    step::stages_bytes,
    tensor_types::UNIT,
};
use crate::{
    backend::KvLayer,
    model::{
        Decoder,
        decoder::{Attention, Layer},
        ops::Op,
    },
};

/// The most tokens whose logits one call computes.
pub const LOGITS_LEN: usize = 32;

/// Where every buffer begins: enough for every vector access.
const ALIGNMENT: usize = 256;

/// A named part of the device memory that a run needs.
#[derive(Debug, Clone, Copy)]
pub struct Part {
    pub name: &'static str,
    pub bytes: usize,
}

/// The buffers of a decode step. Shapes as in [`crate::model::decoder`].
pub struct Scratch {
    memory: DeviceBuffer,
    /// i32 (3): the token to compute and its position; of a chunk, the first one's, and that of the first whose logits are wanted
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
    /// f32 (hidden_size): what is added to the residual stream, where it is normalized or scaled first
    pub branch: CUdeviceptr,
    /// f32 (width * layers): what the token gives to every layer
    pub token_inputs: CUdeviceptr,
    /// f32 (width): the gate of a layer's part of it
    pub gate: CUdeviceptr,
    /// f32 ([`launches::decode_attention_partial_len`])
    pub attention_partial: CUdeviceptr,
    /// u32, zero between launches
    pub attention_counters: CUdeviceptr,
    /// f32 (vocab_size, LOGITS_LEN): the first row, of a decoded token or of a prompt's last
    pub logits: CUdeviceptr,
    /// How tokens are chosen
    pub choice_settings: CUdeviceptr,
    /// u32 (vocab_size): how often each token was among the last ones
    pub token_counts: CUdeviceptr,
    /// u64 ([`launches::choose_lists_len`])
    pub choice_lists: CUdeviceptr,
}

impl Scratch {
    pub fn new(device: &Arc<Device>, decoder: &Decoder) -> Result<Self> {
        let (memory, addresses) = take(device, &decode_parts(device, decoder))?;
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
            branch: next(),
            token_inputs: next(),
            gate: next(),
            attention_partial: next(),
            attention_counters: next(),
            logits: next(),
            choice_settings: next(),
            token_counts: next(),
            choice_lists: next(),
            memory,
        })
    }

    /// The memory behind all addresses.
    pub fn memory(&self) -> &DeviceBuffer {
        &self.memory
    }

    /// Copies `source` to `address` of this memory, behind all that is queued, and waits for it.
    pub fn upload(&self, address: CUdeviceptr, source: &[u8]) -> Result<()> {
        self.memory
            .upload((address - self.memory.at(0)) as usize, source)
    }

    /// The address of the part of [`token_inputs`](Self::token_inputs) that is a layer's.
    pub fn inputs_of_layer(&self, part: &Range<usize>) -> CUdeviceptr {
        self.token_inputs + (part.start * size_of::<f32>()) as u64
    }

    /// Where the token to compute is, or a chunk's first.
    pub fn whereabouts(&self) -> Whereabouts {
        self.whereabouts_at(1)
    }

    /// Where the first of a chunk is whose logits are wanted.
    pub fn wanted_whereabouts(&self) -> Whereabouts {
        self.whereabouts_at(3)
    }

    fn whereabouts_at(&self, index: usize) -> Whereabouts {
        let position = self.inputs + (index * size_of::<i32>()) as u64;
        Whereabouts {
            position,
            place: position + size_of::<i32>() as u64,
        }
    }
}

/// Numbers that a batch is told by: the token; the position and the place of it, or of a chunk's first; and those of the first
/// of a chunk whose logits are wanted.
pub const INPUTS: usize = 5;

/// The addresses of two i32: a token's position in the text, and its place in layers that evict.
#[derive(Clone, Copy)]
pub struct Whereabouts {
    pub position: CUdeviceptr,
    place: CUdeviceptr,
}

impl Whereabouts {
    /// The address of the token's place in a layer.
    pub fn place_in(self, layer: &KvLayer) -> CUdeviceptr {
        match layer.evicts {
            true => self.place,
            false => self.position,
        }
    }
}

/// The greatest lengths of activations over all layers.
struct Lengths {
    q_dim: usize,
    kv_dim: usize,
    /// Of what is gated: in the feed-forward, or of what a token gives to a layer
    gated: usize,
    /// Of what a token gives to a layer
    token_input: usize,
}

impl Lengths {
    fn new(layers: &[Layer]) -> Self {
        let feed_forward = layers
            .iter()
            .map(|layer| layer.feed_forward.gate.weights.rows());
        let inputs = layers.iter().filter_map(|layer| layer.token_input.as_ref());
        let token_input = inputs.map(|input| input.gate.weights.rows()).max();
        let token_input = token_input.unwrap_or(0);
        Self {
            q_dim: greatest(layers, Attention::q_dim),
            kv_dim: greatest(layers, Attention::kv_dim),
            gated: feed_forward.max().unwrap_or(0).max(token_input),
            token_input,
        }
    }
}

fn greatest(layers: &[Layer], of: impl Fn(&Attention) -> usize) -> usize {
    let values = layers.iter().map(|layer| of(&layer.attention));
    values.max().unwrap_or(0)
}

/// The buffers of [`Scratch`] in its order.
pub fn decode_parts(device: &Device, decoder: &Decoder) -> Vec<Part> {
    let lengths = Lengths::new(&decoder.layers);
    let Lengths { q_dim, kv_dim, .. } = lengths;
    let hidden = decoder.hidden_size.next_multiple_of(UNIT);
    let widest = q_dim.max(lengths.gated).next_multiple_of(UNIT);
    let partial = greatest(&decoder.layers, |attention| {
        let (kv, group) = (attention.head_count_kv, attention.group());
        let splits = launches::decode_attention_splits(device, kv, group);
        launches::decode_attention_partial_len(attention.head_dim, attention.head_count, splits)
    });
    let counters = greatest(&decoder.layers, |attention| {
        launches::decode_attention_counters(attention.head_count_kv, attention.group())
    });
    [
        ("token, positions and places", INPUTS * 4),
        ("residual stream", decoder.hidden_size * 4),
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
        ("branch", decoder.hidden_size * 4),
        (
            "inputs of the token",
            lengths.token_input * decoder.layers.len() * 4,
        ),
        ("their gate", lengths.token_input * 4),
        ("attention partial sums", partial * 4),
        ("attention counters", counters * 4),
        ("logits", LOGITS_LEN * decoder.vocab_size * 4),
        ("settings of the choice", size_of::<ChoiceSettings>()),
        ("counts of recent tokens", decoder.vocab_size * 4),
        (
            "best tokens",
            launches::choose_lists_len(decoder.vocab_size) * 8,
        ),
    ]
    .map(Part::from)
    .to_vec()
}

/// What the step kernel keeps of its own: its stages, and what travels between blocks. Packets as in
/// `kernels/step/packet.cuh`.
pub struct StepScratch {
    memory: DeviceBuffer,
    params: StepParams,
    /// (kv_dim, 2, HEAD_KINDS): the newest token's keys and values that layers share
    newest: CUdeviceptr,
    newest_bytes: u64,
}

impl StepScratch {
    pub fn new(device: &Arc<Device>, decoder: &Decoder) -> Result<Self> {
        let (memory, addresses) = take(device, &step_parts(device, decoder))?;
        let mut addresses = addresses.into_iter();
        let mut next = || addresses.next().expect("every buffer is a part");
        let (stages, epochs) = (next(), next());
        // Where no matrix has floats, nobody reads unquantized vectors.
        let floats = has_floats(decoder);
        let mut vector = || {
            let (groups, values) = (next(), next());
            StepVector {
                groups,
                values: if floats { values } else { 0 },
            }
        };
        let (normed, activation) = (vector(), vector());
        let params = StepParams {
            stages,
            epochs,
            normed,
            activation,
            qkv: next(),
            partial: next(),
            partial_sums: next(),
            branch_squares: next(),
            spill: next(),
            ..StepParams::zeroed()
        };
        let newest = next();
        Ok(Self {
            memory,
            params,
            newest,
            newest_bytes: newest_bytes(&decoder.layers) as u64,
        })
    }

    /// The buffers' addresses, and nothing else.
    pub fn params(&self) -> StepParams {
        self.params
    }

    /// Where the layers that read the keys and values of one share its newest token's: `index` is that one's among all that
    /// share theirs, less than [`HEAD_KINDS`].
    pub fn newest(&self, index: usize) -> CUdeviceptr {
        self.newest + index as u64 * self.newest_bytes
    }

    pub fn upload_stages(&self, stages: &[u8]) -> Result<()> {
        self.memory.upload(0, stages)
    }
}

fn has_floats(decoder: &Decoder) -> bool {
    decoder.ops.iter().any(|op| match op {
        Op::Linear { linear, .. } => linear.weights.tensor_type().is_float(),
        _ => false,
    })
}

/// Bytes of packets.
const PACKET: usize = 16;
const VALUE_PACKET: usize = 8;

/// Bytes of the newest token's key and value.
fn newest_bytes(layers: &[Layer]) -> usize {
    2 * Lengths::new(layers).kv_dim * VALUE_PACKET
}

/// The buffers of [`StepScratch`] in its order.
pub fn step_parts(device: &Device, decoder: &Decoder) -> Vec<Part> {
    let Lengths {
        q_dim,
        kv_dim,
        gated,
        token_input,
    } = Lengths::new(&decoder.layers);
    let floats = has_floats(decoder);
    let groups = |length: usize| length.div_ceil(32) * 4 * PACKET;
    let values = |length: usize| match floats {
        true => length.next_multiple_of(32) * VALUE_PACKET,
        false => 0,
    };
    let (hidden, widest) = (decoder.hidden_size, q_dim.max(gated));
    let split_heads = |of: fn(&Attention) -> usize| {
        greatest(&decoder.layers, |attention| {
            let (kv, group) = (attention.head_count_kv, attention.group());
            of(attention) * launches::decode_attention_splits(device, kv, group)
        })
    };
    let partial = split_heads(Attention::q_dim) * VALUE_PACKET;
    let sums = split_heads(|attention| attention.head_count) * PACKET;
    [
        ("step kernel: stages", stages_bytes(device, decoder)),
        ("step kernel: epochs", device.multiprocessors() * 4),
        ("step kernel: residual stream", groups(hidden)),
        ("step kernel: its float values", values(hidden)),
        ("step kernel: activations", groups(widest)),
        ("step kernel: their float values", values(widest)),
        (
            "step kernel: queries, keys, values",
            (q_dim + 2 * kv_dim).max(token_input) * VALUE_PACKET,
        ),
        ("step kernel: attention partial sums", partial),
        ("step kernel: their exponentials", sums),
        (
            "step kernel: squares of a branch",
            hidden.div_ceil(32) * VALUE_PACKET,
        ),
        (
            "step kernel: split groups",
            hidden.max(gated) * VALUE_PACKET,
        ),
        (
            "step kernel: shared keys and values",
            HEAD_KINDS * newest_bytes(&decoder.layers),
        ),
    ]
    .map(Part::from)
    .to_vec()
}

/// The buffers of a chunk of a prompt, `tokens` being its most tokens. Shapes as in [`crate::model::decoder`].
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
    /// f32 (feed_forward_length, tokens), where gate and up cannot be one product, or of what tokens give to a layer
    pub gate: CUdeviceptr,
    /// f32 (feed_forward_length, tokens), where gate and up cannot be one product
    pub up: CUdeviceptr,
    /// f32 (hidden_size, tokens): what is added to the residual stream, where it is normalized or scaled first
    pub branch: CUdeviceptr,
    /// f32 (width * layers, tokens): what each token gives to every layer
    pub token_inputs: CUdeviceptr,
    /// f32 (tokens): what each token was divided by, where a product reads the residual stream as it is
    pub rms: CUdeviceptr,
    /// A float matrix in f16, where the model has any
    pub half_weights: CUdeviceptr,
    pub gemm_workspace: SplitKWorkspace,
    pub attention_workspace: SplitKWorkspace,
}

impl ChunkScratch {
    pub fn new(device: &Arc<Device>, decoder: &Decoder, chunk: Chunk) -> Result<Self> {
        let (memory, addresses) = take(device, &prompt_parts(device, decoder, chunk)?)?;
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
            branch: next(),
            token_inputs: next(),
            rms: next(),
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
pub fn prompt_parts(device: &Device, decoder: &Decoder, chunk: Chunk) -> Result<Vec<Part>> {
    let tokens = chunk.tokens;
    let Lengths {
        q_dim,
        kv_dim,
        gated,
        token_input,
    } = Lengths::new(&decoder.layers);
    let (gate_len, up_len) = match prompt::has_separate_gate(decoder) {
        true => (gated * tokens, gated * tokens),
        false => (token_input * tokens, 0),
    };
    let branch_len = match prompt::has_branch_sums(decoder) {
        true => decoder.hidden_size * tokens,
        false => 0,
    };
    let (mut attention_partial, mut attention_counters) = (0, 0);
    for layer in &decoder.layers {
        let (head_dim, heads_kv) = (layer.attention.head_dim, layer.attention.head_count_kv);
        let tiles = launches::flash_attention_tiles(head_dim, tokens, layer.attention.group())?;
        let partial = launches::flash_attention_partial_len(device, head_dim, tiles, heads_kv);
        attention_partial = attention_partial.max(partial);
        attention_counters = attention_counters.max(tiles * heads_kv);
    }
    Ok([
        ("prompt: tokens", tokens * 4),
        ("prompt: residual stream", decoder.hidden_size * tokens * 4),
        ("prompt: normed", chunk.tile_bytes(decoder.hidden_size)),
        ("prompt: queries", q_dim * tokens * 4),
        ("prompt: keys", kv_dim * tokens * 4),
        ("prompt: values", kv_dim * tokens * 4),
        ("prompt: rotated queries", q_dim * tokens * 2),
        ("prompt: attention output", chunk.tile_bytes(q_dim)),
        ("prompt: gated", chunk.tile_bytes(gated)),
        ("prompt: gate", gate_len * 4),
        ("prompt: up", up_len * 4),
        ("prompt: branch", branch_len * 4),
        (
            "prompt: inputs of the tokens",
            token_input * decoder.layers.len() * tokens * 4,
        ),
        ("prompt: root mean squares", tokens * 4),
        (
            "prompt: half-precision weights",
            prompt::half_weights_bytes(decoder)?,
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
        ("prompt: attention counters", attention_counters * 4),
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
