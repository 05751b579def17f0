// IQ2_S: d * (2 * scale + 1) / 8 * value, a scale of 4 bits for each 16 values. Every eight values are a point of a
// codebook, with signs: each is one of 6, and has a code of 3 bits on the device, where 24 bits take the place of a
// point's index of 10 bits and 8 signs.
//
// File block of 256 values: d (f16); 32 bytes, the low bits of the point of each 8 values; 32 bytes, bit i % 8 of byte
// i / 8 being the sign of value i; 8 bytes, bits 2 (g % 4) of byte g / 4 being the high bits of point g; 8 bytes, scale
// s at 4 * (s % 2) of byte s / 2.
//
// Planes:
//
//   codes, high   as three_bits.cuh has them: nibble b of word w is value 4 w + b of the part in the first half, nibble
//                 4 + b in the second half. A code is the magnitude and, as bit 2, the sign
//   scales        2 bytes: the scales of part 0 in the first and the second half, then those of part 1
//   supers        d (f16)
#pragma once

#include "codebook.cuh"
#include "codebook_points.cuh"
#include "three_bits.cuh"

struct IQ2_S {
    static constexpr int block_values = 256, block_bytes = 82;
    using Layout = TileLayout<1, 8, 2, 2>;

    // OFFSET is added.
    template <int OFFSET>
    struct Values {
        __host__ __device__ static constexpr int value(int code) {
            constexpr int8_t MAGNITUDES[4] = {8, 25, 43, 0};
            return OFFSET + (code & 4 ? -MAGNITUDES[code & 3] : MAGNITUDES[code & 3]);
        }
    };

    __device__ static int code(const uint8_t *block, int i) {
        const int g = i / 8, point = block[2 + g] | (block[66 + g / 4] >> 2 * (g % 4) & 3) << 8;
        return (codebook_points::IQ2_S[point] >> 2 * (i % 8) & 3) | (block[34 + g] >> i % 8 & 1) << 2;
    }

    __device__ static void repack(const FileUnit<IQ2_S> &in, const TileUnit<Layout, uint8_t> &out) {
        three_bits::store(out, [&](int part, int w, int n) { return in.code(n / 4 * 32 + part * 16 + 4 * w + n % 4); });
        const int u = out.unit % SUPER_UNITS;
        const uint8_t *block = in.block(), *packed = block + 74 + 2 * u;
        const bool real = in.blocks > 0;
        for (int part = 0; part < 2; part++) {
            const auto scale = [&](int half) { return packed[half] >> 4 * part & 15; };
            out.scales()[part] = static_cast<uint8_t>(real ? scale(0) | scale(1) << 4 : 0);
        }
        if (u < 2) out.super()[u] = real ? block[u] : 0;
    }
    __device__ static float value(const TileUnit<Layout> &unit, int i) {
        const int upper = i / 32, part = i % 32 / 16;
        const int code = three_bits::load(unit, part, i % 16 / 4, 4 * upper + i % 4);
        const int scale = unit.scales()[part] >> 4 * upper & 15;
        const float d = __half2float(*reinterpret_cast<const half *>(unit.super()));
        return d * (2 * scale + 1) * 0.125f * Values<0>::value(code);
    }

    struct Activations : ActivationUnit {
        __device__ __forceinline__ void prepare(const int4 (&q)[4], float s0, float s1) {
            int sum[4];
            load(q, s0, s1, sum);
        }
    };
    __device__ static __forceinline__ float dot(const uint8_t *tile, int n, int row, int lane, const Activations &a) {
        constexpr uint32_t POSITIVE = codebook::word<Values<0>>(0), NEGATIVE = codebook::word<Values<0>>(1);
        uint32_t word[2][4];
        three_bits::load_words<Layout>(tile, n, row, lane, word);
        int sum[4] = {};
#pragma unroll
        for (int part = 0; part < 2; part++) {
#pragma unroll
            for (int w = 0; w < 4; w++) {
                const uint32_t codes = word[part][w] & 0x77777777u;
                const uint32_t first = codebook::permute(POSITIVE, NEGATIVE, codes);
                const uint32_t second = codebook::permute(POSITIVE, NEGATIVE, codes >> 16);
                sum[part] = __dp4a(static_cast<int>(first), a.x[4 * part + w], sum[part]);
                sum[2 + part] = __dp4a(static_cast<int>(second), a.x[8 + 4 * part + w], sum[2 + part]);
            }
        }
        const int packed = reinterpret_cast<const uint16_t *>(tile + Layout::scale_at(n))[row * n + lane];
        const auto scale = [&](int s) { return (packed >> 4 * s & 15) * 2 + 1; };
        const half *supers = reinterpret_cast<const half *>(tile + Layout::super_at(n));
        const float d = __half2float(supers[row * (n / SUPER_UNITS) + lane / SUPER_UNITS]) * 0.125f;
        return d * (a.scale0 * (scale(0) * sum[0] + scale(2) * sum[1]) +
                    a.scale1 * (scale(1) * sum[2] + scale(3) * sum[3]));
    }

    template <int MT>
    using Run = WeightRun<Layout, MT>;

    // Decodes to an eighth of the value.
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
            constexpr uint32_t POSITIVE = codebook::word<Values<128>>(0), NEGATIVE = codebook::word<Values<128>>(1);
            codebook::biased_to_half<3>(codebook::permute(POSITIVE, NEGATIVE, (r.code[w] & 0x77777777u) >> 16 * HALF),
                                        x, y);
        }
    };

    template <int MT>
    struct FragmentScales {
        using Lane = LaneLayout<Layout, MT>;
        template <typename Registers>
        __device__ static __forceinline__ void load(Registers &r, uint32_t from, const Lane &lane, int h, int step,
                                                    int first_unit, int n) {
            // Of the two that were copied together, scales and d are those that their index in the tile says.
            const int unit = 2 * step + lane.unit;
            const uint32_t scales = load_shared<uint32_t>(from + lane.scale + (h * 8 * Run<MT>::units + unit) * 4);
            const half2 supers = load_shared<half2>(from + lane.super + (h * 8 * Run<MT>::supers + step / 2) * 4);
            const int index = lane.row % TILE_ROWS * (n / SUPER_UNITS) + (first_unit + unit) / SUPER_UNITS;
            const half2 d = index % 2 ? __high2half2(supers) : __low2half2(supers);
            const uint32_t two = scales >> (16 * lane.unit + 8 * lane.part);
            const half2 s = field_to_half<0x000f000fu, 0, 0>(__byte_perm(two, two << 12, 0x7610));
            const half2 odd = __hmul2(d, __hfma2(s, __float2half2_rn(2.f), __float2half2_rn(1.f)));
            r.scale[0] = __low2half2(odd), r.scale[1] = __high2half2(odd);
        }
        template <int HALF, typename Registers>
        __device__ static __forceinline__ half2 apply(const Registers &r, half2 x) {
            return __hmul2(x, r.scale[HALF]);
        }
    };
    template <int MT>
    using Fragment = WeightFragment<FragmentCodes<MT>, FragmentScales<MT>>;
};
