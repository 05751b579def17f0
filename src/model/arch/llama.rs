//! Llama: Touvron et al., <https://arxiv.org/abs/2302.13971>, grouped queries and rotation factors as in Llama 3,
//! <https://arxiv.org/abs/2407.21783>, heads of any length as in Mistral NeMo, and Mistral's sliding window,
//! <https://arxiv.org/abs/2310.06825>.

use anyhow::Result;

use super::{
    super::decoder::{Activation, Decoder, RopeStyle},
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
    let window = source.window(&shape)?;
    source.decoder(&shape, &source.ends(&shape)?, |tensors| {
        let mut attention = tensors.attention(&rope)?;
        attention.window = window;
        tensors.pre_norm(attention, tensors.feed_forward(Activation::Silu)?)
    })
}
