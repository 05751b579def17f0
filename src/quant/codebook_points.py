#!/usr/bin/env python3
"""Writes codebook_points.rs: the codebooks of the formats IQ1 to IQ3, as the PyPI package `gguf` has them.

    pip install gguf
    python3 src/quant/codebook_points.py

A point is packed as indexes of the few values that a coordinate can take, the first coordinate in the lowest bits.
The codebooks are those of ggml's `ggml-common.h`; made with `gguf` 0.19.0. Also prints a hash of every codebook, for
the test in codebooks.rs.
"""
from pathlib import Path

import numpy as np
from gguf import quants

HEAD = """\
//! Points of the codebooks in `codebooks.rs`. Written by `codebook_points.py`.
//!
//! The coordinates of a point are indexes of their values, the first in the lowest bits: octal digits, or two bits each.
"""


CODEBOOKS = {
    "IQ1": quants.IQ1_S, "IQ2_XXS": quants.IQ2_XXS, "IQ2_XS": quants.IQ2_XS, "IQ2_S": quants.IQ2_S,
    "IQ3_XXS": quants.IQ3_XXS, "IQ3_S": quants.IQ3_S,
}


def fnv1a(data):
    """FNV-1a of 64 bits."""
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return value


def main():
    out = [HEAD]
    for name, codebook in CODEBOOKS.items():
        codebook.init_grid()
        grid = codebook.grid.reshape(codebook.grid_shape).astype(np.int8)
        count, coordinates = grid.shape
        bits, number = (3, "0o{:04o}") if coordinates == 4 else (2, "0x{:04x}")
        digits = np.searchsorted(codebook.grid_map, grid)
        points = (digits << bits * np.arange(coordinates)).sum(axis=1)
        numbers = [number.format(point) for point in points]
        lines = [", ".join(numbers[i:i + 12]) for i in range(0, count, 12)]
        out.append(f"pub const {name}: [u16; {count}] = [\n" + "".join(f"    {line},\n" for line in lines) + "];\n")
        print(f"{name}: {fnv1a(grid.tobytes()):#018x}")
    Path(__file__).with_suffix(".rs").write_text("\n".join(out))


if __name__ == "__main__":
    main()
