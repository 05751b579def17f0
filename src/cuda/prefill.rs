//! Reading a chunk of a prompt: every launch between the tokens' ids and the KV cache, and the logits where they are wanted.
//! The state afterwards is the one that decoding the same tokens one by one leaves.

use anyhow::Result;
use cudarc::driver::sys::CUdeviceptr;

use super::{
    device::{Device, Launch},
    launches::{
        Chunk, Epilogue, GATE_SCALE, Linear, embed_tokens, exponent_scale, flash_attention,
        float_to_half, gate_tokens, gemm, norm_tokens, rope_tokens,
    },
    params::{FlashAttentionParams, RopeParams},
    scratch::{ChunkScratch, KvCache, Scratch},
    tensor_types::{COPY_TYPE, KernelType},
    weights::{DeviceWeights, Matrix},
};
use crate::{
    model::{Config, Model, config::RopeStyle, weights::LayerWeights},
    quant::TensorType,
};

/// What a chunk is computed with.
pub struct Prefill<'a> {
    pub device: &'a Device,
    pub config: &'a Config,
    pub weights: &'a DeviceWeights,
    pub decode: &'a Scratch,
    pub scratch: &'a ChunkScratch,
    pub cache: &'a KvCache,
}

/// Where launches go, one after another: they start while the next are still being put together.
type Queue<'a> = &'a mut dyn FnMut(Launch) -> Result<()>;

/// Which tokens of a chunk get logits.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Logits {
    Last,
    All,
}

impl Prefill<'_> {
    /// Hands `launch` every launch for `chunk.tokens` tokens, the last of which is at position `context_end - 1`. Their ids
    /// and the first one's position lie in device memory.
    pub fn run(
        &self,
        chunk: Chunk,
        context_end: usize,
        logits: Logits,
        launch: Queue,
    ) -> Result<()> {
        let Self {
            device,
            config,
            weights,
            scratch,
            cache,
            ..
        } = self;
        let epsilon = config.rms_norm_epsilon;
        let group = config.head_count / config.head_count_kv;
        let position = self.decode.inputs + 4;
        let x = scratch.hidden;

        launch(embed_tokens(
            device,
            weights.token_embd,
            scratch.tokens,
            x,
            chunk,
        )?)?;
        for (i, layer) in weights.layers.iter().enumerate() {
            let norm = |weight| {
                norm_tokens(
                    device,
                    x,
                    weight,
                    scratch.normed,
                    epsilon,
                    config.hidden_size,
                    chunk,
                )
            };
            launch(norm(layer.attn_norm)?)?;
            let qkv = [
                (layer.attn_q, layer.attn_q_bias, scratch.q),
                (layer.attn_k, layer.attn_k_bias, scratch.k),
                (layer.attn_v, layer.attn_v_bias, scratch.v),
            ]
            .map(|(weights, bias, out)| Linear { weights, bias, out });
            self.store(launch, &qkv, scratch.normed, chunk)?;
            let rope = RopeParams {
                q: scratch.q,
                k: scratch.k,
                v: scratch.v,
                q_norm: layer.attn_q_norm,
                k_norm: layer.attn_k_norm,
                frequencies: weights.rope_frequencies,
                q_out: scratch.rotated_q,
                k_cache: cache.keys(i),
                v_cache: cache.values(i),
                position,
                epsilon,
                context: cache.context_len as i32,
                head_count: config.head_count as i32,
                head_count_kv: config.head_count_kv as i32,
                rope_dims: config.rope_dimension_count as i32,
                interleaved: i32::from(config.rope_style == RopeStyle::Interleaved),
                scale: exponent_scale(config.head_dim),
                unused: 0,
            };
            launch(rope_tokens(device, config.head_dim, rope, chunk)?)?;
            let attention = FlashAttentionParams {
                q: scratch.rotated_q,
                k_cache: cache.keys(i),
                v_cache: cache.values(i),
                out: scratch.attended,
                position,
                partial: scratch.attention_workspace.partial,
                finished: scratch.attention_workspace.finished,
                tokens: chunk.tokens as i32,
                padded_tokens: chunk.padded() as i32,
                context: cache.context_len as i32,
                group: group as i32,
            };
            launch(flash_attention(
                device,
                config.head_dim,
                config.head_count_kv,
                context_end,
                attention,
            )?)?;
            self.add(launch, layer.attn_output, scratch.attended, 1.0, chunk)?;

            launch(norm(layer.ffn_norm)?)?;
            self.gate(launch, layer.ffn_gate, layer.ffn_up, chunk)?;
            self.add(launch, layer.ffn_down, scratch.gated, GATE_SCALE, chunk)?;
        }
        let (first, counted) = match logits {
            Logits::Last => (chunk.tokens - 1, Chunk { tokens: 1 }),
            Logits::All => (0, chunk),
        };
        let row = x + (first * config.hidden_size * size_of::<f32>()) as u64;
        let norm = weights.output_norm;
        launch(norm_tokens(
            device,
            row,
            norm,
            scratch.normed,
            epsilon,
            config.hidden_size,
            counted,
        )?)?;
        let output = Linear {
            weights: weights.output,
            bias: 0,
            out: self.decode.logits,
        };
        self.store(launch, &[output], scratch.normed, counted)
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

/// Whether a layer's gate and up projections are one product.
pub fn is_one_product(layer: &LayerWeights) -> bool {
    are_one_product(layer.ffn_gate.tensor_type(), layer.ffn_up.tensor_type())
}

/// Bytes of the largest float16 copy that the model needs.
pub fn half_weights_bytes(model: &Model) -> Result<usize> {
    let copy = KernelType::of(COPY_TYPE)?;
    let weights = &model.weights;
    let layers = weights.layers.iter().flat_map(LayerWeights::matrices);
    let copied = layers
        .chain([&weights.output])
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
