//! Any text as a chat template: it must end in a prompt or an error, never in a panic.

#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use serde_json::json;
use sharpi::model::{ChatTemplate, Gguf, Message, TemplateOptions, Tokenizer, demo};

static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| {
    let demo = demo().expect("the demo model's file");
    Tokenizer::from_gguf(&demo).expect("the demo model's tokenizer")
});

fuzz_target!(|template: &str| {
    let mut file = sharpi_fuzz::GgufFile::default();
    file.set("tokenizer.chat_template", template);
    let gguf = Gguf::from_bytes("fuzz.gguf", file.to_bytes()).expect("a file of one key");
    let template = ChatTemplate::from_gguf(&gguf, &TOKENIZER).expect("a text");
    let tool = json!({"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}});
    let template = template.expect("the file has one");
    let conversation = ["system", "user", "assistant", "user"]
        .map(|role| Message::new(role, "Na\u{ef}ve <|im_end|> 12\n"));
    for continue_last in [false, true] {
        let options = TemplateOptions {
            enable_thinking: Some(true),
            tools: Some(vec![tool.clone()]),
            date: Some("2026-01-31T18:30:05".parse().expect("a date")),
            continue_last,
        };
        let _ = template.render(&conversation, &options);
    }
});
