//! Models whose every next token is known beforehand.

use sharpi::quant::TensorType;

use crate::common::gguf_writer::{GgufFile, RandomModel, Value, byte_vocabulary};

/// Ends generation in the writer's byte vocabulary, where a byte's id is the byte.
pub const END: u32 = 263;

/// A model that always continues `chain[i]` with `chain[i + 1]`, whatever came before. Its layers add nothing to the
/// embedding, which for every link is a direction of its own that the output matrix maps to the next token: all but
/// certain, with a logit of about 160 against zeros.
pub fn chain(chain: &[u32]) -> GgufFile {
    chain_over(byte_vocabulary(), chain)
}

/// The same with another vocabulary.
pub fn chain_over(vocabulary: Vec<(String, Value)>, chain: &[u32]) -> GgufFile {
    let mut model = RandomModel::new("llama", TensorType::F32);
    model.vocabulary = vocabulary;
    model.tied = false;
    model.layers = 1;
    let mut file = model.file();
    let hidden = model.hidden_size as usize;
    for name in [
        "blk.0.attn_output.weight",
        "blk.0.ffn_down.weight",
        "token_embd.weight",
        "output.weight",
    ] {
        file.tensor(name).data.fill(0);
    }
    let mut put = |name: &str, row: u32, column: usize, value: f32| {
        let data = &mut file.tensor(name).data;
        let at = (row as usize * hidden + column) * size_of::<f32>();
        data[at..at + size_of::<f32>()].copy_from_slice(&value.to_le_bytes());
    };
    for (link, pair) in chain.windows(2).enumerate() {
        put("token_embd.weight", pair[0], link, 1.0);
        put("output.weight", pair[1], link, 10.0);
    }
    file
}

/// A model that answers the raw prompt `a` with `text`, of bytes that occur once each, and then ends.
pub fn answers(text: &str) -> Vec<u8> {
    let text = text.bytes().map(u32::from);
    let links: Vec<u32> = [u32::from(b'a')]
        .into_iter()
        .chain(text)
        .chain([END])
        .collect();
    chain(&links).to_bytes()
}

/// A model that answers `a` with `bcbcbc...` until its context is full.
pub fn endless(context_length: u32) -> Vec<u8> {
    let mut file = chain(&b"abcb".map(u32::from));
    file.set("llama.context_length", context_length);
    file.to_bytes()
}
