// MXFP4 (OCP Microscaling Formats 1.0): 2^(exponent - 128) * value(code), codes of 4 bits, an 8-bit exponent for each
// 32 values. Values are those of FP4 (E2M1), doubled.
//
// File block: exponent; byte i of 16 holds value i low, value 16 + i high.
//
//   scales   2 bytes: the exponents of the unit's two blocks
#pragma once

#include "codebook.cuh"

struct Fp4Values {
    __host__ __device__ static constexpr int value(int code) {
        constexpr int8_t VALUES[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
        return VALUES[code];
    }
};

struct ExponentScales {
    // Of the plane of scales, which is the one after `high`.
    template <typename Layout>
    static constexpr int unit_bytes = Layout::scale_bytes;

    template <typename Type, typename Layout>
    __device__ static void repack(const FileUnit<Type> &in, const TileUnit<Layout, uint8_t> &out) {
        for (int i = 0; i < 2; i++) {
            out.scales()[i] = in.index * 2 + i < in.blocks ? in.block()[i * Type::block_bytes] : 0;
        }
    }

    template <typename Layout>
    __device__ static __forceinline__ float value(const TileUnit<Layout> &unit, int i, int value) {
        const uint32_t exponent = unit.scales()[i / 32];
        return __uint_as_float(exponent < 2 ? 0x00200000u << exponent : (exponent - 1) << 23) * value;
    }

    // 2^(exponent - 127) of each half, by the exponents in the low 16 bits; 0 for an exponent of 0.
    __device__ static __forceinline__ float2 powers(uint32_t exponents) {
        constexpr uint32_t EXPONENT = 0x7f800000u;
        return {__uint_as_float(exponents << 23 & EXPONENT), __uint_as_float(exponents << 15 & EXPONENT)};
    }

    template <typename Layout, typename Activations>
    __device__ static __forceinline__ float dot(const uint8_t *scales, int lane, const Activations &a, int first,
                                                int second) {
        const float2 d = powers(reinterpret_cast<const uint16_t *>(scales)[lane]);
        return 0.5f * (d.x * a.scale0 * first + d.y * a.scale1 * second);
    }

    template <typename Layout, int MT>
    struct Fragment {
        using Run = WeightRun<Layout, MT>;
        using Lane = LaneLayout<Layout, MT>;
        template <typename Registers>
        __device__ static __forceinline__ void load(Registers &r, uint32_t from, const Lane &lane, int h, int step,
                                                    int first_unit, int n) {
            const int unit = 2 * step + lane.unit;
            const uint32_t two = load_shared<uint32_t>(from + lane.scale + (h * 8 * Run::units + unit) * 4);
            // Of the two units that were copied together, this is the one that its index in the tile says.
            const int index = lane.row % TILE_ROWS * n + first_unit + unit;
            const float2 d = powers(index % 2 ? two >> 16 : two);
            r.scale[0] = __float2half2_rn(d.x * 0.5f), r.scale[1] = __float2half2_rn(d.y * 0.5f);
        }
        template <int HALF, typename Registers>
        __device__ static __forceinline__ half2 apply(const Registers &r, half2 x) {
            return __hmul2(x, r.scale[HALF]);
        }
    };
};

struct MXFP4 : CodebookType<MXFP4, TileLayout<2, 0, 2, 0>, Fp4Values, ExponentScales> {
    static constexpr int block_values = 32, block_bytes = 17;

    __device__ static int code(const uint8_t *block, int i) { return nibbles::code_in_block<1, false>(block, i); }
};
