// Q4_K: d * scale * code - dmin * min, codes of 4 bits, scale and min for each 32 values.
//
// File block of 256 values: d, dmin (f16); 12 bytes of scales and minima; 128 bytes, in each 32 of which byte j holds
// value j low, value 32 + j high.
#pragma once

#include "nibbles.cuh"
#include "packed_scales.cuh"

struct Q4_K : NibbleType<Q4_K, TileLayout<2, 0, 0, 16>, 0, PackedScales> {
    static constexpr int block_values = 256, block_bytes = 144;

    __device__ static int code(const uint8_t *block, int i) {
        const int group = i / 32, j = i % 32;
        return block[16 + group / 2 * 32 + j] >> group % 2 * 4 & 15;
    }
};
