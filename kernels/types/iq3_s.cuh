// IQ3_S: d * (2 * scale + 1) * value, a scale of 4 bits for each 32 values. Every four values are a point of a
// codebook, with signs: each is one of 16, and has a code of 4 bits on the device, where 12 bits and 4 signs take the
// place of a point's index of 9 bits.
//
// File block of 256 values: d (f16); 64 bytes, the low bits of the point of each 4 values; 8 bytes, bit g % 8 of byte
// g / 8 being bit 8 of point g; 32 bytes, bit i % 8 of byte i / 8 being the sign of value i; 4 bytes, scale s at
// 4 * (s % 2) of byte s / 2.
#pragma once

#include "codebook.cuh"
#include "codebook_points.cuh"
#include "odd_scales.cuh"

struct Iq3SValues {
    __host__ __device__ static constexpr int value(int code) {
        const int magnitude = 2 * (code & 7) + 1;
        return code & 8 ? -magnitude : magnitude;
    }
};

struct IQ3_S : CodebookType<IQ3_S, TileLayout<2, 0, 0, 8>, Iq3SValues, OddScales<0>> {
    static constexpr int block_values = 256, block_bytes = 110;

    __device__ static int code(const uint8_t *block, int i) {
        const int g = i / 4, point = block[2 + g] | (block[66 + g / 8] >> g % 8 & 1) << 8;
        return (codebook_points::IQ3_S[point] >> 3 * (i % 4) & 7) | (block[74 + i / 8] >> i % 8 & 1) << 3;
    }
    __device__ static int scale(const uint8_t *block, int s) { return block[106 + s / 2] >> s % 2 * 4 & 15; }
};
