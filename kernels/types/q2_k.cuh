// Q2_K: d * scale * code - dmin * min, codes of 2 bits, scale and min of 4 bits each for each 16 values.
//
// File block of 256 values: 16 bytes, a scale low and a min high in each; 64 bytes, in each 32 of which bits 2 g of
// byte j are value 32 g + j; d, dmin (f16).
//
// Planes:
//
//   codes    as two_bits.cuh has them
//   scales   the unit's 4 bytes
//   supers   d, dmin (f16)
#pragma once

#include "two_bits.cuh"

struct Q2_K {
    static constexpr int block_values = 256, block_bytes = 84;
    using Layout = TileLayout<1, 0, 4, 4>;

    __device__ static int code(const uint8_t *block, int i) {
        return block[16 + i / 128 * 32 + i % 32] >> i % 128 / 32 * 2 & 3;
    }

    __device__ static void repack(const FileUnit<Q2_K> &in, const TileUnit<Layout, uint8_t> &out) {
        two_bits::store(out.codes(0), [&](int i) { return in.code(i); });
        const int u = out.unit % SUPER_UNITS;
        const uint8_t *block = in.block();
        const bool real = in.blocks > 0;
        for (int i = 0; i < 4; i++) out.scales()[i] = real ? block[u * 4 + i] : 0;
        out.super()[u] = real ? block[80 + u] : 0;
    }
    __device__ static float value(const TileUnit<Layout> &unit, int i) {
        const int scale = unit.scales()[i / 16];
        const float2 d = half2_at(unit.super());
        return d.x * (scale & 15) * two_bits::load(unit.codes(0), i) - d.y * (scale >> 4);
    }

    struct Activations : ActivationUnit {
        uint32_t sums[2];  // of each 16 integers, of each half
        float codes1;      // the scale for the second half's codes, which are used in place, times 4

        __device__ __forceinline__ void prepare(const int4 (&q)[4], float s0, float s1) {
            int sum[4];
            load(q, s0, s1, sum);
            sums[0] = pack(sum[0], sum[1]), sums[1] = pack(sum[2], sum[3]);
            codes1 = s1 / 4.f;
        }
        // Two integers of 16 bits.
        __device__ static __forceinline__ uint32_t pack(int low, int high) { return __byte_perm(low, high, 0x5410); }
    };
    __device__ static __forceinline__ float dot(const uint8_t *tile, int n, int row, int lane, const Activations &a) {
        constexpr uint32_t CODE = 0x03030303u;
        const uint4 c = reinterpret_cast<const uint4 *>(tile)[row * n + lane];
        const uint32_t word[4] = {c.x, c.y, c.z, c.w};
        // Of each 16 products: at most 16 * 3 * 127, of the second half four times that. 16 bits hold it.
        int sum[4] = {};
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const uint32_t codes = i % 2 ? word[i / 2] >> 4 : word[i / 2];
            sum[i / 4] = dot4(codes & CODE, a.x[i], sum[i / 4]);
            sum[2 + i / 4] = dot4(codes & CODE << 2, a.x[8 + i], sum[2 + i / 4]);
        }
        const uint32_t packed = reinterpret_cast<const uint32_t *>(tile + Layout::scale_at(n))[row * n + lane];
        const uint32_t scales = packed & 0x0f0f0f0fu, minima = packed >> 4 & 0x0f0f0f0fu;
        const int first = dot2<0>(a.pack(sum[0], sum[1]), scales), second = dot2<1>(a.pack(sum[2], sum[3]), scales);
        const int min0 = dot2<0>(a.sums[0], minima), min1 = dot2<1>(a.sums[1], minima);
        const float2 d = half2_at(tile + Layout::super_at(n) + (row * (n / SUPER_UNITS) + lane / SUPER_UNITS) * 4);
        return d.x * (a.scale0 * first + a.codes1 * second) - d.y * (a.scale0 * min0 + a.scale1 * min1);
    }
    // The sum of two products, signed halves of `a` times unsigned bytes 2 UPPER and 2 UPPER + 1 of `b`.
    template <int UPPER>
    __device__ static __forceinline__ int dot2(uint32_t a, uint32_t b) {
        int d;
        if constexpr (UPPER)
            asm("dp2a.hi.s32.u32 %0, %1, %2, 0;" : "=r"(d) : "r"(a), "r"(b));
        else
            asm("dp2a.lo.s32.u32 %0, %1, %2, 0;" : "=r"(d) : "r"(a), "r"(b));
        return d;
    }

    template <int MT>
    using Run = WeightRun<Layout, MT>;

    template <int MT>
    struct FragmentCodes {
        static constexpr int words = 2;
        using Registers = FragmentRegisters<words>;

        __device__ static __forceinline__ void load(Registers &r, uint32_t from, const LaneLayout<Layout, MT> &lane,
                                                    int h, int step) {
            const uint2 two =
                load_shared<uint2>(from + lane.code + (h * 8 * Run<MT>::units + lane.code_unit(step)) * 16);
            r.code[0] = two.x, r.code[1] = two.y;
        }
        template <int HALF>
        __device__ static __forceinline__ void decode(const Registers &r, int w, half2 &x, half2 &y) {
            constexpr uint32_t CODE = 0x00030003u << 2 * HALF;
            const uint32_t word = r.code[w / 2];
            if (w % 2) {
                x = field_to_half<CODE << 4, 4 + 2 * HALF, 0>(word);
                y = field_to_half<CODE << 4, 4 + 2 * HALF, 0>(word >> 8);
            } else {
                x = field_to_half<CODE, 2 * HALF, 0>(word);
                y = field_to_half<CODE, 2 * HALF, 0>(word >> 8);
            }
        }
    };

    template <int MT>
    struct FragmentScales {
        using Lane = LaneLayout<Layout, MT>;
        template <typename Registers>
        __device__ static __forceinline__ void load(Registers &r, uint32_t from, const Lane &lane, int h, int step, int,
                                                    int) {
            const uint32_t scales = from + lane.scale + (h * 8 * Run<MT>::units + 2 * step + lane.unit) * 4;
            const uint32_t packed = load_shared<uint32_t>(scales) >> 8 * lane.part;  // bytes 0 and 2
            const half2 d = load_shared<half2>(from + lane.super + (h * 8 * Run<MT>::supers + step / 2) * 4);
            const half2 s = __hmul2(__low2half2(d), field_to_half<0x000f000fu, 0, 0>(packed));
            const half2 m = __hmul2(__hneg2(__high2half2(d)), field_to_half<0x00f000f0u, 4, 0>(packed));
            r.scale[0] = __low2half2(s), r.scale[1] = __high2half2(s);
            r.minimum[0] = __low2half2(m), r.minimum[1] = __high2half2(m);
        }
        template <int HALF, typename Registers>
        __device__ static __forceinline__ half2 apply(const Registers &r, half2 x) {
            return __hfma2(x, r.scale[HALF], r.minimum[HALF]);
        }
    };
    template <int MT>
    using Fragment = WeightFragment<FragmentCodes<MT>, FragmentScales<MT>>;
};
