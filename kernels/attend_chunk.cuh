// Attention of a chunk's tokens: the kernel of flash_attention.cu and flash_attention_tiles.cu.
#pragma once

#include "copy.cuh"
#include "expand_tiles.cuh"
#include "kv_cache.cuh"
#include "mma.cuh"
#include "softcap.cuh"
#include "token_tiles.cuh"

#include <type_traits>

namespace {

constexpr int CONSUMERS = 2 * WARPGROUP;
constexpr int SLOTS = 4;  // of keys and values in turn
constexpr int MIN_CHUNK = 256;
constexpr int RING_MULTIPLE = 128;  // of slots in a cache that is a ring
constexpr float NO_SCORE = -1e30f;
// A block's threads have 168 to begin with.
template <bool HAS_TILES>
constexpr int PRODUCER_REGISTERS = HAS_TILES ? 56 : 40;
template <bool HAS_TILES>
constexpr int CONSUMER_REGISTERS = HAS_TILES ? 224 : 232;

template <int D>
struct Config {
    static constexpr bool warpgroup = WARPGROUP_MMA && D <= 128;
    static constexpr int keys = warpgroup ? 128 : D <= 128 ? 64 : D <= 256 ? 32 : 16;  // of a slot
    static constexpr int slot_bytes = keys * D * 2;
    static_assert(RING_MULTIPLE % keys == 0, "the keys of a slot lie together");
    // Warps that share 16 rows, each with a part of a head's values: one has no registers for rows of 512.
    static constexpr int parts = D > 256 ? 4 : 1;
    static constexpr int part = D / parts;
    static constexpr int rows = CONSUMERS / WARP / parts * 16;
    // Where fragments of queries are: in registers, or, where these are too few, in device memory, or, for warpgroups,
    // in shared memory.
    static constexpr bool queries_in_registers = !warpgroup && D != 256;
};

__device__ __forceinline__ void consumers_sync() { asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory"); }

// score = Q K: 16 rows of the warp times a slot's keys, by its part of the values. `q` or `q_row` or `q_shared` as
// Config says.
template <int D, int KEYS>
__device__ __forceinline__ void start_scores(float (&score)[KEYS / 8][4], uint32_t q_shared,
                                             const uint32_t (&q)[Config<D>::part / 16][4],
                                             const uint32_t *const (&q_row)[2], uint32_t keys) {
#if WARPGROUP_MMA
    if constexpr (Config<D>::warpgroup) {
        warpgroup_arrive();
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
            warpgroup_mma(score, matrix_descriptor(q_shared + k / 4 * (Config<D>::rows * 128)) + k % 4 * 2,
                          matrix_descriptor(keys + k / 4 * (KEYS * 128)) + k % 4 * 2, k > 0);
        }
        warpgroup_commit();
        return;
    }
#endif
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int j = 0; j < KEYS / 8; j++) score[j][0] = score[j][1] = score[j][2] = score[j][3] = 0.f;
#pragma unroll
    for (int k = 0; k < Config<D>::part / 16; k++) {
        uint32_t a[4];
#pragma unroll
        for (int i = 0; i < 4; i++) a[i] = Config<D>::queries_in_registers ? q[k][i] : q_row[i % 2][k * 8 + i / 2 * 4];
#pragma unroll
        for (int j = 0; j < KEYS / 16; j++) {
            const int row = j * 16 + lane / 16 * 8 + lane % 8, piece = k % 4 * 2 + lane / 8 % 2;
            uint32_t b[4];
            load_matrices(b, keys + k / 4 * (KEYS * 128) + row * 128 + (piece ^ row % 8) * 16);
            mma(score[2 * j], a, b[0], b[1]);
            mma(score[2 * j + 1], a, b[2], b[3]);
        }
    }
}

// out += P V, of the warp's part of the values.
template <int D, int KEYS>
__device__ __forceinline__ void start_values(float (&out)[Config<D>::part / 8][4], const uint32_t (&p)[KEYS / 16][4],
                                             uint32_t values) {
#if WARPGROUP_MMA
    if constexpr (Config<D>::warpgroup) {
        warpgroup_arrive();
#pragma unroll
        for (int k = 0; k < KEYS / 16; k++)
            warpgroup_mma<1>(out, p[k], matrix_descriptor(values, KEYS * 128) + k * 128);
        warpgroup_commit();
        return;
    }
#endif
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int k = 0; k < KEYS / 16; k++) {
#pragma unroll
        for (int j = 0; j < Config<D>::part / 16; j++) {
            const int row = k * 16 + lane % 16, piece = j % 4 * 2 + lane / 16;
            uint32_t b[4];
            load_matrices_transposed(b, values + j / 4 * (KEYS * 128) + row * 128 + (piece ^ row % 8) * 16);
            mma(out[2 * j], p[k], b[0], b[1]);
            mma(out[2 * j + 1], p[k], b[2], b[3]);
        }
    }
}

// Waits for all but the last PENDING products started.
template <int D, int PENDING>
__device__ __forceinline__ void wait_products() {
#if WARPGROUP_MMA
    if constexpr (Config<D>::warpgroup) warpgroup_wait<PENDING>();
#endif
}

// Rotates a row of a head (kv_tiles.cuh), of which this lane has values 8 j + 2 t + i, at [j][i]. By all consumers.
template <int D>
__device__ __forceinline__ void rotate_row(float (&value)[Config<D>::part / 8][2], float2 *shared) {
    constexpr int COUNT = Config<D>::part / 8, PARTS = Config<D>::parts;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
#pragma unroll
    for (auto &pair : value) {
        const float a = pair[0], b = pair[1];
        pair[0] = a + b, pair[1] = a - b;
    }
#pragma unroll
    for (int distance = 1; distance < 4; distance *= 2) {
#pragma unroll
        for (auto &pair : value) {
#pragma unroll
            for (float &x : pair) {
                const float other = __shfl_xor_sync(~0u, x, distance);
                x = lane & distance ? other - x : x + other;
            }
        }
    }
#pragma unroll
    for (int distance = 1; distance < COUNT; distance *= 2) {
#pragma unroll
        for (int j = 0; j < COUNT; j++) {
            if (j & distance) continue;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float a = value[j][i], b = value[j | distance][i];
                value[j][i] = a + b, value[j | distance][i] = a - b;
            }
        }
    }
    if constexpr (PARTS > 1) {
        consumers_sync();
#pragma unroll
        for (int j = 0; j < COUNT; j++) shared[(warp * COUNT + j) * WARP + lane] = {value[j][0], value[j][1]};
        consumers_sync();
        const int part = warp % PARTS;
#pragma unroll
        for (int j = 0; j < COUNT; j++) {
            float2 sum = {};
#pragma unroll
            for (int other = 0; other < PARTS; other++) {
                const float2 x = shared[((warp - part + other) * COUNT + j) * WARP + lane];
                const float sign = __popc(part & other) % 2 ? -1.f : 1.f;
                sum = {sum.x + sign * x.x, sum.y + sign * x.y};
            }
            value[j][0] = sum.x, value[j][1] = sum.y;
        }
    }
}

// Tile: of the tokens that lie far behind (kv_tiles.cuh); void where all are kept as they were stored.
template <int D, typename Tile = void>
__device__ __forceinline__ void attend(const FlashAttentionParams &p) {
    constexpr bool HAS_TILES = !std::is_void_v<Tile>;
    constexpr int KEYS = Config<D>::keys, SLOT = Config<D>::slot_bytes, ROWS = Config<D>::rows;
    constexpr int PARTS = Config<D>::parts, PART = Config<D>::part;
    extern __shared__ __align__(1024) uint8_t shared[];
    __shared__ uint64_t barriers[2][SLOTS];
    __shared__ bool last;
    [[maybe_unused]] __shared__ int bounds[CONSUMERS / WARP][2];  // of each warp: tiled, twice

    launch_dependents();
    const int warp = warp_uniform(threadIdx.x / WARP), lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const uint32_t first_barrier = warp_uniform(shared_address(barriers)), slots = warp_uniform(shared_address(shared));
    const auto full = [&](int slot) { return Barrier{first_barrier + slot * 8}; };
    const auto empty = [&](int slot) { return Barrier{first_barrier + (SLOTS + slot) * 8}; };
    if (threadIdx.x == 0) {
        for (int i = 0; i < SLOTS; i++) {
            full(i).init(WARPGROUP);
            empty(i).init(CONSUMERS / WARP);
        }
        Barrier::publish();
    }
    __syncthreads();
    wait_for_predecessor();

    const int tile = gridDim.x - 1 - blockIdx.x;  // those with most to do first
    const int head_kv = blockIdx.y, split = blockIdx.z;
    const int tile_tokens = ROWS / p.group, first = tile * tile_tokens;
    const int place = *p.place;
    // The tile's tokens see keys from `seen` to `visible`. Steps begin at multiples of KEYS, so that the keys of each
    // lie together in a ring, too.
    //
    // With tiles these come first: up to `tiled`, those of the tile that only some of the tokens see so included. Those
    // who do not see that one so have it among the others, which are counted on from there: `twice` is its length.
    int tiled = 0, twice = 0;
    if constexpr (HAS_TILES) {
        using namespace kv_tiles;
        tiled = tiles_seen(place + min(first + tile_tokens, p.tokens) - 1) * TILE;
        twice = tiled - tiles_seen(place + first) * TILE;
    }
    const int visible = place + min(first + tile_tokens, p.tokens) + twice;
    const int seen = p.window ? max(place + first + 1 - p.window, 0) : 0, start = seen / KEYS * KEYS;
    const int share = (visible - start + int(gridDim.z) - 1) / int(gridDim.z);
    const int chunk = gridDim.z == 1 ? visible - start : max(round_up(share, KEYS), MIN_CHUNK);
    const int chunks = (visible - start + chunk - 1) / chunk;
    const int begin = start + split * chunk, end = min(begin + chunk, visible);
    if (begin >= end) return;
    const int steps = (end - begin + KEYS - 1) / KEYS;

    if (warp >= CONSUMERS / WARP) {
        give_registers<PRODUCER_REGISTERS<HAS_TILES>>();
        constexpr int PIECES = D / 8,
                      PASS = WARPGROUP / PIECES;  // of 16 bytes a key; keys that the threads copy at once
        const int thread = threadIdx.x - CONSUMERS, key = thread / PIECES, piece = thread % PIECES;
        int cache_slot = KvCache<D>::slot_of(max(begin, tiled) - twice, p.context);
        const auto wait_until_empty = [&](int i) {
            if (i >= SLOTS) empty(i % SLOTS).wait((i / SLOTS - 1) & 1);
        };
        int fetched = 0;  // slots
        if constexpr (HAS_TILES) {
            using Expander = TileExpander<D, KEYS, Tile>;
            __shared__ CopyBarrier staged[MAX_STAGES];
            const Expander expander(p.tiles, head_kv, thread);
            const int tiled_slots = 2 * min(max(tiled - begin + KEYS - 1, 0) / KEYS, steps);
            const auto stage = [&](int i) { return shared + p.tile_ring + i % p.tile_depth * Expander::STAGE; };
            const auto load = [&](int i) {
                const int key0 = begin + i / 2 * KEYS;
                if (i % 2) {
                    expander.stage_values(staged[i % p.tile_depth], stage(i), key0);
                } else {
                    expander.stage_keys(staged[i % p.tile_depth], stage(i), key0);
                }
            };
            const auto producers_sync = [] { asm volatile("bar.sync 15, %0;" ::"n"(WARPGROUP) : "memory"); };
            const bool loads = warp == CONSUMERS / WARP;
            if (loads) {
                if (elect()) {
                    for (int i = 0; i < MAX_STAGES; i++) staged[i].init();
                    Barrier::publish();
                }
                __syncwarp();
                for (int i = 0; i < min(p.tile_depth, tiled_slots); i++) load(i);
            }
            producers_sync();
#pragma unroll 1
            for (; fetched < tiled_slots; fetched++) {
                const int key0 = begin + fetched / 2 * KEYS;
                uint8_t *slot = shared + fetched % SLOTS * SLOT;
                staged[fetched % p.tile_depth].wait(fetched / p.tile_depth & 1);
                wait_until_empty(fetched);
                if (fetched % 2) {
                    expander.expand_values(stage(fetched), key0, slot);
                } else {
                    expander.expand_keys(stage(fetched), key0, slot);
                }
                publish_shared();
                full(fetched % SLOTS).arrive();
                producers_sync();
                if (loads && fetched + p.tile_depth < tiled_slots) load(fetched + p.tile_depth);
            }
        }
        for (int i = fetched; i < 2 * steps; i++) {
            wait_until_empty(i);
            const half *from = (i % 2 ? p.v_cache : p.k_cache) +
                               (KvCache<D>::row(head_kv, cache_slot, p.context) + key) * D + piece * 8;
            const uint32_t to = slots + i % SLOTS * SLOT + piece / 8 * (KEYS * 128) + key * 128;
            const int key0 = begin + i / 2 * KEYS + key, before = seen - key0, left = end - key0;
#pragma unroll
            for (int j = 0; j < KEYS; j += PASS) {
                // Zeros for what nobody sees: anything may lie there, and a factor of 0 does not remove NaN.
                copy_or_zero<16>(to + j * 128 + (piece % 8 ^ (key + j) % 8) * 16, from + j * D,
                                 j >= before && j < left);
            }
            full(i % SLOTS).arrive_after_copies();
            if (i % 2) {
                cache_slot += KEYS;
                if (cache_slot >= p.context) cache_slot -= p.context;
            }
        }
        return;
    }
    take_registers<CONSUMER_REGISTERS<HAS_TILES>>();
    // A row's last key is `counted` + its token. The rest is kept out of registers, of which there are none to spare.
    const int counted = place + twice;
    if constexpr (HAS_TILES) {
        if (lane == 0) bounds[warp][0] = tiled, bounds[warp][1] = twice;
        __syncwarp();
    }

    const int part = warp % PARTS;  // of the values, that is the warp's
    // This lane's rows g and g + 8 of the warp's 16. Rows past the end repeat the last token and are not stored.
    int query[2], head[2];
    bool stored[2];
    const uint32_t *q_row[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int row = warp / PARTS * 16 + h * 8 + g;
        query[h] = first + row / p.group;
        head[h] = head_kv * p.group + row % p.group;
        stored[h] = row < tile_tokens * p.group && query[h] < p.tokens;
        query[h] = min(query[h], p.tokens - 1);
        const half *from = p.q + (size_t(query[h]) * p.group * gridDim.y + head[h]) * D + part * PART;
        q_row[h] = reinterpret_cast<const uint32_t *>(from) + t;
    }
    uint32_t q[PART / 16][4];
    const uint32_t q_shared = slots + SLOTS * SLOT;
    if constexpr (Config<D>::warpgroup) {
        for (int i = threadIdx.x; i < ROWS * D / 8; i += CONSUMERS) {
            const int row = i / (D / 8), piece = i % (D / 8);
            const int token = min(first + row / p.group, p.tokens - 1);
            copy_or_zero<16>(q_shared + piece / 8 * (ROWS * 128) + row * 128 + (piece % 8 ^ row % 8) * 16,
                             p.q + ((size_t(token) * gridDim.y + head_kv) * p.group + row % p.group) * D + piece * 8,
                             true);
        }
        commit_copies();
        wait_for_copies<0>();
        publish_shared();
        consumers_sync();
    } else if constexpr (Config<D>::queries_in_registers) {
#pragma unroll
        for (int k = 0; k < PART / 16; k++) {
            q[k][0] = q_row[0][k * 8], q[k][1] = q_row[1][k * 8];
            q[k][2] = q_row[0][k * 8 + 4], q[k][3] = q_row[1][k * 8 + 4];
        }
    }

    const uint32_t q_address = q_shared + warp / 4 * (64 * 128);
    float out[PART / 8][4], score[KEYS / 8][4];
    uint32_t even[KEYS / 16][4],
        odd[KEYS / 16][4];  // exponentials of steps in turn: products read one while the other is written
    float largest[2] = {NO_SCORE, NO_SCORE}, exponentials[2] = {}, shrink[2];
#pragma unroll
    for (int j = 0; j < PART / 8; j++) out[j][0] = out[j][1] = out[j][2] = out[j][3] = 0.f;
    const auto release = [&](int slot) {
        // Reads may wait in line for long: here nothing says that they have ended, as waiting for warpgroups' products
        // does.
        if (!Config<D>::warpgroup) __threadfence_block();
        __syncwarp();
        if (lane == 0) empty(slot).arrive();
    };
    const auto wait_for_slot = [&](int i) {
        full(i % SLOTS).wait(i / SLOTS & 1);
        publish_shared();
    };
    // Where warps that share rows leave their parts of a step's scores: (lanes, KEYS / 8, parts), in two places in
    // turn, so that one barrier a step is enough.
    const auto shared_scores = [&](int step) {
        return reinterpret_cast<float4 *>(shared + SLOTS * SLOT) +
               (step % 2 * (CONSUMERS / WARP) + warp / PARTS * PARTS) * (KEYS / 8 * WARP) + lane;
    };
    const auto start_step = [&](int step) {
        wait_for_slot(2 * step);
        start_scores<D, KEYS>(score, q_address, q, q_row,
                              slots + 2 * step % SLOTS * SLOT + part * (PART / 64) * (KEYS * 128));
        if constexpr (PARTS > 1) {
#pragma unroll
            for (int j = 0; j < KEYS / 8; j++) {
                shared_scores(step)[(part * (KEYS / 8) + j) * WARP] = {score[j][0], score[j][1], score[j][2],
                                                                       score[j][3]};
            }
        }
    };
    // Turns a step's scores into exponentials, rounded to f16 in `to`.
    const auto exponentiate = [&](int step, uint32_t (&to)[KEYS / 16][4]) {
        if constexpr (PARTS > 1) {
            asm volatile("bar.sync %0, %1;" ::"r"(2 + warp / PARTS), "n"(PARTS * WARP) : "memory");
#pragma unroll
            for (int j = 0; j < KEYS / 8; j++) {
                float4 sum = {};
#pragma unroll
                for (int i = 0; i < PARTS; i++) {  // in the same order by all warps
                    const float4 add = shared_scores(step)[(i * (KEYS / 8) + j) * WARP];
                    sum = {sum.x + add.x, sum.y + add.y, sum.z + add.z, sum.w + add.w};
                }
                score[j][0] = sum.x, score[j][1] = sum.y, score[j][2] = sum.z, score[j][3] = sum.w;
            }
        }
        if (p.softcap != 0.f) {
#pragma unroll
            for (int j = 0; j < KEYS / 8; j++) cap_scores(score[j], p.softcap);
        }
        const int key0 = begin + step * KEYS;
        if constexpr (HAS_TILES) {
            const volatile int *const rarely_used = bounds[warp];
            const int tiled = rarely_used[0], twice = rarely_used[1];
            // The tile that some of the tokens see as one, and the others as it was stored.
            if (key0 >= tiled - twice && key0 < tiled + twice) {
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const bool sees_tile = kv_tiles::tiles_seen(counted + query[h] - twice) * kv_tiles::TILE == tiled;
                    if (sees_tile == key0 < tiled) continue;
#pragma unroll
                    for (int j = 0; j < KEYS / 8; j++) score[j][2 * h] = score[j][2 * h + 1] = NO_SCORE;
                }
            }
        }
        if (key0 + KEYS > counted + first + 1) {  // keys that the tile's first token does not see yet
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int left = min(counted + query[h] + 1, end) - key0 - 2 * t;
#pragma unroll
                for (int j = 0; j < KEYS / 8; j++) {
                    if (j * 8 >= left) score[j][2 * h] = NO_SCORE;
                    if (j * 8 + 1 >= left) score[j][2 * h + 1] = NO_SCORE;
                }
            }
        }
        // Layers with tiles have no window.
        if (!HAS_TILES && p.window != 0 &&
            key0 < visible - p.window) {  // keys that the tile's last token does not see any more
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int unseen = place + query[h] - p.window - key0 - 2 * t;
#pragma unroll
                for (int j = 0; j < KEYS / 8; j++) {
                    if (j * 8 <= unseen) score[j][2 * h] = NO_SCORE;
                    if (j * 8 + 1 <= unseen) score[j][2 * h + 1] = NO_SCORE;
                }
            }
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float top = largest[h];
#pragma unroll
            for (int j = 0; j < KEYS / 8; j++) top = fmaxf(top, fmaxf(score[j][2 * h], score[j][2 * h + 1]));
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
            shrink[h] = power_of_two(largest[h] - top);
            largest[h] = top;
            float sum = 0.f;
#pragma unroll
            for (int j = 0; j < KEYS / 8; j++) {
                const float a = power_of_two(score[j][2 * h] - top), b = power_of_two(score[j][2 * h + 1] - top);
                sum += a + b;
                to[j / 2][j % 2 * 2 + h] = bits(__floats2half2_rn(a, b));
                pin_operand(to[j / 2][j % 2 * 2 + h]);
            }
            exponentials[h] = exponentials[h] * shrink[h] + sum;
        }
    };

    // out = out at the latest scale + a step's exponentials times its values.
    const auto start_sums = [&](int step, const uint32_t (&probability)[KEYS / 16][4]) {
        const int i = 2 * step + 1;
        wait_for_slot(i);
        start_values<D, KEYS>(out, probability, slots + i % SLOTS * SLOT + part * (PART / 64) * (KEYS * 128));
    };
    const auto rescale = [&] {
#pragma unroll
        for (int j = 0; j < PART / 8; j++) {
            out[j][0] *= shrink[0], out[j][1] *= shrink[0];
            out[j][2] *= shrink[1], out[j][3] *= shrink[1];
        }
    };
    // A step's sums beside the next one's exponentials.
    // The warpgroups take turns: one starts products while the other works on exponentials.
    const int group_of_warps = warp / 4;
    const auto take_turn = [&] {
        if constexpr (Config<D>::warpgroup)
            asm volatile("bar.sync %0, %1;" ::"r"(2 + group_of_warps), "n"(CONSUMERS) : "memory");
    };
    const auto give_turn = [&] {
        if constexpr (Config<D>::warpgroup)
            asm volatile("bar.arrive %0, %1;" ::"r"(3 - group_of_warps), "n"(CONSUMERS) : "memory");
    };
    const auto advance = [&](int step, const uint32_t (&from)[KEYS / 16][4], uint32_t (&to)[KEYS / 16][4]) {
        rescale();
        take_turn();
        start_step(step + 1);
        start_sums(step, from);
        if (group_of_warps == 0 || step + 2 < steps) give_turn();
        wait_products<D, 1>();
        release((2 * step + 2) % SLOTS);
        exponentiate(step + 1, to);
        wait_products<D, 0>();
        release((2 * step + 1) % SLOTS);
    };

    start_step(0);
    wait_products<D, 0>();
    release(0);
    exponentiate(0, even);
    if (group_of_warps == 1 && steps > 1) give_turn();
    for (int step = 0; step < steps - 1; step += 2) {
        advance(step, even, odd);
        if (step + 2 < steps) advance(step + 1, odd, even);
    }
    if (steps % 2 == 0) {
#pragma unroll
        for (int k = 0; k < KEYS / 16; k++) {
#pragma unroll
            for (int i = 0; i < 4; i++) even[k][i] = odd[k][i];
        }
    }
    rescale();
    start_sums(steps - 1, even);
    wait_products<D, 0>();
#pragma unroll
    for (int h = 0; h < 2; h++) {
        exponentials[h] += __shfl_xor_sync(~0u, exponentials[h], 1);
        exponentials[h] += __shfl_xor_sync(~0u, exponentials[h], 2);
    }

    const TokenTiles tiles{p.out, p.padded_tokens};
    const int width = p.group * gridDim.y * D;
    if (head_kv == int(gridDim.y) - 1) {  // zeros up to whole steps
        for (int i = threadIdx.x; i < tile_tokens * (round_up(width, STEP_VALUES) - width) / 4; i += CONSUMERS) {
            const int token = first + i % tile_tokens, column = width + i / tile_tokens * 4;
            if (token < p.tokens) tiles.store(token, column, float4{});
        }
    }
    if (chunks == 1) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const float scale = __fdividef(HAS_TILES ? 1.f / sqrtf(float(D)) : 1.f, exponentials[h]);
            float value[PART / 8][2];
#pragma unroll
            for (int j = 0; j < PART / 8; j++) {
                value[j][0] = out[j][2 * h] * scale, value[j][1] = out[j][2 * h + 1] * scale;
            }
            // Values are kept rotated.
            if constexpr (HAS_TILES) rotate_row<D>(value, reinterpret_cast<float2 *>(shared));
            half2 pair[PART / 8];
#pragma unroll
            for (int j = 0; j < PART / 8; j++) {
                const float a = value[j][0], b = value[j][1];
                // Values 2 apart stand side by side: neighbours exchange one.
                const float other = __shfl_xor_sync(~0u, t % 2 ? a : b, 1);
                pair[j] = t % 2 ? __floats2half2_rn(other, b) : __floats2half2_rn(a, other);
            }
            if (!stored[h]) continue;
#pragma unroll
            for (int j = 0; j < PART / 8; j++)
                *tiles.pair(query[h], head[h] * D + part * PART + j * 8 + t / 2 * 4, t % 2) = pair[j];
        }
        return;
    }

    const int index = tile * gridDim.y + head_kv;
    float *partial = p.partial + size_t(index) * gridDim.z * ROWS * (D + 2);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float *to = partial + (size_t(split) * ROWS + warp / PARTS * 16 + h * 8 + g) * (D + 2);
        if (!stored[h]) continue;
#pragma unroll
        for (int j = 0; j < PART / 8; j++) {
            __stcg(reinterpret_cast<float2 *>(to + part * PART + j * 8 + 2 * t),
                   make_float2(out[j][2 * h], out[j][2 * h + 1]));
        }
        if (t == 0 && part == 0) __stcg(reinterpret_cast<float2 *>(to + D), make_float2(largest[h], exponentials[h]));
    }
    consumers_sync();
    if (threadIdx.x == 0) {  // its fences speak for all threads that the barrier joined
        __threadfence();
        last = atomicAdd(p.finished + index, 1u) == unsigned(chunks - 1);
        if (last) p.finished[index] = 0;
        __threadfence();
    }
    consumers_sync();
    if (!last) return;
    // Values d .. d + 3 of a row.
    const auto joined = [&](int row, int d) {
        const auto at = [&](int s) { return partial + (size_t(s) * ROWS + row) * (D + 2); };
        float top = NO_SCORE, all = 0.f;
#pragma unroll 8
        for (int s = 0; s < chunks; s++) top = fmaxf(top, __ldcg(at(s) + D));
        float4 v = {};
#pragma unroll 8
        for (int s = 0; s < chunks; s++) {
            const float2 scale_and_sum = __ldcg(reinterpret_cast<const float2 *>(at(s) + D));
            const float weight = power_of_two(scale_and_sum.x - top);
            const float2 a = __ldcg(reinterpret_cast<const float2 *>(at(s) + d)),
                         b = __ldcg(reinterpret_cast<const float2 *>(at(s) + d + 2));
            all += weight * scale_and_sum.y;
            v = {v.x + weight * a.x, v.y + weight * a.y, v.z + weight * b.x, v.w + weight * b.y};
        }
        const float scale = 1.f / all;
        return float4{v.x * scale, v.y * scale, v.z * scale, v.w * scale};
    };
    const auto store = [&](int row, int d, const float4 &four) {
        tiles.store(first + row / p.group, (head_kv * p.group + row % p.group) * D + d, four);
    };
    const int rows = min(tile_tokens, p.tokens - first) * p.group;
    if constexpr (HAS_TILES) {
        // A warp a row, which is turned in its own part of memory.
        float *turned = reinterpret_cast<float *>(shared) + warp * D;
        const auto fours = reinterpret_cast<float4 *>(turned);
        for (int row = warp; row < rows; row += CONSUMERS / WARP) {
            for (int i = lane; i < D / 4; i += WARP) fours[i] = joined(row, i * 4);
            __syncwarp();
            float value[D / WARP];
#pragma unroll
            for (int i = 0; i < D / WARP; i++) value[i] = turned[i * WARP + lane];
            kv_tiles::rotate<D>(value);
#pragma unroll
            for (int i = 0; i < D / WARP; i++) turned[i * WARP + lane] = value[i];
            __syncwarp();
            for (int i = lane; i < D / 4; i += WARP) store(row, i * 4, fours[i]);
            __syncwarp();
        }
    } else {
        for (int i = threadIdx.x; i < rows * (D / 4); i += CONSUMERS) {
            store(i / (D / 4), i % (D / 4) * 4, joined(i / (D / 4), i % (D / 4) * 4));
        }
    }
}

}  // namespace
