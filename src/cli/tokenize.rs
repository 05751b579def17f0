//! `sharpi tokenize`: the ids and pieces of a text. Any file with a vocabulary will do.

use std::io::{self, BufWriter, Write};

use anyhow::{Context, Result};
use serde::Serialize;

use super::{
    escape::escaped,
    exit::Outcome,
    output::{WRITING, write_json_line},
    resolve::TokenizeRequest,
};
use crate::model::{Tokenizer, Vocabulary};

#[derive(Serialize)]
struct Tokenized<'a> {
    text: &'a str,
    ids: &'a [u32],
}

pub fn run(request: &TokenizeRequest) -> Result<Outcome> {
    let Vocabulary {
        gguf,
        tokenizer,
        chat_template,
    } = Vocabulary::from_gguf(request.model.open_gguf()?)?;
    let prompt = request.input.render(chat_template.as_ref(), gguf.name())?;
    let ids = tokenizer.encode(&prompt);
    let mut out = BufWriter::new(io::stdout().lock());
    let written = match request.json {
        true => write_json_line(
            &mut out,
            &Tokenized {
                text: prompt.text(),
                ids: &ids,
            },
        ),
        false => write_lines(&mut out, &tokenizer, &ids),
    };
    written.context(WRITING)?;
    Ok(Outcome::Done)
}

/// One token a line, `id<TAB>text`. Control characters are escaped, so that a line is a line.
fn write_lines(out: &mut impl Write, tokenizer: &Tokenizer, ids: &[u32]) -> io::Result<()> {
    for &id in ids {
        writeln!(out, "{id}\t{}", shown(tokenizer, id))?;
    }
    out.flush()
}

/// The text that a token stands for, bytes that are none as `<0xF0>`; of a control token its name.
fn shown(tokenizer: &Tokenizer, id: u32) -> String {
    let bytes = tokenizer.token_bytes(id);
    if bytes.is_empty() {
        return escaped(tokenizer.piece(id));
    }
    let chunks = bytes.utf8_chunks().map(|chunk| {
        let others = chunk.invalid().iter().map(|byte| format!("<0x{byte:02X}>"));
        escaped(chunk.valid()) + &others.collect::<String>()
    });
    chunks.collect()
}
