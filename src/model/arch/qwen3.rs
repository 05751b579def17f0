//! Qwen3: Yang et al., <https://arxiv.org/abs/2505.09388>. Queries and keys are normalized per head before they are rotated.

use anyhow::Result;

use super::{
    super::decoder::{Activation, Decoder, RopeStyle},
    Architecture, Source,
};

pub const QWEN3: Architecture = Architecture {
    name: "qwen3",
    describe,
};

fn describe(source: &Source) -> Result<Decoder> {
    let shape = source.shape()?;
    let rope = source.rope(RopeStyle::Neox, shape.head_dim)?.into();
    source.decoder(&shape, &source.ends(&shape)?, |tensors| {
        let mut attention = tensors.attention(&rope)?;
        tensors.add_qk_norm(&mut attention, shape.head_dim, shape.head_dim)?;
        tensors.pre_norm(attention, tensors.feed_forward(Activation::Silu)?)
    })
}
