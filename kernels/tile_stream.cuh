// A team's share of the tokens that are kept in tiles (kv_tiles.cuh): their codes pass through a ring in shared memory
// that is private to the warp, filled by bulk copies that start before the kernel waits for its predecessor.
//
// Of keys a lane makes f16 again; of values it multiplies codes: a token's scale goes to its probability, and its zero,
// which is the same for all values, is added up apart.
#pragma once

#include "copy.cuh"
#include "decode_attention.cuh"
#include "kv_tiles.cuh"

namespace decode_attention {

constexpr int TILE_TOKENS = 32;    // that a team handles at a time
constexpr int MAX_TILE_DEPTH = 8;  // places in a warp's ring

template <int D, typename Tile>
struct TileStream {
    static constexpr int HALVES = TILE_TOKENS / STEP;
    // Bytes of a place: keys' codes, values', and what both are scaled by.
    static constexpr int KEYS = HALVES * Tile::key_bytes, CODES = KEYS + HALVES * Tile::value_bytes;
    static constexpr int KEY_GROUPS = Tile::part * 4, VALUE_GROUPS = TILE_TOKENS * 4;
    static constexpr int PLACE = CODES + KEY_GROUPS + VALUE_GROUPS;
    static_assert(Tile::parts == PARTS<D> && kv_tiles::STEP == STEP);

    CopyBarrier *arrived;
    uint8_t *ring;
    const uint8_t *records;
    uint64_t policy;
    int first, count, depth;  // the first of its pieces of TILE_TOKENS in the text, how many, and places of the ring

    // Of key/value head `head`, tokens begin .. end: multiples of TILE_TOKENS. `ring` has room for p.tile_depth places
    // of each warp.
    __device__ __forceinline__ TileStream(const DecodeAttentionParams &p, uint8_t *ring, int head, int begin, int end)
        : ring(ring + threadIdx.x / WARP * p.tile_depth * PLACE),
          records(p.tiles.records + head * p.tiles.head_bytes),
          policy(read_once()),
          first(begin / TILE_TOKENS + team()),
          count(max((end - begin) / TILE_TOKENS - team() + TEAMS<D> - 1, 0) / TEAMS<D>),
          depth(p.tile_depth) {
        __shared__ CopyBarrier barriers[WARPS][MAX_TILE_DEPTH];
        arrived = barriers[threadIdx.x / WARP];
        if (elect()) {
#pragma unroll
            for (int place = 0; place < MAX_TILE_DEPTH; place++) arrived[place].init();
            Barrier::publish();
        }
        __syncwarp();
#pragma unroll 1
        for (int i = 0; i < min(depth, count); i++) load(i, i);
    }

    __device__ static __forceinline__ int team() { return threadIdx.x / WARP / PARTS<D>; }

    // Starts copying this team's `i`th piece to `place`.
    __device__ __forceinline__ void load(int place, int i) const {
        constexpr int IN_TILE = kv_tiles::TILE / TILE_TOKENS;
        const int number = first + i * TEAMS<D>, piece = number % IN_TILE, part = part_of_warp<D>();
        const uint8_t *record = records + size_t(number / IN_TILE) * Tile::bytes;
        arrived[place].template copy_parts<KEYS, CODES - KEYS, KEY_GROUPS, VALUE_GROUPS>(
            ring + place * PLACE,
            {record + Tile::keys_at(part, piece * HALVES), record + Tile::values_at(part, piece * HALVES),
             record + Tile::key_groups_at(piece * HALVES, part * (Tile::part / 8)),
             record + Tile::value_groups + piece * VALUE_GROUPS},
            policy);
    }

    // Adds all of them. `finish` is Gathered's.
    template <typename Finish>
    __device__ __forceinline__ void add_to(Gathered<D> &gathered, const QueryFragments<D> &query, Finish finish) const {
        const int lane = threadIdx.x % WARP, t = lane % 4;
        int place = 0, parity = 0;
        float zeros = 0.f;  // of head g, as exponentials are
#pragma unroll 1
        for (int i = 0; i < count; i++) {
            arrived[place].wait(parity);
            const uint8_t *at = ring + place * PLACE;
            float probability[HALVES][4];
            score(query, at, probability);
#pragma unroll
            for (int h = 0; h < HALVES; h++) finish(probability[h]);
            // The sinks are read as they were stored.
            if (first + i * TEAMS<D> == 0 && 2 * t < kv_tiles::SINKS) probability[0][0] = probability[0][1] = NO_SCORE;
            exponentiate(gathered, zeros, probability);

            uint32_t scaled[HALVES][2];
            const auto *groups = reinterpret_cast<const half2 *>(at + CODES + KEY_GROUPS);
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
            add_values(gathered, at, scaled);
            __syncwarp();
            if (i + depth < count) load(place, i + depth);
            if (++place == depth) place = 0, parity ^= 1;
        }
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
    __device__ static __forceinline__ void score(const QueryFragments<D> &query, const uint8_t *at,
                                                 float (&probability)[HALVES][4]) {
        constexpr int BITS = Tile::key_bits, KEY_WORDS = kv_tiles::KEY_WORDS<BITS>, PIECES = PART<D> / 32;
        const int lane = threadIdx.x % WARP, part = part_of_warp<D>();
        alignas(16) uint32_t codes[HALVES][Tile::key_words];
#pragma unroll
        for (int h = 0; h < HALVES; h++) words(at + h * Tile::key_bytes, codes[h]);
        float score[HALVES][2][4] = {};
#pragma unroll
        for (int c = 0; c < PIECES; c++) {
            const int fragment = part * (PART<D> / 16) + 2 * c;
            const uint4 a = query.lanes[fragment][lane], b = query.lanes[fragment + 1][lane];
            const auto *groups = reinterpret_cast<const uint4 *>(at + CODES + (4 * c + lane % 4) * 32);
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
    __device__ static __forceinline__ void add_values(Gathered<D> &gathered, const uint8_t *at,
                                                      const uint32_t (&scaled)[HALVES][2]) {
        constexpr int BITS = Tile::value_bits, VALUE_WORDS = kv_tiles::VALUE_WORDS<BITS>;
#pragma unroll
        for (int h = 0; h < HALVES; h++) {
            alignas(16) uint32_t codes[Tile::value_words];
            words(at + KEYS + h * Tile::value_bytes, codes);
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
