// IQ3_XXS: d * (2 * scale + 1) / 4 * value, a scale of 4 bits for each 32 values. Every four values are a point of a
// codebook, with signs: each is one of 16, and has a code of 4 bits on the device, where 12 bits and 4 signs take the
// place of a point's index of 8 bits and 3.5 bits of signs.
//
// File block of 256 values: d (f16); 64 bytes, the point of each 4 values; a word for each 32 values, of which bits 7 k
// .. 7 k + 6 are signs of values 8 k .. 8 k + 6 (value 8 k + 7 makes the number of minus signs even), bits 28 to 31 the
// scale.
#pragma once

#include "codebook.cuh"
#include "codebook_points.cuh"
#include "odd_scales.cuh"

struct Iq3XxsValues {
    __host__ __device__ static constexpr int value(int code) {
        const int magnitude = (code & 7) == 7 ? 62 : 8 * (code & 7) + 4;
        return code & 8 ? -magnitude : magnitude;
    }
};

struct IQ3_XXS : CodebookType<IQ3_XXS, TileLayout<2, 0, 0, 8>, Iq3XxsValues, OddScales<2>, 2> {
    static constexpr int block_values = 256, block_bytes = 98;

    __device__ static int code(const uint8_t *block, int i) {
        const int seven = word(block, i / 32) >> i % 32 / 8 * 7 & 127, j = i % 8;
        const int sign = j < 7 ? seven >> j & 1 : __popc(seven) & 1;
        return (codebook_points::IQ3_XXS[block[2 + i / 4]] >> 3 * (i % 4) & 7) | sign << 3;
    }
    __device__ static int scale(const uint8_t *block, int s) { return word(block, s) >> 28; }

private:
    // Signs and scale of values 32 s .. + 31.
    __device__ static uint32_t word(const uint8_t *block, int s) {
        const uint8_t *bytes = block + 66 + 4 * s;
        return bytes[0] | bytes[1] << 8 | bytes[2] << 16 | uint32_t(bytes[3]) << 24;
    }
};
