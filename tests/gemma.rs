//! Text in the files of Gemma 3 and Gemma 4, against Hugging Face's and SentencePiece's outputs, and a file that is
//! refused. `tests/golden.rs` has what these models compute.
//!
//! Without the files, which `tests/fetch-gemma3.sh` and `tests/make-gemma4.sh` bring, these tests are reported as ignored.

mod common;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, Result, ensure};
use libtest_mimic::{Arguments, Trial};
use serde::Deserialize;
use sharpi::model::{Gguf, Message, Model, Prompt, TemplateOptions, Vocabulary};

const BOS: u32 = 2;

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let gemma3 = common::gemma3_path();
    let [gemma4, experts] = ["e-f32", "moe-f32"].map(common::gemma4_path);
    for (path, script) in [
        (&gemma3, "tests/fetch-gemma3.sh"),
        (&gemma4, "tests/make-gemma4.sh"),
    ] {
        if path.is_none() {
            eprintln!("a model is not here, its tests are ignored: run {script}");
        }
    }
    let trials = vec![
        trial("gemma3_ids_are_the_references", &gemma3, |path| {
            ids(path, include_str!("data/gemma3-tokens.json"))
        }),
        trial("gemma4_ids_are_the_references", &gemma4, |path| {
            ids(path, include_str!("data/gemma4-tokens.json"))
        }),
        trial("gemma3_ends_turns", &gemma3, |path| ends(path, &[1, 106])),
        trial("gemma4_ends_turns", &gemma4, |path| {
            ends(path, &[1, 50, 106])
        }),
        trial("gemma4_prompts_are_the_references", &gemma4, chats),
        trial("experts_are_refused", &experts, experts_are_refused),
    ];
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// Ignored where there is no file.
fn trial(name: &str, path: &Option<PathBuf>, check: fn(&Path) -> Result<()>) -> Trial {
    let path = path.clone();
    let ignored = path.is_none();
    let run = move || Ok(check(&path.context("the file is missing")?)?);
    Trial::test(name, run).with_ignored_flag(ignored)
}

fn vocabulary(path: &Path) -> Result<Vocabulary> {
    Vocabulary::from_gguf(Gguf::open(path)?)
}

fn ids(path: &Path, vectors: &str) -> Result<()> {
    #[derive(Deserialize)]
    struct Vector {
        text: String,
        /// Without the beginning.
        ids: Vec<u32>,
    }
    let vectors: Vec<Vector> = serde_json::from_str(vectors)?;
    let tokenizer = vocabulary(path)?.tokenizer;
    for Vector { text, ids } in vectors {
        let encoded = tokenizer.encode(&Prompt::raw(&text));
        // A text that spells the beginning itself does not get a second one.
        let expected = match ids.first() {
            Some(&BOS) => ids,
            _ => [&[BOS], &ids[..]].concat(),
        };
        ensure!(
            encoded == expected,
            "{encoded:?} for {expected:?}, of {text:?}"
        );
    }
    Ok(())
}

/// By their texts: the files name the first of them only.
fn ends(path: &Path, expected: &[u32]) -> Result<()> {
    let tokenizer = vocabulary(path)?.tokenizer;
    let ends = tokenizer.end_of_generation();
    ensure!(ends == expected, "{ends:?} for {expected:?}");
    Ok(())
}

fn chats(path: &Path) -> Result<()> {
    #[derive(Deserialize)]
    struct Vector {
        name: String,
        messages: Vec<Message>,
        args: Options,
        text: String,
    }
    #[derive(Deserialize)]
    struct Options {
        enable_thinking: Option<bool>,
    }
    let vectors: Vec<Vector> = serde_json::from_str(include_str!("data/gemma4-chat.json"))?;
    let vocabulary = vocabulary(path)?;
    let template = vocabulary.chat_template.context("no chat template")?;
    for vector in vectors {
        let options = TemplateOptions {
            enable_thinking: vector.args.enable_thinking,
            ..TemplateOptions::default()
        };
        let prompt = template.render(&vector.messages, &options)?;
        ensure!(
            prompt.text() == vector.text,
            "{}: {:?} for {:?}",
            vector.name,
            prompt.text(),
            vector.text
        );
        let [ids, spelled] =
            [prompt, Prompt::raw(vector.text)].map(|prompt| vocabulary.tokenizer.encode(&prompt));
        ensure!(ids == spelled, "{}: {ids:?} for {spelled:?}", vector.name);
        let beginnings = ids.iter().filter(|&&id| id == BOS).count();
        ensure!(beginnings == 1, "{}: {beginnings} beginnings", vector.name);
    }
    Ok(())
}

fn experts_are_refused(path: &Path) -> Result<()> {
    let error = Model::open(path).err().context("it was taken")?;
    let message = format!("{error:#}");
    ensure!(message.contains("expert"), "{message:?} names no experts");
    Ok(())
}
