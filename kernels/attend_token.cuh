// Attention of one new token: the kernel of decode_attention.cu and decode_attention_tiles.cu.
#pragma once

#include "decode_attention.cuh"
#include "kv_tiles.cuh"
#include "softcap.cuh"
#include "tile_stream.cuh"

#include <type_traits>

namespace {

using namespace decode_attention;

constexpr int AT_ONCE = 16;  // chunks whose sums a thread loads together

__device__ __forceinline__ void add(float4 &sum, const float4 &value, float factor) {
    sum.x += value.x * factor, sum.y += value.y * factor, sum.z += value.z * factor, sum.w += value.w * factor;
}

// Tile: of the tokens that lie far behind (kv_tiles.cuh); void where all are kept as they were stored.
template <int D, typename Tile = void>
__device__ __forceinline__ void attend(const DecodeAttentionParams &p) {
    using Cache = KvCache<D>;
    constexpr bool HAS_TILES = !std::is_void_v<Tile>;
    __shared__ __align__(16) QueryFragments<D> query;
    __shared__ __align__(16) half newest_key[D], newest_value[D];
    __shared__ float2 rotations[D / 2];
    __shared__ TeamSums<D> sums;
    __shared__ float weight[MAX_SPLITS][HEADS];
    __shared__ bool last;
    // In turn, with barriers between: (D, WARPS), a row for each warp; Exchange, where a team is two warps;
    // TeamSums::out; heads to be rotated back. The rings of tiles lie behind the rows, and are done with before sums
    // are put there.
    extern __shared__ __align__(16) float memory[];
    static_assert(PARTS<D> == 1 || sizeof(Exchange) <= WARPS * D * sizeof(float));

    const AttentionLayer &layer = p.layer;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int g = lane / 4, t = lane % 4;  // as the matrix instruction numbers them
    const int team = warp / PARTS<D>, part = part_of_warp<D>();
    const int head_kv = blockIdx.x, split = blockIdx.y, splits = gridDim.y;
    const int heads = min(layer.group - int(blockIdx.z) * HEADS, HEADS);
    const int first_head = head_kv * layer.group + blockIdx.z * HEADS;

    // What this warp prepares: its query head, and of the last two one the newest key, one the newest value.
    const bool for_query = warp < heads;
    bool for_key = layer.stores && warp == WARPS - 1, for_value = layer.stores && warp == WARPS - 2;
    float norm[D / WARP], newest_norm[D / WARP];
    load_norm<D>(layer.q_norm, norm);
    load_norm<D>(for_key ? layer.k_norm : layer.v_norm, newest_norm);
    static_assert(D / 2 <= WARPS * WARP);
    const double frequency = pair_frequency(layer, threadIdx.x);

    // The token's place and the older tokens' keys and values may be read before the wait: this kernel started when all
    // before its predecessor had ended, since a kernel lets its successor start only after its own wait. So may the
    // newest token's where an earlier layer has stored them: the predecessor computed this layer's queries, and that
    // layer's attention came before it.
    const int position = *p.position, place = *p.place;
    const int first = layer.window ? max(place + 1 - layer.window, 0) : 0;
    const Chunks chunks(place + 1 - first, splits);
    const int begin = first + split * chunks.chunk, end = min(begin + chunks.chunk, place + 1);
    if (begin > place) {
        wait_for_predecessor();
        launch_dependents();
        return;
    }
    // From here on tokens are read as they were stored; before it, where there are any, in a step of their own, the
    // sinks.
    int exact = begin;
    bool has_sinks = false;
    if constexpr (HAS_TILES) {
        exact = kv_tiles::exact_from(place, begin, end);
        has_sinks = begin == 0 && exact > 0;
    }
    const bool stores_newest = layer.stores && end > place;
    [[maybe_unused]] const auto stream = [&] {
        if constexpr (HAS_TILES) {
            uint8_t *ring = reinterpret_cast<uint8_t *>(memory) + p.tile_ring;
            return TileStream<D, Tile>(p, ring, head_kv, begin, exact);
        } else {
            return 0;
        }
    }();
    for_key &= stores_newest, for_value &= stores_newest;
    const typename Cache::Slots slot_of(exact, layer.context);
    half *k_cache = layer.k_cache + Cache::row(head_kv, 0, layer.context) * D;
    half *v_cache = layer.v_cache + Cache::row(head_kv, 0, layer.context) * D;

    // Of 16 tokens. Those of a newest token that this block stores come from shared memory, whatever the cache held.
    uint4 key[2][PART<D> / 32], value[PART<D> / 64][4];
    const int key_at = part * PART<D> + t * 8, value_at = part * PART<D> + g * 8;
    const auto row = [&](half *cache, int plane, int from, int i) {
        if constexpr (HAS_TILES) {
            constexpr int SINKS = kv_tiles::SINKS;
            if (from < exact) return p.tiles.sinks + ((head_kv * 2 + plane) * SINKS + min(i, SINKS - 1)) * D;
        }
        return cache + size_t(slot_of(min(from + i, end - 1))) * D;
    };
    const auto load_keys = [&](int from) {
#pragma unroll
        for (int tile = 0; tile < 2; tile++) {
            const half *at = row(k_cache, 0, from, tile * 8 + g) + key_at;
#pragma unroll
            for (int c = 0; c < PART<D> / 32; c++) key[tile][c] = Cache::load(at + c * 32);
        }
    };
    const auto load_values = [&](int from) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const half *at = row(v_cache, 1, from, i / 2 * 8 + t * 2 + i % 2) + value_at;
#pragma unroll
            for (int c = 0; c < PART<D> / 64; c++) value[c][i] = Cache::load(at + c * 64);
        }
    };
    const auto has_newest = [&](int from) { return stores_newest && from < end && from + STEP > place; };
    const auto take_newest_key = [&](int from) {
#pragma unroll
        for (int tile = 0; tile < 2; tile++) {
            if (from + tile * 8 + g < place) continue;
#pragma unroll
            for (int c = 0; c < PART<D> / 32; c++) key[tile][c] = Cache::load(newest_key + key_at + c * 32);
        }
    };
    const auto take_newest_value = [&](int from) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (from + i / 2 * 8 + t * 2 + i % 2 < place) continue;
#pragma unroll
            for (int c = 0; c < PART<D> / 64; c++) value[c][i] = Cache::load(newest_value + value_at + c * 64);
        }
    };
    int from = exact + team * STEP - (has_sinks ? STEP : 0);
    if (from < end) {
        load_keys(from);
        load_values(from);
    }

    if (threadIdx.x < D / 2) rotations[threadIdx.x] = rotation(position, frequency, layer.rope_factor);
    __syncthreads();
    wait_for_predecessor();
    launch_dependents();
    float x[D / WARP] = {}, newest[D / WARP];
#pragma unroll
    for (int i = 0; i < D / WARP; i++) {
        if (for_query) x[i] = p.q[(first_head + warp) * D + i * WARP + lane];
        if (for_key || for_value) newest[i] = (for_key ? p.k : p.v)[head_kv * D + i * WARP + lane];
    }
    // Once for the query, and once for the newest token's key or value: a loop, since to fetch instructions takes
    // longer here than to run them again.
#pragma unroll 1
    for (int pass = 0; pass < 2; pass++) {
        const bool is_query = pass == 0;
        const float *weights = is_query ? layer.q_norm : for_key ? layer.k_norm : layer.v_norm;
        if (is_query ? for_query : for_key) {
            rotate_head<D>(x, weights, norm, layer, memory + warp * D,
                           [&](int i) { return rotations[i * WARP + lane]; });
        } else if (!is_query && for_value && weights) {
            const float scale = head_scale<D>(x, layer.epsilon);
#pragma unroll
            for (int i = 0; i < D / WARP; i++) x[i] = x[i] * scale * norm[i];
        }
        if constexpr (HAS_TILES) kv_tiles::rotate<D>(x);
        if (is_query) {
            query.store(warp, x, layer.scale);
        } else if (for_key || for_value) {
            half *here = for_key ? newest_key : newest_value;
            half *cached = (for_key ? k_cache : v_cache) + size_t(slot_of(place)) * D;
#pragma unroll
            for (int i = 0; i < D / WARP; i++) {
                Cache::store(here + i * WARP + lane, x[i]);
                Cache::store(cached + i * WARP + lane, x[i]);
            }
        }
        if (!(for_key || for_value)) break;
#pragma unroll
        for (int i = 0; i < D / WARP; i++) x[i] = newest[i], norm[i] = newest_norm[i];
    }
    __syncthreads();
    if (has_newest(from)) {
        take_newest_key(from);
        take_newest_value(from);
    }

    Gathered<D> gathered;
    const float softcap = layer.softcap;
    int step = 0;
    const auto finish = [&](float (&score)[4]) {
        if constexpr (PARTS<D> == 2) (*reinterpret_cast<Exchange *>(memory))(score, step);
        if (softcap != 0.f) cap_scores(score, softcap);
        step++;
    };
    if constexpr (HAS_TILES) {
        stream.add_to(gathered, query, finish);
    }
#pragma unroll 1
    for (; from < end; from += TEAMS<D> * STEP) {
        const int next = from + TEAMS<D> * STEP;
        gathered.add(
            query, from, end, [&](int tile, int c) { return key[tile][c]; },
            [&] {
                if (next < end) load_keys(next);
                if (has_newest(next)) take_newest_key(next);
            },
            [&](float (&score)[4]) {
                finish(score);
                if (HAS_TILES && from < exact) keep_sinks(score);
            },
            [&](int c, int i) { return value[c][i]; });
        if (next < end) load_values(next);
        if (has_newest(next)) take_newest_value(next);
    }

    const int teams = min((end - begin + STEP - 1) / STEP, TEAMS<D>), head_count = layer.group * gridDim.x;
    sums.out = memory;
    const auto sync = [] { __syncthreads(); };
    float factor[2] = {};
    sums.weigh(gathered, teams, sync, factor);
    if (team < teams) sums.put(gathered, factor, 0, heads);
    __syncthreads();
    // Of a chunk and a head: the values, then the greatest score and the sum of exponentials.
    const auto partial = [&](int chunk, int head) {
        return p.partial + (size_t(chunk) * head_count + first_head + head) * (D + 4);
    };
    // Four values of a head. Rotated ones stay here until all are: their thread alone reads what lies in their place.
    const auto store = [&](bool exists, int head, int d, const float4 &four) {
        if constexpr (HAS_TILES) {
            if (exists) *reinterpret_cast<float4 *>(sums.at(head) + d) = four;
        } else {
            store_four(p.out, exists, (first_head + head) * D + d, four);
        }
    };
    const auto rotate_back = [&] {
        if constexpr (HAS_TILES) {
            __syncthreads();
            if (warp >= heads) return;
            float gathered_values[D / WARP];
#pragma unroll
            for (int i = 0; i < D / WARP; i++) gathered_values[i] = sums.at(warp)[i * WARP + lane];
            kv_tiles::rotate<D>(gathered_values);
#pragma unroll
            for (int i = 0; i < D / WARP; i++) {
                store_group(p.out, (first_head + warp) * (D / WARP) + i, gathered_values[i]);
            }
        }
    };
    constexpr int AT_A_TIME = WARPS * WARP * 4;
    const int own = threadIdx.x * 4;
    for (int i = own; i - own < heads * D; i += AT_A_TIME) {
        const bool exists = i < heads * D;
        const int head = exists ? i / D : 0, d = i % D;
        float4 sum = {};
#pragma unroll
        for (int w = 0; w < TEAMS<D>; w++) {
            if (w < teams) add(sum, *reinterpret_cast<const float4 *>(sums.at(w * heads + head) + d), 1.f);
        }
        const float all = sums.all[head];
        if (chunks.count == 1) {
            store(exists, head, d, {sum.x / all, sum.y / all, sum.z / all, sum.w / all});
        } else if (exists) {
            float *to = partial(split, head);
            *reinterpret_cast<float4 *>(to + d) = sum;
            if (d == 0) *reinterpret_cast<float2 *>(to + D) = {sums.top[head], all};
        }
    }
    if (chunks.count == 1) {
        rotate_back();
        return;
    }

    // The block that ends last adds up the chunks.
    unsigned *finished = p.finished + head_kv + gridDim.x * blockIdx.z;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(finished, 1u) == unsigned(chunks.count - 1);
        if (last) *finished = 0;
    }
    __syncthreads();
    if (!last) return;
    __threadfence();
    for (int head = warp; head < heads; head += WARPS) {
        float tops[MAX_SPLITS / WARP], all[MAX_SPLITS / WARP];
#pragma unroll
        for (int i = 0; i < MAX_SPLITS / WARP; i++) {
            const int s = i * WARP + lane;
            const bool exists = s < chunks.count;
            const float2 of_chunk = exists ? __ldcg(reinterpret_cast<const float2 *>(partial(s, head) + D)) : float2{};
            tops[i] = exists ? of_chunk.x : NO_SCORE;
            all[i] = of_chunk.y;
        }
        const ChunkWeights weights(tops, all);
#pragma unroll
        for (int i = 0; i < MAX_SPLITS / WARP; i++) weight[i * WARP + lane][head] = weights.of[i];
    }
    __syncthreads();
    for (int i = own; i - own < heads * D; i += AT_A_TIME) {
        const bool exists = i < heads * D;
        const int head = exists ? i / D : 0, d = i % D;
        float4 sum = {};
        for (int first = 0; first < chunks.count; first += AT_ONCE) {
            float4 part[AT_ONCE];
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++) {
                const bool counts = exists && first + j < chunks.count;
                part[j] = counts ? __ldcg(reinterpret_cast<const float4 *>(partial(first + j, head) + d)) : float4{};
            }
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++) add(sum, part[j], weight[first + j][head]);
        }
        store(exists, head, d, sum);
    }
    rotate_back();
}

}  // namespace
