#!/usr/bin/env python3
"""Writes the vectors of tests/quant.rs: random blocks of every tensor type and what they dequantize to.

    pip install gguf numpy
    python3 tests/data/quant/make.py

For each type, NAME.bin holds the blocks and NAME.f32 their values (float32, little-endian), computed by the
PyPI package `gguf` (made with 0.19.0). The blocks are random bits, scales included, save that float16 and
bfloat16 numbers are finite where they scale something, so that the expected values are numbers.
"""
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGML_QUANT_SIZES
from gguf.quants import dequantize

# Blocks to write, and byte offsets of the float16 scales in a block.
TYPES = {
    "F32": (64, []), "F16": (512, []), "BF16": (256, []),
    "Q4_0": (8, [0]), "Q4_1": (8, [0, 2]), "Q5_0": (8, [0]), "Q5_1": (8, [0, 2]), "Q8_0": (8, [0]),
    "Q2_K": (3, [80, 82]), "Q3_K": (3, [108]), "Q4_K": (3, [0, 2]), "Q5_K": (3, [0, 2]), "Q6_K": (3, [208]),
    "IQ4_NL": (8, [0]), "IQ4_XS": (3, [0]), "MXFP4": (8, []), "IQ3_S": (3, [0]), "IQ3_XXS": (3, [0]), "IQ2_S": (3, [0]),
    "IQ2_XS": (3, [0]), "IQ2_XXS": (3, [0]), "IQ1_M": (3, []), "IQ1_S": (3, [0]), "TQ2_0": (3, [64]), "TQ1_0": (3, [52]),
}


def random_scale(rng):
    """A float16 of any size: subnormals and both signs included."""
    return np.uint16(rng.integers(0, 0x7C00) | rng.integers(0, 2) << 15).tobytes()


def main():
    here = Path(__file__).parent
    for number, (name, (count, scales)) in enumerate(TYPES.items()):
        rng = np.random.default_rng(number)
        tensor_type = GGMLQuantizationType[name]
        size = GGML_QUANT_SIZES[tensor_type][1]
        blocks = rng.integers(0, 256, (count, size), dtype=np.uint8)
        for block in blocks:
            for offset in scales:
                block[offset:offset + 2] = np.frombuffer(random_scale(rng), dtype=np.uint8)
        if name == "MXFP4":  # powers of two: all kinds of exponents, but none that overflows
            blocks[:, 0] = [0, 1, 2, 127, 252, *rng.integers(3, 252, count - 5)]
        if name == "IQ1_M":  # a float16 in the highest bits of four words
            for block in blocks:
                scale = int.from_bytes(random_scale(rng), "little")
                for word in range(4):
                    at = 49 + 2 * word
                    block[at] = block[at] & 15 | (scale >> 4 * word & 15) << 4
        if name == "F32":
            blocks = rng.standard_normal(count, dtype=np.float32).view(np.uint8)
        if name == "F16":  # a stretch of subnormals, the rest of any size
            blocks = np.array([i if i < 64 else np.frombuffer(random_scale(rng), dtype=np.uint16)[0]
                               for i in range(count)], dtype=np.uint16).view(np.uint8)
        if name == "BF16":
            blocks = (rng.standard_normal(count, dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        data = blocks.reshape(-1)
        values = dequantize(data, tensor_type).astype("<f4")
        assert np.isfinite(values).all()
        (here / f"{name}.bin").write_bytes(data.tobytes())
        (here / f"{name}.f32").write_bytes(values.tobytes())


if __name__ == "__main__":
    main()
