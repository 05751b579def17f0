// IQ3_S: d * (2 * scale + 1) * value, a scale of 4 bits for each 32 values. Every four values are a point of a
// codebook, with signs: each is one of 16, and has a code of 4 bits on the device, where 12 bits and 4 signs take the
// place of a point's index of 9 bits. Those are the odd numbers from -15 to 15, so that a value is 2 * code - 15.
//
// File block of 256 values: d (f16); 64 bytes, the low bits of the point of each 4 values; 8 bytes, bit g % 8 of byte
// g / 8 being bit 8 of point g; 32 bytes, bit i % 8 of byte i / 8 being the sign of value i; 4 bytes, scale s at
// 4 * (s % 2) of byte s / 2.
#pragma once

#include "codebook_points.cuh"
#include "nibbles.cuh"
#include "odd_scales.cuh"

struct IQ3_S {
    static constexpr int block_values = 256, block_bytes = 110;
    using Layout = TileLayout<2, 0, 0, 8>;
    using Scales = OddScales<0>;

    __device__ static int code(const uint8_t *block, int i) {
        const int g = i / 4, point = block[2 + g] | (block[66 + g / 8] >> g % 8 & 1) << 8;
        const int magnitude = codebook_points::IQ3_S[point] >> 3 * (i % 4) & 7, sign = block[74 + i / 8] >> i % 8 & 1;
        return sign ? 7 - magnitude : 8 + magnitude;
    }
    __device__ static int scale(const uint8_t *block, int s) { return block[106 + s / 2] >> s % 2 * 4 & 15; }

    __device__ static void repack(const FileUnit<IQ3_S> &in, const TileUnit<Layout, uint8_t> &out) {
        nibbles::repack(in, out);
        Scales::repack(in, out);
    }
    __device__ static float value(const TileUnit<Layout> &unit, int i) {
        return Scales::value(unit, i, 2 * nibbles::code(unit, i) - 15);
    }

    // The second half's codes are used in place, times 16.
    struct Activations : ActivationUnit {
        int start0, start1;  // -15 * (sum of the integers) of each 32 values

        __device__ __forceinline__ void prepare(const int4 (&q)[4], float s0, float s1) {
            int sum[4];
            load(q, s0, s1, sum);
            scale1 = s1 / 16.f;
            start0 = -15 * (sum[0] + sum[1]);
            start1 = -15 * 16 * (sum[2] + sum[3]);
        }
    };
    __device__ static __forceinline__ float dot(const uint8_t *tile, int n, int row, int lane, const Activations &a) {
        constexpr uint32_t LOW = 0x0f0f0f0fu;
        uint32_t word[8];
        nibbles::load_words(tile, n, row, lane, word);
        int first = 0, second = 0;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            first = dot4(word[i] & LOW, a.x[i], first);
            second = dot4(word[i] & ~LOW, a.x[8 + i], second);
        }
        const uint8_t *scales = tile + Layout::scale_at(n) + row * n * Scales::unit_bytes<Layout>;
        return Scales::dot<Layout>(scales, lane, a, 2 * first + a.start0, 2 * second + a.start1);
    }

    template <int MT>
    using Run = WeightRun<Layout, MT>;

    template <int MT>
    struct FragmentCodes {
        static constexpr int words = 4;
        using Registers = FragmentRegisters<words>;

        __device__ static __forceinline__ void load(Registers &r, uint32_t from, const LaneLayout<Layout, MT> &lane,
                                                    int h, int step) {
            nibbles::load_fragment(r.code, from, lane, h, step);
        }
        template <int HALF>
        __device__ static __forceinline__ void decode(const Registers &r, int w, half2 &x, half2 &y) {
            x = two_values<HALF>(r.code[w]), y = two_values<HALF>(r.code[w] >> 8);
        }

    private:
        // Of the codes in bytes 0 and 2 of `word`.
        template <int HALF>
        __device__ static __forceinline__ half2 two_values(uint32_t word) {
            if constexpr (HALF) return field_to_half<0x00f000f0u, 3, 15>(word);
            const half2 codes = field_to_half<0x000f000fu, 0, 0>(word);
            return __hfma2(codes, __float2half2_rn(2.f), __float2half2_rn(-15.f));
        }
    };
    template <int MT>
    using Fragment = WeightFragment<FragmentCodes<MT>, Scales::Fragment<Layout, MT>>;
};
