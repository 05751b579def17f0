#!/usr/bin/env python3
"""Writes tests/data/pre-tokenizers.json: strings with their token ids, for each pre-tokenizer, over the demo model's
vocabulary and merges and a few that tell the pre-tokenizers apart, by Hugging Face tokenizers set up as the models' own
tokenizer.json files set it up. Needs the PyPI packages gguf and tokenizers."""

import json
import os

import gguf
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel, Digits, Punctuation, Split

HERE = os.path.dirname(os.path.abspath(__file__))
DEMO = os.path.join(HERE, "..", "assets", "stories-10m-q4_k_m.gguf")

CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
BLANKS = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*" + BLANKS
QWEN35 = (
    CONTRACTION + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + BLANKS
)
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
BY_CASE = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+ENDING|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*ENDING"
    r"|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n/]*" + BLANKS
)
DEEPSEEK_V3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*" + BLANKS
)
BAILING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
SEED = CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+" + BLANKS
EXAONE_MOE = (
    CONTRACTION + r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
SPARK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+|[\r\n]|\s+(?!\S)|\s+"
)
YOUTU = (
    "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+"
    "|[\u3105-\u312f]+|" + KANA
)
# Some of DeepSeek LLM's list, which names the letters one by one: those that the texts below have.
DEEPSEEK_LETTERS = r"\s?[A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u0386\u0388-\u03ff\u0400-\u0481\u1e00-\u1f15\u212a-\u212d]+"
CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"

# What the demo model's own pre-tokenizer never let merge. tests/tokenizer.rs adds the same.
EXTRA = ["1 2", "12 3", "3 4", "4 5", "\u0120 1", "\u010a \u010a", ") {"]

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
    "camelCaseWords HTTPServer a/b//\n/c $5+5=10 `x`~y\u2026 \u2018q\u2019 \u3002",
    "\u041f\u0440\u0438\u0432\u0435\u0442 \u0393\u03b5\u03b9\u03ac \ud55c\uad6d\uc5b4 \u3072\u3089\u304c\u306a \u30ab\u30bf\u30ab\u30ca  ",
]


def split(*patterns):
    return [Split(Regex(pattern), "isolated") for pattern in patterns] + [ByteLevel(False, use_regex=False)]


GPT2 = ByteLevel(False)
# Its pre-tokenizers, whether text is brought into form C, and whether a word that is a token is taken whole.
PRE_TOKENIZERS = {
    "qwen2": (split(LLAMA3 % r"\p{N}"), True, False),
    "smollm": ([Digits(True), GPT2], False, False),
    "llama-bpe": (split(LLAMA3 % r"\p{N}{1,3}"), False, True),
    "gpt-2": ([GPT2], False, False),
    "qwen35": (split(QWEN35), True, False),
    "tekken": (split(BY_CASE.replace("ENDING", "").replace("DIGITS", r"\p{N}")), False, True),
    "gpt-4o": (split(BY_CASE.replace("ENDING", CONTRACTION + "?").replace("DIGITS", r"\p{N}{1,3}")), False, False),
    "deepseek-v3": (split(r"\p{N}{1,3}", KANA, DEEPSEEK_V3), False, False),
    "spark2_5": (split(r"\p{N}{1,3}", KANA, SPARK, r"\p{N}"), False, False),
    "bailingmoe": (split(BAILING), False, False),
    "seed-coder": (split(SEED), False, False),
    "exaone-moe": (split(EXAONE_MOE), False, False),
    "glm4": (split(LLAMA3 % r"\p{N}{1,3}"), False, True),
    "minicpm5": (split(r"\p{N}{1,3}", LLAMA3 % r"\p{N}+"), False, True),
    "youtu": (split(YOUTU, BY_CASE.replace("ENDING", CONTRACTION + "?").replace("DIGITS", r"\p{N}")), False, True),
    "laguna": (split(r"[^\n]+|[\n]+", LLAMA3 % r"\p{N}"), False, False),
    "ufakzeka": (split((LLAMA3 % r"\p{N}")[len(CONTRACTION) + 1 :]), False, False),
    "deepseek-coder": (split("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CJK, r"\p{N}"), False, False),
    "deepseek-llm": (
        split("[\r\n]", DEEPSEEK_LETTERS, "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+", r"\s+$", CJK, r"\p{N}+"),
        False,
        False,
    ),
    "command-r": ([Digits(True), GPT2], True, False),
    "mpt": ([GPT2], True, False),
    "falcon": ([Punctuation("contiguous"), GPT2, Digits(False), Split(Regex("[0-9][0-9][0-9]"), "isolated")], False, False),
    "bloom": (split(r" ?[^(\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+"), False, False),
}


def main():
    fields = gguf.GGUFReader(DEMO).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"].contents() + EXTRA]
    tokens += [token for token in ("".join(pair.split(" ")) for pair in EXTRA) if token not in tokens]
    ids = {token: i for i, token in enumerate(tokens)}
    vectors = []
    for name, (stages, nfc, whole_words) in PRE_TOKENIZERS.items():
        tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=whole_words))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(stages)
        if nfc:
            tokenizer.normalizer = normalizers.NFC()
        vectors += [{"pre": name, "text": text, "ids": tokenizer.encode(text).ids} for text in TEXTS]
    lines = ",\n".join(json.dumps(vector, ensure_ascii=True) for vector in vectors)
    with open(os.path.join(HERE, "data", "pre-tokenizers.json"), "w") as out:
        out.write(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
