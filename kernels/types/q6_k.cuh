// Q6_K: d * scale * (code - 32), codes of 6 bits, an 8-bit signed scale for each 16 values.
//
// File block of 256 values, in two halves of 128: 64 bytes of low bits a half, byte j of which holds value j low, value
// 64 + j high; then 32 bytes a half, bits 2 g of byte j being bits 4 and 5 of value 32 g + j; 16 scales; d (f16).
//
// Planes:
//
//   codes    as nibbles.cuh has them
//   high     bits 4 and 5 of codes, as two_bits.cuh has them
//   scales   the 4 of the unit
//   supers   d (f16)
#pragma once

#include "nibbles.cuh"
#include "two_bits.cuh"

struct Q6_K {
    static constexpr int block_values = 256, block_bytes = 210;
    using Layout = TileLayout<2, 16, 4, 2>;

    __device__ static int code(const uint8_t *block, int i) {
        const int part = i / 128, j = i % 128;
        const int low = block[part * 64 + j % 64] >> j / 64 * 4 & 15;
        return low | (block[128 + part * 32 + j % 32] >> j / 32 * 2 & 3) << 4;
    }

    __device__ static void repack(const FileUnit<Q6_K> &in, const TileUnit<Layout, uint8_t> &out) {
        nibbles::repack_low_bits(in, out);
        two_bits::store(out.high(), [&](int i) { return in.code(i) >> 4; });
        const int u = out.unit % SUPER_UNITS;
        const uint8_t *block = in.block();
        const bool real = in.blocks > 0;
        for (int i = 0; i < 4; i++) out.scales()[i] = real ? block[192 + u * 4 + i] : 0;
        if (u < 2) out.super()[u] = real ? block[208 + u] : 0;
    }
    __device__ static float value(const TileUnit<Layout> &unit, int i) {
        const int high = two_bits::load(unit.high(), i);
        const int code = nibbles::low_bits(unit, i) | high << 4;
        const float d = __half2float(*reinterpret_cast<const half *>(unit.super()));
        return d * static_cast<int8_t>(unit.scales()[i / 16]) * (code - 32);
    }

    struct Activations : ActivationUnit {
        int start[4];  // what a sum over 16 products starts from: -32 * (sum of the integers)

        __device__ __forceinline__ void prepare(const int4 (&q)[4], float s0, float s1) {
            int sum[4];
            load(q, s0, s1, sum);
#pragma unroll
            for (int i = 0; i < 4; i++) start[i] = -32 * sum[i];
        }
    };
    __device__ static __forceinline__ float dot(const uint8_t *tile, int n, int row, int lane, const Activations &a) {
        constexpr uint32_t LOW = 0x0f0f0f0fu, TOP = 0x30303030u;
        uint32_t word[8];
        nibbles::load_words(tile, n, row, lane, word);
        const uint8_t *scales = tile + Layout::scale_at(n) + row * n * Layout::scale_bytes;
        const uint8_t *highs = tile + Layout::high_at(n) + row * n * Layout::high_bytes;
        const uint4 high = reinterpret_cast<const uint4 *>(highs)[lane];
        const uint32_t bits[4] = {high.x, high.y, high.z, high.w};
        int sum[4] = {a.start[0], a.start[1], a.start[2], a.start[3]};
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const uint32_t h = bits[i / 2];
            const uint32_t first = (word[i] & LOW) | ((i % 2 ? h : h << 4) & TOP);
            const uint32_t second = (word[i] >> 4 & LOW) | ((i % 2 ? h >> 2 : h << 2) & TOP);
            sum[i / 4] = dot4(first, a.x[i], sum[i / 4]);
            sum[2 + i / 4] = dot4(second, a.x[8 + i], sum[2 + i / 4]);
        }
        const char4 s = *reinterpret_cast<const char4 *>(scales + 4 * lane);
        const half *supers = reinterpret_cast<const half *>(tile + Layout::super_at(n));
        const float d = __half2float(supers[row * (n / SUPER_UNITS) + lane / SUPER_UNITS]);
        return d * (a.scale0 * (s.x * sum[0] + s.y * sum[1]) + a.scale1 * (s.z * sum[2] + s.w * sum[3]));
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
            nibbles::load_high(r.high, from, lane, h, step);
        }
        template <int HALF>
        __device__ static __forceinline__ void decode(const Registers &r, int w, half2 &x, half2 &y) {
            const half2 offset = __float2half2_rn(1024.f + 32);
            uint32_t c = (HALF ? r.code[w] >> 4 : r.code[w]) & 0x0f0f0f0fu;
            const uint32_t h = w / 2 ? r.high.y : r.high.x;
            const int shift = 4 - 4 * (w % 2) - 2 * HALF;  // to the left
            c |= (shift >= 0 ? h << shift : h >> -shift) & 0x30303030u;
            bytes_to_half(c, offset, x, y);
        }
    };

    template <int MT>
    struct FragmentScales {
        using Lane = LaneLayout<Layout, MT>;
        template <typename Registers>
        __device__ static __forceinline__ void load(Registers &r, uint32_t from, const Lane &lane, int h, int step,
                                                    int first_unit, int n) {
            const uint32_t scales = from + lane.scale + h * 8 * Run<MT>::units * Layout::scale_bytes;
            const int unit = 2 * step + lane.unit;
            const uint32_t packed = load_shared<uint32_t>(scales + unit * 4);
            // Of the two that were copied together, d is the one that its index in the tile says.
            const half2 supers = load_shared<half2>(from + Run<MT>::super_at +
                                                    ((lane.row + h * 8) * Run<MT>::supers + unit / SUPER_UNITS) * 4);
            const int index = lane.row % TILE_ROWS * (n / SUPER_UNITS) + (first_unit + unit) / SUPER_UNITS;
            const float d = __half2float(index % 2 ? __high2half(supers) : __low2half(supers));
            r.scale[0] = __float2half2_rn(d * static_cast<int8_t>(packed >> 8 * lane.part));
            r.scale[1] = __float2half2_rn(d * static_cast<int8_t>(packed >> (16 + 8 * lane.part)));
        }
        template <int HALF, typename Registers>
        __device__ static __forceinline__ half2 apply(const Registers &r, half2 x) {
            return __hmul2(x, r.scale[HALF]);
        }
    };
    template <int MT>
    using Fragment = WeightFragment<FragmentCodes<MT>, FragmentScales<MT>>;
};
