// Scales and minima of Q4_K and Q5_K: 6 bits each, one of both for each 32 values, times d and dmin of a super-block.
//
//   supers   16 bytes: d and dmin in the first word (f16), then as unit_bits.cuh has it 24 bits for each unit: scale
//   and
//            scale of its first and second 32 values, then min and min, 6 bits each from the lowest bit up
#pragma once

#include "unit_bits.cuh"

struct PackedScales {
    // Of the plane of scales, which is the one after `high`.
    template <typename Layout>
    static constexpr int unit_bytes = Layout::super_bytes / SUPER_UNITS;

    // From a file's block, which begins with d, dmin and 12 bytes of scales and minima.
    template <typename Type, typename Layout>
    __device__ static void repack(const FileUnit<Type> &in, const TileUnit<Layout, uint8_t> &out) {
        if (out.unit % SUPER_UNITS != 0) return;
        uint8_t *header = out.super();
        const uint8_t *block = in.block(), *packed = block + 4;
        const bool real = in.blocks > 0;
        auto scale = [&](int j) { return j < 4 ? packed[j] & 63 : (packed[j + 4] & 15) | packed[j - 4] >> 6 << 4; };
        auto minimum = [&](int j) { return j < 4 ? packed[j + 4] & 63 : packed[j + 4] >> 4 | packed[j] >> 6 << 4; };
        for (int i = 0; i < 4; i++) header[i] = real ? block[i] : 0;
        for (int u = 0; u < 4; u++) {
            const int bits =
                real ? scale(2 * u) | scale(2 * u + 1) << 6 | minimum(2 * u) << 12 | minimum(2 * u + 1) << 18 : 0;
            unit_bits::store(header, u, bits);
        }
    }

    template <typename Layout>
    __device__ static __forceinline__ float value(const TileUnit<Layout> &unit, int i, int code) {
        const uint8_t *header = unit.super();
        const int second = i / 32, packed = unit_bits::load(header, unit.unit % SUPER_UNITS);
        const float2 d = half2_at(header);
        return d.x * (packed >> 6 * second & 63) * code - d.y * (packed >> (12 + 6 * second) & 63);
    }

    // Scales the sums of codes times activations.
    template <typename Layout, typename Activations>
    __device__ static __forceinline__ float dot(const uint8_t *supers, int lane, const Activations &a, int first,
                                                int second) {
        const uint4 header = reinterpret_cast<const uint4 *>(supers)[lane / SUPER_UNITS];
        const uint32_t packed = unit_bits::load(header, lane % SUPER_UNITS);
        const int scale0 = packed & 63, scale1 = packed >> 6 & 63, min0 = packed >> 12 & 63, min1 = packed >> 18;
        const float2 d = __half22float2(*reinterpret_cast<const half2 *>(&header.x));
        return d.x * (a.scale0 * (scale0 * first) + a.scale1 * (scale1 * second)) -
               d.y * (a.sum0 * min0 + a.sum1 * min1);
    }

    template <typename Layout, int MT>
    struct Fragment {
        using Lane = unit_bits::Lane<Layout, MT>;

        template <typename Registers>
        __device__ static __forceinline__ void load(Registers &r, uint32_t from, const Lane &lane, int h, int step, int,
                                                    int) {
            uint4 header;
            const uint32_t packed = lane.load(header, from, h, step);
            const half2 scales = unit_bits::two_to_half<0>(packed), minima = unit_bits::two_to_half<0, 12>(packed);
            const half2 d = as_half2(header.x);
            const half2 s = __hmul2(__low2half2(d), scales), m = __hmul2(__hneg2(__high2half2(d)), minima);
            r.scale[0] = __low2half2(s), r.scale[1] = __high2half2(s);
            r.minimum[0] = __low2half2(m), r.minimum[1] = __high2half2(m);
        }

        template <int HALF, typename Registers>
        __device__ static __forceinline__ half2 apply(const Registers &r, half2 x) {
            return __hfma2(x, r.scale[HALF], r.minimum[HALF]);
        }
    };
};
