//! Gemma 4, <https://ai.google.dev/gemma/docs/core>: as Gemma 3, with heads twice as long in the layers that see everything,
//! values that are normalized too, and, in the small models, last layers that attend over the keys and values of earlier ones
//! and an input of the token itself for every layer.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};

use super::{
    super::decoder::{
        Activation, Decoder, KeyValues, Layer, Norm, OwnKeyValues, RopeStyle, Vector,
    },
    Architecture, LayerSource, Shape, Source,
};

pub const GEMMA4: Architecture = Architecture {
    name: "gemma4",
    describe,
};

/// Every sixth layer sees everything, where a file does not say.
const PERIOD: usize = 6;

fn describe(source: &Source) -> Result<Decoder> {
    let shape = source.shape()?;
    let mut ends = source.ends(&shape)?;
    ends.embedding_scale = Some((shape.hidden_size as f32).sqrt());
    ends.softcap = source.nonzero("final_logit_softcapping")?;
    ends.suppressed = source.suppressed_tokens(&shape);
    source.add_token_inputs(&shape, &mut ends)?;
    let head_dim = shape.head_dim;
    let mut rope = source.rope(RopeStyle::Neox, head_dim)?;
    rope.factors = source.optional_vector("rope_freqs.weight", rope.dimensions / 2)?;
    let sliding_head_dim = source.sliding_head_dim()?;
    let sliding_rope = Arc::new(source.sliding_rope(&rope, sliding_head_dim)?);
    let rope = Arc::new(rope);
    let scale = source.attention_scale(1.0)?;
    let window = source.window(&shape)?;
    let sliding = source.sliding_layers(&shape, PERIOD)?;
    let owners = owners(&sliding, source.shared_kv_layers(&shape)?)?;
    source.decoder(&shape, &ends, |tensors| {
        let index = tensors.index();
        let (rope, head_dim) = match sliding[index] {
            true => (&sliding_rope, sliding_head_dim),
            false => (&rope, head_dim),
        };
        let kv = match owners[index] {
            owner if owner == index => {
                KeyValues::Own(own_key_values(tensors, &shape, head_dim)?.into())
            }
            owner => {
                ensure!(
                    shape.head_count_kv[index] == shape.head_count_kv[owner],
                    "layer {index} shares the keys and values of layer {owner}, and they have {} and {} heads for them",
                    shape.head_count_kv[index],
                    shape.head_count_kv[owner]
                );
                // Some files carry them nevertheless.
                tensors.ignore(&["attn_k", "attn_v", "attn_k_norm"]);
                KeyValues::SharedWith(owner)
            }
        };
        let q_dim = shape.head_count[index] * head_dim;
        let q = tensors.linear("attn_q", [shape.hidden_size, q_dim])?;
        let mut attention = tensors.attention_over(kv, q, rope, head_dim)?;
        attention.q_norm = Some(tensors.norm("attn_q_norm", head_dim)?);
        attention.scale = scale * rope.score_factor(head_dim);
        attention.window = window.filter(|_| sliding[index]);
        let activation = Activation::GeluTanh;
        let layer = tensors.pre_norm(attention, tensors.feed_forward(activation)?)?;
        Ok(Layer {
            token_input: tensors.token_input(activation)?,
            output_scale: tensors.optional_scalar("layer_output_scale")?,
            ..tensors.post_norm(layer)?
        })
    })
}

/// Keys and values that are both normalized, values by the norm alone. Where the file has no matrix of values, they are what
/// keys are before their norm.
fn own_key_values(tensors: &LayerSource, shape: &Shape, head_dim: usize) -> Result<OwnKeyValues> {
    let kv_shape = [
        shape.hidden_size,
        shape.head_count_kv[tensors.index()] * head_dim,
    ];
    let weight: Vector = vec![1.0; head_dim].into();
    Ok(OwnKeyValues {
        k: tensors.linear("attn_k", kv_shape)?,
        v: tensors.optional_linear("attn_v", kv_shape)?,
        k_norm: Some(tensors.norm("attn_k_norm", head_dim)?),
        v_norm: Some(Norm {
            weight,
            epsilon: shape.norm_epsilon,
        }),
    })
}

/// Of each layer, the one whose keys and values it reads: itself, or, for the last `sharing` layers, the last one before these
/// that slides, or does not, as it does.
fn owners(sliding: &[bool], sharing: usize) -> Result<Vec<usize>> {
    let first_sharing = sliding.len() - sharing;
    let owner = |layer: usize| {
        if layer < first_sharing {
            return Ok(layer);
        }
        let mut own = sliding[..first_sharing].iter();
        let owner = own.rposition(|kind| *kind == sliding[layer]);
        owner.with_context(|| {
            format!(
                "layer {layer} shares keys and values, and no layer of its kind before the last {sharing} has any"
            )
        })
    };
    (0..sliding.len()).map(owner).collect()
}
