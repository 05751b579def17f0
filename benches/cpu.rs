//! Speed of the CPU backend: `cargo bench --bench cpu [-- model.gguf...]`.
//!
//! Prints tokens/s of the built-in demo model and of every file named, in float32 and with activations of 8 bits, best of
//! several rounds: `prefill` reads 512 tokens, `decode` appends single tokens to them. `SHARPI_THREADS` sets the number of
//! workers.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::Result;
use sharpi::{
    backend::{Backend, Batch, Want},
    cpu::{Arithmetic, CpuBackend, Options},
    model::Model,
};

const PROMPT_LEN: usize = 512;
const DECODE_LEN: usize = 64;
const ROUNDS: usize = 4;

fn main() -> Result<()> {
    let threads = std::env::var("SHARPI_THREADS").map_or(Ok(0), |threads| threads.parse())?;
    measure("stories-10m (built in)", Model::demo()?, threads)?;
    for path in std::env::args()
        .skip(1)
        .filter(|argument| !argument.starts_with("--"))
    {
        measure(&path, Model::open(Path::new(&path))?, threads)?;
    }
    Ok(())
}

fn measure(name: &str, model: Model, threads: usize) -> Result<()> {
    let vocab_size = model.decoder.vocab_size;
    let tokens: Vec<u32> = (0..PROMPT_LEN + DECODE_LEN)
        .map(|i| (i * 31 % vocab_size) as u32)
        .collect();
    let (prompt, rest) = tokens.split_at(PROMPT_LEN);
    for arithmetic in [Arithmetic::Exact, Arithmetic::EightBits] {
        let options = Options {
            arithmetic,
            ..Options::exact(threads)
        };
        let mut backend = CpuBackend::with_options(model.decoder.clone(), tokens.len(), options)?;
        let (mut prefill, mut decode) = (Duration::MAX, Duration::MAX);
        for _ in 0..ROUNDS {
            let start = Instant::now();
            let chunk_len = backend.limits().chunk_len;
            for (chunk, tokens) in prompt.chunks(chunk_len).enumerate() {
                backend.compute(Batch::prompt(tokens, chunk * chunk_len, Want::Last))?;
            }
            prefill = prefill.min(start.elapsed());
            let start = Instant::now();
            for (i, token) in rest.iter().enumerate() {
                backend.compute(Batch::decode(token, PROMPT_LEN + i))?;
            }
            decode = decode.min(start.elapsed());
        }
        println!(
            "{name}, {}, {arithmetic:?}: prefill {:.0} tokens/s, decode {:.0} tokens/s",
            backend.device(),
            PROMPT_LEN as f64 / prefill.as_secs_f64(),
            DECODE_LEN as f64 / decode.as_secs_f64(),
        );
    }
    Ok(())
}
