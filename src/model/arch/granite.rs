//! Granite 3: IBM, <https://github.com/ibm-granite/granite-3.0-language-models>. A llama with a factor for embeddings, for what
//! is added to the residual stream, for scores and for logits.

use anyhow::Result;

use super::{
    super::decoder::{Activation, Decoder, RopeStyle},
    Architecture, Source,
};

pub const GRANITE: Architecture = Architecture {
    name: "granite",
    describe,
};

fn describe(source: &Source) -> Result<Decoder> {
    let mut shape = source.shape()?;
    let factor = |key| Ok::<_, anyhow::Error>(source.nonzero(key)?.unwrap_or(1.0));
    // The residual stream is kept in units of what each branch adds. Only norms read it, and to them a unit is nothing but
    // another epsilon.
    let unit = factor("residual_scale")?;
    shape.norm_epsilon /= unit * unit;
    let mut ends = source.ends(&shape)?;
    ends.embedding_scale = Some(factor("embedding_scale")? / unit);
    let divisor = factor("logit_scale")?;
    ends.output_norm.weight = ends
        .output_norm
        .weight
        .iter()
        .map(|w| w / divisor)
        .collect();
    let rope = source.rope(RopeStyle::Interleaved, shape.head_dim)?.into();
    let scale = source.nonzero("attention.scale")?;
    source.decoder(&shape, &ends, |tensors| {
        let mut attention = tensors.attention(&rope)?;
        if let Some(scale) = scale {
            attention.scale = scale * rope.score_factor(shape.head_dim);
        }
        tensors.pre_norm(attention, tensors.feed_forward(Activation::Silu)?)
    })
}
