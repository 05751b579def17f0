#!/usr/bin/env python3
"""make_gemma4.py FOLDER: writes small GGUF files of architecture gemma4 with random weights and a made-up tokenizer.

Run by make-gemma4.sh. Needs the PyPI packages gguf (0.19) and numpy, with which every run gives the same bytes.

The families have what sets Gemma 4's sizes apart: `e` (as E2B and E4B) has per-layer embeddings, and last layers that use
the keys and values of earlier ones; `dense` (as 12B and 31B) uses keys as values in its global layers; `moe` (as 26B-A4B)
has experts beside that. Heads have the real sizes: 256 values in sliding layers, 512 in global ones. Weights are scaled so
that logits spread by about 6 and the soft cap matters; the text that such a model makes is noise.
"""

import dataclasses
import os
import sys
import zlib

import gguf
import numpy as np
from gguf import GGMLQuantizationType as TensorType
from gguf import TokenType


@dataclasses.dataclass
class File:
    family: str
    seed: int
    layers: int
    period: int  # every period-th layer is global, and the last one
    heads: int
    kv_heads: int  # of sliding layers
    kv_heads_global: int
    ffn: int  # twice that in layers that share keys and values
    quantized: bool = False  # as Q4_K_M, else all float32
    hidden: int = 256
    shared: int = 0  # last layers that use the keys and values of earlier ones
    carries_unused: bool = False  # these have tensors for their own nevertheless, as some files do
    per_layer_embedding: int = 0
    experts: int = 0
    experts_used: int = 0
    ffn_expert: int = 0
    suppresses: bool = False  # names tokens never to choose, which would often win


FILES = {
    "e-f32": File("e", 21, layers=12, period=6, heads=2, kv_heads=1, kv_heads_global=1, ffn=192, shared=4,
                  carries_unused=True, per_layer_embedding=32),
    "e-q4km": File("e", 12, layers=15, period=5, heads=4, kv_heads=2, kv_heads_global=2, ffn=512, shared=6,
                   quantized=True, per_layer_embedding=256),
    "dense-f32": File("dense", 13, layers=12, period=6, heads=4, kv_heads=2, kv_heads_global=1, ffn=256),
    "dense-q4km": File("dense", 14, layers=12, period=6, heads=4, kv_heads=4, kv_heads_global=1, ffn=768,
                       quantized=True, hidden=512, suppresses=True),
    "moe-f32": File("moe", 15, layers=8, period=4, heads=2, kv_heads=2, kv_heads_global=1, ffn=192,
                    experts=6, experts_used=2, ffn_expert=96),
}

WINDOW = 32
HEAD_DIM, HEAD_DIM_GLOBAL = 256, 512
VOCABULARY = 1536

# What the vocabulary's pieces are learnt from.
TEXT = """The old lighthouse keeper climbed the stairs every evening and lit the lamp before the ships came home.
A small fox found a lantern in the forest and carried it to the river, where the water was still and dark.
What is the capital of France? The capital of France is Paris, a city on the river Seine.
Once upon a time there was a girl who wanted to count all the stars in the sky.
She said that the weather would be good tomorrow, but it rained for three days and three nights.
def fibonacci(n): return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)
for (int i = 0; i < 10; ++i) { total += values[i] * weights[i]; }
if x is None: raise ValueError("the value must not be empty")
print("hello, world"); print(len(items), sum(items) / len(items))
let result = numbers.iter().map(|x| x * 2).filter(|x| x > 10).collect();
The price rose from 12.50 to 13.75 in 2024, and then fell to 11.90 in 2025.
In 1969 the first people walked on the moon; about 600 million people watched it on television.
Water is made of hydrogen and oxygen. It boils at 100 degrees and freezes at 0 degrees.
The train to the north leaves at 8:15 in the morning and arrives at 17:42 in the afternoon.
My brother and my sister are teachers; they work in the same school near the old market.
Please write a short letter to the manager of the hotel and ask for a room with a view of the sea.
There are seven days in a week, twelve months in a year, and a hundred years in a century.
The cat sat on the mat, the dog lay by the door, and the bird sang in the tree.
No one knows what happened to the ship after it left the harbour on that cold morning.
He opened the window, looked at the garden, and thought about the long summer that was over.
The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs.
It's not that I don't want to go; I'll come when I've finished what we're doing, as he'd said.
naïve café résumé über straße niño façade jalapeño voilà déjà vu
Привет, как дела? Сегодня хорошая погода, и мы идём гулять в парк.
The engine reads the file, maps the weights, and then runs one layer after another for every token.
An experiment needs a question, a method, a measurement and an honest look at the result.
Bread is made from flour, water, salt and yeast; it is baked in a hot oven until it is brown.
You are a helpful assistant. You are a careful assistant who answers in one sentence.
The list of things to buy: milk, eggs, butter, apples, pears, rice, beans and tea.
A triangle has three sides, a square has four sides, and a circle has none.
While the children were playing in the street, their parents were talking about the new bridge.
To the north of the town there is a hill, and on the hill there is a tower of grey stone.
"""

# Gemma 4's layout of a conversation without tools, in this project's own words.
TEMPLATE = (
    "{{ bos_token }}"
    "{%- if enable_thinking or messages[0]['role'] in ['system', 'developer'] -%}"
    "{{ '<|turn>system\\n' }}{% if enable_thinking %}{{ '<|think|>' }}{% endif %}"
    "{%- if messages[0]['role'] in ['system', 'developer'] -%}{{ messages[0]['content'] | trim }}{%- endif -%}{{ '<turn|>\\n' }}"
    "{%- endif -%}"
    "{%- for m in messages -%}{%- if not (loop.first and m['role'] in ['system', 'developer']) -%}"
    "{{ '<|turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' + (m['content'] | trim) + '<turn|>\\n' }}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|turn>model\\n' }}{%- endif -%}"
)

# Where Gemma 4's vocabulary has them too: special tokens, runs of newlines and of blanks, bytes. Pieces follow.
NAMED = {0: "<pad>", 1: "<eos>", 2: "<bos>", 3: "<unk>", 4: "<mask>", 46: "<|tool>", 47: "<tool|>", 48: "<|tool_call>",
         49: "<tool_call|>", 50: "<|tool_response>", 51: "<tool_response|>", 52: '<|"|>', 98: "<|think|>",
         100: "<|channel>", 101: "<channel|>", 105: "<|turn>", 106: "<turn|>", 212: "</s>"}
NEWLINES, BLANKS, BYTES, PIECES = 107, 138, 238, 494
USER_DEFINED = ["<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>']
HTML = 212  # its </s> is a tag, not an end of the text
LAST = ["<|image>", "<image|>", "<|audio>", "<audio|>"]
SUPPRESSED = [VOCABULARY - 1, VOCABULARY - 3]  # the two ends among these


def generator(*seed):
    return np.random.Generator(np.random.SFC64(seed))


def learn(seed):
    """Pieces of a byte-pair vocabulary in the order learnt. Lines are not cut into words: pieces may hold blanks."""
    lines = TEXT.strip().split("\n")
    order = generator(seed, 77).permutation(len(lines))
    texts = [list(lines[i].replace(" ", "\u2581")) for i in sorted(order[: len(lines) * 7 // 8])]
    pieces = []
    while True:
        counts = {}
        for text in texts:
            for pair in zip(text, text[1:]):
                counts[pair] = counts.get(pair, 0) + 1
        count, best = max((count, pair) for pair, count in counts.items())
        if count < 2:
            return pieces
        merged = best[0] + best[1]
        if merged not in pieces:
            pieces.append(merged)
        for number, text in enumerate(texts):
            out, i = [], 0
            while i < len(text):
                if tuple(text[i : i + 2]) == best:
                    out.append(merged)
                    i += 2
                else:
                    out.append(text[i])
                    i += 1
            texts[number] = out


def vocabulary(seed):
    """The tokens, their types and the merges."""
    tokens = dict(NAMED)
    tokens |= {NEWLINES + i: "\n" * (i + 1) for i in range(31)}
    tokens |= {BLANKS + i: "\u2581" * (i + 2) for i in range(30)}
    tokens |= {BYTES + byte: f"<0x{byte:02X}>" for byte in range(256)}
    chars = set(TEXT.replace(" ", "\u2581")) | {chr(c) for c in range(33, 127)} | {"\t"}
    chars = sorted(chars - {"\n"})
    room = VOCABULARY - PIECES - len(chars) - len(LAST)
    pieces = [piece for piece in learn(seed) if piece not in tokens.values()][:room]
    # Filled up with pairs of learnt pieces: rare, but a text may hold them.
    random, learnt, known = generator(seed, 78), len(pieces), {*pieces, *chars, *tokens.values()}
    while len(pieces) < room:
        first = pieces[random.integers(learnt)]
        second = pieces[random.integers(learnt)] if random.random() < 0.7 else chars[random.integers(len(chars))]
        if len(first + second) <= 9 and first + second not in known:
            pieces.append(first + second)
            known.add(first + second)
    tokens |= enumerate(pieces + chars, PIECES)
    tokens |= enumerate(LAST, VOCABULARY - len(LAST))
    names, types, unused = [], [], 0
    for i in range(VOCABULARY):
        if i not in tokens:
            tokens[i] = f"<unused{unused}>"
            unused += 1
        names.append(tokens[i])
        types.append(token_type(i, tokens[i]))
    ids = {name: i for i, name in enumerate(names) if types[i] == TokenType.NORMAL}
    merges = []
    # Every way to make a piece of two others, pieces in the order of their ids.
    for name in filter(ids.__contains__, names):
        halves = [(name[:i], name[i:]) for i in range(1, len(name))]
        halves = [pair for pair in halves if pair[0] in ids and pair[1] in ids]
        halves.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        merges += [" ".join(pair) for pair in halves]
    return names, types, merges


def token_type(token, name):
    if BYTES <= token < PIECES:
        return TokenType.BYTE
    if name in USER_DEFINED:
        return TokenType.USER_DEFINED
    is_piece = PIECES <= token < VOCABULARY - len(LAST)
    if name.startswith("<") and not is_piece and token != HTML:
        return TokenType.CONTROL
    return TokenType.NORMAL


def reciprocal(values):
    """0 of 0."""
    return np.where(values != 0, 1 / np.where(values != 0, values, 1), 0)


def q4_k(values):
    """Blocks of 256: a scale and a minimum of 6 bits for each 32 values of 4 bits, and what both are multiples of."""
    x = values.reshape(-1, 8, 32)
    low = np.minimum(x.min(-1), 0)
    step = (x.max(-1) - low) / 15
    d, dmin = (step.max(-1) / 63).astype(np.float16), ((-low).max(-1) / 63).astype(np.float16)
    wide_d, wide_dmin = d.astype(np.float32)[:, None], dmin.astype(np.float32)[:, None]
    scale = np.clip(np.rint(step * reciprocal(wide_d)), 0, 63).astype(np.uint8)
    minimum = np.clip(np.rint(-low * reciprocal(wide_dmin)), 0, 63).astype(np.uint8)
    x = (x + (wide_dmin * minimum)[..., None]) * reciprocal(wide_d * scale)[..., None]
    q = np.clip(np.rint(x), 0, 15).astype(np.uint8).reshape(-1, 4, 2, 32)
    scales = np.empty((len(q), 12), np.uint8)
    scales[:, :4] = scale[:, :4] | ((scale[:, 4:] >> 4) << 6)
    scales[:, 4:8] = minimum[:, :4] | ((minimum[:, 4:] >> 4) << 6)
    scales[:, 8:] = (scale[:, 4:] & 15) | ((minimum[:, 4:] & 15) << 4)
    q = (q[:, :, 0] | (q[:, :, 1] << 4)).reshape(-1, 128)
    return np.concatenate([d[:, None].view(np.uint8), dmin[:, None].view(np.uint8), scales, q], 1)


def q6_k(values):
    """Blocks of 256: a scale of 8 bits for each 16 values of 6 bits, and what the scales are multiples of."""
    x = values.reshape(-1, 16, 16)
    greatest = np.take_along_axis(x, np.abs(x).argmax(-1)[..., None], -1)[..., 0]
    step = greatest / -32
    d = (np.abs(step).max(-1) / 127).astype(np.float16)
    wide_d = d.astype(np.float32)[:, None]
    scale = np.clip(np.rint(step * reciprocal(wide_d)), -127, 127).astype(np.int8)
    x = x * reciprocal(wide_d * scale)[..., None]
    q = (np.clip(np.rint(x), -32, 31) + 32).astype(np.uint8).reshape(-1, 2, 4, 32)
    low = [(q[:, :, i] & 15) | ((q[:, :, i + 2] & 15) << 4) for i in (0, 1)]
    low = np.stack(low, 2).reshape(-1, 128)
    high = (q[:, :, 0] >> 4) | ((q[:, :, 1] >> 4) << 2) | ((q[:, :, 2] >> 4) << 4) | ((q[:, :, 3] >> 4) << 6)
    return np.concatenate([low, high.reshape(-1, 64), scale.view(np.uint8), d[:, None].view(np.uint8)], 1)


class Writer:
    """A GGUF file whose tensors are random, each by its own name and the file's seed."""

    def __init__(self, path, file):
        self.gguf = gguf.GGUFWriter(path, "gemma4")
        self.seed = file.seed

    def random(self, name):
        return generator(self.seed, zlib.crc32(name.encode()))

    def add(self, name, values, tensor_type=TensorType.F32):
        if tensor_type in (TensorType.Q4_K, TensorType.Q6_K):
            blocks = q4_k(values) if tensor_type == TensorType.Q4_K else q6_k(values)
            values = np.ascontiguousarray(blocks).reshape(*values.shape[:-1], -1)
        else:
            values = values.astype(np.float16 if tensor_type == TensorType.F16 else np.float32)
        self.gguf.add_tensor(name, values, raw_dtype=tensor_type)

    def normal(self, name, *shape, gain=1.0):
        values = self.random(name).standard_normal(shape, dtype=np.float32)
        return values * np.float32(gain * shape[-1] ** -0.5)

    def matrix(self, name, *shape, tensor_type=TensorType.F32, gain=1.0):
        self.add(name, self.normal(name, *shape, gain=gain), tensor_type)

    def norm(self, name, size, mean, signs=False):
        """`mean` is not 1, so that one added to the weights would show. Either sign keeps a tied output from always
        choosing the token that it was just given."""
        values = mean * (1 + 0.3 * self.random(name).standard_normal(size))
        if signs:
            values *= self.random(name + "s").integers(0, 2, size) * 2 - 1
        self.add(name, values)


def add_metadata(out, file, sliding):
    prefix = "gemma4."
    types = "q4_k_m" if file.quantized else "f32"
    out.add_name(f"synthetic gemma4 {file.family} {types} seed {file.seed}")
    out.add_file_type(15 if file.quantized else 0)
    out.add_quantization_version(2)
    for key, value in {
        "context_length": 4096,
        "embedding_length": file.hidden,
        "block_count": file.layers,
        "vocab_size": VOCABULARY,
        "attention.head_count": file.heads,
        "attention.key_length": HEAD_DIM_GLOBAL,
        "attention.value_length": HEAD_DIM_GLOBAL,
        "attention.key_length_swa": HEAD_DIM,
        "attention.value_length_swa": HEAD_DIM,
        "attention.sliding_window": WINDOW,
        "attention.shared_kv_layers": file.shared,
        "rope.dimension_count": HEAD_DIM_GLOBAL,
        "rope.dimension_count_swa": HEAD_DIM,
        "embedding_length_per_layer_input": file.per_layer_embedding,
    }.items():
        out.add_uint32(prefix + key, value)
    for key, value in {
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 1e6,
        "rope.freq_base_swa": 1e4,
        "final_logit_softcapping": 30.0,
    }.items():
        out.add_float32(prefix + key, value)
    if file.shared:
        own = file.layers - file.shared
        out.add_array(prefix + "feed_forward_length", [file.ffn] * own + [2 * file.ffn] * file.shared)
    else:
        out.add_uint32(prefix + "feed_forward_length", file.ffn)
    if file.family == "e":
        out.add_uint32(prefix + "attention.head_count_kv", file.kv_heads)
    else:
        heads = [file.kv_heads if slides else file.kv_heads_global for slides in sliding]
        out.add_array(prefix + "attention.head_count_kv", heads)
    out.add_array(prefix + "attention.sliding_window_pattern", sliding)
    if file.experts:
        out.add_uint32(prefix + "expert_count", file.experts)
        out.add_uint32(prefix + "expert_used_count", file.experts_used)
        out.add_uint32(prefix + "expert_feed_forward_length", file.ffn_expert)


def add_tokenizer(out, file):
    names, types, merges = vocabulary(file.seed)
    out.add_tokenizer_model("gemma4")
    out.add_token_list(names)
    out.add_token_scores([-1000.0] * VOCABULARY)
    out.add_token_types([int(kind) for kind in types])
    out.add_token_merges(merges)
    out.add_bos_token_id(2)
    out.add_eos_token_id(1)
    out.add_unk_token_id(3)
    out.add_pad_token_id(0)
    out.add_mask_token_id(4)
    out.add_add_bos_token(True)
    out.add_add_space_prefix(False)
    out.add_chat_template(TEMPLATE)
    if file.suppresses:
        out.add_array("tokenizer.ggml.suppress_tokens", SUPPRESSED)


def add_tensors(out, file, sliding):
    hidden, ple = file.hidden, file.per_layer_embedding
    matrix_type = TensorType.Q4_K if file.quantized else TensorType.F32
    embedding_type = TensorType.Q6_K if file.quantized else TensorType.F32
    embedding = out.normal("token_embd.weight", VOCABULARY, hidden)
    if file.suppresses:
        embedding[SUPPRESSED] *= 2.5
    out.add("token_embd.weight", embedding, embedding_type)
    out.norm("output_norm.weight", hidden, 6.0, signs=True)
    # Of the pairs of a global head, the first quarter turns.
    out.add("rope_freqs.weight", np.array([1.0] * 64 + [1e30] * 192))
    if ple:
        # Scaled by the width of one layer's part of a row.
        table = out.random("per_layer_token_embd.weight")
        table = table.standard_normal((VOCABULARY, file.layers * ple), dtype=np.float32) * np.float32(ple**-0.5)
        out.add("per_layer_token_embd.weight", table, embedding_type)
        projection_type = TensorType.F16 if file.quantized else TensorType.F32
        out.matrix("per_layer_model_proj.weight", file.layers * ple, hidden, tensor_type=projection_type)
        out.norm("per_layer_proj_norm.weight", ple, 0.8)
    for layer, slides in enumerate(sliding):
        add_layer(out, file, layer, slides, matrix_type)


def add_layer(out, file, layer, slides, matrix_type):
    def matrix(name, *shape, tensor_type=matrix_type, gain=1.0):
        out.matrix(f"blk.{layer}.{name}.weight", *shape, tensor_type=tensor_type, gain=gain)

    def norm(name, size, mean):
        out.norm(f"blk.{layer}.{name}.weight", size, mean)

    hidden, ple, experts = file.hidden, file.per_layer_embedding, file.experts
    # Layers whose attn_v and ffn_down a Q4_K_M file keeps in Q6_K.
    eighth = file.layers // 8
    more_bits = layer < eighth or layer >= 7 * file.layers // 8 or (layer - eighth) % 3 == 2
    wide_type = TensorType.Q6_K if file.quantized and more_bits else matrix_type
    owns_kv = layer < file.layers - file.shared
    head_dim = HEAD_DIM if slides else HEAD_DIM_GLOBAL
    kv_size = (file.kv_heads if slides else file.kv_heads_global) * head_dim
    ffn = file.ffn if owns_kv else 2 * file.ffn
    norm("attn_norm", hidden, 0.9)
    matrix("attn_q", file.heads * head_dim, hidden)
    norm("attn_q_norm", head_dim, 0.25)
    if owns_kv or file.carries_unused:
        matrix("attn_k", kv_size, hidden)
        if slides or file.family == "e":
            matrix("attn_v", kv_size, hidden, tensor_type=wide_type)
        norm("attn_k_norm", head_dim, 0.25)
    matrix("attn_output", hidden, file.heads * head_dim)
    norm("post_attention_norm", hidden, 0.3)
    norm("ffn_norm", hidden, 1.2)
    matrix("ffn_gate", ffn, hidden)
    matrix("ffn_up", ffn, hidden)
    matrix("ffn_down", hidden, ffn, tensor_type=wide_type)
    norm("post_ffw_norm", hidden, 0.3)
    scale = 0.85 + 0.15 * out.random(f"blk.{layer}.scale").random()
    out.add(f"blk.{layer}.layer_output_scale.weight", np.array([scale]))
    if ple:
        matrix("inp_gate", ple, hidden, tensor_type=TensorType.F32)
        matrix("proj", hidden, ple, tensor_type=TensorType.F32)
        norm("post_norm", hidden, 0.2)
    if experts:
        matrix("ffn_gate_inp", experts, hidden, tensor_type=TensorType.F32, gain=3.0 * hidden**0.5)
        scales = 1 + 0.2 * out.random(f"blk.{layer}.gis").standard_normal(hidden)
        out.add(f"blk.{layer}.ffn_gate_inp.scale", scales)
        norm("pre_ffw_norm_2", hidden, 1.1)
        norm("post_ffw_norm_1", hidden, 0.7)
        norm("post_ffw_norm_2", hidden, 0.9)
        matrix("ffn_gate_up_exps", experts, 2 * file.ffn_expert, hidden)
        matrix("ffn_down_exps", experts, hidden, file.ffn_expert, tensor_type=wide_type)
        scales = 0.7 + 0.6 * out.random(f"blk.{layer}.des").random(experts)
        out.add(f"blk.{layer}.ffn_down_exps.scale", scales)


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    for name, file in FILES.items():
        sliding = [(layer + 1) % file.period != 0 and layer != file.layers - 1 for layer in range(file.layers)]
        out = Writer(os.path.join(sys.argv[1], f"{name}.gguf"), file)
        add_metadata(out.gguf, file, sliding)
        add_tokenizer(out.gguf, file)
        add_tensors(out, file, sliding)
        out.gguf.write_header_to_file()
        out.gguf.write_kv_data_to_file()
        out.gguf.write_tensors_to_file()
        out.gguf.close()


if __name__ == "__main__":
    main()
