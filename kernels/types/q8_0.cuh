// Q8_0: d * code, codes of 8 bits with a sign, d for each 32 values.
//
// File block: d (f16); 32 bytes in order of values. Plane of codes: the 64 bytes in order.
#pragma once

#include "block_scales.cuh"

struct Q8_0 {
    static constexpr int block_values = 32, block_bytes = 34;
    using Layout = TileLayout<4, 0, 4, 0>;

    __device__ static int code(const uint8_t *block, int i) { return block[2 + i]; }

    __device__ static void repack(const FileUnit<Q8_0> &in, const TileUnit<Layout, uint8_t> &out) {
        for (int i = 0; i < UNIT; i++) out.codes(i / 16)[i % 16] = static_cast<uint8_t>(in.code(i));
        BlockScales::repack(in, out);
    }
    __device__ static float value(const TileUnit<Layout> &unit, int i) {
        return BlockScales::value(unit, i, static_cast<int8_t>(unit.codes(i / 16)[i % 16]));
    }

    struct Activations : ActivationUnit {
        __device__ __forceinline__ void prepare(const int4 (&q)[4], float s0, float s1) {
            int sum[4];
            load(q, s0, s1, sum);
        }
    };
    __device__ static __forceinline__ float dot(const uint8_t *tile, int n, int row, int lane, const Activations &a) {
        uint32_t word[16];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint4 piece = reinterpret_cast<const uint4 *>(tile)[(i * TILE_ROWS + row) * n + lane];
            word[4 * i] = piece.x, word[4 * i + 1] = piece.y, word[4 * i + 2] = piece.z, word[4 * i + 3] = piece.w;
        }
        const uint8_t *scales = tile + Layout::scale_at(n) + row * n * Layout::scale_bytes;
        int first = 0, second = 0;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            first = __dp4a(static_cast<int>(word[i]), a.x[i], first);
            second = __dp4a(static_cast<int>(word[8 + i]), a.x[8 + i], second);
        }
        return BlockScales::dot<Layout>(scales, lane, a, first, second);
    }

    template <int MT>
    using Run = WeightRun<Layout, MT>;

    template <int MT>
    struct FragmentCodes {
        static constexpr int words = 8;

        __device__ static __forceinline__ void load(FragmentRegisters<words> &r, uint32_t from,
                                                    const LaneLayout<Layout, MT> &lane, int h, int step) {
            const uint32_t codes = from + lane.code + (h * 8 * Layout::code_pieces * Run<MT>::units * 16);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const uint4 v = load_shared<uint4>(codes + (2 * i * Run<MT>::units + lane.code_unit(step)) * 16);
                r.code[4 * i] = v.x, r.code[4 * i + 1] = v.y, r.code[4 * i + 2] = v.z, r.code[4 * i + 3] = v.w;
            }
        }
    };
    template <int MT>
    struct Fragment : WeightFragment<FragmentCodes<MT>, BlockScales::Fragment<Layout, MT>> {
        using Scales = BlockScales::Fragment<Layout, MT>;

        template <int HALF>
        __device__ __forceinline__ void decode(int w, uint32_t &even, uint32_t &odd) const {
            const uint32_t c = this->registers.code[HALF * 4 + w] ^ 0x80808080u;
            const half2 offset = __half2half2(__ushort_as_half(0x6480));  // 1,024 + 128
            even = bits(Scales::template apply<HALF>(this->registers, __hsub2(plus_1024<0x00ff00ffu>(c), offset)));
            odd = bits(Scales::template apply<HALF>(this->registers, __hsub2(plus_1024<0x00ff00ffu>(c >> 8), offset)));
        }
    };
};
