//! The architectures: each is one file that says how metadata and tensors become a [`Decoder`].
//!
//! A new one is a file beside these and its line in [`ALL`].

mod gemma2;
mod gemma3;
mod gemma4;
mod granite;
mod llama;
mod olmo2;
mod phi3;
mod qwen2;
mod qwen3;
mod source;
mod unused;

use anyhow::{Context, Result, bail, ensure};

pub use source::{LayerSource, RopeOptions, RopeScalingType, Shape, Source};

use super::{
    decoder::Decoder,
    gguf::{Gguf, quoted},
};

/// An architecture that sharpi runs.
#[derive(Clone, Copy)]
pub struct Architecture {
    /// `general.architecture`, and the prefix of every hyper-parameter's key.
    pub name: &'static str,
    pub describe: fn(&Source) -> Result<Decoder>,
}

/// Those that a file may name.
pub const ALL: &[Architecture] = &[
    gemma2::GEMMA2,
    gemma3::GEMMA3,
    gemma4::GEMMA4,
    granite::GRANITE,
    llama::LLAMA,
    olmo2::OLMO2,
    phi3::PHI3,
    qwen2::QWEN2,
    qwen3::QWEN3,
];

/// Describes the model that `gguf` holds, as the one of `architectures` that it names does.
///
/// # Errors
/// Another architecture, and metadata or tensors that do not make a model of it, or that it does not use and that may
/// change the result: the message names the key or the tensor, what was found and what is expected.
pub fn describe(
    gguf: &Gguf,
    architectures: &[Architecture],
    rope: &RopeOptions,
) -> Result<Decoder> {
    const KEY: &str = "general.architecture";
    refuse_other_kinds(gguf)?;
    let name = gguf
        .str(KEY)?
        .with_context(|| format!("the metadata key \"{KEY}\" is missing"))?;
    let mut known = architectures.iter();
    let architecture = known.find(|a| a.name == name).with_context(|| {
        let supported: Vec<&str> = architectures.iter().map(|a| a.name).collect();
        format!(
            "the architecture {} is not supported, only {} are",
            quoted(name),
            supported.join(", ")
        )
    })?;
    ensure!(
        gguf.tensors().next().is_some(),
        "it has no tensors: such a file holds a vocabulary, and no model"
    );
    let source = Source::new(gguf, architecture.name, rope);
    let decoder = (architecture.describe)(&source)?;
    source.account(architecture.name)?;
    Ok(decoder)
}

/// Refuses a file that says it holds something beside a model.
fn refuse_other_kinds(gguf: &Gguf) -> Result<()> {
    const KEY: &str = "general.type";
    let what = match gguf.str(KEY)? {
        Some("adapter") => "an adapter (LoRA) for a model",
        Some("mmproj") => "what brings images or sound to a model",
        Some("imatrix") => "statistics to quantize a model by",
        _ => return Ok(()),
    };
    bail!("it holds {what}, and no model (metadata key \"{KEY}\")")
}
