#!/usr/bin/env python3
"""Writes data/architectures.json: small random models and the logits that transformers computes for them in float32.

    pip install torch transformers==5.24.0 gguf==0.19.0 && python3 make_architecture_vectors.py

Weights are not stored: `weights` makes them from a tensor's name, here and in tests/transformers.rs. They are those of the
GGUF file, whose tensors the package gguf names; here they become what transformers holds under its own names.
"""
import json
import pathlib

import gguf
import numpy as np
import torch
import transformers

TOKENS = 40
POSITIONS = [0, 13, 39]
VOCABULARY = 264


def weights(name, count):
    """SplitMix64 (Steele et al.) from the FNV-1a hash of the name: even between -1 and 1."""
    mask = (1 << 64) - 1
    seed = 0xCBF29CE484222325
    for byte in name.encode():
        seed = (seed ^ byte) * 0x100000001B3 & mask
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(40)).astype(np.float64) / (1 << 23) - 1.0


def tensor(name, shape):
    """The tensor of a file. Matrices are exact in float16; norms lie around 1, biases around 0."""
    values = weights(name, int(np.prod(shape))).reshape(shape)
    if len(shape) == 2:
        return (values * (3.0 / shape[1]) ** 0.5).astype(np.float32).astype(np.float16).astype(np.float32)
    return (values * 0.3 + ("norm" in name)).astype(np.float32)


def of_pairs(values, heads):
    """Rows of each head from llama's files, where pairs that turn lie side by side, to transformers', in two halves."""
    rest = values.shape[1:]
    return values.reshape(heads, -1, 2, *rest).swapaxes(1, 2).reshape(-1, *rest)


def case(name, architecture, config, metadata, paired=False, unit_offset=False, context=None):
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    tensors, state = {}, {}
    for ours, parameter in model.state_dict().items():
        if ours == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, _, suffix = ours.rpartition(".")
        theirs = f"{names.get_name(stem)}.{suffix}"
        tensors[theirs] = list(parameter.shape)
        values = tensor(theirs, parameter.shape)
        if paired and ".q_proj." in ours:
            values = of_pairs(values, config.num_attention_heads)
        if paired and ".k_proj." in ours:
            values = of_pairs(values, config.num_key_value_heads)
        if unit_offset and "norm" in ours:
            values = values - np.float32(1)
        state[ours] = torch.from_numpy(np.ascontiguousarray(values))
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert missing in ([], ["lm_head.weight"]), missing
    factors = {}
    rope = config.rope_parameters
    if rope and rope.get("rope_type") == "longrope":
        factors = {f"rope_factors_{kind}.weight": rope[f"{kind}_factor"] for kind in ["short", "long"]}
    tokens = [(7 * i * i + 3 * i + 5) % 256 for i in range(TOKENS if context != "short" else 24)]
    positions = [p if p < len(tokens) else len(tokens) - 1 for p in POSITIONS]
    with torch.no_grad():
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0, positions]
    prefix = gguf.MODEL_ARCH_NAMES[architecture]
    common = {
        "context_length": config.max_position_embeddings,
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(rope["rope_theta"]),
    }
    return {
        "name": name,
        "architecture": prefix,
        "metadata": {f"{prefix}.{key}": value for key, value in {**common, **metadata}.items()},
        "tensors": [[name, shape] for name, shape in tensors.items()],
        "vectors": factors,
        "tokens": tokens,
        "positions": positions,
        "logits": [[float(f"{logit:.7g}") for logit in row] for row in logits.tolist()],
    }


def cases():
    size = dict(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2, pad_token_id=None,
    )
    wide = dict(head_dim=64)
    wide_keys = {"attention.key_length": 64, "attention.value_length": 64, "rope.dimension_count": 64}
    theta = lambda base, **more: {"rope_parameters": {"rope_type": "default", "rope_theta": base, **more}}
    t, arch = transformers, gguf.MODEL_ARCH

    yield case("mistral_nemo", arch.LLAMA, t.MistralConfig(**size, **wide, **theta(1e6), sliding_window=None),
               wide_keys, paired=True)
    yield case("mistral_window", arch.LLAMA, t.MistralConfig(**size, **wide, **theta(1e4), sliding_window=16),
               {**wide_keys, "attention.sliding_window": 16}, paired=True)
    yield case("llama_biases", arch.LLAMA,
               t.LlamaConfig(**size, **wide, **theta(1e4), attention_bias=True, mlp_bias=True),
               wide_keys, paired=True)
    yield case("qwen2", arch.QWEN2, t.Qwen2Config(**{**size, "num_attention_heads": 2}, **theta(1e6)), {})
    yield case("qwen3", arch.QWEN3, t.Qwen3Config(**size, **wide, **theta(1e6)),
               {"attention.key_length": 64, "attention.value_length": 64})

    two_heads = {**size, "num_attention_heads": 2, "num_key_value_heads": 1}
    yield case("phi3", arch.PHI3, t.Phi3Config(**two_heads, **theta(1e4), sliding_window=24),
               {"rope.dimension_count": 64, "rope.scaling.original_context_length": 128,
                "attention.sliding_window": 24})
    long_rope = dict(
        rope_type="longrope", rope_theta=1e4, partial_rotary_factor=0.75, original_max_position_embeddings=32,
        short_factor=[1 + i / 64 for i in range(24)], long_factor=[1 + i / 4 for i in range(24)],
    )
    for context in ["short", "long"]:
        config = t.Phi3Config(**two_heads, rope_parameters=long_rope, original_max_position_embeddings=32,
                              sliding_window=None)
        attn_factor = (1 + np.log(128 / 32) / np.log(32)) ** 0.5
        yield case(f"phi3_{context}_context", arch.PHI3, config,
                   {"rope.dimension_count": 48, "rope.scaling.original_context_length": 32,
                    **({"rope.scaling.attn_factor": attn_factor} if context == "short" else {}),
                    "attention.sliding_window": 0}, context=context)

    yield case("granite", arch.GRANITE,
               t.GraniteConfig(**{**size, "num_attention_heads": 2}, **theta(1e4), attention_multiplier=0.1,
                               embedding_multiplier=12.0, residual_multiplier=0.22, logits_scaling=4.0),
               {"rope.dimension_count": 64, "attention.scale": 0.1, "embedding_scale": 12.0, "residual_scale": 0.22,
                "logit_scale": 4.0}, paired=True)
    yield case("olmo2", arch.OLMO2, t.Olmo2Config(**{**size, "num_attention_heads": 2}, **theta(5e5)), {})
    gemma = {**size, **wide, **theta(1e4), "tie_word_embeddings": True, "sliding_window": 16,
             "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
    gemma_keys = {"attention.key_length": 64, "attention.value_length": 64, "attention.sliding_window": 16,
                  "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
    yield case("gemma2", arch.GEMMA2, t.Gemma2Config(**gemma, query_pre_attn_scalar=64), gemma_keys, unit_offset=True)
    # As deep as the one whose scores are scaled by another length.
    yield case("gemma2_27b", arch.GEMMA2,
               t.Gemma2Config(**{**gemma, "num_hidden_layers": 46, "hidden_size": 64, "intermediate_size": 64},
                              query_pre_attn_scalar=16), gemma_keys, unit_offset=True)


out = pathlib.Path(__file__).parent / "data/architectures.json"
text = json.dumps(list(cases()), separators=(",", ":"))
out.write_text(text.replace('{"name"', '\n{"name"').replace('"logits"', '\n"logits"') + "\n")
