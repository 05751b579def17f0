// A piece of a tile of the compressed KV cache (kv_tiles.cuh) in shared memory, and attention of one token over it:
// what tile_stream.cuh and the step kernel (step/attention.cuh) share, and so compute to the same bits.
//
// Of keys a lane makes f16 again; of values it multiplies codes: a token's scale goes to its probability, and its zero,
// which is the same for all values, is added up apart.
#pragma once

#include "decode_attention.cuh"
#include "kv_tiles.cuh"

namespace decode_attention {

constexpr int TILE_TOKENS = 32;  // of a piece: that a team handles at a time

// Of a step that the sinks begin no other token counts.
__device__ __forceinline__ void keep_sinks(float (&score)[4]) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (i / 2 * 8 + t * 2 + i % 2 >= kv_tiles::SINKS) score[i] = NO_SCORE;
    }
}

template <int D, typename Tile>
struct TilePiece {
    static constexpr int HALVES = TILE_TOKENS / STEP;
    // Bytes: of keys' codes, of values', and of what both are scaled by.
    static constexpr int KEYS = HALVES * Tile::key_bytes, VALUES = HALVES * Tile::value_bytes, CODES = KEYS + VALUES;
    static constexpr int KEY_GROUPS = Tile::part * 4, VALUE_GROUPS = TILE_TOKENS * 4;
    static_assert(Tile::parts == PARTS<D> && kv_tiles::STEP == STEP);

    const uint8_t *keys, *values, *key_groups, *value_groups;

    // Adds its tokens, of values what their codes give; `zeros` takes, of head g, what exponentials give times zeros.
    // `finish` is Gathered's, `begins_text`: whether the first tokens are the text's.
    template <typename Finish>
    __device__ __forceinline__ void add_to(Gathered<D> &gathered, float &zeros, const QueryFragments<D> &query,
                                           bool begins_text, Finish finish) const {
        const int t = threadIdx.x % 4;
        float probability[HALVES][4];
        score(query, probability);
#pragma unroll
        for (int h = 0; h < HALVES; h++) finish(probability[h]);
        // The sinks are read as they were stored.
        if (begins_text && 2 * t < kv_tiles::SINKS) probability[0][0] = probability[0][1] = NO_SCORE;
        exponentiate(gathered, zeros, probability);

        uint32_t scaled[HALVES][2];
        const auto *groups = reinterpret_cast<const half2 *>(value_groups);
#pragma unroll
        for (int h = 0; h < HALVES; h++) {
#pragma unroll
            for (int later = 0; later < 2; later++) {
                float two[2];
#pragma unroll
                for (int odd = 0; odd < 2; odd++) {
                    const float2 group = __half22float2(groups[h * STEP + later * 8 + 2 * t + odd]);
                    const float p = probability[h][later * 2 + odd];
                    two[odd] = p * group.x;
                    zeros = fmaf(p, group.y, zeros);
                }
                scaled[h][later] = bits(__floats2half2_rn(two[0], two[1]));
            }
        }
        add_values(gathered, scaled);
    }

    // Adds to values what zeros give, behind all pieces.
    __device__ static __forceinline__ void add_zeros(Gathered<D> &gathered, float zeros) {
        const int t = threadIdx.x % 4;
        zeros += __shfl_xor_sync(~0u, zeros, 1);
        zeros += __shfl_xor_sync(~0u, zeros, 2);
        const float zeros0 = __shfl_sync(~0u, zeros, t * 8), zeros1 = __shfl_sync(~0u, zeros, t * 8 + 4);
#pragma unroll
        for (auto &o : gathered.out) o[0] += zeros0, o[1] += zeros1, o[2] += zeros0, o[3] += zeros1;
    }

private:
    // A lane's words, loaded in vectors.
    template <int WORDS>
    __device__ static __forceinline__ void words(const uint8_t *at, uint32_t (&word)[WORDS]) {
        constexpr int VECTOR = Tile::template vector<WORDS>;
#pragma unroll
        for (int w = 0; w < WORDS; w += VECTOR) {
            const uint8_t *from = at + Tile::template word_at<WORDS>(w, threadIdx.x % WARP);
            kv_tiles::load_words<VECTOR>(word + w, from);
        }
    }

    // Scores of head g with a lane's tokens.
    __device__ __forceinline__ void score(const QueryFragments<D> &query, float (&probability)[HALVES][4]) const {
        constexpr int BITS = Tile::key_bits, KEY_WORDS = kv_tiles::KEY_WORDS<BITS>, PIECES = PART<D> / 32;
        const int lane = threadIdx.x % WARP, part = part_of_warp<D>();
        alignas(16) uint32_t codes[HALVES][Tile::key_words];
#pragma unroll
        for (int h = 0; h < HALVES; h++) words(keys + h * Tile::key_bytes, codes[h]);
        float score[HALVES][2][4] = {};
#pragma unroll
        for (int c = 0; c < PIECES; c++) {
            const int fragment = part * (PART<D> / 16) + 2 * c;
            const uint4 a = query.lanes[fragment][lane], b = query.lanes[fragment + 1][lane];
            const auto *groups = reinterpret_cast<const uint4 *>(key_groups + (4 * c + lane % 4) * 32);
            const uint4 scale = groups[0], zero = groups[1];
#pragma unroll
            for (int h = 0; h < HALVES; h++) {
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    uint32_t word[KEY_WORDS];
#pragma unroll
                    for (int w = 0; w < KEY_WORDS; w++) word[w] = codes[h][(j * PIECES + c) * KEY_WORDS + w];
                    const auto key = [&](int pair, uint32_t scale, uint32_t zero) {
                        return bits(__hfma2(kv_tiles::key_pair<BITS>(word, pair), as_half2(scale), as_half2(zero)));
                    };
                    mma(score[h][j], {a.x, a.y, a.z, a.w}, key(0, scale.x, zero.x), key(1, scale.y, zero.y));
                    mma(score[h][j], {b.x, b.y, b.z, b.w}, key(2, scale.z, zero.z), key(3, scale.w, zero.w));
                }
            }
        }
#pragma unroll
        for (int h = 0; h < HALVES; h++) {
#pragma unroll
            for (int i = 0; i < 4; i++) probability[h][i] = score[h][i / 2][i % 2] + score[h][i / 2][2 + i % 2];
        }
    }

    // Turns scores into exponentials relative to the greatest so far, to which all that was gathered follows.
    __device__ static __forceinline__ void exponentiate(Gathered<D> &gathered, float &zeros,
                                                        float (&probability)[HALVES][4]) {
        const int t = threadIdx.x % 4;
        float top = gathered.largest;
#pragma unroll
        for (auto &half : probability) top = fmaxf(top, fmaxf(fmaxf(half[0], half[1]), fmaxf(half[2], half[3])));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
        if (__any_sync(~0u, top > gathered.largest)) {
            const float shrink = power_of_two(gathered.largest - top);
            gathered.largest = top;
            gathered.exponentials *= shrink, zeros *= shrink;
            const float shrink0 = __shfl_sync(~0u, shrink, t * 8), shrink1 = __shfl_sync(~0u, shrink, t * 8 + 4);
#pragma unroll
            for (auto &o : gathered.out) o[0] *= shrink0, o[1] *= shrink1, o[2] *= shrink0, o[3] *= shrink1;
        }
#pragma unroll
        for (auto &half : probability) {
#pragma unroll
            for (float &x : half) {
                x = power_of_two(x - top);
                gathered.exponentials += x;
            }
        }
    }

    // Adds values' codes, times what of heads is in `scaled`.
    __device__ __forceinline__ void add_values(Gathered<D> &gathered, const uint32_t (&scaled)[HALVES][2]) const {
        constexpr int BITS = Tile::value_bits, VALUE_WORDS = kv_tiles::VALUE_WORDS<BITS>;
#pragma unroll
        for (int h = 0; h < HALVES; h++) {
            alignas(16) uint32_t codes[Tile::value_words];
            words(values + h * Tile::value_bytes, codes);
#pragma unroll
            for (int c = 0; c < PART<D> / 64; c++) {
                const auto pair = [&](int later, int j) {
                    return bits(
                        kv_tiles::value_pair<BITS>([&](int w) { return codes[c * VALUE_WORDS + w]; }, later, j));
                };
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    mma(gathered.out[4 * c + j],
                        {pair(0, 2 * j), pair(0, 2 * j + 1), pair(1, 2 * j), pair(1, 2 * j + 1)}, scaled[h][0],
                        scaled[h][1]);
                }
            }
        }
    }
};

}  // namespace decode_attention
