// Q5_K: d * scale * code - dmin * min, codes of 5 bits, scale and min for each 32 values.
//
// File block of 256 values: d, dmin (f16); 12 bytes of scales and minima; 32 bytes, bit g of byte j being bit 4 of
// value 32 g + j; 128 bytes of low bits, in each 32 of which byte j holds value j low, value 32 + j high.
#pragma once

#include "nibbles.cuh"
#include "packed_scales.cuh"

struct Q5_K : NibbleType<Q5_K, TileLayout<2, 8, 0, 16>, 0, PackedScales> {
    static constexpr int block_values = 256, block_bytes = 176;

    __device__ static int code(const uint8_t *block, int i) {
        const int group = i / 32, j = i % 32;
        return (block[48 + group / 2 * 32 + j] >> group % 2 * 4 & 15) | (block[16 + j] >> group & 1) << 4;
    }
};
