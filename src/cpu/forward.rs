//! One forward pass of a dense decoder, from token ids to logits.

use std::ops::Range;

use super::{
    CpuBackend, Workers,
    attention::KvCache,
    matmul::{matmul, matmul_swiglu},
    ops,
    rope::Rope,
    simd::Matrix,
    workers::SharedMatrix,
};
use crate::model::{Config, Model, weights::LayerWeights};

/// The activations of a chunk of tokens.
pub struct Activations {
    /// (hidden_size, tokens): the residual stream
    hidden: Matrix,
    /// (hidden_size, tokens): what a layer's half reads of it
    normed: Matrix,
    /// (q_dim + 2 * kv_dim, tokens): queries, keys and values
    qkv: Matrix,
    /// (q_dim, tokens): what the heads gathered
    attended: Matrix,
    /// (feed_forward_length, tokens)
    gated: Matrix,
    /// (vocab_size, tokens)
    logits: Vec<f32>,
}

impl Activations {
    /// For chunks of up to `tokens` tokens, or `None` where there is no memory for them.
    pub fn new(config: &Config, tokens: usize) -> Option<Self> {
        let q_dim = config.head_count * config.head_dim;
        let kv_dim = config.head_count_kv * config.head_dim;
        Some(Self {
            hidden: Matrix::zeros(config.hidden_size, tokens)?,
            normed: Matrix::zeros(config.hidden_size, tokens)?,
            qkv: Matrix::zeros(q_dim + 2 * kv_dim, tokens)?,
            attended: Matrix::zeros(q_dim, tokens)?,
            gated: Matrix::zeros(config.feed_forward_length, tokens)?,
            logits: bytemuck::try_zeroed_vec(config.vocab_size.checked_mul(tokens)?).ok()?,
        })
    }
}

impl CpuBackend {
    /// Appends `tokens` to the KV cache at `position` and computes the logits after those of them that `wanted` numbers:
    /// (vocab_size, wanted.len()).
    pub(super) fn compute(
        &mut self,
        tokens: &[u32],
        position: usize,
        wanted: Range<usize>,
    ) -> &[f32] {
        let Self {
            model,
            workers,
            cache,
            rope,
            activations,
            ..
        } = self;
        let Model {
            config, weights, ..
        } = &**model;
        let epsilon = config.rms_norm_epsilon;
        rope.seek(position, tokens.len());
        workers.install(|| {
            let chunk = 0..tokens.len();
            let Activations {
                hidden,
                normed,
                qkv,
                attended,
                gated,
                logits,
            } = activations;
            for (i, token) in tokens.iter().enumerate() {
                let row_bytes = weights.token_embd.row_bytes();
                let row = &weights.token_embd.bytes()[*token as usize * row_bytes..][..row_bytes];
                weights
                    .token_embd
                    .tensor_type()
                    .dequantize(row, hidden.row_mut(i));
            }
            for (layer, layer_weights) in weights.layers.iter().enumerate() {
                norm(hidden, &layer_weights.attn_norm, epsilon, normed, &chunk);
                let LayerWeights {
                    attn_q,
                    attn_k,
                    attn_v,
                    ..
                } = layer_weights;
                matmul(
                    workers,
                    &[attn_q, attn_k, attn_v],
                    normed,
                    chunk.clone(),
                    &qkv.share(),
                    |out, x| *out = x,
                );
                for i in chunk.clone() {
                    finish_qkv(config, layer_weights, rope, i, qkv.row_mut(i));
                    let q_dim = config.head_count * config.head_dim;
                    let (key, value) =
                        qkv.row(i)[q_dim..].split_at(config.head_count_kv * config.head_dim);
                    cache.store(layer, position + i, key, value);
                }
                attend(
                    workers,
                    config,
                    cache,
                    layer,
                    position,
                    tokens.len(),
                    qkv,
                    attended,
                );
                matmul(
                    workers,
                    &[&layer_weights.attn_output],
                    attended,
                    chunk.clone(),
                    &hidden.share(),
                    |out, x| *out += x,
                );

                norm(hidden, &layer_weights.ffn_norm, epsilon, normed, &chunk);
                let LayerWeights {
                    ffn_gate,
                    ffn_up,
                    ffn_down,
                    ..
                } = layer_weights;
                matmul_swiglu(workers, ffn_gate, ffn_up, normed, tokens.len(), gated);
                matmul(
                    workers,
                    &[ffn_down],
                    gated,
                    chunk.clone(),
                    &hidden.share(),
                    |out, x| *out += x,
                );
            }
            norm(hidden, &weights.output_norm, epsilon, normed, &wanted);
            let logits = &mut logits[..config.vocab_size * wanted.len()];
            let out = SharedMatrix::new(logits, config.vocab_size);
            matmul(
                workers,
                &[&weights.output],
                normed,
                wanted,
                &out,
                |out, x| *out = x,
            );
            &*logits
        })
    }
}

fn norm(x: &Matrix, weight: &[f32], epsilon: f32, out: &mut Matrix, tokens: &Range<usize>) {
    for token in tokens.clone() {
        ops::rms_norm(x.row(token), weight, epsilon, out.row_mut(token));
    }
}

/// Adds the biases to one token's queries, keys and values, and normalizes and rotates the heads of the first two.
fn finish_qkv(config: &Config, weights: &LayerWeights, rope: &Rope, token: usize, qkv: &mut [f32]) {
    let kv_dim = config.head_count_kv * config.head_dim;
    let (q, kv) = qkv.split_at_mut(config.head_count * config.head_dim);
    let (k, v) = kv.split_at_mut(kv_dim);
    for (x, bias) in [
        (&mut *q, &weights.attn_q_bias),
        (&mut *k, &weights.attn_k_bias),
        (&mut *v, &weights.attn_v_bias),
    ] {
        if let Some(bias) = bias {
            ops::add(x, bias);
        }
    }
    for (heads, norm) in [(q, &weights.attn_q_norm), (k, &weights.attn_k_norm)] {
        for head in heads.chunks_exact_mut(config.head_dim) {
            if let Some(norm) = norm {
                ops::rms_norm_in_place(head, norm, config.rms_norm_epsilon);
            }
            rope.rotate(token, head);
        }
    }
}

/// Attends with every head of every token over the positions up to its own.
#[allow(clippy::too_many_arguments)]
fn attend(
    workers: &Workers,
    config: &Config,
    cache: &KvCache,
    layer: usize,
    position: usize,
    tokens: usize,
    qkv: &Matrix,
    out: &mut Matrix,
) {
    let out = out.share();
    workers.run(tokens * config.head_count, |task, scratch| {
        // The last token has the most positions to attend over, so that it comes first.
        let (token, head) = (
            tokens - 1 - task / config.head_count,
            task % config.head_count,
        );
        let head_kv = head / (config.head_count / config.head_count_kv);
        let values = head * config.head_dim..(head + 1) * config.head_dim;
        let query = &qkv.row(token)[values.clone()];
        // SAFETY: no other task has this head of this token.
        let out = unsafe { out.part(token, values) };
        cache.attend(
            layer,
            head_kv,
            position + token + 1,
            query,
            &mut scratch.scores,
            out,
        );
    });
}
