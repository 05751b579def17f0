//! Gemma 3: Gemma team, <https://arxiv.org/abs/2503.19786>. Norms before and behind each branch and of queries and keys; five
//! layers with a sliding window, which rotate by a base of their own, then one that sees everything.

use std::sync::Arc;

use anyhow::Result;

use super::{
    super::decoder::{Activation, Decoder, RopeStyle},
    Architecture, Source,
    gemma2::usual_scale,
};

pub const GEMMA3: Architecture = Architecture {
    name: "gemma3",
    describe,
};

/// Every sixth layer sees everything, where a file does not say.
const PERIOD: usize = 6;

fn describe(source: &Source) -> Result<Decoder> {
    let shape = source.shape()?;
    let mut ends = source.ends(&shape)?;
    ends.embedding_scale = Some((shape.hidden_size as f32).sqrt());
    ends.softcap = source.nonzero("final_logit_softcapping")?;
    let head_dim = shape.head_dim;
    let rope = Arc::new(source.rope(RopeStyle::Neox, head_dim)?);
    let sliding_rope = Arc::new(source.sliding_rope(&rope, head_dim)?);
    let scale = source.attention_scale(usual_scale(&shape, 62))?;
    let window = source.window(&shape)?;
    let sliding = source.sliding_layers(&shape, PERIOD)?;
    source.decoder(&shape, &ends, |tensors| {
        let sliding = sliding[tensors.index()];
        let rope = if sliding { &sliding_rope } else { &rope };
        let mut attention = tensors.attention(rope)?;
        tensors.add_qk_norm(&mut attention, head_dim, head_dim)?;
        attention.scale = scale * rope.score_factor(head_dim);
        attention.window = window.filter(|_| sliding);
        tensors.post_norm(tensors.pre_norm(attention, tensors.feed_forward(Activation::GeluTanh)?)?)
    })
}
