//! Phi-3, Phi-3.5 and Phi-4: Abdin et al., <https://arxiv.org/abs/2404.14219>. Queries, keys and values are one matrix, gate
//! and up another; heads may be rotated in part, and long contexts have rotation factors of their own.

use anyhow::Result;

use super::{
    super::decoder::{Activation, Decoder, RopeStyle},
    Architecture, Source,
};

pub const PHI3: Architecture = Architecture {
    name: "phi3",
    describe,
};

fn describe(source: &Source) -> Result<Decoder> {
    let mut shape = source.shape()?;
    let mut rope = source.rope(RopeStyle::Neox, shape.head_dim)?;
    source.add_long_rope(&mut shape, &mut rope)?;
    let rope = rope.into();
    let window = source.window(&shape)?;
    source.decoder(&shape, &source.ends(&shape)?, |tensors| {
        let mut attention = tensors.attention(&rope)?;
        attention.window = window;
        tensors.pre_norm(attention, tensors.feed_forward(Activation::Silu)?)
    })
}
