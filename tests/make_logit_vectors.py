#!/usr/bin/env python3
"""Writes tests/data/logits.json: what Hugging Face transformers says after a prompt, for the random models of
tests/common/gguf_writer.rs with biases and scaled positions. Needs the PyPI packages numpy, torch and transformers."""

import json
import os

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

HERE = os.path.dirname(os.path.abspath(__file__))
VOCABULARY, HIDDEN, FEED_FORWARD, LAYERS, HEADS, HEADS_KV, HEAD = 264, 32, 64, 2, 2, 1, 16
PROMPT = "quick brown fox"  # in the writer's byte vocabulary no merge reaches it: a byte's id is the byte
STEPS, TOP = 3, 5
CLOSE = 0.02  # log-probabilities that another order of sums might turn around

MODELS = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
}
# GGUF's names, in the writer's order, transformers' and the rows.
MATRICES = {
    "attn_q": ("self_attn.q_proj", HEADS * HEAD, HIDDEN),
    "attn_k": ("self_attn.k_proj", HEADS_KV * HEAD, HIDDEN),
    "attn_v": ("self_attn.v_proj", HEADS_KV * HEAD, HIDDEN),
    "attn_output": ("self_attn.o_proj", HIDDEN, HEADS * HEAD),
    "ffn_gate": ("mlp.gate_proj", FEED_FORWARD, HIDDEN),
    "ffn_up": ("mlp.up_proj", FEED_FORWARD, HIDDEN),
    "ffn_down": ("mlp.down_proj", HIDDEN, FEED_FORWARD),
}
QKV = ["attn_q", "attn_k", "attn_v"]
LINEAR = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}

# Architecture, biases beyond those that it always has, metadata, and what the positions are divided by.
CASES = {
    "llama": ("llama", [], {}, 1.0),
    "llama, biases of queries, keys and values": ("llama", QKV, {}, 1.0),
    "llama, bias of the attention's output": ("llama", ["attn_output"], {}, 1.0),
    "llama, biases of the feed-forward": ("llama", ["ffn_gate", "ffn_up", "ffn_down"], {}, 1.0),
    "qwen2": ("qwen2", [], {}, 1.0),
    "qwen3": ("qwen3", [], {}, 1.0),
    "llama, a scale of no use": ("llama", [], {**LINEAR, "rope.scaling.type": "none"}, 1.0),
    "llama, both keys": ("llama", [], {"rope.scaling.factor": 4.0, "rope.scale_linear": 8.0}, 4.0),
}
for architecture in ["llama", "qwen2"]:
    CASES[f"{architecture}, a scale with its type"] = (architecture, [], LINEAR, 4.0)
    CASES[f"{architecture}, a scale without a type"] = (architecture, [], {"rope.scaling.factor": 4.0}, 4.0)
    CASES[f"{architecture}, the old key"] = (architecture, [], {"rope.scale_linear": 4.0}, 4.0)


class Random:
    """SplitMix64, as the writer uses it."""

    def __init__(self, seed):
        self.state = seed % 2**64

    def centered(self, shape, std):
        n = int(np.prod(shape))
        z = np.uint64(self.state) + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        self.state = int(z[-1])
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        unit = ((z ^ (z >> np.uint64(31))) >> np.uint64(40)).astype(np.float32) / np.float32(2**24)
        values = (unit - np.float32(0.5)) * np.sqrt(np.float32(12)) * np.float32(std)
        return values.reshape(shape)


def halves(rows, heads):
    """Rows of a llama file turn with their neighbours, those of transformers with the one half a head away."""
    return rows.reshape(heads, HEAD // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def tensors(architecture, biases, seed):
    """The writer's model under transformers' names."""
    matrices, vectors, added = Random(seed), Random(~seed), Random(seed)
    out = {}

    def put(name, kind, values):
        if architecture == "llama" and name.endswith(("q_proj", "k_proj")):
            values = halves(values, len(values) // HEAD)
        out[f"model.{name}.{kind}"] = torch.tensor(values, dtype=torch.float64)

    def matrix(name, rows, columns):
        put(name, "weight", matrices.centered((rows, columns), 1 / np.sqrt(np.float32(columns))))

    def norm(name, length):
        put(name, "weight", np.float32(1) + vectors.centered(length, 0.1))

    matrix("embed_tokens", VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        block = f"layers.{layer}."
        norm(block + "input_layernorm", HIDDEN)
        norms_of_heads = ["self_attn.q_norm", "self_attn.k_norm"] if architecture == "qwen3" else []
        for name, (theirs, rows, columns) in MATRICES.items():
            if name == "attn_output":
                if architecture == "qwen2":
                    for of in QKV:
                        put(block + MATRICES[of][0], "bias", vectors.centered(MATRICES[of][1], 0.1))
                for of in norms_of_heads:
                    norm(block + of, HEAD)
            if name == "ffn_gate":
                norm(block + "post_attention_layernorm", HIDDEN)
            matrix(block + theirs, rows, columns)
        for name in biases:
            put(block + MATRICES[name][0], "bias", added.centered(MATRICES[name][1], 0.5))
    norm("norm", HIDDEN)
    return out


def compute(architecture, biases, divisor, seed):
    config, model, options = MODELS[architecture]
    scaling = {"rope_type": "default"} if divisor == 1.0 else {"rope_type": "linear", "factor": divisor}
    model = model(
        config(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=FEED_FORWARD,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS_KV,
            head_dim=HEAD,
            rms_norm_eps=1e-6,
            tie_word_embeddings=True,
            rope_parameters={"rope_theta": 10000.0, **scaling},
            **options,
        )
    )
    model = model.double().eval()
    given = tensors(architecture, biases, seed)
    for name, parameter in model.named_parameters():
        values = given.pop(name, None)
        parameter.copy_(torch.zeros_like(parameter) if values is None and name.endswith("bias") else values)
    assert not given, given.keys()

    ids, steps = list(PROMPT.encode()), []
    for _ in range(STEPS):
        logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1], dim=-1)
        values, tokens = logprobs.topk(TOP)
        if values[0] - values[1] < CLOSE:
            return None
        steps.append([[token, round(value, 7)] for token, value in zip(tokens.tolist(), values.tolist())])
        ids.append(tokens[0].item())
    return steps


@torch.inference_mode()
def main():
    lines = []
    for name, (architecture, biases, metadata, divisor) in CASES.items():
        seed, steps = 0, None
        while steps is None:
            seed += 1
            steps = compute(architecture, biases, divisor, seed)
        case = dict(name=name, architecture=architecture, seed=seed, biases=biases, metadata=metadata, steps=steps)
        lines.append(json.dumps(case))
    with open(os.path.join(HERE, "data", "logits.json"), "w", encoding="utf-8") as out:
        out.write("[\n" + ",\n".join(lines) + "\n]\n")


if __name__ == "__main__":
    main()
