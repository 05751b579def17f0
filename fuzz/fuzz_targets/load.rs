//! Any bytes as a model file: what reads it, fills its chat template, makes tokens, dequantizes its tensors and computes
//! logits must end in a result or an error, never in a panic.

#![no_main]

use libfuzzer_sys::fuzz_target;
use sharpi::{
    backend::{Backend, Batch, Want},
    cpu::CpuBackend,
    model::{Gguf, Message, Model, Prompt, TemplateOptions, Vocabulary},
};

const TEXT: &str = "The the<s>  the\n<|im_start|>12 na\u{ef}ve \u{1f98a}";

fuzz_target!(|bytes: &[u8]| {
    let file = || Gguf::from_bytes("fuzz.gguf", bytes.to_vec());
    let Ok(gguf) = file() else { return };
    for tensor in gguf.tensors() {
        tensor.to_f32();
    }
    if let Ok(vocabulary) = Vocabulary::from_gguf(gguf) {
        speak(&vocabulary);
    }
    if let Ok(model) = file().and_then(Model::from_gguf) {
        let _ = compute(model);
    }
});

/// Tokens of a text and of a conversation, and what they stand for.
fn speak(vocabulary: &Vocabulary) {
    let conversation = ["user", "assistant", "user"].map(|role| Message::new(role, TEXT));
    let rendered = (vocabulary.chat_template.as_ref())
        .map(|template| template.render(&conversation, &TemplateOptions::default()));
    for prompt in rendered.into_iter().flatten().chain([Prompt::raw(TEXT)]) {
        let ids = vocabulary.tokenizer.encode(&prompt);
        for id in ids {
            vocabulary.tokenizer.token_bytes(id);
        }
    }
}

/// Logits after two tokens at once and after a third.
fn compute(model: Model) -> anyhow::Result<()> {
    let last = model.decoder.vocab_size as u32 - 1;
    let mut backend = CpuBackend::new(model.decoder.clone(), 3, 1)?;
    backend.compute(Batch::prompt(&[0, last], 0, Want::All))?;
    backend.compute(Batch::decode(&last, 2))?;
    Ok(())
}
