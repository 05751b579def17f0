#!/usr/bin/env python3
"""Writes tests/data/pre-tokenizers.json: strings with their token ids, for each pre-tokenizer, over the demo model's
vocabulary and merges. A plain implementation of byte-level BPE on the `regex` package, with the patterns that the
models' own tokenizer.json files carry. Needs the PyPI packages gguf and regex."""

import json
import os
import unicodedata

import gguf
import regex

HERE = os.path.dirname(os.path.abspath(__file__))
DEMO = os.path.join(HERE, "..", "assets", "stories-10m-q4_k_m.gguf")

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

TEXTS = [
    "Hello, world! It's the fox's lantern.",
    "I'll we've DON'T they'RE",
    "1234567890 and 12 345, 6",
    "a\tb\n\n\nc\r\nd  \n  e",
    "   leading and trailing   ",
    "nai\u0308ve cafe\u0301 \u212b",
    "\u0663\u0664\u0665 \u00bd \u00b2x",
    "\u4f60\u597d\uff0c\u4e16\u754c\uff01 \U0001f98a\U0001f3ee",
    "for (int i = 0; i < 10; ++i) { x[i] *= 2; }",
    "end.\n\n\"Once upon a time,\" said the fox...\n",
    "\u00a0nbsp\u200bzwsp 'S \u017f \u212a",
]


def byte_alphabet():
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printing]
    return {byte: chr(byte) for byte in printing} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


def words(pre, text):
    if pre == "qwen2":
        return regex.findall(LLAMA3.replace("{1,3}", ""), unicodedata.normalize("NFC", text))
    if pre == "llama-bpe":
        return regex.findall(LLAMA3, text)
    if pre == "smollm":
        parts = regex.findall(r"\p{N}|[^\p{N}]+", text)
        return [word for part in parts for word in regex.findall(GPT2, part)]
    return regex.findall(GPT2, text)


def merge(word, ranks):
    while len(word) > 1:
        best = min(zip(word, word[1:]), key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        merged, i = [], 0
        while i < len(word):
            pair = tuple(word[i : i + 2]) == best
            merged.append("".join(best) if pair else word[i])
            i += 2 if pair else 1
        word = merged
    return word


def main():
    fields = gguf.GGUFReader(DEMO).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = fields["tokenizer.ggml.merges"].contents()
    ids = {token: i for i, token in enumerate(tokens)}
    ranks = {tuple(pair.split(" ")): rank for rank, pair in enumerate(merges)}
    alphabet = byte_alphabet()

    def encode(pre, text):
        out = []
        for word in words(pre, text):
            spelled = "".join(alphabet[byte] for byte in word.encode())
            # Llama 3 takes a word that is a token as it is, whatever the merges say.
            whole = pre == "llama-bpe" and spelled in ids
            out += [ids[token] for token in ([spelled] if whole else merge(list(spelled), ranks))]
        return out

    vectors = [
        {"pre": pre, "text": text, "ids": encode(pre, text)}
        for pre in ("qwen2", "smollm", "llama-bpe", "gpt-2")
        for text in TEXTS
    ]
    lines = ",\n".join(json.dumps(vector, ensure_ascii=True) for vector in vectors)
    with open(os.path.join(HERE, "data", "pre-tokenizers.json"), "w") as out:
        out.write(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
