// Which tokens of the KV cache stay where it has a budget, and bringing them together. Of each key/value head, with its
// query heads h, places i of its tokens, and the last 64 tokens t of a chunk, which observe:
//
//   importance[h, i] = max over t of softmax over the places that t sees of (q[t, h] . K[i])[i], 0 where no t sees i
//   asked[h, i]      = max over the places up to NEIGHBORS before and behind i of importance[h]
//   norm[h, i]       = sqrt(V[i] . G[h] V[i]), how long the value is behind the output matrix
//   floor[h]         = mean over i of importance[h, i]
//   score[i]         = max over h of max(asked[h, i], floor[h]) * norm[h, i]
//
// The first SINKS places are kept, the last RECENT, and of the others those with the greatest scores, of equal ones the
// first. In five kernels, one after another:
//
//   evict_observe   for each (h, t) and block of places the greatest score of attention and the sum of exponentials
//   evict_join      of all blocks: log2 of the sum that probabilities are divided by
//   evict_weigh     the same scores again: importance, and each block's sums of it
//   evict_norms     norm
//   evict_select    score, and the places that are kept
//
// and evict_gather brings them together. Tiles are read as they stand, by every observer.
//
// Bound: the matrix units: 4 * 64 * head_dim operations for each (h, i) in evict_observe and evict_weigh, somewhat more
// than head_dim^2 in evict_norms, since G is symmetric; evict_gather by bytes. All query heads of a key/value head
// share what a block loads.
//
// Grid: evict_observe, evict_weigh and evict_norms (blocks of places, head_count_kv); evict_join (head_count);
// evict_select (head_count_kv); evict_gather (head_count_kv, 2 * head_dim / 32, blocks along places, of which there is
// one where the kept are moved within their memory).
#include "evict.cuh"

namespace {

constexpr int RECENT = 64;
constexpr int NEIGHBORS = 7;
constexpr int SELECT_THREADS = 1024, SELECT_WARPS = SELECT_THREADS / WARP;
constexpr int MAX_GROUP = 128;
constexpr int DIGIT_BITS = 11, DIGITS = 1 << DIGIT_BITS;
constexpr int AT_ONCE = 4;  // scores that a lane loads together

// The sum of those before, in a block of SELECT_THREADS. All threads call it; `sums` has one for each warp.
__device__ __forceinline__ int sum_before(int value, int (&sums)[SELECT_WARPS]) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const auto through = [&](int value) {
#pragma unroll
        for (int distance = 1; distance < WARP; distance *= 2) {
            const int other = __shfl_up_sync(~0u, value, distance);
            if (lane >= distance) value += other;
        }
        return value;
    };
    static_assert(SELECT_WARPS == WARP);
    const int in_warp = through(value);
    if (lane == WARP - 1) sums[warp] = in_warp;
    __syncthreads();
    const int of_warps = through(sums[lane]);
    const int warps_before = __shfl_sync(~0u, of_warps, (warp + WARP - 1) % WARP);
    __syncthreads();
    return in_warp - value + (warp > 0 ? warps_before : 0);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS) evict_join(const __grid_constant__ EvictParams p) {
    constexpr int SHARES = THREADS / OBSERVERS;
    __shared__ float2 of_shares[SHARES][OBSERVERS];
    wait_for_predecessor();
    launch_dependents();
    const int share = threadIdx.x / OBSERVERS, observer = threadIdx.x % OBSERVERS;
    const auto *partial = reinterpret_cast<const float2 *>(p.partial) + blockIdx.x * OBSERVERS + observer;
    const auto add = [](float2 &to, const float2 &more) {
        const float top = fmaxf(to.x, more.x);
        to = {top, to.y * power_of_two(to.x - top) + more.y * power_of_two(more.x - top)};
    };
    float2 all = {NO_SCORE, 0.f};
#pragma unroll 4
    for (int block = share; block < p.blocks; block += SHARES) {
        add(all, partial[size_t(block) * gridDim.x * OBSERVERS]);
    }
    of_shares[share][observer] = all;
    __syncthreads();
    if (share > 0) return;
#pragma unroll
    for (int other = 1; other < SHARES; other++) add(all, of_shares[other][observer]);
    // Nothing is probable to observers that do not exist.
    p.levels[blockIdx.x * OBSERVERS + observer] = observer < p.tokens ? all.x + log2f(all.y) : INFINITY;
}

// By bits of scores, which have their order: these are not negative.
extern "C" __global__ void __launch_bounds__(SELECT_THREADS) evict_select(const __grid_constant__ EvictParams p) {
    using kv_tiles::SINKS;
    __shared__ int counts[DIGITS], sums[SELECT_WARPS];
    __shared__ float floors[MAX_GROUP];
    __shared__ unsigned chosen;
    __shared__ int chosen_left;
    wait_for_predecessor();
    launch_dependents();
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, first_head = blockIdx.x * p.group;
    const int ordinary_end = p.places - RECENT;  // of those that are kept by their scores
    for (int head = warp; head < p.group; head += SELECT_WARPS) {
        float sum = 0.f;
        for (int block = lane; block < p.blocks; block += WARP)
            sum += p.sums[size_t(first_head + head) * p.blocks + block];
        sum = warp_sum(sum);
        if (lane == 0) floors[head] = sum / float(p.places);
    }
    __syncthreads();
    float *scores = p.scores + size_t(blockIdx.x) * p.places;
    for (int place = threadIdx.x; place < p.places; place += SELECT_THREADS) {
        float score = 0.f;
#pragma unroll 1
        for (int head = 0; head < p.group; head++) {
            const size_t row = size_t(first_head + head) * p.places;
            float asked = floors[head];
#pragma unroll
            for (int near = -NEIGHBORS; near <= NEIGHBORS; near++) {
                asked = fmaxf(asked, p.importance[row + min(max(place + near, 0), p.places - 1)]);
            }
            score = fmaxf(score, asked * p.norms[row + place]);
        }
        scores[place] = score;
    }

    // Digit by digit the bits of the least score that is kept, and how many of just this one are.
    int left = p.budget - SINKS - RECENT;
    unsigned threshold = left > 0 ? 0 : ~0u, known = threshold;
    for (int shift = 32 - DIGIT_BITS; known != ~0u; shift = max(shift - DIGIT_BITS, 0)) {
        for (int i = threadIdx.x; i < DIGITS; i += SELECT_THREADS) counts[i] = 0;
        __syncthreads();
        for (int place = SINKS + threadIdx.x; place < ordinary_end; place += SELECT_THREADS) {
            const unsigned bits = __float_as_uint(scores[place]);
            if (((bits ^ threshold) & known) == 0) atomicAdd(counts + (bits >> shift) % DIGITS, 1);
        }
        __syncthreads();
        // From the greatest digit down, each thread has some.
        constexpr int EACH = DIGITS / SELECT_THREADS;
        const int greatest = DIGITS - 1 - int(threadIdx.x) * EACH;
        int own = 0;
#pragma unroll
        for (int i = 0; i < EACH; i++) own += counts[greatest - i];
        int before = sum_before(own, sums);
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int count = counts[greatest - i];
            if (before < left && left <= before + count) {
                chosen = greatest - i;
                chosen_left = left - before;
            }
            before += count;
        }
        __syncthreads();
        threshold |= chosen << shift;
        known |= unsigned(DIGITS - 1) << shift;
        left = chosen_left;
    }

    // Each warp has a stretch of places, and goes through it twice: for what comes before the others', then to write.
    const int stretch = round_up((p.places + SELECT_WARPS - 1) / SELECT_WARPS, WARP);
    const int begin = min(warp * stretch, p.places), end = min(begin + stretch, p.places);
    const auto for_places = [&](auto use) {
        for (int first = begin; first < end; first += AT_ONCE * WARP) {
            unsigned bits[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                bits[i] = __float_as_uint(scores[min(first + i * WARP + lane, p.places - 1)]);
            }
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                const int place = first + i * WARP + lane;
                const bool ordinary = place >= SINKS && place < ordinary_end, exists = place < end;
                const bool equal = exists && ordinary && bits[i] == threshold;
                const bool above = exists && (!ordinary || bits[i] > threshold);
                use(place, above, equal, __ballot_sync(~0u, above), __ballot_sync(~0u, equal));
            }
        }
    };
    int above_count = 0, equal_count = 0;
    for_places([&](int, bool, bool, unsigned all_above, unsigned all_equal) {
        above_count += __popc(all_above), equal_count += __popc(all_equal);
    });
    // One lane of each warp counts.
    above_count = __shfl_sync(~0u, sum_before(lane == 0 ? above_count : 0, sums), 0);
    equal_count = __shfl_sync(~0u, sum_before(lane == 0 ? equal_count : 0, sums), 0);
    int *kept = p.kept + size_t(blockIdx.x) * p.budget;
    for_places([&](int place, bool above, bool equal, unsigned all_above, unsigned all_equal) {
        const unsigned before = (1u << lane) - 1;
        const int above_before = above_count + __popc(all_above & before);
        const int equal_before = equal_count + __popc(all_equal & before);
        if (above || (equal && equal_before < left)) kept[above_before + min(equal_before, left)] = place;
        above_count += __popc(all_above), equal_count += __popc(all_equal);
    });
}

EVICT(64, , void)
EVICT(128, , void)
EVICT(256, , void)
EVICT(512, , void)
