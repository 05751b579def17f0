// Tiles of the compressed KV cache: keys and values of 128 tokens of a key/value head in few bits each
// (docs/kv-cache.md). All are rotated by a Hadamard transform along the head first.
//
// A tile of heads of D values is a record, `KvTile<D, KEY_BITS, VALUE_BITS>`:
//
//   scales and zeros of keys, for each 64 tokens and each 8 channels: 8 scales, 8 zeros (f16)
//   a scale and a zero of each token's values (f16)
//   for each half of the values where a head has 512 (else for all):
//     for each 16 tokens (a step) words of keys' codes
//     for each step words of values' codes
//
// Codes lie as the lanes of a warp read them for the matrix instructions of decode_attention.cuh: a lane's words in
// vectors of 4 (or as many as divide them), those of all lanes side by side. Lane 4 g + t has of a step, of keys, the
// pieces (8 values) 4 c + t of tokens 8 j + g, by j and c; of values, the pieces 8 c + g of tokens 2 t and 2 t + 1, and
// of 2 t + 8 and 2 t + 9, by c. Codes that are used in pairs, of keys two neighbours', of values two tokens', lie 16
// bits apart, so that a mask leaves a pair.
#pragma once

#include "common.cuh"

namespace kv_tiles {

constexpr int TILE = 128;
constexpr int STEP = 16;
constexpr int STEPS = TILE / STEP;
constexpr int KEY_GROUP = 64;  // tokens that share keys' scales and zeros
constexpr int SINKS = 4;       // first tokens of a text, which are read as they were stored

// Calls CALL(D, name, bits of keys, bits of values) for each format.
#define KV_FORMATS(CALL, D) \
    CALL(D, k8v8, 8, 8)     \
    CALL(D, k4v4, 4, 4)     \
    CALL(D, k4v3, 4, 3)

// Tiles that the token at `place` sees. It sees those of its own tile and of the one before as they were stored.
__device__ __forceinline__ int tiles_seen(int place) { return max(place / TILE - 1, 0); }
// Of the tokens begin .. end, the first that it sees as it was stored.
__device__ __forceinline__ int exact_from(int place, int begin, int end) {
    return min(max(tiles_seen(place) * TILE, begin), end);
}

// The greatest code.
template <int BITS>
constexpr float GREATEST = (1 << BITS) - 1;

// Words of a piece of a token's keys, and of a piece of four tokens' values.
template <int BITS>
constexpr int KEY_WORDS = BITS / 4;
template <int BITS>
constexpr int VALUE_WORDS = BITS;

// (x & mask) | 1024 in f16, twice: the last bits of which then count ones.
__device__ __forceinline__ half2 with_1024(uint32_t x, uint32_t mask) {
    uint32_t y;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(y) : "r"(x), "r"(mask), "r"(0x64006400));
    return as_half2(y);
}
// The codes in the last bits of halves, as numbers.
__device__ __forceinline__ half2 low_pair(uint32_t x, uint32_t mask) {
    return __hsub2(with_1024(x, mask), as_half2(0x64006400));
}
// Those 4 bits higher.
__device__ __forceinline__ half2 high_pair(uint32_t x) {
    return __hfma2(with_1024(x, 0x00f000f0), __float2half2_rn(1.f / 16), __float2half2_rn(-64.f));
}

// Pair j of a word of 4 pairs of 4 bits.
__device__ __forceinline__ half2 pair_of_4_bits(uint32_t word, int j) {
    const uint32_t x = j < 2 ? word : word >> 8;
    return j % 2 == 0 ? low_pair(x, 0x000f000f) : high_pair(x);
}

// The codes of a piece of keys as numbers: values 2 j and 2 j + 1 are pair j.
template <int BITS>
__device__ __forceinline__ half2 key_pair(const uint32_t (&words)[KEY_WORDS<BITS>], int j) {
    static_assert(BITS == 4 || BITS == 8);
    if constexpr (BITS == 4)
        return pair_of_4_bits(words[0], j);
    else
        return low_pair(words[j / 2] >> j % 2 * 8, 0x00ff00ff);
}

// The codes of a piece of values as numbers: value j of tokens 2 t and 2 t + 1 (`later` = 0), or of those 8 behind.
// `word(w)` gives the piece's words.
template <int BITS, typename Word>
__device__ __forceinline__ half2 value_pair(Word word, int later, int j) {
    static_assert(BITS == 3 || BITS == 4 || BITS == 8);
    if constexpr (BITS == 4) {
        return pair_of_4_bits(word(later * 2 + j / 4), j % 4);
    } else if constexpr (BITS == 8) {
        return low_pair(word(later * 4 + j / 2) >> j % 2 * 8, 0x00ff00ff);
    } else {
        // Words 0 and 1 have the lower two bits, word 2 the third one of all.
        const uint32_t high = word(2), shift = later * 8 + j;
        const uint32_t third = (shift < 2 ? high << (2 - shift) : high >> (shift - 2)) & 0x00040004;
        return low_pair(word(later) >> 2 * j & 0x00030003 | third, 0x00070007);
    }
}

// Loads words that lie one behind another: 4, 2 or 1.
template <int WORDS>
__device__ __forceinline__ void load_words(uint32_t *to, const uint8_t *from) {
    if constexpr (WORDS == 4) {
        *reinterpret_cast<uint4 *>(to) = *reinterpret_cast<const uint4 *>(from);
    } else if constexpr (WORDS == 2) {
        *reinterpret_cast<uint2 *>(to) = *reinterpret_cast<const uint2 *>(from);
    } else {
        *to = *reinterpret_cast<const uint32_t *>(from);
    }
}

// Adds a code to the words of its piece, which were 0.
template <int BITS>
__device__ __forceinline__ void add_key(uint32_t (&words)[KEY_WORDS<BITS>], int value, uint32_t code) {
    const int at = value % 2 * 16, j = value / 2;
    if constexpr (BITS == 4)
        words[0] |= code << (at + 4 * j);
    else
        words[j / 2] |= code << (at + j % 2 * 8);
}
template <int BITS>
__device__ __forceinline__ void add_value(uint32_t (&words)[VALUE_WORDS<BITS>], int later, int odd, int j,
                                          uint32_t code) {
    const int at = odd * 16;
    if constexpr (BITS == 4) {
        words[later * 2 + j / 4] |= code << (at + j % 4 * 4);
    } else if constexpr (BITS == 8) {
        words[later * 4 + j / 2] |= code << (at + j % 2 * 8);
    } else {
        words[later] |= (code & 3) << (at + 2 * j);
        words[2] |= code / 4 << (at + later * 8 + j);
    }
}

// A record, and where in it things begin, in bytes.
template <int D, int KEY_BITS, int VALUE_BITS>
struct KvTile {
    static constexpr int key_bits = KEY_BITS, value_bits = VALUE_BITS;
    static constexpr int parts = D > 256 ? 2 : 1, part = D / parts;
    // Of a lane, for a step and a part.
    static constexpr int key_words = part / 16 * KEY_WORDS<KEY_BITS>, value_words = part / 64 * VALUE_WORDS<VALUE_BITS>;
    static constexpr int key_bytes = key_words * WARP * 4, value_bytes = value_words * WARP * 4;
    static constexpr int value_groups = TILE / KEY_GROUP * D * 4, codes = value_groups + TILE * 4;
    static constexpr int bytes = codes + parts * STEPS * (key_bytes + value_bytes);

    // Of channels 8 octet .. + 7, for the tokens of a step.
    __device__ static constexpr int key_groups_at(int step, int octet) {
        return step / (KEY_GROUP / STEP) * (D * 4) + octet * 32;
    }
    __device__ static constexpr int keys_at(int part, int step) {
        return codes + part * STEPS * (key_bytes + value_bytes) + step * key_bytes;
    }
    __device__ static constexpr int values_at(int part, int step) { return keys_at(part, STEPS) + step * value_bytes; }

    // Where in a step a lane's word of keys is, and of values.
    __device__ static constexpr int key_word_at(int word, int lane) { return word_at<key_words>(word, lane); }
    __device__ static constexpr int value_word_at(int word, int lane) { return word_at<value_words>(word, lane); }
    template <int WORDS>
    static constexpr int vector = WORDS % 4 == 0   ? 4
                                  : WORDS % 2 == 0 ? 2
                                                   : 1;
    template <int WORDS>
    __device__ static constexpr int word_at(int word, int lane) {
        return (word / vector<WORDS> * WARP + lane) * (vector<WORDS> * 4) + word % vector<WORDS> * 4;
    }
};

// Eight values of one token: 8 octet .. + 7 of the key of a tile's token, and of its value.
template <typename Tile>
__device__ __forceinline__ uint4 key_octet(const uint8_t *record, int token, int octet) {
    constexpr int BITS = Tile::key_bits, WORDS = KEY_WORDS<BITS>, IN_PART = Tile::part / 8;
    const int step = token / STEP, word = (token % STEP / 8 * (IN_PART / 4) + octet % IN_PART / 4) * WORDS;
    uint32_t words[WORDS];
    load_words<WORDS>(
        words, record + Tile::keys_at(octet / IN_PART, step) + Tile::key_word_at(word, token % 8 * 4 + octet % 4));
    const auto *groups = reinterpret_cast<const uint4 *>(record + Tile::key_groups_at(step, octet));
    const uint4 scale = groups[0], zero = groups[1];
    const auto pair = [&](int j, uint32_t scale, uint32_t zero) {
        return bits(__hfma2(key_pair<BITS>(words, j), as_half2(scale), as_half2(zero)));
    };
    return {pair(0, scale.x, zero.x), pair(1, scale.y, zero.y), pair(2, scale.z, zero.z), pair(3, scale.w, zero.w)};
}
template <typename Tile>
__device__ __forceinline__ uint4 value_octet(const uint8_t *record, int token, int octet) {
    constexpr int BITS = Tile::value_bits, WORDS = VALUE_WORDS<BITS>, IN_PART = Tile::part / 8;
    const int step = token / STEP, later = token % STEP / 8, word = octet % IN_PART / 8 * WORDS;
    const uint8_t *codes = record + Tile::values_at(octet / IN_PART, step);
    const auto at = [&](int w) { return codes + Tile::value_word_at(word + w, octet % 8 * 4 + token % 8 / 2); };
    // The words of this token and of the one that shares them, where a piece's first tokens have theirs.
    uint32_t words[WORDS];
    if constexpr (BITS == 3) {
        load_words<1>(words, at(later));
        load_words<1>(words + 2, at(2));
        words[2] >>= later * 8;
    } else {
        load_words<WORDS / 2>(words, at(later * (WORDS / 2)));
    }
    const half2 group = *reinterpret_cast<const half2 *>(record + Tile::value_groups + token * 4);
    const half2 scale = __low2half2(group), zero = __high2half2(group);
    const auto pair = [&](int j) {
        const auto codes = [&](int j) { return bits(value_pair<BITS>([&](int w) { return words[w]; }, 0, j)); };
        const uint32_t two = __byte_perm(codes(j), codes(j + 1), token % 2 ? 0x7632 : 0x5410);
        return bits(__hfma2(as_half2(two), scale, zero));
    };
    return {pair(0), pair(2), pair(4), pair(6)};
}

// Rotates a head of D values, of which this lane has i * WARP + lane: first each 32 values by themselves, of which it
// has N here, then the lane's with one another.
template <int N>
__device__ __forceinline__ void rotate_lanes(float (&value)[N]) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int distance = 1; distance < WARP; distance *= 2) {
#pragma unroll
        for (int i = 0; i < N; i++) {
            const float other = __shfl_xor_sync(~0u, value[i], distance);
            value[i] = lane & distance ? other - value[i] : value[i] + other;
        }
    }
}
template <int D>
__device__ __forceinline__ void rotate_own(float (&value)[D / WARP]) {
#pragma unroll
    for (int distance = 1; distance < D / WARP; distance *= 2) {
#pragma unroll
        for (int i = 0; i < D / WARP; i++) {
            if (i & distance) continue;
            const float a = value[i], b = value[i | distance];
            value[i] = a + b, value[i | distance] = a - b;
        }
    }
    const float scale = 1.f / sqrtf(float(D));
#pragma unroll
    for (int i = 0; i < D / WARP; i++) value[i] *= scale;
}
template <int D>
__device__ __forceinline__ void rotate(float (&value)[D / WARP]) {
    rotate_lanes(value);
    rotate_own<D>(value);
}

}  // namespace kv_tiles
