//! What a prompt cache costs and saves: `cargo bench --bench prompt_cache -- model.gguf [tokens [device]]`.
//!
//! Reads a prompt of 8,000 made-up tokens, or as many as are given, on the first GPU where there is one, or with `cpu` on the
//! CPU; stores it, opens the file again, and lets a second session go on behind it. Prints the time of each part, and
//! whether the first token and those that follow are the same.

use std::{ops::ControlFlow, path::Path, time::Instant};

use anyhow::{Context, Result, ensure};
use sharpi::{
    backend::{Backend, KvOptions},
    cpu::{self, CpuBackend},
    cuda::{self, CudaBackend, Device, Gpus},
    engine::{Identity, PromptCache, Session, made_up_tokens, model_id},
    model::Model,
};

/// Tokens that are decoded behind the prompt.
const DECODED: usize = 8;

fn main() -> Result<()> {
    let mut args = std::env::args()
        .skip(1)
        .filter(|argument| !argument.starts_with("--"));
    let model = args
        .next()
        .context("name a model: -- model.gguf [tokens [cpu]]")?;
    let len = args.next().map_or(Ok(8000), |len| len.parse())?;
    let on_gpu =
        args.next().is_none_or(|device| device != "cpu") && matches!(cuda::list()?, Gpus::Here(_));
    let model = Model::open(Path::new(&model))?;
    let session = || -> Result<Session> {
        let start = Instant::now();
        let session = Session::new(open(&model, len + DECODED, on_gpu)?);
        println!(
            "loaded on {} in {:.0?}",
            session.backend().device(),
            start.elapsed()
        );
        Ok(session)
    };
    let prompt = made_up_tokens(len, model.decoder.vocab_size);
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("prompt");

    let mut first = session()?;
    first.keep_prompts();
    let start = Instant::now();
    let token = read(&mut first, &prompt)?;
    println!("first token without a cache: {:.1?}", start.elapsed());
    let text = decode(&mut first, token)?;
    let start = Instant::now();
    let id = model_id(model.gguf.fingerprint(), &model.decoder);
    println!("model identified in {:.1?}", start.elapsed());
    let identity = Identity::new(&id, first.backend());
    let start = Instant::now();
    let bytes = PromptCache::write(&path, &identity, &mut first, &|| true)?;
    let bytes = bytes.context("the prompt was kept")?;
    println!("{bytes} bytes stored in {:.1?}", start.elapsed());
    drop(first);

    let mut second = session()?;
    let start = Instant::now();
    let cache = PromptCache::open(&path)?;
    println!("opened and verified in {:.1?}", start.elapsed());
    let start = Instant::now();
    let reusable = cache.reusable(&prompt, &identity, second.backend())?;
    ensure!(reusable == len, "{reusable} tokens of {len} can be reused");
    cache.restore(&mut second)?;
    println!("restored in {:.1?}", start.elapsed());
    ensure!(read(&mut second, &prompt)? == token, "another first token");
    println!("first token from then on, with it: {:.1?}", start.elapsed());
    ensure!(decode(&mut second, token)? == text, "another text");
    println!("the same {DECODED} tokens follow");
    Ok(())
}

fn open(model: &Model, context_len: usize, on_gpu: bool) -> Result<Box<dyn Backend>> {
    if !on_gpu {
        let kv = KvOptions::default();
        let cpu = CpuBackend::with_options(
            model.decoder.clone(),
            context_len,
            cpu::Options {
                kv,
                ..cpu::Options::exact(0)
            },
        )?;
        return Ok(Box::new(cpu));
    }
    let options = cuda::Options {
        context_len: Some(context_len),
        ..cuda::Options::default()
    };
    let cuda = CudaBackend::new(
        Device::open(0)?,
        model.decoder.clone(),
        &options,
        &mut |_, _| {},
    )?;
    Ok(Box::new(cuda))
}

/// The likeliest token behind the prompt.
fn read(session: &mut Session, prompt: &[u32]) -> Result<u32> {
    let logits = session.prefill(prompt, &mut |_, _| ControlFlow::Continue(()))?;
    Ok(likeliest(logits.context("it was not interrupted")?))
}

/// The tokens that follow `token`.
fn decode(session: &mut Session, mut token: u32) -> Result<Vec<u32>> {
    let next = |_| {
        token = likeliest(session.decode(token)?);
        Ok(token)
    };
    (0..DECODED).map(next).collect()
}

fn likeliest(logits: &[f32]) -> u32 {
    let most = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
    most.map_or(0, |(id, _)| id as u32)
}
