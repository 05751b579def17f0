// Q5_0: d * (code - 16), codes of 5 bits, d for each 32 values.
//
// File block: d (f16); 32 fifth bits in order of values; byte i of 16 holds value i low, value 16 + i high.
#pragma once

#include "block_scales.cuh"
#include "nibbles.cuh"

struct Q5_0 : NibbleType<Q5_0, TileLayout<2, 8, 4, 0>, 16, BlockScales> {
    static constexpr int block_values = 32, block_bytes = 22;

    __device__ static int code(const uint8_t *block, int i) { return nibbles::code_in_block<2, true>(block, i); }
};
