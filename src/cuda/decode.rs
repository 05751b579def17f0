//! The decode region: a decoder lowered to the launches between a token's id and the logits after it, with all arguments
//! fixed. What varies from token to token (its id and position) lies in device memory, so the list is made once and can be
//! captured.
//!
//! GEMVs read their input quantized. Norms are part of them: whoever writes the residual stream also writes it times the
//! weights of the norm that reads it next, and whoever reads that divides by the root mean square.

use anyhow::{Result, bail};
use cudarc::driver::sys::CUdeviceptr;

use super::{
    device::{Device, Launch},
    kv_cache::KvCache,
    launches::{
        Linear, decode_attention, decode_attention_splits, embed_token, gemv_add, gemv_store,
        gemv_swiglu,
    },
    lowering::{Group, Heads, token_groups},
    params::{AttentionLayer, DecodeAttentionParams},
    scratch::Scratch,
    weights::DeviceWeights,
};
use crate::model::{
    Decoder,
    decoder::{self, Norm, RopeStyle},
};

/// What the launches ask of the order of norms.
const NORMS: &str = "decoding on CUDA takes a norm behind each write of the residual stream, and nowhere else: use --device cpu";

/// The launches of one token, in order.
///
/// # Errors
/// Operations for which there is no launch.
pub fn lower(
    device: &Device,
    decoder: &Decoder,
    weights: &DeviceWeights,
    scratch: &Scratch,
    cache: &KvCache,
) -> Result<Vec<Launch>> {
    let (x, normed, activation) = (scratch.hidden, scratch.normed, scratch.activation);
    let store = |linear: &decoder::Linear, out| Linear {
        weights: weights.matrix(&linear.weights),
        bias: weights.vector(linear.bias.as_ref()),
        out,
    };
    let groups = token_groups(decoder)?;
    let mut launches = Vec::new();
    // Of the norm that made what is read.
    let mut epsilon = 0.0;
    for (i, group) in groups.iter().enumerate() {
        let norm = || norm_behind(groups.get(i + 1), weights);
        match group {
            Group::Embed { table, scale } => {
                let table = weights.matrix(table);
                let token = scratch.inputs;
                let norm = norm()?;
                launches.push(embed_token(device, table, *scale, token, x, norm, normed)?);
            }
            Group::Norm(norm) => match groups[..i].last() {
                Some(Group::Embed { .. } | Group::AddAttended(_) | Group::AddGated(_)) => {
                    epsilon = norm.epsilon;
                }
                _ => bail!(NORMS),
            },
            Group::Attention { q, k, v, heads } => {
                let qkv = [
                    store(q, scratch.q),
                    store(k, scratch.k),
                    store(v, scratch.v),
                ];
                launches.push(gemv_store(device, &qkv, normed, epsilon)?);
                // Directly behind the GEMV: it reads the position and the cache before it waits.
                launches.push(attention(device, weights, scratch, cache, heads)?);
            }
            Group::Gate { gate, up } => {
                let (gate, up) = (weights.matrix(gate), weights.matrix(up));
                launches.push(gemv_swiglu(device, gate, up, normed, epsilon, activation)?);
            }
            Group::AddAttended(matrix) | Group::AddGated(matrix) => {
                let matrix = weights.matrix(matrix);
                launches.push(gemv_add(device, matrix, activation, x, norm()?, normed)?);
            }
            Group::Select => {}
            Group::Logits(linear) => {
                let logits = store(linear, scratch.logits);
                launches.push(gemv_store(device, &[logits], normed, epsilon)?);
            }
        }
    }
    Ok(launches)
}

/// The weights of the norm that `next` is: what writes the residual stream writes for the norm behind it as well.
pub fn norm_behind(next: Option<&Group>, weights: &DeviceWeights) -> Result<CUdeviceptr> {
    match next {
        Some(Group::Norm(Norm { weight, .. })) => Ok(weights.vector(Some(weight))),
        _ => bail!(NORMS),
    }
}

/// One layer's attention as a launch.
fn attention(
    device: &Device,
    weights: &DeviceWeights,
    scratch: &Scratch,
    cache: &KvCache,
    heads: &Heads,
) -> Result<Launch> {
    let attention = heads.attention;
    let splits = decode_attention_splits(device, attention.head_count_kv, attention.group());
    let params = DecodeAttentionParams {
        q: scratch.q,
        k: scratch.k,
        v: scratch.v,
        layer: attention_layer(weights, cache, heads),
        position: scratch.position(),
        partial: scratch.attention_partial,
        finished: scratch.attention_counters,
        out: scratch.activation,
    };
    let (head_dim, head_count_kv) = (attention.head_dim, attention.head_count_kv);
    decode_attention(device, head_dim, head_count_kv, splits, params)
}

/// What attention takes of its layer.
pub fn attention_layer(weights: &DeviceWeights, cache: &KvCache, heads: &Heads) -> AttentionLayer {
    let attention = heads.attention;
    AttentionLayer {
        q_norm: weights.vector(heads.q_norm),
        k_norm: weights.vector(heads.k_norm),
        v_norm: 0,
        frequencies: weights.frequencies(heads.rope),
        k_cache: cache.keys(heads.layer),
        v_cache: cache.values(heads.layer),
        epsilon: heads.epsilon,
        context: cache.capacity(heads.layer) as i32,
        group: attention.group() as i32,
        rope_dims: heads.rope.dimensions as i32,
        interleaved: i32::from(heads.rope.style == RopeStyle::Interleaved),
        scale: heads.exponent_scale(),
        rope_factor: heads.rope.rotation_factor(attention.head_dim),
        window: attention.window.unwrap_or(0) as i32,
        softcap: attention.softcap.unwrap_or(0.0) * std::f32::consts::LOG2_E,
        stores: 1,
    }
}
