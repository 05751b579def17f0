// Q3_K: d * (scale - 32) * (code - 4), codes of 3 bits, a 6-bit scale for each 16 values.
//
// File block of 256 values: 32 bytes, bit g of byte j being bit 2 of value 32 g + j; 64 bytes, in each 32 of which bits
// 2 g of byte j are the low bits of value 32 g + j; 12 bytes of scales: low 4 bits of scale s at 4 * (s / 8) of byte
// s % 8, high 2 bits at 2 * (s / 4) of byte 8 + s % 4; d (f16).
//
// Planes. Of each half of a unit, part p (of 2) is values 16 p .. + 15; a part has three words, which hold four:
//
//   codes    words 0 and 1 of part 0, then of part 1
//   high     word 2 of each part
//            in byte b of word w, bits 0 to 2 are the code of value 4 w + b of the part in the first half, bits 4 to 6
//            in the second half; bits 3 and 7 are bit w of the codes of values 12 + b
//   supers   d (f16) and, as unit_bits.cuh has it, 24 bits for each unit: the part's scales in the first and the second
//            half, then those of part 1, 6 bits each
#pragma once

#include "unit_bits.cuh"

struct Q3_K {
    static constexpr int block_values = 256, block_bytes = 110;
    using Layout = TileLayout<1, 8, 0, 16>;

    __device__ static int code(const uint8_t *block, int i) {
        const int low = block[32 + i / 128 * 32 + i % 32] >> i % 128 / 32 * 2 & 3;
        return low | (block[i % 32] >> i / 32 & 1) << 2;
    }

    // Word `w` (of 3) of part `part`.
    template <typename Byte>
    __device__ static Byte *word(const TileUnit<Layout, Byte> &unit, int part, int w) {
        return w < 2 ? unit.codes(0) + part * 8 + w * 4 : unit.high() + part * 4;
    }
    // The fourth word, as the others are without their bits 3 and 7.
    __device__ static __forceinline__ uint32_t fourth(uint32_t w0, uint32_t w1, uint32_t w2) {
        return (w0 >> 3 & 0x11111111u) | (w1 >> 2 & 0x22222222u) | (w2 >> 1 & 0x44444444u);
    }

    __device__ static void repack(const FileUnit<Q3_K> &in, const TileUnit<Layout, uint8_t> &out) {
        for (int part = 0; part < 2; part++) {
            for (int w = 0; w < 3; w++) {
                for (int b = 0; b < 4; b++) {
                    const auto nibble = [&](int first) {
                        return in.code(first + 4 * w + b) | (in.code(first + 12 + b) >> w & 1) << 3;
                    };
                    word(out, part, w)[b] = static_cast<uint8_t>(nibble(16 * part) | nibble(32 + 16 * part) << 4);
                }
            }
        }
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
        const int upper = i / 32, part = i % 32 / 16, w = i % 16 / 4, b = i % 4;
        int code = 0;
        if (w < 3) {
            code = word(unit, part, w)[b] >> 4 * upper & 7;
        } else {
            for (int k = 0; k < 3; k++) code |= (word(unit, part, k)[b] >> (3 + 4 * upper) & 1) << k;
        }
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
        const uint8_t *highs = tile + Layout::high_at(n), *supers = tile + Layout::super_at(n);
        const uint4 c = reinterpret_cast<const uint4 *>(tile)[row * n + lane];
        const uint2 high = reinterpret_cast<const uint2 *>(highs)[row * n + lane];
        const uint32_t word[2][4] = {{c.x, c.y, high.x, fourth(c.x, c.y, high.x)},
                                     {c.z, c.w, high.y, fourth(c.z, c.w, high.y)}};
        int sum[4] = {a.start[0], a.start[1], a.start[2], a.start[3]};
#pragma unroll
        for (int part = 0; part < 2; part++) {
#pragma unroll
            for (int w = 0; w < 4; w++) {
                sum[part] = dot4(word[part][w] & CODE, a.x[4 * part + w], sum[part]);
                sum[2 + part] = dot4(word[part][w] & CODE << 4, a.x[8 + 4 * part + w], sum[2 + part]);
            }
        }
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
            const uint2 two =
                load_shared<uint2>(from + lane.code + (h * 8 * Run<MT>::units + lane.code_unit(step)) * 16);
            const uint32_t highs = from + lane.high + lane.part * 4;
            r.code[0] = two.x, r.code[1] = two.y;
            r.code[2] = load_shared<uint32_t>(highs + (h * 8 * Run<MT>::units + lane.high_unit(step)) * 8);
            r.code[3] = fourth(r.code[0], r.code[1], r.code[2]);
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
