// Codes of 4 bits that name the values of a codebook of 16 integers: IQ4_NL, IQ4_XS, MXFP4, IQ3_XXS.
//
//   codes   word w of the eight that the unit's two pieces make: its bits 16 h .. + 15 are the codes of values
//           32 h + 4 w .. + 3, the first lowest. That is the selector with which a byte permutation looks four codes up
//
// A codebook has `value(code)`, which is constant. A permutation knows eight bytes, so it takes two, and which of them
// counts bit 3 of the code says. In `dot` that is free: where bit 3 of a selector's nibble is 1, the result is the sign
// of the byte, 0 or -1, so that a value can be the sum of one byte from each of two tables.
#pragma once

#include "nibbles.cuh"

namespace codebook {

// Byte i % 4 of word i / 4 of a table.
template <typename Table>
__host__ __device__ constexpr uint32_t word(int index) {
    uint32_t word = 0;
    for (int i = 0; i < 4; i++) word |= (Table::value(4 * index + i) & 0xffu) << 8 * i;
    return word;
}

// Values plus 128.
template <typename Book>
struct Unsigned {
    __host__ __device__ static constexpr int value(int code) { return Book::value(code) + 128; }
};

// What `first` gives for codes below 8 and `second` for the others makes up for what the other table's sign adds.
template <typename Book>
struct Sum {
    __host__ __device__ static constexpr int sign(int value) { return value < 0 ? -1 : 0; }
    __host__ __device__ static constexpr int second(int code) {
        return Book::value(code) - sign(Book::value(code - 8));
    }
    __host__ __device__ static constexpr int first(int code) { return Book::value(code) - sign(second(code + 8)); }
    __host__ __device__ static constexpr int value(int code) { return code < 8 ? first(code) : second(code); }
    __host__ __device__ static constexpr bool holds() {
        for (int code = 0; code < 8; code++) {
            if (sign(first(code)) != sign(Book::value(code))) return false;
        }
        return true;
    }
};

// Byte i is that of the eight in `low` and `high` which nibble i of `selector` names; with its bit 3, the byte's sign.
__device__ __forceinline__ uint32_t permute(uint32_t low, uint32_t high, uint32_t selector) {
    uint32_t result;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "r"(selector));
    return result;
}

template <typename Layout>
__device__ __forceinline__ int code(const TileUnit<Layout> &unit, int i) {
    const int nibble = i % 32 / 4 * 8 + i / 32 * 4 + i % 4;
    return unit.codes(nibble / 32)[nibble / 2 % 16] >> nibble % 2 * 4 & 15;
}

// Adds the products of the four codes in the low half of `codes`; `flipped` has their bits 3 inverted.
template <typename Book>
__device__ __forceinline__ int dot4(uint32_t codes, uint32_t flipped, int x, int sum) {
    using Table = Sum<Book>;
    static_assert(Table::holds());
    constexpr uint32_t TABLE[4] = {word<Table>(0), word<Table>(1), word<Table>(2), word<Table>(3)};
    sum = __dp4a(static_cast<int>(permute(TABLE[0], TABLE[1], codes)), x, sum);
    return __dp4a(static_cast<int>(permute(TABLE[2], TABLE[3], flipped)), x, sum);
}

// 2^-SHIFT times values from bytes that are 128 more: 0 and 2 of `word` in x, 1 and 3 in y.
template <int SHIFT>
__device__ __forceinline__ void biased_to_half(uint32_t word, half2 &x, half2 &y) {
    constexpr float STEP = 1 << SHIFT, OFFSET = 1024 + 128;
    x = as_half2(permute(word, 0x64646464u, 0x4240)), y = as_half2(permute(word, 0x64646464u, 0x4341));
    if constexpr (SHIFT == 0) {
        x = __hsub2(x, __float2half2_rn(OFFSET)), y = __hsub2(y, __float2half2_rn(OFFSET));
    } else {
        const half2 factor = __float2half2_rn(1.f / STEP), offset = __float2half2_rn(-OFFSET / STEP);
        x = __hfma2(x, factor, offset), y = __hfma2(y, factor, offset);
    }
}

// Decodes to 2^-SHIFT times the value.
template <typename Layout, int MT, typename Book, int SHIFT>
struct FragmentCodes {
    static constexpr int words = 4;
    using Registers = FragmentRegisters<words>;

    __device__ static __forceinline__ void load(Registers &r, uint32_t from, const LaneLayout<Layout, MT> &lane, int h,
                                                int step) {
        nibbles::load_fragment(r.code, from, lane, h, step);
    }

    template <int HALF>
    __device__ static __forceinline__ void decode(const Registers &r, int w, half2 &x, half2 &y) {
        using Table = Unsigned<Book>;
        constexpr uint32_t TABLE[4] = {word<Table>(0), word<Table>(1), word<Table>(2), word<Table>(3)};
        const uint32_t in_eight = (r.code[w] & 0x77777777u) >> 16 * HALF;
        const uint32_t which_eight = ((r.code[w] >> 1 & 0x44444444u) | 0x32103210u) >> 16 * HALF;
        const uint32_t bytes =
            permute(permute(TABLE[0], TABLE[1], in_eight), permute(TABLE[2], TABLE[3], in_eight), which_eight);
        biased_to_half<SHIFT>(bytes, x, y);
    }
};

}  // namespace codebook

// The members of such a type but for what it is in the file. Its scales are 2^SHIFT times as large in fragments.
template <typename Type, typename TypeLayout, typename Book, typename Scales, int SHIFT = 0>
struct CodebookType {
    using Layout = TypeLayout;
    template <int MT>
    using Run = WeightRun<Layout, MT>;
    template <int MT>
    using Fragment = WeightFragment<codebook::FragmentCodes<Layout, MT, Book, SHIFT>,
                                    typename Scales::template Fragment<Layout, MT>>;

    __device__ static void repack(const FileUnit<Type> &in, const TileUnit<Layout, uint8_t> &out) {
        for (int byte = 0; byte < 32; byte++) {
            const int first = byte % 4 / 2 * 32 + byte / 4 * 4 + byte % 2 * 2;
            out.codes(byte / 16)[byte % 16] = static_cast<uint8_t>(in.code(first) | in.code(first + 1) << 4);
        }
        Scales::repack(in, out);
    }
    __device__ static float value(const TileUnit<Layout> &unit, int i) {
        return Scales::value(unit, i, Book::value(codebook::code(unit, i)));
    }

    struct Activations : ActivationUnit {
        __device__ __forceinline__ void prepare(const int4 (&q)[4], float s0, float s1) {
            int sum[4];
            load(q, s0, s1, sum);
        }
    };
    __device__ static __forceinline__ float dot(const uint8_t *tile, int n, int row, int lane, const Activations &a) {
        const uint8_t *scales = tile + Layout::scale_at(n) + row * n * Scales::template unit_bytes<Layout>;
        uint32_t word[8];
        nibbles::load_words(tile, n, row, lane, word);
        int first = 0, second = 0;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const uint32_t flipped = word[i] ^ 0x88888888u;
            first = codebook::dot4<Book>(word[i], flipped, a.x[i], first);
            second = codebook::dot4<Book>(word[i] >> 16, flipped >> 16, a.x[8 + i], second);
        }
        return Scales::template dot<Layout>(scales, lane, a, first, second);
    }
};

// Of IQ4_NL and IQ4_XS.
struct Iq4Values {
    __host__ __device__ static constexpr int value(int code) {
        constexpr int8_t VALUES[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
        return VALUES[code];
    }
};
