//! Llama: Touvron et al., <https://arxiv.org/abs/2302.13971>, grouped queries and rotation factors as in Llama 3,
//! <https://arxiv.org/abs/2407.21783>.

use anyhow::Result;

use super::{
    super::decoder::{Activation, Decoder, Layer, RopeStyle},
    Architecture, Source,
};

pub const LLAMA: Architecture = Architecture {
    name: "llama",
    describe,
};

fn describe(source: &Source) -> Result<Decoder> {
    let shape = source.shape()?;
    let mut rope = source.rope(RopeStyle::Interleaved, shape.head_dim)?;
    rope.factors = source.optional_vector("rope_freqs.weight", rope.dimensions / 2)?;
    let rope = rope.into();
    let layer = |layer| {
        let tensors = source.layer(&shape, layer);
        Ok(Layer {
            attention: tensors.attention(&rope)?,
            feed_forward: tensors.feed_forward(Activation::Silu)?,
            output_scale: None,
        })
    };
    source.pre_norm_decoder(&shape, layer)
}
