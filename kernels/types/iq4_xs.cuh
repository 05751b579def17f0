// IQ4_XS: d * (scale - 32) * value(code), codes of 4 bits, a 6-bit scale for each 32 values.
//
// File block of 256 values: d (f16); a word of 16 bits, bits 2 g and 2 g + 1 of which are the high bits of scale g; 4
// bytes, scale g's low bits at 4 * (g % 2) of byte g / 2; 128 bytes, in each 16 of which byte j holds value j low,
// value 16 + j high of 32.
//
//   supers   8 bytes: d, then 12 bits for each unit: the scales of its first and second 32 values
#pragma once

#include "codebook.cuh"

struct Iq4XsScales {
    // Of the plane of scales, which is the one after `high`.
    template <typename Layout>
    static constexpr int unit_bytes = Layout::super_bytes / SUPER_UNITS;

    template <typename Type, typename Layout>
    __device__ static void repack(const FileUnit<Type> &in, const TileUnit<Layout, uint8_t> &out) {
        if (out.unit % SUPER_UNITS != 0) return;
        const uint8_t *block = in.block();
        uint64_t bits = 0;
        if (in.blocks > 0) {
            bits = block[0] | block[1] << 8;
            for (int g = 0; g < 8; g++) {
                const int low = block[4 + g / 2] >> g % 2 * 4 & 15, high = block[2 + g / 4] >> g % 4 * 2 & 3;
                bits |= uint64_t(low | high << 4) << (16 + 6 * g);
            }
        }
        for (int i = 0; i < 8; i++) out.super()[i] = static_cast<uint8_t>(bits >> 8 * i);
    }

    // The two scales of unit `u` of a super-block, 6 bits each from the lowest up; what is above them is not theirs.
    __device__ static __forceinline__ uint32_t unit_scales(uint2 super, int u) {
        return __funnelshift_r(u < 2 ? super.x : super.y, super.y, (16 + 12 * u) % 32);
    }

    template <typename Layout>
    __device__ static __forceinline__ float value(const TileUnit<Layout> &unit, int i, int value) {
        const uint2 super = *reinterpret_cast<const uint2 *>(unit.super());
        const int scale = unit_scales(super, unit.unit % SUPER_UNITS) >> i / 32 * 6 & 63;
        return __low2float(as_half2(super.x)) * (scale - 32) * value;
    }

    template <typename Layout, typename Activations>
    __device__ static __forceinline__ float dot(const uint8_t *supers, int lane, const Activations &a, int first,
                                                int second) {
        const uint2 super = reinterpret_cast<const uint2 *>(supers)[lane / SUPER_UNITS];
        const uint32_t scales = unit_scales(super, lane % SUPER_UNITS);
        const int scale0 = int(scales & 63) - 32, scale1 = int(scales >> 6 & 63) - 32;
        return __low2float(as_half2(super.x)) * (a.scale0 * (scale0 * first) + a.scale1 * (scale1 * second));
    }

    template <typename Layout, int MT>
    struct Fragment {
        using Run = WeightRun<Layout, MT>;
        using Lane = LaneLayout<Layout, MT>;
        template <typename Registers>
        __device__ static __forceinline__ void load(Registers &r, uint32_t from, const Lane &lane, int h, int step, int,
                                                    int) {
            const uint2 super = load_shared<uint2>(from + lane.super + (h * 8 * Run::supers + step / 2) * 8);
            const uint32_t scales = unit_scales(super, step % 2 * 2 + lane.unit);
            // d alone may be too small for f16's normal numbers, and so may its products.
            const half2 d = __hmul2(__low2half2(as_half2(super.x)), __float2half2_rn(32.f));
            const half2 s = field_to_half<0x003f003fu, 0, 32>(__byte_perm(scales, scales << 10, 0x7610));
            r.scale[0] = __hmul2(d, __low2half2(s)), r.scale[1] = __hmul2(d, __high2half2(s));
        }
        template <int HALF, typename Registers>
        __device__ static __forceinline__ half2 apply(const Registers &r, half2 x) {
            return __hmul2(x, r.scale[HALF]);
        }
    };
};

struct IQ4_XS : CodebookType<IQ4_XS, TileLayout<2, 0, 0, 8>, Iq4Values, Iq4XsScales, 5> {
    static constexpr int block_values = 256, block_bytes = 136;

    __device__ static int code(const uint8_t *block, int i) {
        return nibbles::code_in_block<8, false>(block + i / 32 * 16, i % 32);
    }
};
