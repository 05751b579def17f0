// Q3_K: d * (scale - 32) * (code - 4), codes of 3 bits, a 6-bit scale for each 16 values.
//
// File block of 256 values: 32 bytes, bit g of byte j being bit 2 of value 32 g + j; 64 bytes, in each 32 of which bits
// 2 g of byte j are the low bits of value 32 g + j; 12 bytes of scales: low 4 bits of scale s at 4 * (s / 8) of byte
// s % 8, high 2 bits at 2 * (s / 4) of byte 8 + s % 4; d (f16).
//
// Planes:
//
//   codes, high   as three_bits.cuh has them: byte b of word w is value 4 w + b of the part, of the first half low, of
//   the
//                 second high
//   supers        d (f16) and, as unit_bits.cuh has it, 24 bits for each unit: the scales of part 0 in the first and
//   the
//                 second half, then those of part 1, 6 bits each
#pragma once

#include "three_bits.cuh"
#include "unit_bits.cuh"

struct Q3_K {
    static constexpr int block_values = 256, block_bytes = 110;
    using Layout = TileLayout<1, 8, 0, 16>;

    __device__ static int code(const uint8_t *block, int i) {
        const int low = block[32 + i / 128 * 32 + i % 32] >> i % 128 / 32 * 2 & 3;
        return low | (block[i % 32] >> i / 32 & 1) << 2;
    }

    __device__ static void repack(const FileUnit<Q3_K> &in, const TileUnit<Layout, uint8_t> &out) {
        three_bits::store(out, [&](int part, int w, int n) { return in.code(n % 2 * 32 + part * 16 + 4 * w + n / 2); });
        if (out.unit % SUPER_UNITS != 0) return;
        uint8_t *header = out.super();
        const uint8_t *block = in.block(), *packed = block + 96;
        const bool real = in.blocks > 0;
        const auto scale = [&](int s) {
            return (packed[s % 8] >> s / 8 * 4 & 15) | (packed[8 + s % 4] >> s / 4 * 2 & 3) << 4;
        };
        for (int i = 0; i < 4; i++) header[i] = real && i < 2 ? block[108 + i] : 0;
        for (int u = 0; u < SUPER_UNITS; u++) {
            unit_bits::store(
                header, u,
                real ? scale(4 * u) | scale(4 * u + 2) << 6 | scale(4 * u + 1) << 12 | scale(4 * u + 3) << 18 : 0);
        }
    }
    __device__ static float value(const TileUnit<Layout> &unit, int i) {
        const int upper = i / 32, part = i % 32 / 16;
        const int code = three_bits::load(unit, part, i % 16 / 4, i % 4 * 2 + upper);
        const int scale = unit_bits::load(unit.super(), unit.unit % SUPER_UNITS) >> (12 * part + 6 * upper) & 63;
        return __half2float(*reinterpret_cast<const half *>(unit.super())) * (scale - 32) * (code - 4);
    }

    // The second half's codes are used in place, times 16.
    struct Activations : ActivationUnit {
        int start[4];  // what a sum over 16 products starts from: -4 * (sum of the integers)

        __device__ __forceinline__ void prepare(const int4 (&q)[4], float s0, float s1) {
            int sum[4];
            load(q, s0, s1, sum);
            scale1 = s1 / 16.f;
#pragma unroll
            for (int i = 0; i < 4; i++) start[i] = (i < 2 ? -4 : -64) * sum[i];
        }
    };
    __device__ static __forceinline__ float dot(const uint8_t *tile, int n, int row, int lane, const Activations &a) {
        constexpr uint32_t CODE = 0x07070707u;
        uint32_t word[2][4];
        three_bits::load_words<Layout>(tile, n, row, lane, word);
        int sum[4] = {a.start[0], a.start[1], a.start[2], a.start[3]};
#pragma unroll
        for (int part = 0; part < 2; part++) {
#pragma unroll
            for (int w = 0; w < 4; w++) {
                sum[part] = dot4(word[part][w] & CODE, a.x[4 * part + w], sum[part]);
                sum[2 + part] = dot4(word[part][w] & CODE << 4, a.x[8 + 4 * part + w], sum[2 + part]);
            }
        }
        const uint8_t *supers = tile + Layout::super_at(n);
        const uint4 header = reinterpret_cast<const uint4 *>(supers)[row * (n / SUPER_UNITS) + lane / SUPER_UNITS];
        const uint32_t packed = unit_bits::load(header, lane % SUPER_UNITS);
        const auto scale = [&](int s) { return int(packed >> 6 * s & 63) - 32; };
        const float d = __low2float(as_half2(header.x));
        return d * (a.scale0 * (scale(0) * sum[0] + scale(2) * sum[1]) +
                    a.scale1 * (scale(1) * sum[2] + scale(3) * sum[3]));
    }

    template <int MT>
    using Run = WeightRun<Layout, MT>;

    template <int MT>
    struct FragmentCodes {
        static constexpr int words = 4;
        using Registers = FragmentRegisters<words>;

        __device__ static __forceinline__ void load(Registers &r, uint32_t from, const LaneLayout<Layout, MT> &lane,
                                                    int h, int step) {
            three_bits::load_fragment(r.code, from, lane, h, step);
        }
        template <int HALF>
        __device__ static __forceinline__ void decode(const Registers &r, int w, half2 &x, half2 &y) {
            constexpr uint32_t CODE = 0x00070007u << 4 * HALF;
            x = field_to_half<CODE, 4 * HALF, 4>(r.code[w]);
            y = field_to_half<CODE, 4 * HALF, 4>(r.code[w] >> 8);
        }
    };

    template <int MT>
    struct FragmentScales {
        using Lane = unit_bits::Lane<Layout, MT>;
        template <typename Registers>
        __device__ static __forceinline__ void load(Registers &r, uint32_t from, const Lane &lane, int h, int step, int,
                                                    int) {
            uint4 header;
            const uint32_t packed = lane.load(header, from, h, step) >> 12 * lane.part;
            const half2 s = __hmul2(__low2half2(as_half2(header.x)), unit_bits::two_to_half<32>(packed));
            r.scale[0] = __low2half2(s), r.scale[1] = __high2half2(s);
        }
        template <int HALF, typename Registers>
        __device__ static __forceinline__ half2 apply(const Registers &r, half2 x) {
            return __hmul2(x, r.scale[HALF]);
        }
    };
    template <int MT>
    using Fragment = WeightFragment<FragmentCodes<MT>, FragmentScales<MT>>;
};
