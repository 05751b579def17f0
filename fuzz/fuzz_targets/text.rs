//! Any text for every tokenizer: it must end in ids of the vocabulary, and byte-level ones must give it back.

#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use sharpi::model::{Gguf, Prompt, Tokenizer};
use sharpi_fuzz::{GgufFile, PRE_TOKENIZERS, Value, byte_vocabulary, piece_vocabulary};

/// Each with whether it gives every text back as it was: not those that bring it into another form first.
static TOKENIZERS: LazyLock<Vec<(Tokenizer, bool)>> = LazyLock::new(|| {
    let byte_level = PRE_TOKENIZERS.map(|pre| {
        let mut file = GgufFile {
            metadata: byte_vocabulary(),
            ..GgufFile::default()
        };
        file.set("tokenizer.ggml.pre", pre);
        (
            tokenizer(file.metadata),
            !["qwen2", "qwen35", "mpt", "command-r"].contains(&pre),
        )
    });
    let pieces = ["llama", "gemma4"].map(|model| (tokenizer(piece_vocabulary(model)), false));
    byte_level.into_iter().chain(pieces).collect()
});

fn tokenizer(metadata: Vec<(String, Value)>) -> Tokenizer {
    let file = GgufFile {
        metadata,
        ..GgufFile::default()
    };
    let gguf = Gguf::from_bytes("fuzz.gguf", file.to_bytes()).expect("a file");
    Tokenizer::from_gguf(&gguf).expect("a vocabulary")
}

fuzz_target!(|text: &str| {
    for (tokenizer, gives_back) in TOKENIZERS.iter() {
        let ids = tokenizer.encode(&Prompt::raw(text));
        let bytes: Vec<u8> = ids
            .iter()
            .flat_map(|&id| tokenizer.token_bytes(id))
            .collect();
        assert!(ids.iter().all(|&id| (id as usize) < tokenizer.vocab_size()));
        if *gives_back && !text.contains("<|") {
            assert_eq!(bytes, text.as_bytes());
        }
    }
});
