// IQ4_NL: d * value(code), codes of 4 bits, d for each 32 values.
//
// File block: d (f16); byte i of 16 holds value i low, value 16 + i high.
#pragma once

#include "block_scales.cuh"
#include "codebook.cuh"

struct IQ4_NL : CodebookType<IQ4_NL, TileLayout<2, 0, 4, 0>, Iq4Values, BlockScales> {
    static constexpr int block_values = 32, block_bytes = 18;

    __device__ static int code(const uint8_t *block, int i) { return nibbles::code_in_block<2, false>(block, i); }
};
