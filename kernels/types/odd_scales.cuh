// Scales of IQ3_S and IQ3_XXS: d * (2 * scale + 1) * 2^-SHIFT, a scale of 4 bits for each 32 values.
//
//   supers   8 bytes: d (f16), two of nothing, a byte for each unit: the scale of its first 32 values low, of its
//   second
//            high
#pragma once

#include "type.cuh"

// `Type::scale(block, g)`: of values 32 g .. + 31 of a file's block, which begins with d.
template <int SHIFT>
struct OddScales {
    // Of the plane of scales, which is the one after `high`.
    template <typename Layout>
    static constexpr int unit_bytes = Layout::super_bytes / SUPER_UNITS;

    template <typename Type, typename Layout>
    __device__ static void repack(const FileUnit<Type> &in, const TileUnit<Layout, uint8_t> &out) {
        if (out.unit % SUPER_UNITS != 0) return;
        uint8_t *super = out.super();
        const uint8_t *block = in.block();
        const bool real = in.blocks > 0;
        for (int i = 0; i < 4; i++) super[i] = real && i < 2 ? block[i] : 0;
        for (int u = 0; u < SUPER_UNITS; u++) {
            super[4 + u] =
                static_cast<uint8_t>(real ? Type::scale(block, 2 * u) | Type::scale(block, 2 * u + 1) << 4 : 0);
        }
    }

    template <typename Layout>
    __device__ static __forceinline__ float value(const TileUnit<Layout> &unit, int i, int value) {
        const uint8_t *super = unit.super();
        const int scale = super[4 + unit.unit % SUPER_UNITS] >> i / 32 * 4 & 15;
        return __half2float(*reinterpret_cast<const half *>(super)) * (2 * scale + 1) * (1.f / (1 << SHIFT)) * value;
    }

    template <typename Layout, typename Activations>
    __device__ static __forceinline__ float dot(const uint8_t *supers, int lane, const Activations &a, int first,
                                                int second) {
        const uint2 super = reinterpret_cast<const uint2 *>(supers)[lane / SUPER_UNITS];
        const int scales = super.y >> 8 * (lane % SUPER_UNITS);
        const int scale0 = (scales << 1 & 30) + 1, scale1 = (scales >> 3 & 30) + 1;
        const float d = __low2float(as_half2(super.x)) * (1.f / (1 << SHIFT));
        return d * (a.scale0 * (scale0 * first) + a.scale1 * (scale1 * second));
    }

    // Without 2^-SHIFT.
    template <typename Layout, int MT>
    struct Fragment {
        using Run = WeightRun<Layout, MT>;
        using Lane = LaneLayout<Layout, MT>;
        template <typename Registers>
        __device__ static __forceinline__ void load(Registers &r, uint32_t from, const Lane &lane, int h, int step, int,
                                                    int) {
            const uint2 super = load_shared<uint2>(from + lane.super + (h * 8 * Run::supers + step / 2) * 8);
            const uint32_t two = super.y >> 8 * (step % 2 * 2 + lane.unit);
            const half2 scales = field_to_half<0x000f000fu, 0, 0>(__byte_perm(two, two << 12, 0x7610));
            const half2 d = __low2half2(as_half2(super.x));
            const half2 s = __hmul2(d, __hfma2(scales, __float2half2_rn(2.f), __float2half2_rn(1.f)));
            r.scale[0] = __low2half2(s), r.scale[1] = __high2half2(s);
        }
        template <int HALF, typename Registers>
        __device__ static __forceinline__ half2 apply(const Registers &r, half2 x) {
            return __hmul2(x, r.scale[HALF]);
        }
    };
};
