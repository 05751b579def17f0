// Q4_1: d * code + m, codes of 4 bits, d and m for each 32 values.
//
// File block: d, m (f16); byte i of 16 holds value i low, value 16 + i high.
#pragma once

#include "block_scales.cuh"
#include "nibbles.cuh"

struct Q4_1 : NibbleType<Q4_1, TileLayout<2, 0, 8, 0>, 0, BlockScales> {
    static constexpr int block_values = 32, block_bytes = 20;

    __device__ static int code(const uint8_t *block, int i) { return nibbles::code_in_block<4, false>(block, i); }
};
