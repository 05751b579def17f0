// Makes f16 keys and values of tiles' codes (kv_tiles.cuh) in the slots of attend_chunk.cuh, as they would be copied
// there, by a warpgroup. The codes of a slot come through a ring of stages in shared memory, by bulk copies.
#pragma once

#include "copy.cuh"
#include "kv_tiles.cuh"

constexpr int MAX_STAGES = 4;

template <int D, int KEYS, typename Tile>
struct TileExpander {
    static constexpr int PIECES = D / 8, PASS = WARPGROUP / PIECES;  // of 8 values a token; tokens of keys, or pairs of
                                                                     // tokens of values, that the threads do at once
    static constexpr int STEPS = KEYS / kv_tiles::STEP, IN_PART = Tile::part / 8;
    static constexpr int GROUPS = (KEYS + kv_tiles::KEY_GROUP - 1) / kv_tiles::KEY_GROUP;
    // Bytes of a stage: scales with zeros, then each part's codes.
    static constexpr int KEY_GROUPS = GROUPS * D * 4, VALUE_GROUPS = KEYS * 4;
    static constexpr int KEY_CODES = STEPS * Tile::key_bytes, VALUE_CODES = STEPS * Tile::value_bytes;
    static constexpr int KEY_STAGE = KEY_GROUPS + Tile::parts * KEY_CODES;
    static constexpr int VALUE_STAGE = VALUE_GROUPS + Tile::parts * VALUE_CODES;
    static constexpr int STAGE = KEY_STAGE > VALUE_STAGE ? KEY_STAGE : VALUE_STAGE;

    const uint8_t *records;
    const half *sinks;
    int row, piece;  // the thread's first token, or pair, of a pass, and its piece

    // Of a head. `thread` is one of a warpgroup's.
    __device__ __forceinline__ TileExpander(const KvTiles &tiles, int head, int thread)
        : records(tiles.records + head * tiles.head_bytes),
          sinks(tiles.sinks + head * (2 * kv_tiles::SINKS * D)),
          row(thread / PIECES),
          piece(thread % PIECES) {}

    // Starts copying the keys' codes, or the values', of tokens first .. + KEYS. By a warp.
    __device__ __forceinline__ void stage_keys(CopyBarrier &arrived, uint8_t *stage, int first) const {
        const uint8_t *record = records + size_t(first / kv_tiles::TILE) * Tile::bytes;
        const int step = first % kv_tiles::TILE / kv_tiles::STEP;
        const uint8_t *groups = record + Tile::key_groups_at(step, 0), *codes = record + Tile::keys_at(0, step);
        if constexpr (Tile::parts == 1) {
            arrived.copy_parts<KEY_GROUPS, KEY_CODES>(stage, {groups, codes}, read_once());
        } else {
            const uint8_t *second = record + Tile::keys_at(1, step);
            arrived.copy_parts<KEY_GROUPS, KEY_CODES, KEY_CODES>(stage, {groups, codes, second}, read_once());
        }
    }
    __device__ __forceinline__ void stage_values(CopyBarrier &arrived, uint8_t *stage, int first) const {
        const uint8_t *record = records + size_t(first / kv_tiles::TILE) * Tile::bytes;
        const int token = first % kv_tiles::TILE, step = token / kv_tiles::STEP;
        const uint8_t *groups = record + Tile::value_groups + token * 4, *codes = record + Tile::values_at(0, step);
        if constexpr (Tile::parts == 1) {
            arrived.copy_parts<VALUE_GROUPS, VALUE_CODES>(stage, {groups, codes}, read_once());
        } else {
            const uint8_t *second = record + Tile::values_at(1, step);
            arrived.copy_parts<VALUE_GROUPS, VALUE_CODES, VALUE_CODES>(stage, {groups, codes, second}, read_once());
        }
    }

    // Expands a stage to a slot. A thread's tokens, or pairs, are `row` and those PASS apart from it: `row` changes
    // bits that the others are zero in, so that most of where they lie is known beforehand.
    __device__ __forceinline__ void expand_keys(const uint8_t *stage, int first, uint8_t *slot) const {
        using namespace kv_tiles;
        constexpr int WORDS = KEY_WORDS<Tile::key_bits>, IN_GROUP = KEYS / GROUPS;
        const int part = piece / IN_PART, c = piece % IN_PART / 4;
        const uint8_t *codes = stage + KEY_GROUPS + part * KEY_CODES +
                               Tile::key_word_at((row / 8 * (Tile::part / 32) + c) * WORDS, row % 8 * 4 + piece % 4);
        uint8_t *to = slot + piece / 8 * (KEYS * 128) + row * 128;
        const int swizzle = piece % 8 ^ row % 8;
#pragma unroll 1
        for (int group = 0; group < GROUPS; group++) {
            const auto *groups = reinterpret_cast<const uint4 *>(stage + group * (D * 4) + piece * 32);
            const uint4 scale = groups[0], zero = groups[1];
            const uint8_t *from = codes + group * (IN_GROUP / STEP * Tile::key_bytes);
            // All loads come before the first store, which for all that is known could change what they find.
            uint32_t words[IN_GROUP / PASS][WORDS];
#pragma unroll
            for (int token = 0; token < IN_GROUP; token += PASS) {
                const int first = token % STEP / 8 * (Tile::part / 32) * WORDS;
                load_words<WORDS>(words[token / PASS],
                                  from + token / STEP * Tile::key_bytes + Tile::key_word_at(first, token % 8 * 4));
            }
#pragma unroll
            for (int token = 0; token < IN_GROUP; token += PASS) {
                const auto key = [&](int j, uint32_t scale, uint32_t zero) {
                    const half2 codes = key_pair<Tile::key_bits>(words[token / PASS], j);
                    return bits(__hfma2(codes, as_half2(scale), as_half2(zero)));
                };
                store(to + (group * IN_GROUP + token) * 128 + (swizzle ^ token % 8) * 16,
                      {key(0, scale.x, zero.x), key(1, scale.y, zero.y), key(2, scale.z, zero.z),
                       key(3, scale.w, zero.w)});
            }
        }
        keep_sinks(0, first, slot);
    }
    __device__ __forceinline__ void expand_values(const uint8_t *stage, int first, uint8_t *slot) const {
        using namespace kv_tiles;
        constexpr int WORDS = VALUE_WORDS<Tile::value_bits>, PAIRS = STEP / 2;
        constexpr int AT_ONCE = (KEYS / 2 / PASS < 4 ? KEYS / 2 / PASS : 4) * PASS;
        static_assert(AT_ONCE % PAIRS == 0);
        const int part = piece / IN_PART, c = piece % IN_PART / 8, lane = piece % 8 * 4 + row % 4;
        const uint8_t *codes = stage + VALUE_GROUPS + part * VALUE_CODES + row / PAIRS * Tile::value_bytes;
        uint8_t *to = slot + piece / 8 * (KEYS * 128) + row * 256;
#pragma unroll 1
        for (int begin = 0; begin < KEYS / 2; begin += AT_ONCE) {
            const uint8_t *from = codes + begin / PAIRS * Tile::value_bytes;
            const auto *groups = reinterpret_cast<const half2 *>(stage) + 2 * (begin + row);
            // The words of each pair, where a piece's first pair has its own.
            uint32_t words[AT_ONCE / PASS][WORDS];
            half2 even[AT_ONCE / PASS], odd[AT_ONCE / PASS];
#pragma unroll
            for (int pair = 0; pair < AT_ONCE; pair += PASS) {
                const int later = row % PAIRS / 4 + pair % PAIRS / 4;
                const uint8_t *step = from + pair / PAIRS * Tile::value_bytes;
                uint32_t (&own)[WORDS] = words[pair / PASS];
                const auto at = [&](int word) { return step + Tile::value_word_at(c * WORDS + word, lane + pair % 4); };
                if constexpr (Tile::value_bits == 3) {
                    load_words<1>(own, at(later));
                    load_words<1>(own + 2, at(2));
                    own[2] = later ? own[2] >> 8 : own[2];
                } else {
                    load_words<WORDS / 2>(own, at(later * (WORDS / 2)));
                }
                even[pair / PASS] = groups[2 * pair], odd[pair / PASS] = groups[2 * pair + 1];
            }
#pragma unroll
            for (int pair = 0; pair < AT_ONCE; pair += PASS) {
                const int i = pair / PASS;
                const half2 scale = __lows2half2(even[i], odd[i]), zero = __highs2half2(even[i], odd[i]);
                uint32_t values[8];
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    const half2 codes = value_pair<Tile::value_bits>([&](int w) { return words[i][w]; }, 0, j);
                    values[j] = bits(__hfma2(codes, scale, zero));
                }
#pragma unroll
                for (int k = 0; k < 2; k++) {
                    const auto two = [&](int j) { return __byte_perm(values[j], values[j + 1], k ? 0x7632 : 0x5410); };
                    const int token = (begin + pair) * 2 + k, swizzle = piece % 8 ^ row * 2 % 8 ^ (pair * 2 + k) % 8;
                    store(to + token * 128 + swizzle * 16, {two(0), two(2), two(4), two(6)});
                }
            }
        }
        keep_sinks(1, first, slot);
    }

private:
    __device__ static __forceinline__ void store(uint8_t *to, const uint4 &eight) {
        *reinterpret_cast<uint4 *>(to) = eight;
    }
    // The first tokens of a text, by those threads that have stored what their codes say.
    __device__ __forceinline__ void keep_sinks(int plane, int first, uint8_t *slot) const {
        using namespace kv_tiles;
        if (first > 0) return;
#pragma unroll
        for (int token = 0; token < SINKS; token++) {
            if (token / (1 + plane) % PASS != row) continue;
            store(slot + piece / 8 * (KEYS * 128) + token * 128 + (piece % 8 ^ token % 8) * 16,
                  __ldg(reinterpret_cast<const uint4 *>(sinks + (plane * SINKS + token) * D + piece * 8)));
        }
    }
};
