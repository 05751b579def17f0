//! Prompts that are kept in files, on any backend.

use std::{ops::ControlFlow, path::Path, sync::Arc};

use anyhow::{Context, Result, ensure};
use sharpi::{
    backend::{KvOptions, Tiles},
    engine::{Identity, PromptCache, Session, made_up_tokens, model_id},
    model::Model,
    quant::TensorType,
};

use super::gguf_writer::RandomModel;

/// Of a prompt: several tiles, and more than all rings hold.
pub const LEN: usize = 450;
pub const CONTEXT_LEN: usize = 1024;

/// More tokens than all rings can go back.
const FOLLOWING: usize = 140;

/// Two layers, the second with a sliding window where one is given.
pub fn model(window: Option<usize>) -> Arc<Model> {
    let random = RandomModel {
        context_length: 2 * CONTEXT_LEN as u32,
        ..RandomModel::new("qwen3", TensorType::F16)
    };
    let mut model = random.model().expect("a good model");
    let model_itself = Arc::get_mut(&mut model).expect("nobody else has it");
    let decoder = Arc::get_mut(&mut model_itself.decoder).expect("nobody else has it");
    decoder.layers[1].attention.window = window;
    model
}

/// Windows and caches.
pub fn ways() -> Vec<(Option<usize>, KvOptions)> {
    let mut ways = Vec::new();
    for window in [None, Some(50)] {
        for tiles in [None, Some(Tiles::of(4, 3))] {
            for budget in [None, Some(68)] {
                ways.push((window, KvOptions { tiles, budget }));
            }
        }
    }
    ways
}

pub fn identity(model: &Model, session: &Session) -> Identity {
    let id = model_id(model.gguf.fingerprint(), &model.decoder);
    Identity::new(&id, session.backend())
}

/// The bits of the logits behind a prompt, and how many of its tokens were there before.
pub fn read(session: &mut Session, prompt: &[u32]) -> Result<(Vec<u32>, usize)> {
    let mut there = None;
    let mut progress = |done, _| {
        there.get_or_insert(done);
        ControlFlow::Continue(())
    };
    let logits = session.prefill(prompt, &mut progress)?;
    let logits = bits(logits.context("it was not interrupted")?);
    Ok((logits, there.context("progress is heard of")?))
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// The bits of the logits behind each of some tokens that follow.
pub fn decode(session: &mut Session, tokens: &[u32]) -> Result<Vec<u32>> {
    let mut all = Vec::new();
    for &token in tokens {
        all.extend(bits(session.decode(token)?));
    }
    Ok(all)
}

/// Writes the prompt that the session has kept, and returns the bytes of the file.
pub fn write(path: &Path, model: &Model, session: &mut Session) -> Result<u64> {
    let identity = identity(model, session);
    let written = PromptCache::write(path, &identity, session, &|| true)?;
    written.context("a prompt was kept")
}

/// Brings what the file has of `prompt` to `session`, and returns how many tokens that is.
pub fn restore(path: &Path, model: &Model, session: &mut Session, prompt: &[u32]) -> Result<usize> {
    let cache = PromptCache::open(path)?;
    let reusable = cache.reusable(prompt, &identity(model, session), session.backend())?;
    if reusable > 0 {
        cache.restore(session)?;
    }
    Ok(reusable)
}

/// The same prompt, a longer one, such as part from it, within what rings remember and before, and one that is a token shorter.
fn next_prompts(prompt: &[u32]) -> Vec<Vec<u32>> {
    let mut prompts = vec![prompt.to_vec(), prompt[..LEN - 1].to_vec()];
    for shared in [LEN - 9, LEN, 200] {
        let rest = prompt.iter().rev().take(LEN + 20 - shared);
        prompts.push(prompt[..shared].iter().chain(rest).copied().collect());
    }
    prompts
}

/// Asserts that sessions which `open` makes for contexts of a length go on from a file as from the prompt, with the same bits.
pub fn goes_on(model: &Model, open: &dyn Fn(usize) -> Result<Session>) -> Result<()> {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("prompt");
    let prompt = made_up_tokens(LEN, model.decoder.vocab_size);
    let open = |context_len| -> Result<Session> {
        let mut session = open(context_len)?;
        session.keep_prompts();
        Ok(session)
    };
    let mut first = open(CONTEXT_LEN)?;
    read(&mut first, &prompt)?;
    decode(&mut first, &prompt[..FOLLOWING])?;
    write(&path, model, &mut first)?;
    // In a longer context everything lies elsewhere.
    let context_lens = [CONTEXT_LEN, CONTEXT_LEN + 520];
    for (next, context_len) in next_prompts(&prompt)
        .iter()
        .zip(context_lens.iter().cycle())
    {
        let case = format!("a prompt of {}", next.len());
        let mut same = open(CONTEXT_LEN)?;
        read(&mut same, &prompt)?;
        let (logits, there) = read(&mut same, next)?;
        let mut session = open(*context_len)?;
        let restored = restore(&path, model, &mut session, next)?;
        let (logits_again, there_again) = read(&mut session, next)?;
        ensure!(
            (restored, there_again) == (there, there),
            "{case}: {restored} tokens are restored, {there_again} are there, and {there} were"
        );
        ensure!(logits_again == logits, "{case}: other logits");
        let text = decode(&mut same, &prompt[..3])?;
        let text_again = decode(&mut session, &prompt[..3])?;
        ensure!(text_again == text, "{case}: other logits in the text");
    }
    // What was restored can be kept again, and is what it was.
    let mut again = open(CONTEXT_LEN)?;
    restore(&path, model, &mut again, &prompt)?;
    decode(&mut again, &prompt[..FOLLOWING])?;
    let first = std::fs::read(&path)?;
    write(&path, model, &mut again)?;
    ensure!(
        first == std::fs::read(&path)?,
        "other bytes when kept again"
    );
    Ok(())
}
