// Scales and minima of Q4_K and Q5_K: 6 bits each, one of both for each 32 values, times d and dmin of a super-block.
//
//   supers   16 bytes: d and dmin in the first word (f16); byte u of the second, third and fourth words make 24 bits
//            for unit u: scale and scale of its first and second 32 values, then min and min, 6 bits each from the
//            lowest bit up
#pragma once

#include "type.cuh"

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
            for (int byte = 0; byte < 3; byte++) header[4 + 4 * byte + u] = static_cast<uint8_t>(bits >> 8 * byte);
        }
    }

    template <typename Layout>
    __device__ static __forceinline__ float value(const TileUnit<Layout> &unit, int i, int code) {
        const uint8_t *header = unit.super();
        const int u = unit.unit % SUPER_UNITS, second = i / 32;
        const int packed = header[4 + u] | header[8 + u] << 8 | header[12 + u] << 16;
        const float2 d = half2_at(header);
        return d.x * (packed >> 6 * second & 63) * code - d.y * (packed >> (12 + 6 * second) & 63);
    }

    // Scales the sums of codes times activations.
    template <typename Layout, typename Activations>
    __device__ static __forceinline__ float dot(const uint8_t *supers, int lane, const Activations &a, int first,
                                                int second) {
        const uint4 header = reinterpret_cast<const uint4 *>(supers)[lane / SUPER_UNITS];
        const uint32_t u = lane % SUPER_UNITS;
        const uint32_t two = __byte_perm(header.y, header.z, u | (u + 4) << 4);
        const uint32_t packed = __byte_perm(two, header.w, 0x7010 | (u + 4) << 8) & 0xffffffu;
        const int scale0 = packed & 63, scale1 = packed >> 6 & 63, min0 = packed >> 12 & 63, min1 = packed >> 18;
        const float2 d = __half22float2(*reinterpret_cast<const half2 *>(&header.x));
        return d.x * (a.scale0 * (scale0 * first) + a.scale1 * (scale1 * second)) -
               d.y * (a.sum0 * min0 + a.sum1 * min1);
    }

    template <typename Layout, int MT>
    struct Fragment {
        using Run = WeightRun<Layout, MT>;
        struct Lane : LaneLayout<Layout, MT> {
            uint32_t pick[2];  // which bytes of the header are the unit's

            __device__ __forceinline__ Lane() {
                pick[0] = this->unit | (this->unit + 4) << 4, pick[1] = 0x7010 | (this->unit + 4) << 8;
            }
        };

        template <typename Registers>
        __device__ static __forceinline__ void load(Registers &r, uint32_t from, const Lane &lane, int h, int step, int,
                                                    int) {
            const uint32_t supers = from + lane.super + h * 8 * Run::supers * Run::super_bytes;
            const uint4 header = load_shared<uint4>(supers + step / 2 * 16);
            const uint32_t two = __byte_perm(header.y, header.z, lane.pick[0] + step % 2 * 0x22);
            const uint32_t packed = __byte_perm(two, header.w, lane.pick[1] + step % 2 * 0x200);
            const half2 magic = __half2half2(__ushort_as_half(0x6400));
            const half2 scales = __hsub2(plus_1024<0x003f003fu>(__byte_perm(packed, packed << 10, 0x7610)), magic);
            const half2 minima = __hsub2(plus_1024<0x003f003fu>(__byte_perm(packed >> 12, packed >> 2, 0x7610)), magic);
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
