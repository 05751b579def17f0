#!/usr/bin/env python3
"""Writes codebook_points.cuh from src/quant/codebook_points.rs, which says how points are packed.

    python3 kernels/types/codebook_points.py
"""
import re
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parents[1] / "src/quant/codebook_points.rs"
HEAD = """\
// Points of the codebooks of IQ2_S and IQ3_*. Written by codebook_points.py.
//
// The coordinates of a point are indexes of their values, the first in the lowest bits: 3 bits each, IQ2_S's 2.
#pragma once

#include "../common.cuh"

namespace codebook_points {

"""


def main():
    out = HEAD
    text = SOURCE.read_text()
    for name in ["IQ2_S", "IQ3_XXS", "IQ3_S"]:
        found = re.search(rf"const {name}: \[u16; (\d+)\] = \[(.*?)\];", text, re.S)
        points = [f"0x{int(number, 0):04x}" for number in re.findall(r"0[ox]\w+", found[2])]
        assert len(points) == int(found[1])
        lines = [", ".join(points[i:i + 14]) for i in range(0, len(points), 14)]
        body = "".join(f"    {line},\n" for line in lines)
        out += f"__device__ const uint16_t {name}[{len(points)}] = {{\n{body}}};\n\n"
    (HERE / "codebook_points.cuh").write_text(out + "}  // namespace codebook_points\n")


if __name__ == "__main__":
    main()
