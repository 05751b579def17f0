//! OLMo 2: OLMo team, <https://arxiv.org/abs/2501.00656>. Branches norm what they add to the residual stream, not what they
//! read of it, and queries and keys are normalized over all heads at once.

use anyhow::Result;

use super::{
    super::decoder::{Activation, Decoder, Layer, RopeStyle},
    Architecture, Source,
};

pub const OLMO2: Architecture = Architecture {
    name: "olmo2",
    describe,
};

fn describe(source: &Source) -> Result<Decoder> {
    let shape = source.shape()?;
    let rope = source.rope(RopeStyle::Neox, shape.head_dim)?.into();
    source.decoder(&shape, &source.ends(&shape)?, |tensors| {
        let mut attention = tensors.attention(&rope)?;
        let (q_dim, kv_dim) = (attention.q_dim(), attention.kv_dim());
        tensors.add_qk_norm(&mut attention, q_dim, kv_dim)?;
        tensors.post_norm(Layer {
            attention,
            feed_forward: tensors.feed_forward(Activation::Silu)?,
            token_input: None,
            output_scale: None,
        })
    })
}
