// Codes of 3 bits in 24 bytes. Of each half of a unit, part p (of 2) is values 16 p .. + 15; a part has three words of
// eight nibbles, which hold four: the low three bits of a nibble are a code, and bit 3 of nibble n of word w is bit w
// of nibble n of the fourth word. Which value a nibble stands for, the type says.
//
//   codes   words 0 and 1 of part 0, then of part 1
//   high    word 2 of each part
#pragma once

#include "type.cuh"

namespace three_bits {

// Word `w` (of 3) of part `part`.
template <typename Layout, typename Byte>
__device__ Byte *word(const TileUnit<Layout, Byte> &unit, int part, int w) {
    return w < 2 ? unit.codes(0) + part * 8 + w * 4 : unit.high() + part * 4;
}
__device__ __forceinline__ uint32_t fourth(uint32_t w0, uint32_t w1, uint32_t w2) {
    return (w0 >> 3 & 0x11111111u) | (w1 >> 2 & 0x22222222u) | (w2 >> 1 & 0x44444444u);
}

// `code(part, w, n)`: of the value that nibble `n` of word `w` (of 4) of a part stands for.
template <typename Layout, typename Code>
__device__ void store(const TileUnit<Layout, uint8_t> &out, Code code) {
    for (int part = 0; part < 2; part++) {
        for (int w = 0; w < 3; w++) {
            const auto nibble = [&](int n) { return code(part, w, n) | (code(part, 3, n) >> w & 1) << 3; };
            for (int b = 0; b < 4; b++) {
                word(out, part, w)[b] = static_cast<uint8_t>(nibble(2 * b) | nibble(2 * b + 1) << 4);
            }
        }
    }
}
template <typename Layout>
__device__ __forceinline__ int load(const TileUnit<Layout> &unit, int part, int w, int n) {
    const auto nibble = [&](int of) { return word(unit, part, of)[n / 2] >> 4 * (n % 2); };
    if (w < 3) return nibble(w) & 7;
    return (nibble(0) >> 3 & 1) | (nibble(1) >> 2 & 2) | (nibble(2) >> 1 & 4);
}

// The words of unit `lane`; those that are in memory have bits 3 that are not theirs.
template <typename Layout>
__device__ __forceinline__ void load_words(const uint8_t *tile, int n, int row, int lane, uint32_t (&word)[2][4]) {
    const uint4 c = reinterpret_cast<const uint4 *>(tile)[row * n + lane];
    const uint2 high = reinterpret_cast<const uint2 *>(tile + Layout::high_at(n))[row * n + lane];
    word[0][0] = c.x, word[0][1] = c.y, word[0][2] = high.x, word[0][3] = fourth(c.x, c.y, high.x);
    word[1][0] = c.z, word[1][1] = c.w, word[1][2] = high.y, word[1][3] = fourth(c.z, c.w, high.y);
}

// Those of a lane's part.
template <typename Layout, int MT>
__device__ __forceinline__ void load_fragment(uint32_t (&code)[4], uint32_t from, const LaneLayout<Layout, MT> &lane,
                                              int h, int step) {
    using Run = WeightRun<Layout, MT>;
    const uint2 two = load_shared<uint2>(from + lane.code + (h * 8 * Run::units + lane.code_unit(step)) * 16);
    const uint32_t highs = from + lane.high + lane.part * 4;
    code[0] = two.x, code[1] = two.y;
    code[2] = load_shared<uint32_t>(highs + (h * 8 * Run::units + lane.high_unit(step)) * 8);
    code[3] = fourth(code[0], code[1], code[2]);
}

}  // namespace three_bits
