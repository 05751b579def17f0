//! Prompts that are kept in files, on the CPU: what a session makes of them, and what is refused.

mod common;

use std::{ops::ControlFlow, path::Path, sync::Arc};

use common::prompt_cache::{
    CONTEXT_LEN, LEN, decode, goes_on, identity, model, read, restore, ways, write,
};
use sharpi::{
    backend::KvOptions,
    cpu::{CpuBackend, Options},
    engine::{PromptCache, Session, made_up_tokens},
    model::Model,
};
use xxhash_rust::xxh3::xxh3_64;

fn session(model: &Model, context_len: usize, kv: KvOptions) -> Session {
    let backend = CpuBackend::with_options(
        model.decoder.clone(),
        context_len,
        Options {
            kv,
            ..Options::exact(2)
        },
    )
    .unwrap();
    let mut session = Session::new(Box::new(backend));
    session.keep_prompts();
    session
}

#[test]
fn a_restored_session_goes_on_as_the_one_that_read_the_prompt() {
    for (window, kv) in ways() {
        let model = model(window);
        let open = |context_len| Ok(session(&model, context_len, kv));
        goes_on(&model, &open)
            .unwrap_or_else(|error| panic!("window {window:?}, {kv:?}: {error:#}"));
    }
}

#[test]
fn a_prompt_is_read_on_with_the_bits_of_reading_it_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("prompt");
    for (window, kv) in ways().into_iter().filter(|(_, kv)| kv.budget.is_none()) {
        let model = model(window);
        let tokens = made_up_tokens(LEN, model.decoder.vocab_size);
        let mut first = session(&model, CONTEXT_LEN, kv);
        read(&mut first, &tokens[..LEN - 50]).unwrap();
        write(&path, &model, &mut first).unwrap();
        let mut restored = session(&model, CONTEXT_LEN, kv);
        restore(&path, &model, &mut restored, &tokens).unwrap();
        let mut at_once = session(&model, CONTEXT_LEN, kv);
        let (logits, there) = read(&mut restored, &tokens).unwrap();
        assert_eq!(there, LEN - 50);
        assert!(logits == read(&mut at_once, &tokens).unwrap().0, "{kv:?}");
        let [a, b] = [restored, at_once].map(|mut s| decode(&mut s, &tokens[..5]).unwrap());
        assert!(a == b, "{kv:?}");
    }
}

#[test]
fn a_prompt_that_was_read_costs_nothing_again() {
    for (window, kv) in ways() {
        let model = model(window);
        let prompt = made_up_tokens(LEN, model.decoder.vocab_size);
        let mut session = session(&model, CONTEXT_LEN, kv);
        let (logits, _) = read(&mut session, &prompt).unwrap();
        decode(&mut session, &prompt[..5]).unwrap();
        assert_eq!(read(&mut session, &prompt).unwrap(), (logits, LEN));
    }
}

#[test]
fn a_prompt_that_was_left_is_not_written() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("prompt");
    let model = model(None);
    let prompt = made_up_tokens(LEN, model.decoder.vocab_size);
    let mut session = session(&model, CONTEXT_LEN, KvOptions::default());
    let identity = identity(&model, &session);
    let written =
        |session: &mut Session| PromptCache::write(&path, &identity, session, &|| true).unwrap();
    assert_eq!(written(&mut session), None);
    read(&mut session, &prompt[..300]).unwrap();
    // The next one is interrupted.
    let mut progress = |done, _| match done {
        ..400 => ControlFlow::Continue(()),
        _ => ControlFlow::Break(()),
    };
    let logits = session.prefill(&prompt, &mut progress).unwrap();
    assert!(logits.is_none());
    assert_eq!(written(&mut session), None);
    read(&mut session, &prompt).unwrap();
    session.rewind(LEN - 1);
    assert_eq!(written(&mut session), None);
    assert!(!path.exists());
}

/// A small file, its model, and the bytes of its header.
fn small_file(path: &Path) -> (Arc<Model>, Vec<u8>, usize) {
    let model = model(None);
    let mut session = session(&model, 64, KvOptions::default());
    read(&mut session, &made_up_tokens(20, model.decoder.vocab_size)).unwrap();
    let bytes = write(path, &model, &mut session).unwrap();
    let file = std::fs::read(path).unwrap();
    assert_eq!(file.len() as u64, bytes);
    let header_len = u32::from_le_bytes(*file[20..].first_chunk().unwrap());
    (model, file, header_len as usize)
}

/// Why a file of these bytes is refused, by what reads it or by what would use it.
fn refusal(path: &Path, model: &Model, bytes: &[u8]) -> Option<String> {
    std::fs::write(path, bytes).unwrap();
    let mut session = session(model, 64, KvOptions::default());
    let identity = identity(model, &session);
    let used = PromptCache::open(path).and_then(|cache| {
        cache.reusable(cache.tokens(), &identity, session.backend())?;
        cache.restore(&mut session)
    });
    used.err().map(|error| format!("{error:#}"))
}

#[test]
fn damaged_files_are_refused_with_a_reason() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("prompt");
    let (model, file, header_len) = small_file(&path);
    assert_eq!(refusal(&path, &model, &file), None);
    let head = 48 + header_len;
    let places = || (0..head).chain((head..file.len()).step_by(997));
    let last = file.len() - 1;
    for place in places().chain([last - 8, last]) {
        let mut damaged = file.clone();
        damaged[place] ^= 0x10;
        let reason = refusal(&path, &model, &damaged);
        let reason = reason.unwrap_or_else(|| panic!("byte {place} does not matter"));
        let expected = match place {
            0..16 => "something else than a prompt cache",
            16..20 => "of version",
            _ => "damaged",
        };
        assert!(reason.contains(expected), "byte {place}: {reason}");
    }
    for len in places().chain([last]) {
        let reason = refusal(&path, &model, &file[..len]).expect("it is cut short");
        assert!(reason.contains("damaged"), "{len} bytes: {reason}");
    }
    let longer = [&file[..], b"x"].concat();
    let reason = refusal(&path, &model, &longer).expect("it is too long");
    assert!(reason.contains("another length"), "{reason}");
}

/// Files whose checksums are right, and whose headers say what cannot be.
#[test]
fn headers_that_lie_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("prompt");
    let (model, file, header_len) = small_file(&path);
    let (header, body) = file[48..].split_at(header_len);
    let header: serde_json::Value = serde_json::from_slice(header).unwrap();
    let with = |header: &[u8], body_len: u64| {
        let mut prefix = file[..20].to_vec();
        prefix.extend((header.len() as u32).to_le_bytes());
        prefix.extend(body_len.to_le_bytes());
        prefix.extend(xxh3_64(header).to_le_bytes());
        prefix.extend(xxh3_64(&prefix).to_le_bytes());
        [&prefix[..], header, body].concat()
    };
    let body_len = u64::from_le_bytes(*file[24..].first_chunk().unwrap());
    let same = with(&serde_json::to_vec(&header).unwrap(), body_len);
    assert_eq!(refusal(&path, &model, &same), None);
    for (pointer, value) in [
        ("/tokens", u64::MAX),
        ("/tokens", 1 << 40),
        ("/tokens", 19),
        ("/tokens", 0),
        ("/tokens", 65),
        ("/logits", u64::MAX / 4),
        ("/logits", 0),
        ("/written/end", 19),
        ("/written/end", 65),
        ("/written/end", u64::MAX),
        ("/written/places_end", 0),
        ("/written/places_end", 64),
        ("/written/evicted", 21),
        ("/written/evicted", u64::MAX),
        ("/written/evicted_at", 21),
    ] {
        let mut header = header.clone();
        *header.pointer_mut(pointer).expect(pointer) = value.into();
        let lying = with(&serde_json::to_vec(&header).unwrap(), body_len);
        let reason = refusal(&path, &model, &lying);
        assert!(reason.is_some(), "{pointer} {value} is taken");
    }
    for body_len in [0, body_len - 1, u64::MAX, u64::MAX / 2, 1 << 62] {
        let lying = with(&serde_json::to_vec(&header).unwrap(), body_len);
        let reason = refusal(&path, &model, &lying).expect("it is refused");
        assert!(reason.contains("another length"), "{body_len}: {reason}");
    }
    for header in [&b"{}"[..], b"[", b"\xff"] {
        let reason = refusal(&path, &model, &with(header, body_len)).expect("it is refused");
        assert!(reason.contains("header is damaged"), "{reason}");
    }
}

#[test]
fn a_file_is_replaced_whole_or_not_at_all() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("prompt");
    let (model, file, _) = small_file(&path);
    let mut session = session(&model, 64, KvOptions::default());
    read(&mut session, &made_up_tokens(30, model.decoder.vocab_size)).unwrap();
    let identity = identity(&model, &session);
    let error = PromptCache::write(&path, &identity, &mut session, &|| false).unwrap_err();
    assert!(error.to_string().contains("interrupted"), "{error}");
    assert!(std::fs::read(&path).unwrap() == file);
    let entries = std::fs::read_dir(directory.path()).unwrap();
    assert_eq!(entries.count(), 1);
}
