// Q4_0: d * (code - 8), codes of 4 bits, d for each 32 values.
//
// File block: d (f16); byte i of 16 holds value i low, value 16 + i high.
#pragma once

#include "block_scales.cuh"
#include "nibbles.cuh"

struct Q4_0 : NibbleType<Q4_0, TileLayout<2, 0, 4, 0>, 8, BlockScales> {
    static constexpr int block_values = 32, block_bytes = 18;

    __device__ static int code(const uint8_t *block, int i) { return nibbles::code_in_block<2, false>(block, i); }
};
