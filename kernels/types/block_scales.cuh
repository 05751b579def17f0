// Scales of types whose blocks have 32 values: d of each (Q4_0, Q5_0, Q8_0), or d and a minimum m (Q4_1, Q5_1).
//
//   scales   4 bytes: d of the unit's two blocks, f16; or 8 bytes: d and m of the first, d and m of the second
#pragma once

#include "type.cuh"

struct BlockScales {
    // Of the plane of scales, which is the one after `high`.
    template <typename Layout>
    static constexpr int unit_bytes = Layout::scale_bytes;

    template <typename Layout>
    static constexpr bool has_minimum = Layout::scale_bytes == 8;

    // From a file's blocks, which begin with d, or d and m.
    template <typename Type, typename Layout>
    __device__ static void repack(const FileUnit<Type> &in, const TileUnit<Layout, uint8_t> &out) {
        constexpr int OF_BLOCK = Layout::scale_bytes / 2;
        uint8_t *scales = out.scales();
        const uint8_t *block = in.block();
        for (int i = 0; i < Layout::scale_bytes; i++) {
            scales[i] =
                in.index * 2 + i / OF_BLOCK < in.blocks ? block[i / OF_BLOCK * Type::block_bytes + i % OF_BLOCK] : 0;
        }
    }

    // `code` is less what stands for 0.
    template <typename Layout>
    __device__ static __forceinline__ float value(const TileUnit<Layout> &unit, int i, int code) {
        if constexpr (has_minimum<Layout>) {
            const float2 block = half2_at(unit.scales() + i / 32 * 4);
            return block.x * code + block.y;
        } else {
            return __half2float(reinterpret_cast<const half *>(unit.scales())[i / 32]) * code;
        }
    }

    // Scales the sums of codes times activations, where there are no minima.
    template <typename Layout, typename Activations>
    __device__ static __forceinline__ float dot(const uint8_t *scales, int lane, const Activations &a, int first,
                                                int second) {
        const float2 d = half2_at(scales + 4 * lane);
        return d.x * a.scale0 * first + d.y * a.scale1 * second;
    }

    template <typename Layout, int MT>
    struct Fragment {
        using Run = WeightRun<Layout, MT>;
        using Lane = LaneLayout<Layout, MT>;
        template <typename Registers>
        __device__ static __forceinline__ void load(Registers &r, uint32_t from, const Lane &lane, int h, int step, int,
                                                    int) {
            const uint32_t scales = from + lane.scale + h * 8 * Run::units * Layout::scale_bytes;
            const int unit = 2 * step + lane.unit;
            if constexpr (has_minimum<Layout>) {
                const uint2 both = load_shared<uint2>(scales + unit * 8);
                r.scale[0] = __low2half2(as_half2(both.x)), r.minimum[0] = __high2half2(as_half2(both.x));
                r.scale[1] = __low2half2(as_half2(both.y)), r.minimum[1] = __high2half2(as_half2(both.y));
            } else {
                const half2 both = load_shared<half2>(scales + unit * 4);
                r.scale[0] = __low2half2(both), r.scale[1] = __high2half2(both);
            }
        }

        template <int HALF, typename Registers>
        __device__ static __forceinline__ half2 apply(const Registers &r, half2 x) {
            if constexpr (has_minimum<Layout>)
                return __hfma2(x, r.scale[HALF], r.minimum[HALF]);
            else
                return __hmul2(x, r.scale[HALF]);
        }
    };
};
