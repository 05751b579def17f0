#!/usr/bin/env bash
# Formats the CUDA sources by the style in .clang-format, with a clang-format from PyPI (each version has a taste of its own);
# with --check it changes nothing and fails where something differs.
set -euo pipefail
cd "$(dirname "$0")/.."

package=clang-format==20.1.8
folder=target/$package
if [ ! -d "$folder" ]; then
    rm -rf "$folder.partial"
    python3 -m pip install --quiet --target "$folder.partial" "$package"
    mv "$folder.partial" "$folder"
fi
mode=(-i)
[ "${1-}" = --check ] && mode=(--dry-run --Werror)
find kernels \( -name '*.cu' -o -name '*.cuh' -o -name '*.h' \) -print0 |
    xargs -0 "$folder/clang_format/data/bin/clang-format" --style=file:.clang-format "${mode[@]}"
