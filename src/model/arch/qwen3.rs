//! Qwen3: Yang et al., <https://arxiv.org/abs/2505.09388>. Queries and keys are normalized per head before they are rotated.

use anyhow::Result;

use super::{
    super::decoder::{Activation, Decoder, Layer, RopeStyle},
    Architecture, Source,
};

pub const QWEN3: Architecture = Architecture {
    name: "qwen3",
    describe,
};

fn describe(source: &Source) -> Result<Decoder> {
    let shape = source.shape()?;
    let rope = source.rope(RopeStyle::Neox, shape.head_dim)?.into();
    let layer = |layer| {
        let tensors = source.layer(&shape, layer);
        let mut attention = tensors.attention(&rope)?;
        tensors.add_qk_norm(&mut attention)?;
        Ok(Layer {
            attention,
            feed_forward: tensors.feed_forward(Activation::Silu)?,
            output_scale: None,
        })
    };
    source.pre_norm_decoder(&shape, layer)
}
