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
        BranchSum, Chunk, Linear, Normed, add_branch, decode_attention, decode_attention_splits,
        embed_token, finish_logits, gate_token, gemv_add, gemv_gate, gemv_store, gemv_store_gated,
        most_chunks, token_inputs,
    },
    lowering::{Branch, Finish, Group, Heads, TokenInputs, token_groups},
    params::{Activation, AttentionLayer, DecodeAttentionParams, TokenInputsParams},
    scratch::Scratch,
    tensor_types::KernelType,
    weights::DeviceWeights,
};
use crate::model::{
    Decoder, Tensor,
    decoder::{Norm, RopeStyle},
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
    let columns = decoder.hidden_size;
    let product = |tensor, activation, out| product(device, weights, tensor, activation, out);
    let one = Chunk { tokens: 1 };
    let groups = token_groups(decoder)?;
    let mut launches = Vec::new();
    // Of the norm that made what is read.
    let mut epsilon = 0.0;
    for (i, group) in groups.iter().enumerate() {
        let next_norm = || norm_behind(groups.get(i + 1), weights);
        match group {
            Group::Embed { table, scale } => {
                let table = weights.matrix(table);
                let token = scratch.inputs;
                let norm = next_norm()?;
                launches.push(embed_token(device, table, *scale, token, x, norm, normed)?);
            }
            Group::TokenInputs(inputs) => {
                launches.extend(inputs_of_token(device, decoder, weights, scratch, inputs)?);
                let norm = next_norm()?;
                launches.push(add_branch(
                    device,
                    x,
                    0,
                    BranchSum::default(),
                    columns,
                    norm,
                    normed,
                )?);
            }
            Group::Norm(norm) => match groups[..i].last() {
                Some(
                    Group::Embed { .. }
                    | Group::TokenInputs(_)
                    | Group::AddAttended(_)
                    | Group::AddGated(_),
                ) => epsilon = norm.epsilon,
                _ => bail!(NORMS),
            },
            Group::Attention { q, kv, heads } => {
                let qkv = weights.qkv(q, kv.as_ref(), [scratch.q, scratch.k, scratch.v]);
                launches.push(gemv_store(device, &qkv, normed, epsilon)?);
                // Directly behind the GEMV: it reads the position and the cache before it waits.
                let kv = &qkv[1..];
                launches.push(attention(device, weights, scratch, cache, heads, kv)?);
            }
            Group::Gate {
                gate,
                up,
                activation: function,
            } => {
                let (gate, up) = (weights.matrix(gate), weights.matrix(up));
                launches.push(gemv_gate(
                    device, gate, up, *function, normed, epsilon, activation,
                )?);
            }
            Group::GateInputs {
                gate,
                part,
                activation: function,
            } => {
                let (x, inputs) = (normed.activation, scratch.inputs_of_layer(part));
                match groups.get(i + 1) {
                    // Products with floats read no quantized values.
                    Some(Group::AddGated(Branch { matrix, .. }))
                        if matrix.tensor_type().is_float() =>
                    {
                        let gate = weights.product(gate, activation.value);
                        launches.push(gemv_store_gated(device, gate, x, *function, inputs)?);
                    }
                    _ => {
                        launches.push(product(gate, x, scratch.gate)?);
                        launches.push(gate_token(
                            device,
                            scratch.gate,
                            inputs,
                            part.len(),
                            *function,
                            activation,
                        )?);
                    }
                }
            }
            Group::AddAttended(branch) | Group::AddGated(branch) => {
                let norm = next_norm()?;
                if branch.is_plain() && norm != 0 {
                    let matrix = weights.matrix(branch.matrix);
                    launches.push(gemv_add(device, matrix, activation, x, norm, normed)?);
                } else {
                    let sum = branch_sum(branch, weights);
                    launches.push(product(branch.matrix, activation, scratch.branch)?);
                    launches.push(add_branch(
                        device,
                        x,
                        scratch.branch,
                        sum,
                        columns,
                        norm,
                        normed,
                    )?);
                }
            }
            Group::Select => {}
            Group::Logits { linear, finish } => {
                let logits = weights.linear(linear, scratch.logits);
                launches.push(gemv_store(device, &[logits], normed, epsilon)?);
                launches.extend(finishing(device, weights, finish, logits, one)?);
            }
        }
    }
    // Of all layers at once: of 128 tokens, one ends tiles.
    launches.extend(cache.compress(device, scratch.whereabouts())?);
    Ok(launches)
}

/// The weights of the norm behind what writes the residual stream, which writes for it as well; 0 where what reads it takes it
/// as it is.
pub fn norm_behind(next: Option<&Group>, weights: &DeviceWeights) -> Result<CUdeviceptr> {
    match next {
        Some(Group::Norm(Norm { weight, .. })) => Ok(weights.vector(Some(weight))),
        Some(Group::TokenInputs(_) | Group::GateInputs { .. }) => Ok(0),
        _ => bail!(NORMS),
    }
}

/// `out = W x`, of x as it is.
fn product(
    device: &Device,
    weights: &DeviceWeights,
    tensor: &Tensor,
    x: Activation,
    out: CUdeviceptr,
) -> Result<Launch> {
    let product = weights.product(tensor, out);
    gemv_store(device, &[product], as_it_is(x), 0.0)
}

/// What makes the inputs that the token gives to every layer, of its row of the embedding.
pub fn inputs_of_token(
    device: &Device,
    decoder: &Decoder,
    weights: &DeviceWeights,
    scratch: &Scratch,
    inputs: &TokenInputs,
) -> Result<[Launch; 2]> {
    let (x, out) = (scratch.normed.activation, scratch.token_inputs);
    let params = token_inputs_params(inputs, weights, scratch.inputs, out, 0)?;
    Ok([
        product(device, weights, inputs.projection, x, out)?,
        token_inputs(device, decoder.layers.len(), params, Chunk { tokens: 1 })?,
    ])
}

/// What a product reads that no norm is in front of.
fn as_it_is(activation: Activation) -> Normed {
    Normed {
        activation,
        squares: 0,
    }
}

/// What becomes of a branch whose product is `branch.matrix`'s.
pub fn branch_sum(branch: &Branch, weights: &DeviceWeights) -> BranchSum {
    BranchSum {
        norm: weights.vector(branch.norm.map(|norm| &norm.weight)),
        epsilon: branch.norm.map_or(0.0, |norm| norm.epsilon),
        scale: branch.scale.unwrap_or(1.0),
    }
}

/// What makes `projected` the inputs that `token` gives to every layer. `rms`: f32 (tokens) that the projection is multiplied
/// with, or 0.
pub fn token_inputs_params(
    inputs: &TokenInputs,
    weights: &DeviceWeights,
    token: CUdeviceptr,
    projected: CUdeviceptr,
    rms: CUdeviceptr,
) -> Result<TokenInputsParams> {
    let table = weights.matrix(inputs.table);
    Ok(TokenInputsParams {
        table: table.address,
        token,
        projected,
        rms,
        norm: weights.vector(Some(&inputs.norm.weight)),
        row_scale: inputs.row_scale,
        projection_scale: inputs.projection_scale,
        sum_scale: inputs.sum_scale,
        epsilon: inputs.norm.epsilon,
        tensor_type: KernelType::of(table.tensor_type)?.id,
        width: inputs.norm.weight.len() as i32,
    })
}

/// What is to be done with the logits behind their product, if anything.
pub fn finishing(
    device: &Device,
    weights: &DeviceWeights,
    finish: &Finish,
    logits: Linear,
    chunk: Chunk,
) -> Result<Option<Launch>> {
    let count = finish.suppressed.map_or(0, |tokens| tokens.len());
    if finish.softcap.is_none() && count == 0 {
        return Ok(None);
    }
    let suppressed = weights.tokens(finish.suppressed);
    let (softcap, rows) = (finish.softcap.unwrap_or(0.0), logits.weights.rows);
    let launch = finish_logits(device, logits.out, softcap, suppressed, count, rows, chunk)?;
    Ok(Some(launch))
}

/// Where a layer's keys and values are before their norms, by the products that make them, which may be one for both; 0 where
/// there are none.
pub fn key_value_addresses(products: &[Linear]) -> [CUdeviceptr; 2] {
    [products.first(), products.last()].map(|product| product.map_or(0, |product| product.out))
}

/// One layer's attention as a launch, behind the products `kv` of keys and values.
fn attention(
    device: &Device,
    weights: &DeviceWeights,
    scratch: &Scratch,
    cache: &KvCache,
    heads: &Heads,
    kv: &[Linear],
) -> Result<Launch> {
    let attention = heads.attention;
    let (head_dim, head_count_kv) = (attention.head_dim, attention.head_count_kv);
    let splits = decode_attention_splits(device, head_count_kv, attention.group());
    // No more pieces than a window has: blocks without one only take time to start.
    let splits = splits.min(attention.window.map_or(usize::MAX, most_chunks));
    let [k, v] = key_value_addresses(kv);
    let at = scratch.whereabouts();
    let params = DecodeAttentionParams {
        q: scratch.q,
        k,
        v,
        layer: attention_layer(weights, cache, heads),
        position: at.position,
        place: at.place_in(&cache.layout().layers[heads.layer]),
        partial: scratch.attention_partial,
        finished: scratch.attention_counters,
        out: scratch.activation,
        tiles: cache.tiles(heads.layer),
        tile_ring: 0,
        tile_depth: 0,
    };
    let kept = cache.kept(heads.layer);
    decode_attention(device, head_dim, head_count_kv, splits, kept, params)
}

/// What attention takes of its layer.
pub fn attention_layer(weights: &DeviceWeights, cache: &KvCache, heads: &Heads) -> AttentionLayer {
    let attention = heads.attention;
    let ring = cache.ring(heads.layer);
    AttentionLayer {
        q_norm: weights.vector(heads.q_norm),
        k_norm: weights.vector(heads.k_norm),
        v_norm: weights.vector(heads.v_norm),
        frequencies: weights.frequencies(heads.rope),
        k_cache: ring.keys,
        v_cache: ring.values,
        epsilon: heads.epsilon,
        context: ring.capacity as i32,
        group: attention.group() as i32,
        rope_dims: heads.rope.dimensions as i32,
        interleaved: i32::from(heads.rope.style == RopeStyle::Interleaved),
        scale: heads.exponent_scale(),
        rope_factor: heads.rope.rotation_factor(attention.head_dim),
        window: attention.window.unwrap_or(0) as i32,
        softcap: heads.exponent_softcap(),
        stores: i32::from(heads.stores),
    }
}
