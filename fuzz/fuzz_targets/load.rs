//! Any bytes as a model file: loading, and tokenizing with what it holds, must end in a result or an error, never in a
//! panic.

#![no_main]

use libfuzzer_sys::fuzz_target;
use sharpi::model::{Gguf, Model, Prompt, Vocabulary};

fuzz_target!(|bytes: &[u8]| {
    let file = || Gguf::from_bytes("fuzz.gguf", bytes.to_vec());
    let _ = file().and_then(Model::from_gguf);
    let text = Prompt::raw("The the<s>  the\n<|im_start|>12 na\u{ef}ve \u{1f98a}");
    let _ = file()
        .and_then(Vocabulary::from_gguf)
        .and_then(|file| file.tokenizer.encode(&text));
});
