//! Gemma 2: Gemma team, <https://arxiv.org/abs/2408.00118>. Norms before and behind each branch, every second layer with a
//! sliding window, scores and logits capped.

use anyhow::Result;

use super::{
    super::decoder::{Activation, Decoder, RopeStyle},
    Architecture, Shape, Source,
};

pub const GEMMA2: Architecture = Architecture {
    name: "gemma2",
    describe,
};

/// Every second layer sees everything, where a file does not say.
const PERIOD: usize = 2;

fn describe(source: &Source) -> Result<Decoder> {
    let shape = source.shape()?;
    let mut ends = source.ends(&shape)?;
    ends.embedding_scale = Some((shape.hidden_size as f32).sqrt());
    ends.softcap = source.nonzero("final_logit_softcapping")?;
    let rope = source.rope(RopeStyle::Neox, shape.head_dim)?.into();
    let scale = source.attention_scale(usual_scale(&shape, 46))?;
    let softcap = source.nonzero("attn_logit_softcapping")?;
    let window = source.window(&shape)?;
    let sliding = source.sliding_layers(&shape, PERIOD)?;
    source.decoder(&shape, &ends, |tensors| {
        let mut attention = tensors.attention(&rope)?;
        attention.scale = scale * rope.score_factor(shape.head_dim);
        attention.softcap = softcap;
        attention.window = window.filter(|_| sliding[tensors.index()]);
        tensors.post_norm(tensors.pre_norm(attention, tensors.feed_forward(Activation::GeluTanh)?)?)
    })
}

/// Files do not say what scores are multiplied with. It follows from the length of a head, but in the model of 27 billion
/// parameters, the one of `largest` layers, from that of an equal share of the residual stream.
pub fn usual_scale(shape: &Shape, largest: usize) -> f32 {
    let len = match shape.block_count == largest {
        true => shape.hidden_size / shape.head_count[0],
        false => shape.head_dim,
    };
    (len as f32).sqrt().recip()
}
