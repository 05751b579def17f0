//! What a file holds beside what its architecture asks for: harmless, or part of the result.

use serde_json::Value;

/// What becomes of the result when a key is not read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unused {
    Harmless,
    ChangesResult,
    Unknown,
}

/// Tensors that nothing needs, by the end of their names: frequencies that follow from the metadata.
const HARMLESS_TENSORS: [&str; 2] = ["attn_rot_embd.weight", "rotary_emb.inv_freq"];

/// Keys that say what follows from others, what training did, or what other uses of the model need.
const HARMLESS_KEYS: [&str; 16] = [
    "vocab_size",
    "tensor_data_layout",
    "attention.causal",
    "attention.layer_norm_epsilon",
    "embedding_length_out",
    "expert_used_count",
    "expert_feed_forward_length",
    "expert_shared_count",
    "leading_dense_block_count",
    "interleave_moe_layer_step",
    "nextn_predict_layers",
    "pooling_type",
    "rope.dimension_count_swa",
    "rope.freq_base_swa",
    "rope.scaling.finetuned",
    "decoder_block_count",
];

/// Keys that change what a layer computes, with the value that changes nothing.
const KEYS_OF_THE_RESULT: [(&str, f64); 22] = [
    ("attention.scale", 0.0),
    ("attention.output_scale", 0.0),
    ("attention.clamp_kqv", 0.0),
    ("attention.max_alibi_bias", 0.0),
    ("attention.temperature_length", 0.0),
    ("attention.temperature_scale", 0.0),
    ("attention.sliding_window", 0.0),
    ("attention.sliding_window_pattern", 0.0),
    ("attention.shared_kv_layers", 0.0),
    ("attention.group_norm_epsilon", 0.0),
    ("attn_logit_softcapping", 0.0),
    ("attention.logit_softcapping", 0.0),
    ("router_logit_softcapping", 0.0),
    ("final_logit_softcapping", 0.0),
    ("logit_scale", 1.0),
    ("residual_scale", 1.0),
    ("embedding_scale", 1.0),
    ("embedding_length_per_layer_input", 0.0),
    ("rope.dimension_sections", 0.0),
    ("rope.scaling.yarn_log_multiplier", 0.0),
    ("swin_norm", 0.0),
    ("use_parallel_residual", 0.0),
];

pub fn is_harmless_tensor(name: &str) -> bool {
    HARMLESS_TENSORS.iter().any(|end| name.ends_with(end))
}

/// `key` is given without its prefix.
pub fn weigh_key(key: &str, value: &Value) -> Unused {
    if HARMLESS_KEYS.contains(&key) {
        return Unused::Harmless;
    }
    let Some((_, neutral)) = KEYS_OF_THE_RESULT.iter().find(|(known, _)| *known == key) else {
        return Unused::Unknown;
    };
    let number = match value {
        Value::Bool(value) => Some(f64::from(u8::from(*value))),
        value => value.as_f64(),
    };
    // 0 is what converters write for none where 1 would change nothing.
    match number == Some(*neutral) || number == Some(0.0) {
        true => Unused::Harmless,
        false => Unused::ChangesResult,
    }
}
