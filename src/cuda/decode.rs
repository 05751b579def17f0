//! The decode region: every launch between a token's id and the logits after it, with all arguments fixed. What varies
//! from token to token (its id and position) lies in device memory, so the list is made once and can be captured.

use anyhow::Result;

use super::{
    device::{Device, Launch},
    launches::{
        Linear, decode_attention, decode_attention_splits, embed_token, exponent_scale, gemv_add,
        gemv_store, gemv_swiglu,
    },
    params::DecodeAttentionParams,
    scratch::{KvCache, Scratch},
    weights::DeviceWeights,
};
use crate::model::{Config, config::RopeStyle};

/// The launches of one token, in order.
pub fn region(
    device: &Device,
    config: &Config,
    weights: &DeviceWeights,
    scratch: &Scratch,
    cache: &KvCache,
) -> Result<Vec<Launch>> {
    let epsilon = config.rms_norm_epsilon;
    let group = config.head_count / config.head_count_kv;
    let splits = decode_attention_splits(device, config.head_count_kv, group);
    let (token, position) = (scratch.inputs, scratch.inputs + 4);
    let x = scratch.hidden;

    let first_norm = weights.layers[0].attn_norm;
    let mut launches = vec![embed_token(
        device,
        weights.token_embd,
        token,
        x,
        first_norm,
        scratch.normed,
    )?];
    for (i, layer) in weights.layers.iter().enumerate() {
        let qkv = [
            (layer.attn_q, layer.attn_q_bias, scratch.q),
            (layer.attn_k, layer.attn_k_bias, scratch.k),
            (layer.attn_v, layer.attn_v_bias, scratch.v),
        ]
        .map(|(weights, bias, out)| Linear { weights, bias, out });
        launches.push(gemv_store(device, &qkv, scratch.normed, epsilon)?);

        let params = DecodeAttentionParams {
            q: scratch.q,
            k: scratch.k,
            v: scratch.v,
            q_norm: layer.attn_q_norm,
            k_norm: layer.attn_k_norm,
            frequencies: weights.rope_frequencies,
            k_cache: cache.keys(i),
            v_cache: cache.values(i),
            position,
            partial: scratch.attention_partial,
            finished: scratch.attention_counters,
            out: scratch.activation,
            epsilon,
            context: cache.context_len as i32,
            group: group as i32,
            rope_dims: config.rope_dimension_count as i32,
            interleaved: i32::from(config.rope_style == RopeStyle::Interleaved),
            scale: exponent_scale(config.head_dim),
        };
        // Directly behind the GEMV: it reads the position and the cache before it waits.
        launches.push(decode_attention(
            device,
            config.head_dim,
            config.head_count_kv,
            splits,
            params,
        )?);
        launches.push(gemv_add(
            device,
            layer.attn_output,
            scratch.activation,
            x,
            layer.ffn_norm,
            scratch.normed,
        )?);

        let (gate, up) = (layer.ffn_gate, layer.ffn_up);
        launches.push(gemv_swiglu(
            device,
            gate,
            up,
            scratch.normed,
            epsilon,
            scratch.activation,
        )?);
        let next_norm = weights
            .layers
            .get(i + 1)
            .map_or(weights.output_norm, |next| next.attn_norm);
        launches.push(gemv_add(
            device,
            layer.ffn_down,
            scratch.activation,
            x,
            next_norm,
            scratch.normed,
        )?);
    }
    let output = Linear {
        weights: weights.output,
        bias: 0,
        out: scratch.logits,
    };
    launches.push(gemv_store(device, &[output], scratch.normed, epsilon)?);
    Ok(launches)
}
