//! What a run needs on the device, before any of it is taken, and the context that fits.

use anyhow::{Result, bail};

use super::{
    device::Device,
    launches::Chunk,
    scratch::{Part, decode_parts, prompt_parts},
};
use crate::{
    backend::{KvFormat, KvLayout},
    model::Decoder,
};

/// Memory that is left alone: what the driver takes later, for kernels and graphs.
const RESERVE: usize = 256 << 20;

/// All but the length of the context.
pub struct Sizing {
    weights_bytes: usize,
    scratch: Vec<Part>,
    kv_bytes_per_token: usize,
}

impl Sizing {
    /// `weights_bytes`: what the weights take. `chunk`: the largest part of a prompt that is read at once.
    pub fn new(
        device: &Device,
        decoder: &Decoder,
        weights_bytes: usize,
        chunk: Chunk,
    ) -> Result<Self> {
        let mut scratch = decode_parts(device, decoder);
        scratch.extend(prompt_parts(device, decoder, chunk)?);
        Ok(Self {
            weights_bytes,
            scratch,
            kv_bytes_per_token: KvLayout::new(decoder, 1, KvFormat::F16).bytes_per_token(),
        })
    }

    /// The context to use: `asked`, or as much of the model's own length as fits.
    ///
    /// # Errors
    /// One that lists every part, what is free, and the largest context that would fit.
    pub fn choose_context(
        &self,
        asked: Option<usize>,
        trained: usize,
        free: usize,
    ) -> Result<usize> {
        let fits = self.largest_context(free);
        let context_len = asked.unwrap_or(trained.min(fits));
        if context_len == 0 || context_len > fits {
            let mut parts = format!("weights {}", Megabytes(self.weights_bytes));
            for part in self.parts(context_len.max(1)) {
                parts += &format!(", {} {}", part.name, Megabytes(part.bytes));
            }
            let advice = match fits {
                0 => "not even a context of one token fits: use a smaller model, free memory on the GPU, or --device cpu"
                    .to_owned(),
                _ => format!("the largest context that fits is {fits} tokens"),
            };
            bail!(
                "a context of {} tokens does not fit on the GPU: {parts}, kept free for the driver {}; free are {}; {advice}",
                context_len.max(1),
                Megabytes(RESERVE),
                Megabytes(free)
            );
        }
        Ok(context_len)
    }

    /// Scratch and KV cache by part.
    pub fn parts(&self, context_len: usize) -> impl Iterator<Item = Part> {
        let cache = Part {
            name: "KV cache",
            // A context that nobody has memory for must end in a refusal, not in a small number.
            bytes: context_len.saturating_mul(self.kv_bytes_per_token),
        };
        self.scratch.iter().copied().chain([cache])
    }

    fn largest_context(&self, free: usize) -> usize {
        let fixed =
            self.weights_bytes + RESERVE + self.parts(0).map(|part| part.bytes).sum::<usize>();
        free.saturating_sub(fixed) / self.kv_bytes_per_token
    }
}

/// Bytes in a message.
struct Megabytes(usize);

impl std::fmt::Display for Megabytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.1} MB", self.0 as f64 / 1e6)
    }
}
