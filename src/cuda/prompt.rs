//! Reading a chunk of a prompt: a decoder's operations lowered to the launches between the tokens' ids and the KV cache, and
//! the logits where they are wanted. What the cache holds afterwards is what decoding the same tokens one by one leaves there,
//! up to the rounding of float16 activations here and of 8-bit ones there.

use anyhow::Result;
use cudarc::driver::sys::CUdeviceptr;

use super::{
    device::{Device, Launch},
    kv_cache::KvCache,
    launches::{
        Chunk, Epilogue, GATE_SCALE, Linear, embed_tokens, flash_attention, float_to_half,
        gate_tokens, gemm, norm_tokens, rope_tokens,
    },
    lowering::{Group, Heads, groups},
    params::{FlashAttentionParams, RopeParams},
    scratch::{ChunkScratch, Scratch},
    tensor_types::{COPY_TYPE, KernelType},
    weights::{DeviceWeights, Matrix},
};
use crate::{
    backend::Want,
    model::{
        Decoder,
        decoder::{self, RopeStyle},
        ops::Op,
    },
    quant::TensorType,
};

/// What a chunk is computed with.
pub struct Prompt<'a> {
    pub device: &'a Device,
    pub decoder: &'a Decoder,
    pub weights: &'a DeviceWeights,
    pub decode: &'a Scratch,
    pub scratch: &'a ChunkScratch,
    pub cache: &'a KvCache,
}

/// Where launches go, one after another: they start while the next are still being put together.
type Queue<'a> = &'a mut dyn FnMut(Launch) -> Result<()>;

impl Prompt<'_> {
    /// Hands `launch` every launch for `chunk.tokens` tokens, the last of which is at position `context_end - 1`. Their ids
    /// and the first one's position lie in device memory.
    ///
    /// # Errors
    /// Operations for which there is no launch, and what `launch` meets.
    pub fn run(&self, chunk: Chunk, context_end: usize, want: Want, launch: Queue) -> Result<()> {
        let Self {
            device,
            decoder,
            weights,
            scratch,
            ..
        } = self;
        let store = |linear: &decoder::Linear, out| Linear {
            weights: weights.matrix(&linear.weights),
            bias: weights.vector(linear.bias.as_ref()),
            out,
        };
        // The tokens that count, and where the first of them lies in the residual stream.
        let (mut counted, mut x) = (chunk, scratch.hidden);
        for group in groups(decoder)? {
            match group {
                Group::Embed { table, scale } => {
                    let table = weights.matrix(table);
                    let tokens = scratch.tokens;
                    launch(embed_tokens(device, table, scale, tokens, x, chunk)?)?;
                }
                Group::Norm(norm) => launch(norm_tokens(
                    device,
                    x,
                    weights.vector(Some(&norm.weight)),
                    scratch.normed,
                    norm.epsilon,
                    decoder.hidden_size,
                    counted,
                )?)?,
                Group::Attention { q, k, v, heads } => {
                    let qkv = [
                        store(q, scratch.q),
                        store(k, scratch.k),
                        store(v, scratch.v),
                    ];
                    self.store(launch, &qkv, scratch.normed, chunk)?;
                    self.attention(launch, &heads, chunk, context_end)?;
                }
                Group::Gate { gate, up } => {
                    let (gate, up) = (weights.matrix(gate), weights.matrix(up));
                    self.gate(launch, gate, up, chunk)?;
                }
                Group::AddAttended(matrix) => {
                    let matrix = weights.matrix(matrix);
                    self.add(launch, matrix, scratch.attended, 1.0, chunk)?;
                }
                Group::AddGated(matrix) => {
                    let matrix = weights.matrix(matrix);
                    self.add(launch, matrix, scratch.gated, GATE_SCALE, chunk)?;
                }
                Group::Select => {
                    let first = match want {
                        Want::Nothing => return Ok(()),
                        Want::Last => chunk.tokens - 1,
                        Want::All => 0,
                    };
                    counted.tokens = chunk.tokens - first;
                    x += (first * decoder.hidden_size * size_of::<f32>()) as u64;
                }
                Group::Logits(linear) => {
                    let logits = store(linear, self.decode.logits);
                    self.store(launch, &[logits], scratch.normed, counted)?;
                }
            }
        }
        Ok(())
    }

    /// One layer's attention behind its products.
    fn attention(
        &self,
        launch: Queue,
        heads: &Heads,
        chunk: Chunk,
        context_end: usize,
    ) -> Result<()> {
        let Self {
            device,
            weights,
            scratch,
            cache,
            ..
        } = self;
        let attention = heads.attention;
        let (head_dim, head_count_kv) = (attention.head_dim, attention.head_count_kv);
        let position = self.decode.position();
        let rope = RopeParams {
            q: scratch.q,
            k: scratch.k,
            v: scratch.v,
            q_norm: weights.vector(heads.q_norm),
            k_norm: weights.vector(heads.k_norm),
            v_norm: 0,
            frequencies: weights.frequencies(heads.rope),
            q_out: scratch.rotated_q,
            k_cache: cache.keys(heads.layer),
            v_cache: cache.values(heads.layer),
            position,
            epsilon: heads.epsilon,
            context: cache.capacity(heads.layer) as i32,
            head_count: attention.head_count as i32,
            head_count_kv: head_count_kv as i32,
            rope_dims: heads.rope.dimensions as i32,
            interleaved: i32::from(heads.rope.style == RopeStyle::Interleaved),
            scale: heads.exponent_scale(),
            rope_factor: heads.rope.rotation_factor(head_dim),
            stores: 1,
            unused: 0,
        };
        launch(rope_tokens(device, head_dim, rope, chunk)?)?;
        let params = FlashAttentionParams {
            q: scratch.rotated_q,
            k_cache: cache.keys(heads.layer),
            v_cache: cache.values(heads.layer),
            out: scratch.attended,
            position,
            partial: scratch.attention_workspace.partial,
            finished: scratch.attention_workspace.finished,
            tokens: chunk.tokens as i32,
            padded_tokens: chunk.padded() as i32,
            context: cache.capacity(heads.layer) as i32,
            group: attention.group() as i32,
            window: attention.window.unwrap_or(0) as i32,
            softcap: attention.softcap.unwrap_or(0.0) * std::f32::consts::LOG2_E,
        };
        launch(flash_attention(
            device,
            head_dim,
            head_count_kv,
            context_end,
            params,
        )?)
    }

    /// `out = W x + bias` of each product, as few launches as their types allow.
    fn store(
        &self,
        launch: Queue,
        products: &[Linear],
        x: CUdeviceptr,
        chunk: Chunk,
    ) -> Result<()> {
        let together = |a: &Linear, b: &Linear| {
            a.weights.tensor_type == b.weights.tensor_type && !needs_copy(a.weights.tensor_type)
        };
        for products in products.chunk_by(together) {
            let products: Vec<Linear> = products
                .iter()
                .map(|product| {
                    let weights = self.multipliable(launch, product.weights)?;
                    Ok(Linear {
                        weights,
                        ..*product
                    })
                })
                .collect::<Result<_>>()?;
            self.gemm(launch, &products, x, Epilogue::Store, chunk)?;
        }
        Ok(())
    }

    /// The residual stream `+= factor * W x`.
    fn add(
        &self,
        launch: Queue,
        weights: Matrix,
        x: CUdeviceptr,
        factor: f32,
        chunk: Chunk,
    ) -> Result<()> {
        let product = Linear {
            weights: self.multipliable(launch, weights)?,
            bias: 0,
            out: self.scratch.hidden,
        };
        self.gemm(launch, &[product], x, Epilogue::Add { factor }, chunk)
    }

    /// The first half of the feed-forward.
    fn gate(&self, launch: Queue, gate: Matrix, up: Matrix, chunk: Chunk) -> Result<()> {
        let scratch = self.scratch;
        let products = [(gate, scratch.gate), (up, scratch.up)].map(|(weights, out)| Linear {
            weights,
            bias: 0,
            out,
        });
        if are_one_product(gate.tensor_type, up.tensor_type) {
            return self.gemm(launch, &products, scratch.normed, Epilogue::Gate, chunk);
        }
        self.store(launch, &products, scratch.normed, chunk)?;
        launch(gate_tokens(
            self.device,
            scratch.gate,
            scratch.up,
            scratch.gated,
            gate.rows,
            chunk,
        )?)
    }

    fn gemm(
        &self,
        launch: Queue,
        products: &[Linear],
        x: CUdeviceptr,
        epilogue: Epilogue,
        chunk: Chunk,
    ) -> Result<()> {
        let Self {
            device, scratch, ..
        } = self;
        let workspace = scratch.gemm_workspace;
        let mut product = gemm(
            device,
            products,
            x,
            scratch.gated,
            epilogue,
            workspace,
            chunk,
        )?;
        // A product fetches weights before it waits for the kernel before it, which must not be the one that writes them.
        product.dependent = products
            .iter()
            .all(|product| product.weights.address != scratch.half_weights);
        launch(product)
    }

    /// The matrix itself, or a float16 copy where its type has no kernel.
    fn multipliable(&self, launch: Queue, weights: Matrix) -> Result<Matrix> {
        if !needs_copy(weights.tensor_type) {
            return Ok(weights);
        }
        let address = self.scratch.half_weights;
        launch(float_to_half(self.device, weights, address)?)?;
        Ok(Matrix {
            address,
            tensor_type: COPY_TYPE,
            ..weights
        })
    }
}

/// Whether the gate and up matrices of some layer are two products.
pub fn has_separate_gate(decoder: &Decoder) -> bool {
    decoder.layers.iter().any(|layer| {
        let [gate, up] = [&layer.feed_forward.gate, &layer.feed_forward.up];
        !are_one_product(gate.weights.tensor_type(), up.weights.tensor_type())
    })
}

/// Bytes of the largest float16 copy that the model needs.
pub fn half_weights_bytes(decoder: &Decoder) -> Result<usize> {
    let copy = KernelType::of(COPY_TYPE)?;
    let copied = decoder
        .ops
        .iter()
        .filter_map(Op::weights)
        .filter(|matrix| needs_copy(matrix.tensor_type()))
        .map(|matrix| copy.matrix_bytes(matrix.rows(), matrix.row_len()));
    Ok(copied.max().unwrap_or(0))
}

fn are_one_product(gate: TensorType, up: TensorType) -> bool {
    gate == up && !needs_copy(gate)
}

fn needs_copy(tensor_type: TensorType) -> bool {
    KernelType::of(tensor_type).is_ok_and(KernelType::needs_copy)
}
