#!/usr/bin/env python3
"""make_golden.py MODEL.gguf GOLDEN.json: computes what a model file should give for the cases of GOLDEN.json, of which it
keeps the name, the prompt and whether that is a user's turn, by Hugging Face transformers in float32 on the file's
dequantized weights. Needs the PyPI packages accelerate, gguf, jinja2, torch and transformers, and six bytes of memory a
parameter."""

import json
import os
import sys

import torch
import transformers

TOP = 20  # log-probabilities after the prompt
STEPS = 64  # greedy tokens at most


def compute(case, model, tokenizer):
    text = case["prompt"]
    if case["chat"]:
        text = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    output = model(torch.tensor([ids]), use_cache=True)
    logprobs = torch.log_softmax(output.logits[0].double(), dim=-1)
    nll = [-logprobs[i, token].item() for i, token in enumerate(ids[1:])]
    values, tokens = logprobs[-1].topk(TOP)

    greedy, margins = [], []
    logits = output.logits[0, -1]
    while len(greedy) < STEPS:
        best = logits.topk(2)
        greedy.append(best.indices[0].item())
        margins.append(round((best.values[0] - best.values[1]).item(), 4))
        if greedy[-1] == tokenizer.eos_token_id:
            break
        output = model(torch.tensor([greedy[-1:]]), past_key_values=output.past_key_values, use_cache=True)
        logits = output.logits[0, -1]
    return {
        "name": case["name"],
        "reference": f"transformers {transformers.__version__}",
        "prompt": case["prompt"],
        "chat": case["chat"],
        "text": text,
        "prompt_ids": ids,
        "mean_nll": sum(nll) / len(nll) if nll else None,
        "last_logprobs": [[token, round(value, 5)] for token, value in zip(tokens.tolist(), values.tolist())],
        "greedy_ids": greedy,
        "greedy_margins": margins,
        "greedy_text": tokenizer.decode(greedy, skip_special_tokens=True),
    }


@torch.inference_mode()
def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    (directory, file), golden = os.path.split(os.path.abspath(sys.argv[1])), sys.argv[2]
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, gguf_file=file, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, gguf_file=file)
    with open(golden, encoding="utf-8") as cases:
        cases = json.load(cases)
    cases = [json.dumps(compute(case, model, tokenizer), ensure_ascii=False) for case in cases]
    with open(golden, "w", encoding="utf-8") as out:
        out.write("[\n" + ",\n".join(cases) + "\n]\n")


if __name__ == "__main__":
    main()
