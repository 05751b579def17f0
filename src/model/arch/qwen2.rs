//! Qwen2 and Qwen2.5: Yang et al., <https://arxiv.org/abs/2407.10671>. Queries, keys and values have biases.

use anyhow::Result;

use super::{
    super::decoder::{Activation, Decoder, RopeStyle},
    Architecture, Source,
};

pub const QWEN2: Architecture = Architecture {
    name: "qwen2",
    describe,
};

fn describe(source: &Source) -> Result<Decoder> {
    let shape = source.shape()?;
    let rope = source.rope(RopeStyle::Neox, shape.head_dim)?.into();
    source.decoder(&shape, &source.ends(&shape)?, |tensors| {
        let mut attention = tensors.attention(&rope)?;
        tensors.add_qkv_bias(&mut attention)?;
        tensors.pre_norm(attention, tensors.feed_forward(Activation::Silu)?)
    })
}
