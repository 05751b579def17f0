// What a token of the KV cache is worth: the kernels of evict.cu and evict_tiles.cu, which compute it, and which bring
// the kept tokens together.
//
// A warp has 16 or 32 places as the first operand of matrix instructions: keys, or values. The second comes in slabs of
// rows through shared memory: queries, or rows of Gram matrices. Both are cut into pieces of 8 values, of which lane
// 4 g + t has those numbered 4 c + t: tiles' keys lie so, and a piece is 16 bytes in any case. The order of products
// that this gives a sum is the same on both sides.
#pragma once

#include "copy.cuh"
#include "kv_cache.cuh"
#include "kv_tiles.cuh"
#include "mma.cuh"
#include "softcap.cuh"

#include <type_traits>

namespace {

constexpr int THREADS = 256, WARPS = THREADS / WARP;
constexpr int OBSERVERS = 64;  // queries whose scores count: the chunk's last
constexpr float NO_SCORE = -1e30f;

template <int D>
struct Shape {
    static constexpr int fragments = D <= 128 ? 2 : 1;  // of 16 places, that a warp has
    static constexpr int warp_places = 16 * fragments;
    static constexpr int block_places = WARPS * warp_places;
    static constexpr int pieces = D / 32;            // of 8 values of a row that a lane has
    static constexpr int rows = D <= 256 ? 32 : 16;  // of a slab
    static constexpr int slab = rows * (D / 8);      // pieces
    static constexpr int blocks = D <= 256 ? 2 : 1;  // that a multiprocessor should have room for
    static constexpr int score_slabs = OBSERVERS / rows, norm_slabs = D / rows;  // of a head
};

// Keys (PLANE 0) or values (1) of a key/value head, as the token behind all `places` reads them: those up to `tiled`
// from tiles, but for the sinks.
template <int D, typename Tile, int PLANE>
struct CachedHead {
    const half *ring, *sinks;
    const uint8_t *records;
    int tiled;
    typename KvCache<D>::Slots slots;

    __device__ __forceinline__ CachedHead(const half *cache, const KvTiles &tiles, int head, int context, int places)
        : ring(cache + KvCache<D>::row(head, 0, context) * D),
          sinks(tiles.sinks + (head * 2 + PLANE) * (kv_tiles::SINKS * D)),
          records(tiles.records + head * tiles.head_bytes),
          tiled(std::is_void_v<Tile> ? 0 : kv_tiles::tiles_seen(places) * kv_tiles::TILE),
          slots(tiled, context) {}

    // Values 8 octet .. + 7 of a token that is as it was stored: in the ring, or a sink.
    __device__ __forceinline__ uint4 stored(int place, int octet) const {
        return KvCache<D>::load(ring + size_t(slots(place)) * D + octet * 8);
    }
    __device__ __forceinline__ uint4 sink(int place, int octet) const {
        return KvCache<D>::load(sinks + place * D + octet * 8);
    }
    // Those of one in a tile.
    __device__ __forceinline__ uint4 expanded(int place, int octet) const {
        using namespace kv_tiles;
        const uint8_t *record = records + size_t(place / TILE) * Tile::bytes;
        if constexpr (PLANE == 0) return key_octet<Tile>(record, place % TILE, octet);
        return value_octet<Tile>(record, place % TILE, octet);
    }
    // Those of any.
    __device__ __forceinline__ uint4 any(int place, int octet) const {
        if constexpr (!std::is_void_v<Tile>) {
            if (place < tiled) return place < kv_tiles::SINKS ? sink(place, octet) : expanded(place, octet);
        }
        return stored(place, octet);
    }
};

// The pieces of a lane: of places g and g + 8 of each 16 of its warp's. Places past the end repeat the last.
template <int D>
struct Fragments {
    uint4 piece[Shape<D>::fragments][Shape<D>::pieces][2];

    template <typename Tile, int PLANE>
    __device__ __forceinline__ Fragments(const CachedHead<D, Tile, PLANE> &head, int first, int places) {
        const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
        const auto fill = [&](auto eight) {
#pragma unroll
            for (int f = 0; f < Shape<D>::fragments; f++) {
#pragma unroll
                for (int c = 0; c < Shape<D>::pieces; c++) {
                    // More loads at once would take too many registers.
                    if (c > 0 && c % 4 == 0) __syncwarp();
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        piece[f][c][j] = eight(min(first + f * 16 + j * 8 + g, places - 1), 4 * c + t);
                    }
                }
            }
        };
        if constexpr (!std::is_void_v<Tile>) {
            // All of a warp's places are in tiles, or none is.
            static_assert(kv_tiles::TILE % Shape<D>::warp_places == 0);
            if (first < head.tiled) {
                fill([&](int place, int octet) { return head.expanded(place, octet); });
                if (first + g < kv_tiles::SINKS) {
#pragma unroll
                    for (int c = 0; c < Shape<D>::pieces; c++) piece[0][c][0] = head.sink(g, 4 * c + t);
                }
                return;
            }
        }
        fill([&](int place, int octet) { return head.stored(place, octet); });
    }
};

// sum += 16 places x 8 rows, of a lane's pieces c.
__device__ __forceinline__ void multiply_pieces(float (&sum)[4], const uint4 (&a)[2], const uint4 &b) {
    mma(sum, {a[0].x, a[1].x, a[0].y, a[1].y}, b.x, b.y);
    mma(sum, {a[0].z, a[1].z, a[0].w, a[1].w}, b.z, b.w);
}

// Brings `count` slabs to shared memory, one after another and the next while one is used: `row(i, n)` is where row n
// of slab i begins, of which a lane has `pieces(i)`; `use(i, slab)` finds these pieces by c, 8 rows, and lane. Between
// two calls all threads of the block meet.
template <int D, typename Row, typename Pieces, typename Use>
__device__ __forceinline__ void for_slabs(uint4 (&slabs)[2][Shape<D>::slab], int count, Row row, Pieces pieces,
                                          Use use) {
    constexpr int EIGHTS = Shape<D>::rows / 8;
    const int lane = threadIdx.x % WARP;
    const auto load = [&](int i) {
        for (int at = threadIdx.x; at < pieces(i) * (EIGHTS * WARP); at += THREADS) {
            const int c = at / (EIGHTS * WARP), n = at / WARP % EIGHTS * 8 + lane / 4;
            copy_or_zero<16>(shared_address(&slabs[i % 2][at]), row(i, n) + (4 * c + lane % 4) * 8, true);
        }
        commit_copies();
    };
    load(0);
#pragma unroll 1
    for (int i = 0; i < count; i++) {
        wait_for_copies<0>();
        __syncthreads();
        if (i + 1 < count) load(i + 1);
        use(i, slabs[i % 2]);
    }
}

// Scores of a warp's places with all observers, for each head of the group: `begin(i)` before slab i, which is of head
// i / score_slabs, then `use(i, first, score)` for 16 observers at a time, the first of them `first`. score[f][n]: of
// observers 8 n + 2 t and + 1 places g, then g + 8 of 16. An observer beyond the last repeats it, and sees everything.
template <int D, typename Tile, typename Begin, typename Use>
__device__ __forceinline__ void for_scores(const EvictParams &p, Begin begin, Use use) {
    using S = Shape<D>;
    __shared__ uint4 slabs[2][S::slab];
    const int head_kv = blockIdx.y, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const int first = blockIdx.x * S::block_places + threadIdx.x / WARP * S::warp_places;
    const int observers = min(p.tokens, OBSERVERS), heads = p.group * gridDim.y;
    const CachedHead<D, Tile, 0> keys(p.k_cache, p.tiles, head_kv, p.context, p.places);
    const Fragments<D> a(keys, first, p.places);
    const auto row = [&](int i, int n) {
        const int observer = min(i % S::score_slabs * S::rows + n, observers - 1);
        const int token = p.tokens - observers + observer, head = head_kv * p.group + i / S::score_slabs;
        return p.q + (size_t(token) * heads + head) * D;
    };
    const auto all_pieces = [](int) { return S::pieces; };
    // Observers do not see the places of those behind them.
    const bool hidden = first + S::warp_places > p.places - observers;
    for_slabs<D>(slabs, p.group * S::score_slabs, row, all_pieces, [&](int i, const uint4(&slab)[S::slab]) {
        begin(i);
#pragma unroll 1
        for (int two = 0; two < S::rows / 16; two++) {
            float score[S::fragments][2][4] = {};
#pragma unroll
            for (int c = 0; c < S::pieces; c++) {
#pragma unroll
                for (int n = 0; n < 2; n++) {
                    const uint4 b = slab[(c * (S::rows / 8) + two * 2 + n) * WARP + lane];
#pragma unroll
                    for (int f = 0; f < S::fragments; f++) multiply_pieces(score[f][n], a.piece[f][c], b);
                }
            }
            const int first_observer = i % S::score_slabs * S::rows + two * 16;
            if (p.softcap != 0.f) {
#pragma unroll
                for (int f = 0; f < S::fragments; f++) {
#pragma unroll
                    for (int n = 0; n < 2; n++) cap_scores(score[f][n], p.softcap);
                }
            }
            if (hidden) {
#pragma unroll
                for (int f = 0; f < S::fragments; f++) {
#pragma unroll
                    for (int n = 0; n < 2; n++) {
#pragma unroll
                        for (int k = 0; k < 4; k++) {
                            const int observer = first_observer + n * 8 + 2 * t + k % 2;
                            const int place = first + f * 16 + k / 2 * 8 + g;
                            if (place > p.places - observers + observer) score[f][n][k] = NO_SCORE;
                        }
                    }
                }
            }
            use(i, first_observer, score);
        }
    });
}

// Of a block's places, for each head and observer: the greatest score, and the sum of exponentials relative to it.
template <int D, typename Tile>
__device__ __forceinline__ void observe(const EvictParams &p) {
    using S = Shape<D>;
    __shared__ float2 of_warps[2][WARPS][S::rows];  // of two slabs in turn
    wait_for_predecessor();
    launch_dependents();
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const auto join = [&](int i) {
        if (threadIdx.x >= S::rows) return;
        float top = NO_SCORE, sum = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) top = fmaxf(top, of_warps[i % 2][w][threadIdx.x].x);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float2 of_warp = of_warps[i % 2][w][threadIdx.x];
            sum += of_warp.y * power_of_two(of_warp.x - top);
        }
        const int observer = i % S::score_slabs * S::rows + threadIdx.x;
        const int head = blockIdx.y * p.group + i / S::score_slabs;
        const size_t at = (size_t(blockIdx.x) * (p.group * gridDim.y) + head) * OBSERVERS + observer;
        reinterpret_cast<float2 *>(p.partial)[at] = {top, sum};
    };
    const auto join_last = [&](int i) {
        if (i > 0) join(i - 1);
    };
    for_scores<D, Tile>(p, join_last, [&](int i, int first_observer, const float (&score)[S::fragments][2][4]) {
#pragma unroll
        for (int n = 0; n < 2; n++) {
            float top[2], sum[2];
#pragma unroll
            for (int k = 0; k < 2; k++) {
                top[k] = NO_SCORE, sum[k] = 0.f;
#pragma unroll
                for (int f = 0; f < S::fragments; f++)
                    top[k] = fmaxf(top[k], fmaxf(score[f][n][k], score[f][n][2 + k]));
#pragma unroll
                for (int over = 4; over < WARP; over *= 2) top[k] = fmaxf(top[k], __shfl_xor_sync(~0u, top[k], over));
#pragma unroll
                for (int f = 0; f < S::fragments; f++)
                    sum[k] += power_of_two(score[f][n][k] - top[k]) + power_of_two(score[f][n][2 + k] - top[k]);
#pragma unroll
                for (int over = 4; over < WARP; over *= 2) sum[k] += __shfl_xor_sync(~0u, sum[k], over);
            }
            if (lane >= 4) continue;
            float2 *to = of_warps[i % 2][warp] + first_observer % S::rows + n * 8 + 2 * lane;
            to[0] = {top[0], sum[0]};
            to[1] = {top[1], sum[1]};
        }
    });
    __syncthreads();
    join(p.group * S::score_slabs - 1);
}

// Of each head the greatest probability that an observer gives each place, and the sums of a block's.
template <int D, typename Tile>
__device__ __forceinline__ void weigh(const EvictParams &p) {
    using S = Shape<D>;
    __shared__ float of_warps[2][WARPS];  // of two heads in turn
    wait_for_predecessor();
    launch_dependents();
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const int first_head = blockIdx.y * p.group;
    const auto join = [&](int head) {
        if (threadIdx.x > 0) return;
        float sum = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += of_warps[head % 2][w];
        p.sums[size_t(first_head + head) * p.blocks + blockIdx.x] = sum;
    };
    const auto join_last = [&](int i) {
        if (i > 0 && i % S::score_slabs == 0) join(i / S::score_slabs - 1);
    };
    float best[S::fragments][2];  // logarithms of probabilities
    for_scores<D, Tile>(p, join_last, [&](int i, int first_observer, const float (&score)[S::fragments][2][4]) {
        const int head = i / S::score_slabs;
        if (first_observer == 0) {
#pragma unroll
            for (int f = 0; f < S::fragments; f++) best[f][0] = best[f][1] = NO_SCORE;
        }
        const auto *levels = reinterpret_cast<const float2 *>(p.levels + (first_head + head) * OBSERVERS);
#pragma unroll
        for (int n = 0; n < 2; n++) {
            const float2 level = levels[first_observer / 2 + n * 4 + t];
#pragma unroll
            for (int f = 0; f < S::fragments; f++) {
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    const float greater = fmaxf(score[f][n][2 * j] - level.x, score[f][n][2 * j + 1] - level.y);
                    best[f][j] = fmaxf(best[f][j], greater);
                }
            }
        }
        if (first_observer < OBSERVERS - 16) return;
        float importance = 0.f;
#pragma unroll
        for (int f = 0; f < S::fragments; f++) {
#pragma unroll
            for (int j = 0; j < 2; j++) {
                float of_row = fmaxf(best[f][j], __shfl_xor_sync(~0u, best[f][j], 1));
                of_row = fmaxf(of_row, __shfl_xor_sync(~0u, of_row, 2));
                // A lane keeps one of the places that it shares with three others.
                const int place = blockIdx.x * S::block_places + warp * S::warp_places + f * 16 + j * 8 + g;
                if (t != f * 2 + j || place >= p.places) continue;
                importance = power_of_two(of_row);
                p.importance[size_t(first_head + head) * p.places + place] = importance;
            }
        }
        importance = warp_sum(importance);
        if (lane == 0) of_warps[head % 2][warp] = importance;
    });
    __syncthreads();
    join(p.group - 1);
}

// Of each head, how long each value is behind the output matrix: sqrt(v . G v).
template <int D, typename Tile>
__device__ __forceinline__ void norms(const EvictParams &p) {
    using S = Shape<D>;
    __shared__ uint4 slabs[2][S::slab];
    wait_for_predecessor();
    launch_dependents();
    const int head_kv = blockIdx.y, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const int first = blockIdx.x * S::block_places + threadIdx.x / WARP * S::warp_places;
    const CachedHead<D, Tile, 1> values(p.v_cache, p.tiles, head_kv, p.context, p.places);
    const Fragments<D> a(values, first, p.places);
    // Eight rows of a slab are of the channels whose products lane t gets with its own pieces: channels 2 q and 2 q + 1
    // of its piece c, with c and q from the number of the eight. They are multiplied with what of the value is in
    // pieces up to c: G is symmetric.
    constexpr int SLABS = S::norm_slabs;
    const auto piece_of = [](int slab) { return slab * S::rows / 32; };
    const auto row = [&](int i, int n) {
        const int eight = (i % SLABS * S::rows + n) / 8, in_eight = n % 8;
        const int channel = eight / 4 * 32 + in_eight / 2 * 8 + eight % 4 * 2 + in_eight % 2;
        return p.grams + (size_t(head_kv * p.group + i / SLABS) * D + channel) * D;
    };
    const auto pieces = [&](int i) { return piece_of(i % SLABS) + 1; };
    float square[S::fragments][2];
    for_slabs<D>(slabs, p.group * SLABS, row, pieces, [&](int i, const uint4(&slab)[S::slab]) {
        const int of_head = i % SLABS, last = piece_of(of_head);
        if (of_head == 0) {
#pragma unroll
            for (int f = 0; f < S::fragments; f++) square[f][0] = square[f][1] = 0.f;
        }
#pragma unroll 1
        for (int two = 0; two < S::rows / 16; two++) {
            const bool later = (of_head * (S::rows / 16) + two) % 2;
            float product[S::fragments][2][4] = {};
            uint32_t own[S::fragments][2][2];  // the value's channels
#pragma unroll
            for (int c = 0; c < S::pieces; c++) {
                if (c > last) continue;
                if (c == last) {
#pragma unroll
                    for (int f = 0; f < S::fragments; f++) {
#pragma unroll
                        for (int j = 0; j < 2; j++) {
                            const uint4 &piece = a.piece[f][c][j];
                            own[f][0][j] = later ? piece.z : piece.x;
                            own[f][1][j] = later ? piece.w : piece.y;
                        }
#pragma unroll
                        for (int n = 0; n < 2; n++) {
#pragma unroll
                            for (float &x : product[f][n]) x *= 2.f;
                        }
                    }
                }
#pragma unroll
                for (int n = 0; n < 2; n++) {
                    const uint4 b = slab[(c * (S::rows / 8) + two * 2 + n) * WARP + lane];
#pragma unroll
                    for (int f = 0; f < S::fragments; f++) multiply_pieces(product[f][n], a.piece[f][c], b);
                }
            }
#pragma unroll
            for (int f = 0; f < S::fragments; f++) {
#pragma unroll
                for (int n = 0; n < 2; n++) {
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        const float2 value = __half22float2(as_half2(own[f][n][j]));
                        square[f][j] = fmaf(product[f][n][2 * j], value.x, square[f][j]);
                        square[f][j] = fmaf(product[f][n][2 * j + 1], value.y, square[f][j]);
                    }
                }
            }
        }
        if (of_head < SLABS - 1) return;
#pragma unroll
        for (int f = 0; f < S::fragments; f++) {
#pragma unroll
            for (int j = 0; j < 2; j++) {
                float of_row = square[f][j] + __shfl_xor_sync(~0u, square[f][j], 1);
                of_row += __shfl_xor_sync(~0u, of_row, 2);
                const int place = first + f * 16 + j * 8 + g, head = head_kv * p.group + i / SLABS;
                if (t != f * 2 + j || place >= p.places) continue;
                p.norms[size_t(head) * p.places + place] = sqrtf(fmaxf(of_row, 0.f));
            }
        }
    });
}

// Kept tokens to where they will be. Where that is the same memory, a block has all places of its channels, in order:
// what it reads lies behind all that it has written.
constexpr int GATHER_THREADS = 512, GATHER_OCTETS = 4;
// Tokens that a thread has at once: where a block has all, many are under way.
template <typename Tile>
constexpr int GATHER_EACH = std::is_void_v<Tile> ? 8 : 2;

template <int D, typename Tile, int PLANE>
__device__ __forceinline__ void gather(const GatherKeptParams &p) {
    constexpr int ROWS = GATHER_THREADS / GATHER_OCTETS, EACH = GATHER_EACH<Tile>;
    const int head = blockIdx.x, row = threadIdx.x / GATHER_OCTETS;
    const int octet = blockIdx.y % (D / 8 / GATHER_OCTETS) * GATHER_OCTETS + threadIdx.x % GATHER_OCTETS;
    const CachedHead<D, Tile, PLANE> from(PLANE == 0 ? p.k_from : p.v_from, p.tiles, head, p.context, p.places);
    half *to = (PLANE == 0 ? p.k_to : p.v_to) + KvCache<D>::row(head, 0, p.to_context) * D + octet * 8;
    const int *kept = p.kept + size_t(head) * p.budget + p.first;
    const typename KvCache<D>::Slots slots(p.first, p.to_context);
    for (int begin = blockIdx.z * (ROWS * EACH); begin < p.count; begin += gridDim.z * (ROWS * EACH)) {
        uint4 eight[EACH];
#pragma unroll
        for (int i = 0; i < EACH; i++) eight[i] = from.any(kept[min(begin + i * ROWS + row, p.count - 1)], octet);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int k = begin + i * ROWS + row;
            if (k < p.count) *reinterpret_cast<uint4 *>(to + size_t(slots(p.first + k)) * D) = eight[i];
        }
    }
}

template <int D, typename Tile>
__device__ __forceinline__ void gather(const GatherKeptParams &p) {
    wait_for_predecessor();
    launch_dependents();
    if (blockIdx.y < D / 8 / GATHER_OCTETS) {
        gather<D, Tile, 0>(p);
    } else {
        gather<D, Tile, 1>(p);
    }
}

}  // namespace

// The kernels of a format: SUFFIX of their names, and tiles.
#define EVICT(D, SUFFIX, ...)                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS, Shape<D>::blocks)     \
        evict_observe_d##D##SUFFIX(const __grid_constant__ EvictParams p) {     \
        observe<D, __VA_ARGS__>(p);                                             \
    }                                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS, Shape<D>::blocks)     \
        evict_weigh_d##D##SUFFIX(const __grid_constant__ EvictParams p) {       \
        weigh<D, __VA_ARGS__>(p);                                               \
    }                                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS, Shape<D>::blocks)     \
        evict_norms_d##D##SUFFIX(const __grid_constant__ EvictParams p) {       \
        norms<D, __VA_ARGS__>(p);                                               \
    }                                                                           \
    extern "C" __global__ void __launch_bounds__(GATHER_THREADS)                \
        evict_gather_d##D##SUFFIX(const __grid_constant__ GatherKeptParams p) { \
        gather<D, __VA_ARGS__>(p);                                              \
    }
