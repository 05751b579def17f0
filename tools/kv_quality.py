#!/usr/bin/env python3
"""Measure what a format of the KV cache costs: the perplexity of a text, and how far its predictions are from those with an
exact cache (mean Kullback-Leibler divergence), for the formats of docs/kv-cache.md and for llama.cpp's q8_0 and q4_0.

    kv_quality.py -m model.gguf -f text.txt
    kv_quality.py -m model.gguf --ids ids.json      # as `sharpi tokenize --json` prints them

One window of the text is read in float32, with every format at once; the second half of it counts, as in `sharpi perplexity`.
With -f the built command tokenizes the text and measures its own formats as well (-n: it only tokenizes). Both should
agree: nothing here comes from it but the ids.

llama.cpp's formats compress every token as soon as it is stored, in layers with a sliding window too, in blocks of 32
values along the head; "rotated": behind a Hadamard transform of the head. sharpi's leave layers with a sliding window exact.

Needs Python 3.9+, numpy and gguf. Reads llama, qwen2, qwen3 and gemma3 files without scaled positions.
"""
import argparse
import json
import re
import subprocess
import sys
from collections import namedtuple

import gguf
import numpy as np

TILE, KEY_GROUP, SINKS = 128, 64, 4
ROWS_AT_ONCE = 32  # of logits

f32 = np.float32


def to_f16(x):
    return x.astype(np.float16).astype(f32)


def exact(keys, values):
    return (keys, values), (keys, values)


def blocks(kind):
    """ggml's blocks of 32 values, of which every token sees what is read back."""
    def store(*tensors):
        read_back = tuple(gguf.dequantize(gguf.quantize(x, kind), kind) for x in tensors)
        return read_back, read_back
    return store


def codes(x, bits, axis):
    """What is read back of groups that lie along an axis."""
    most = f32(2**bits - 1)
    least, greatest = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
    scale, zero = to_f16((greatest - least) / most), to_f16(least)
    divisor = np.where(scale == 0, f32(np.inf), scale)
    return np.clip(np.rint((x - zero) / divisor), 0, most) * scale + zero


def tiles(key_bits, value_bits):
    """The tiles of docs/kv-cache.md, of which every token sees what is read back, but of the sinks."""
    def store(keys, values):
        keys, values = to_f16(keys), to_f16(values)
        read_back = keys.copy(), codes(values, value_bits, axis=2)
        for start in range(0, keys.shape[1], KEY_GROUP):
            group = slice(max(start, SINKS), start + KEY_GROUP)
            read_back[0][:, group] = codes(keys[:, group], key_bits, axis=1)
        read_back[1][:, :SINKS] = values[:, :SINKS]
        return read_back, read_back
    return store


def far(store):
    """The same for those tokens that docs/kv-cache.md compresses."""
    def store_both(keys, values):
        near = to_f16(keys), to_f16(values)
        _, read_back = store(*near)
        for x, exact in zip(read_back, near):
            x[:, :SINKS] = exact[:, :SINKS]
        return near, read_back
    return store_both


# `store` makes of keys and values (heads, tokens, head size) what near tokens see of them and what all others do; `windows`
# says whether it does so in layers with a sliding window too.
Format = namedtuple("Format", "name rotated windows store")
Q8_0, Q4_0 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0
FORMATS = [
    Format("exact", False, True, exact),
    Format("llama.cpp q8_0", False, True, blocks(Q8_0)),
    Format("llama.cpp q8_0, rotated", True, True, blocks(Q8_0)),
    Format("k8v8", True, False, far(tiles(8, 8))),
    Format("llama.cpp q4_0", False, True, blocks(Q4_0)),
    Format("llama.cpp q4_0, rotated", True, True, blocks(Q4_0)),
    Format("k4v4", True, False, far(tiles(4, 4))),
    Format("k4v3", True, False, far(tiles(4, 3))),
    # What keeping near tokens and sinks is worth, and what the tiles are.
    Format("q4_0, rotated, far tokens only", True, False, far(blocks(Q4_0))),
    Format("k4v4, near tokens too", True, True, tiles(4, 4)),
]
KV_TYPES = {"exact": "f16", "k8v8": "k8v8", "k4v4": "k4v4", "k4v3": "k4v3"}


def hadamard(x):
    n = x.shape[-1] & -x.shape[-1]
    matrix = np.ones((1, 1), f32)
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return (x.reshape(*x.shape[:-1], -1, n) @ (matrix / f32(np.sqrt(n)))).reshape(x.shape)


def attend(queries, near, far, window, scale):
    """Queries (heads, tokens, head size) over keys and values of fewer heads."""
    heads, tokens, dim = queries.shape
    grouped = queries.reshape(len(near[0]), -1, tokens, dim)
    out = np.empty_like(grouped)
    for start in range(0, tokens, TILE):
        end = min(start + TILE, tokens)
        first = max(0, start + 1 - window)
        near_first = max(first, start - TILE)
        keys, values = (np.concatenate([f[:, None, first:near_first], n[:, None, near_first:end]], axis=2)
                        for f, n in zip(far, near))
        behind = np.arange(start, end)[:, None] - np.arange(first, end)
        scores = grouped[:, :, start:end] @ keys.swapaxes(2, 3) * scale
        scores = np.where((behind >= 0) & (behind < window), scores, f32(-np.inf))
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, :, start:end] = weights @ values / weights.sum(-1, keepdims=True)
    return out.reshape(heads, tokens, dim)


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return x / 2 * (1 + np.tanh(f32(np.sqrt(2 / np.pi)) * (x + f32(0.044715) * x**3)))


class Model:
    def __init__(self, path):
        self.reader = gguf.GGUFReader(path)
        self.tensors = {tensor.name: tensor for tensor in self.reader.tensors}
        self.architecture = self.reader.get_field("general.architecture").contents()
        if self.architecture not in ("llama", "qwen2", "qwen3", "gemma3"):
            sys.exit(f"{path}: architecture {self.architecture} is not among those that this script reads")
        scaling = self.key("rope.scaling.type", "none") != "none" or self.key("rope.scaling.factor", 1) != 1
        if scaling or "rope_freqs.weight" in self.tensors or self.key("expert_count", 0):
            sys.exit(f"{path}: scaled positions or experts, which this script does not read")
        hidden, self.heads = self.key("embedding_length"), self.key("attention.head_count")
        self.heads_kv = self.key("attention.head_count_kv", self.heads)
        self.head_dim = self.key("attention.key_length", hidden // self.heads)
        self.epsilon = f32(self.key("attention.layer_norm_rms_epsilon"))
        self.is_gemma = self.architecture == "gemma3"
        self.layers = self.key("block_count")
        if self.key("rope.dimension_count", self.head_dim) != self.head_dim or self.is_gemma and self.layers == 62:
            sys.exit(f"{path}: positions in a part of each head, or Gemma 3 27B, which this script does not read")
        self.embedding_scale = f32(np.sqrt(hidden)) if self.is_gemma else f32(1)
        self.activation = gelu if self.is_gemma else silu

    def key(self, name, default=None):
        field = self.reader.get_field(f"{self.architecture}.{name}")
        return default if field is None else field.contents()

    def tensor(self, name, rows=slice(None)):
        tensor = self.tensors.get(name)
        return tensor and gguf.dequantize(tensor.data[rows], tensor.tensor_type).astype(f32)

    def norm(self, x, weight):
        if weight is None:
            return x
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.epsilon) * weight

    def is_sliding(self, layer):
        return self.is_gemma and (layer + 1) % self.key("attention.sliding_window_pattern", 6) != 0

    def rotate_positions(self, x, base):
        """Rotary embedding of (heads, tokens, head size)."""
        half = x.shape[-1] // 2
        angles = np.arange(x.shape[1])[:, None] * float(base) ** (-np.arange(half) / half)
        cos, sin = np.cos(angles).astype(f32), np.sin(angles).astype(f32)
        interleaved = self.architecture == "llama"
        a, b = (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
        pair = a * cos - b * sin, a * sin + b * cos
        return np.stack(pair, -1).reshape(x.shape) if interleaved else np.concatenate(pair, -1)

    def read_layer(self, index, states, formats):
        """Replaces each format's state (tokens, hidden size) by that behind a layer."""
        prefix = f"blk.{index}."
        tensor = {name[len(prefix):]: self.tensor(name) for name in self.tensors if name.startswith(prefix)}
        sliding = self.is_sliding(index)
        window = self.key("attention.sliding_window") if sliding else sys.maxsize
        base = self.key("rope.freq_base_swa", 1e4) if sliding else self.key("rope.freq_base", 1e4)

        def product(x, name):
            bias = tensor.get(f"{name}.bias")
            product = x @ tensor[f"{name}.weight"].T
            return product if bias is None else product + bias

        def project(x, name, heads):
            return product(x, name).reshape(len(x), heads, self.head_dim).swapaxes(0, 1)

        for i, kv in enumerate(formats):
            if sliding and not kv.windows:
                kv = FORMATS[0]
            h = states[i]
            x = self.norm(h, tensor["attn_norm.weight"])
            queries, keys = (
                self.rotate_positions(self.norm(project(x, name, heads), tensor.get(f"{name}_norm.weight")), base)
                for name, heads in (("attn_q", self.heads), ("attn_k", self.heads_kv)))
            values = project(x, "attn_v", self.heads_kv)
            if kv.rotated:
                queries, keys, values = map(hadamard, (queries, keys, values))
            out = attend(queries, *kv.store(keys, values), window, f32(self.head_dim**-0.5))
            if kv.rotated:
                out = hadamard(out)
            out = product(out.swapaxes(0, 1).reshape(len(x), -1), "attn_output")
            h = h + self.norm(out, tensor.get("post_attention_norm.weight"))
            x = self.norm(h, tensor["ffn_norm.weight"])
            out = product(self.activation(product(x, "ffn_gate")) * product(x, "ffn_up"), "ffn_down")
            states[i] = h + self.norm(out, tensor.get("post_ffw_norm.weight"))


def log_softmax(logits):
    logits = logits.astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def evaluate(model, ids, formats):
    """Perplexity and mean divergence from the first format, for each."""
    states = [model.tensor("token_embd.weight", rows=ids) * model.embedding_scale] * len(formats)
    for index in range(model.layers):
        model.read_layer(index, states, formats)
        print(f"\rlayer {index + 1} of {model.layers}", end="", file=sys.stderr)
    print(file=sys.stderr)
    norm, output = model.tensor("output_norm.weight"), model.tensor("output.weight")
    output = model.tensor("token_embd.weight") if output is None else output
    counted = np.arange(len(ids) // 2, len(ids) - 1)
    nll, divergence = np.zeros(len(formats)), np.zeros(len(formats))
    for rows in np.array_split(counted, -(-len(counted) // ROWS_AT_ONCE)):
        expected = None
        for i, state in enumerate(states):
            predicted = log_softmax(model.norm(state[rows], norm) @ output.T)
            expected = predicted if expected is None else expected
            nll[i] -= predicted[np.arange(len(rows)), ids[rows + 1]].sum()
            divergence[i] += (np.exp(expected) * (expected - predicted)).sum()
    return np.exp(nll / len(counted)), divergence / len(counted)


def sharpi(binary, *args):
    return subprocess.run([binary, *args], check=True, stdout=subprocess.PIPE, text=True).stdout


def measured_by_sharpi(args, kv_type):
    out = sharpi(args.sharpi, "perplexity", "-q", "-m", args.model, "-f", args.file, "-c", str(args.ctx_size), "--kl",
                 "--device", "cpu", "--kv-type", kv_type)
    return map(float, re.search(r"perplexity +(\S+) .*mean ([^,]+),", out, re.DOTALL).groups())


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("-m", "--model", required=True)
    text = ap.add_mutually_exclusive_group(required=True)
    text.add_argument("-f", "--file", help="the text")
    text.add_argument("--ids", help="its token ids, as `sharpi tokenize --json` prints them")
    ap.add_argument("-c", "--ctx-size", type=int, default=2048, help="tokens of the window [default: 2048]")
    ap.add_argument("--sharpi", default="target/release/sharpi", help="the command [default: target/release/sharpi]")
    ap.add_argument("-n", "--numpy-only", action="store_true", help="do not measure the command's own formats")
    args = ap.parse_args()
    if args.ids:
        with open(args.ids, encoding="utf-8") as fh:
            tokenized = fh.read()
    else:
        tokenized = sharpi(args.sharpi, "tokenize", "-q", "--json", "-m", args.model, "-f", args.file)
    ids = np.array(json.loads(tokenized)["ids"])
    # The command measures every whole window, this script the first one.
    if not args.ctx_size <= len(ids) < 2 * args.ctx_size:
        sys.exit(f"the text is {len(ids)} tokens long: one window takes {args.ctx_size} to {2 * args.ctx_size - 1}")
    perplexities, divergences = evaluate(Model(args.model), ids[:args.ctx_size], FORMATS)
    print("| cache | perplexity | mean KL | perplexity by sharpi | mean KL by sharpi |\n|---|---|---|---|---|")
    for kv, perplexity, divergence in zip(FORMATS, perplexities, divergences):
        by_sharpi = ["", ""]
        if kv.name in KV_TYPES and args.file and not args.numpy_only:
            own_perplexity, own_divergence = measured_by_sharpi(args, KV_TYPES[kv.name])
            by_sharpi = [f"{own_perplexity:.4f}", f"{own_divergence:.2e}"]
        print(f"| {kv.name} | {perplexity:.4f} | {divergence:.2e} | {by_sharpi[0]} | {by_sharpi[1]} |", flush=True)


if __name__ == "__main__":
    main()
