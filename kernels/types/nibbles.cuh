// Codes of 4 bits, two in a byte, and of 5 bits with a plane of fifth bits: what Q4_* and Q5_* share; Q6_K has its low
// bits from here.
//
//   codes   byte i of the 32 that the unit's two pieces make holds value i low, value 32 + i high
//   high    8 bytes where codes have 5 bits: bit 8 * (i % 4) + i / 4 of the first word is bit 4 of value i's code,
//           of the second word: of value 32 + i's
#pragma once

#include "type.cuh"

namespace nibbles {

template <typename Type, typename Layout>
__device__ void repack_low_bits(const FileUnit<Type> &in, const TileUnit<Layout, uint8_t> &out) {
    for (int i = 0; i < 32; i++) {
        out.codes(i / 16)[i % 16] = static_cast<uint8_t>((in.code(i) & 15) | (in.code(32 + i) & 15) << 4);
    }
}

template <typename Type, typename Layout>
__device__ void repack(const FileUnit<Type> &in, const TileUnit<Layout, uint8_t> &out) {
    repack_low_bits(in, out);
    if constexpr (Layout::high_bytes > 0) {
        uint8_t *high = out.high();
        for (int byte = 0; byte < 8; byte++) {
            int bits = 0;
            for (int k = 0; k < 8; k++) bits |= (in.code(byte / 4 * 32 + 4 * k + byte % 4) >> 4) << k;
            high[byte] = static_cast<uint8_t>(bits);
        }
    }
}

template <typename Layout>
__device__ __forceinline__ int low_bits(const TileUnit<Layout> &unit, int i) {
    return unit.codes(i % 32 / 16)[i % 16] >> i / 32 * 4 & 15;
}

template <typename Layout>
__device__ __forceinline__ int code(const TileUnit<Layout> &unit, int i) {
    int code = low_bits(unit, i);
    if (Layout::high_bytes > 0) code |= (unit.high()[i / 32 * 4 + i % 4] >> i % 32 / 4 & 1) << 4;
    return code;
}

__device__ __forceinline__ void load_words(const uint8_t *tile, int n, int row, int lane, uint32_t (&word)[8]) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const uint4 piece = reinterpret_cast<const uint4 *>(tile)[(i * TILE_ROWS + row) * n + lane];
        word[4 * i] = piece.x, word[4 * i + 1] = piece.y, word[4 * i + 2] = piece.z, word[4 * i + 3] = piece.w;
    }
}

// Activations for codes of which ZERO stands for 0.
template <typename Layout, int ZERO>
struct Activations : ActivationUnit {
    int start0, start1;  // what a sum over 32 products starts from: -ZERO * (sum of the integers)
    float sum0, sum1;    // scale * (sum of the integers) of each 32 values, for types with minima

    __device__ __forceinline__ void prepare(const int4 (&q)[4], float s0, float s1) {
        // High codes are used in place, times 16, where nothing has to be put between them: their scale is divided
        // by 16.
        constexpr bool IN_PLACE = Layout::high_bytes == 0;
        int sum[4];
        load(q, s0, s1, sum);
        if (IN_PLACE) scale1 = s1 / 16.f;
        sum0 = s0 * (sum[0] + sum[1]);
        sum1 = s1 * (sum[2] + sum[3]);
        start0 = -ZERO * (sum[0] + sum[1]);
        start1 = -ZERO * (sum[2] + sum[3]) * (IN_PLACE ? 16 : 1);
    }
};

template <typename Layout, int MT>
__device__ __forceinline__ void load_fragment(uint32_t (&code)[4], uint32_t from, const LaneLayout<Layout, MT> &lane,
                                              int h, int step) {
    using Run = WeightRun<Layout, MT>;
    const uint32_t codes = from + lane.code + (h * 8 * Layout::code_pieces * Run::units * 16);
    const uint4 v = load_shared<uint4>(codes + lane.code_unit(step) * 16);
    code[0] = v.x, code[1] = v.y, code[2] = v.z, code[3] = v.w;
}

template <typename Layout, int MT>
__device__ __forceinline__ void load_high(uint2 &high, uint32_t from, const LaneLayout<Layout, MT> &lane, int h,
                                          int step) {
    using Run = WeightRun<Layout, MT>;
    high = load_shared<uint2>(from + lane.high + (h * 8 * Run::units + lane.high_unit(step)) * Layout::high_bytes);
}

template <typename Layout, int MT, int ZERO>
struct FragmentCodes {
    static constexpr int words = 4;
    using Registers = FragmentRegisters<words>;

    __device__ static __forceinline__ void load(Registers &r, uint32_t from, const LaneLayout<Layout, MT> &lane, int h,
                                                int step) {
        load_fragment(r.code, from, lane, h, step);
        if constexpr (Layout::high_bytes > 0) load_high(r.high, from, lane, h, step);
    }

    template <int HALF>
    __device__ static __forceinline__ void decode(const Registers &r, int w, half2 &x, half2 &y) {
        if constexpr (Layout::high_bytes > 0) {
            uint32_t c = (HALF ? r.code[w] >> 4 : r.code[w]) & 0x0f0f0f0fu;
            const int part = threadIdx.x % 2;
            c |= ((HALF ? r.high.y : r.high.x) >> (4 * part + w) & 0x01010101u) << 4;
            bytes_to_half(c, __float2half2_rn(1024.f + ZERO), x, y);
        } else {
            constexpr uint32_t MASK = 0x000f000fu << 4 * HALF;
            x = field_to_half<MASK, 4 * HALF, ZERO>(r.code[w]);
            y = field_to_half<MASK, 4 * HALF, ZERO>(r.code[w] >> 8);
        }
    }
};

// The code of value `i` of a block of 32 values in a file: HEADER bytes, fifth bits if there are any, and the low bits.
template <int HEADER, bool FIVE>
__device__ int code_in_block(const uint8_t *block, int i) {
    const int high = FIVE ? block[HEADER + i / 8] >> i % 8 & 1 : 0;
    return (block[HEADER + (FIVE ? 4 : 0) + i % 16] >> i / 16 * 4 & 15) | high << 4;
}

}  // namespace nibbles

// The members of such a type but for what it is in the file. Scales: PackedScales or BlockScales.
template <typename Type, typename TypeLayout, int ZERO, typename Scales>
struct NibbleType {
    using Layout = TypeLayout;
    using Activations = nibbles::Activations<Layout, ZERO>;
    template <int MT>
    using Run = WeightRun<Layout, MT>;
    template <int MT>
    using Fragment =
        WeightFragment<nibbles::FragmentCodes<Layout, MT, ZERO>, typename Scales::template Fragment<Layout, MT>>;

    __device__ static void repack(const FileUnit<Type> &in, const TileUnit<Layout, uint8_t> &out) {
        nibbles::repack(in, out);
        Scales::repack(in, out);
    }
    __device__ static float value(const TileUnit<Layout> &unit, int i) {
        return Scales::value(unit, i, nibbles::code(unit, i) - ZERO);
    }
    __device__ static __forceinline__ float dot(const uint8_t *tile, int n, int row, int lane, const Activations &a) {
        constexpr uint32_t LOW = 0x0f0f0f0fu, BIT = 0x10101010u;
        uint32_t word[8];
        nibbles::load_words(tile, n, row, lane, word);
        const uint8_t *scales = tile + Layout::scale_at(n) + row * n * Scales::template unit_bytes<Layout>;
        const uint8_t *highs = tile + Layout::high_at(n) + row * n * Layout::high_bytes;
        int first = a.start0, second = a.start1;
        uint2 high = {};
        if constexpr (Layout::high_bytes > 0) high = reinterpret_cast<const uint2 *>(highs)[lane];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            uint32_t low_codes = word[i] & LOW;
            uint32_t high_codes = word[i] & ~LOW;
            if constexpr (Layout::high_bytes > 0) {
                low_codes |= (i < 4 ? high.x << (4 - i) : high.x >> (i - 4)) & BIT;
                high_codes = high_codes >> 4 | ((i < 4 ? high.y << (4 - i) : high.y >> (i - 4)) & BIT);
            }
            first = dot4(low_codes, a.x[i], first);
            second = dot4(high_codes, a.x[8 + i], second);
        }
        if constexpr (Layout::scale_bytes == 8) {
            // Here and not in BlockScales: within a function of its own the compiler computes the addresses anew for
            // each row.
            const float2 block0 = half2_at(scales + 8 * lane), block1 = half2_at(scales + 8 * lane + 4);
            return block0.x * a.scale0 * first + block1.x * a.scale1 * second + block0.y * a.sum0 + block1.y * a.sum1;
        } else {
            return Scales::template dot<Layout>(scales, lane, a, first, second);
        }
    }
};
