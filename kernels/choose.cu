// The next token, chosen from a vocabulary's logits: `choose_best`, then `choose_token`. In what order which filter
// applies, and each rounding, is as in the host's sampler (src/engine/sampling.rs), so that both choose the same token.
//
//   logits   penalized by the counts of recent tokens; banned ones, and those that are not allowed, are none
//   greedy   the largest, the first of equals
//   else     the top_k largest, sorted; of these the likeliest up to a probability of top_p; of these those at least
//            min_p times as likely as the likeliest; of these one, drawn at the temperature with the host's number
//
// A logit and its token are one 64-bit key that orders as they do, so the largest keys do not depend on who compares
// first.
//
// Bound: latency. `choose_best` reads the logits once: a block sorts 1,024 of them and keeps 64, which is how many
// candidates there can be. Of the blocks' lists only the 64 with the largest heads can hold any of the 64 best;
// `choose_token`, one block, sorts what these hold from the least of those heads on.
#include "common.cuh"

namespace {

constexpr int BLOCK_LOGITS = 1024;
constexpr int BEST_THREADS = 512;
constexpr int TOKEN_THREADS = 1024;
constexpr int MAX_TOP_K = 64;
constexpr int MAX_CANDIDATES = MAX_TOP_K * MAX_TOP_K;

constexpr uint32_t BANNED = 0x80000000;
constexpr uint64_t NOT_FINITE = ~0ull;  // above every finite logit's key
constexpr uint64_t NONE = 0;            // below

// Larger for a larger logit, and for the smaller of two tokens with the same; above 0.
__device__ __forceinline__ uint64_t key_of(float logit, uint32_t token) {
    const uint32_t bits = __float_as_uint(__fadd_rn(logit, 0.f));  // -0 is 0
    return uint64_t(bits & 0x80000000 ? ~bits : bits | 0x80000000) << 32 | ~token;
}
__device__ __forceinline__ uint32_t token_of(uint64_t key) { return ~static_cast<uint32_t>(key); }
__device__ __forceinline__ float logit_of(uint64_t key) {
    const uint32_t bits = key >> 32;
    return __uint_as_float(bits & 0x80000000 ? bits & 0x7fffffff : ~bits);
}

// e^x, operation by operation as in src/math.rs.
__device__ __forceinline__ float exponential(float x) {
    constexpr float ROUND = 12582912.f;
    const float clamped = fminf(fmaxf(x, -87.f), 88.f);
    const float rounded = __fadd_rn(__fmul_rn(clamped, 1.44269504088896340736f), ROUND);
    const float n = __fsub_rn(rounded, ROUND);
    const float r = __fsub_rn(__fsub_rn(clamped, __fmul_rn(n, 0.6933594f)), __fmul_rn(n, -2.1219444e-4f));
    constexpr float COEFFICIENTS[] = {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f};
    float power = 1.f / 5040;
#pragma unroll
    for (const float coefficient : COEFFICIENTS) power = __fadd_rn(__fmul_rn(power, r), coefficient);
    const float two_to_n = __uint_as_float((__float_as_uint(rounded) << 23) + __float_as_uint(1.f));
    return x < -87.f ? 0.f : x > 88.f ? INFINITY : __fmul_rn(power, two_to_n);
}

// Sorts `count` keys, a power of two, the largest first, by all threads of the block (Batcher's bitonic sort).
__device__ __forceinline__ void sort(uint64_t *keys, int count) {
    for (int size = 2; size <= count; size *= 2) {
        for (int stride = size / 2; stride > 0; stride /= 2) {
            __syncthreads();
            for (int i = threadIdx.x; i < count / 2; i += blockDim.x) {
                const int a = 2 * i - (i & (stride - 1)), b = a + stride;
                const uint64_t first = keys[a], second = keys[b];
                if ((first < second) == ((a & size) == 0)) keys[a] = second, keys[b] = first;
            }
        }
    }
    __syncthreads();
}

__device__ __forceinline__ uint64_t warp_max(uint64_t key) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) key = max(key, __shfl_xor_sync(~0u, key, offset));
    return key;
}

// The largest key of a block, in thread 0.
__device__ __forceinline__ uint64_t block_max(uint64_t key) {
    __shared__ uint64_t part[WARP];
    key = warp_max(key);
    if (threadIdx.x % WARP == 0) part[threadIdx.x / WARP] = key;
    __syncthreads();
    if (threadIdx.x >= WARP) return 0;
    return warp_max(threadIdx.x < blockDim.x / WARP ? part[threadIdx.x] : 0);
}

__device__ __forceinline__ float adjusted(float logit, uint32_t count, const ChoiceSettings &settings) {
    if (count == 0) return logit;
    const float repeated =
        logit > 0.f ? __fdiv_rn(logit, settings.repeat_penalty) : __fmul_rn(logit, settings.repeat_penalty);
    const float frequency = __fmul_rn(static_cast<float>(count), settings.frequency_penalty);
    return __fsub_rn(repeated, __fadd_rn(settings.presence_penalty, frequency));
}

// One of the first `count` of `keys`, sorted, by one thread. `weight` has e^(logit - largest) of each, `heated` the
// same at the temperature.
__device__ __forceinline__ int draw(const ChoiceSettings &settings, const float *weight, const float *heated, int count,
                                    double uniform) {
    if (settings.top_p < 1.f) {
        float total = 0.f, sum = 0.f;
        for (int i = 0; i < count; i++) total = __fadd_rn(total, weight[i]);
        const float enough = __fmul_rn(settings.top_p, total);
        for (int i = 0; i < count; i++) {
            sum = __fadd_rn(sum, weight[i]);
            if (sum >= enough) count = i + 1;
        }
    }
    int passing = 0;
    while (passing < count && weight[passing] >= settings.min_p) passing++;
    count = max(passing, 1);
    double total = 0.;
    for (int i = 0; i < count; i++) total = __dadd_rn(total, heated[i]);
    double left = __dmul_rn(uniform, total);
    for (int i = 0; i < count; i++) {
        left = __dsub_rn(left, heated[i]);
        if (left < 0.) return i;
    }
    return count - 1;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(BEST_THREADS) choose_best(const __grid_constant__ ChooseParams p) {
    __shared__ uint64_t keys[BLOCK_LOGITS];
    launch_dependents();
    wait_for_predecessor();
    const ChoiceSettings settings = *p.settings;
    uint64_t largest = NONE;
#pragma unroll
    for (int i = threadIdx.x; i < BLOCK_LOGITS; i += BEST_THREADS) {
        const int token = blockIdx.x * BLOCK_LOGITS + i;
        uint64_t key = NONE;
        if (token < p.vocabulary) {
            const float logit = p.logits[token];
            const uint32_t count = settings.adjusts ? p.counts[token] : 0;
            const bool allowed = p.allowed == nullptr || p.allowed[token / 32] >> token % 32 & 1;
            if (!isfinite(logit)) {
                key = NOT_FINITE;
            } else if (allowed && !(count & BANNED)) {
                key = key_of(adjusted(logit, count, settings), token);
            }
        }
        keys[i] = key;
        largest = max(largest, key);
    }
    uint64_t *list = p.lists + size_t(blockIdx.x) * MAX_TOP_K;
    if (settings.top_k == 0) {
        largest = block_max(largest);
        if (threadIdx.x == 0) list[0] = largest;
        return;
    }
    sort(keys, BLOCK_LOGITS);
    if (threadIdx.x < MAX_TOP_K) list[threadIdx.x] = keys[threadIdx.x];
}

extern "C" __global__ void __launch_bounds__(TOKEN_THREADS) choose_token(const __grid_constant__ ChooseParams p) {
    __shared__ uint64_t keys[MAX_CANDIDATES];
    __shared__ float weight[MAX_TOP_K], heated[MAX_TOP_K];
    __shared__ int found;
    launch_dependents();
    wait_for_predecessor();
    const ChoiceSettings settings = *p.settings;
    const int lists = (p.vocabulary + BLOCK_LOGITS - 1) / BLOCK_LOGITS;
    const auto head = [&](int list) { return list < lists ? p.lists[size_t(list) * MAX_TOP_K] : NONE; };
    const int index = p.inputs[1] + 1;  // of the chosen token in the text

    uint64_t chosen;
    if (settings.top_k == 0) {
        chosen = block_max(head(threadIdx.x));
    } else {
        // Where there are 64 lists, the 64 best tokens are no worse than the least of the 64 best heads.
        int count = MAX_TOP_K;
        while (count < lists) count *= 2;
        if (threadIdx.x < count) keys[threadIdx.x] = head(threadIdx.x);
        sort(keys, count);
        const uint64_t least = max(keys[MAX_TOP_K - 1], uint64_t(1));
        __syncthreads();
        if (threadIdx.x == 0) found = 0;
        __syncthreads();
        for (int list = threadIdx.x / WARP; list < lists; list += TOKEN_THREADS / WARP) {
            if (head(list) < least) continue;
#pragma unroll
            for (int i = threadIdx.x % WARP; i < MAX_TOP_K; i += WARP) {
                const uint64_t key = p.lists[size_t(list) * MAX_TOP_K + i];
                if (key < least) continue;
                const int at = atomicAdd(&found, 1);
                if (at < MAX_CANDIDATES) keys[at] = key;  // more than that are only where logits are no numbers
            }
        }
        __syncthreads();
        const int filled = min(found, MAX_CANDIDATES);
        for (count = MAX_TOP_K; count < filled;) count *= 2;
        for (int i = filled + threadIdx.x; i < count; i += TOKEN_THREADS) keys[i] = NONE;
        sort(keys, count);
        const bool candidate = threadIdx.x < min(settings.top_k, MAX_TOP_K) && keys[threadIdx.x] != NONE;
        const int candidates = __syncthreads_count(candidate);
        if (candidate) {
            const float below = __fsub_rn(logit_of(keys[threadIdx.x]), logit_of(keys[0]));
            weight[threadIdx.x] = exponential(below);
            heated[threadIdx.x] = exponential(__fdiv_rn(below, settings.temperature));
        }
        __syncthreads();
        if (threadIdx.x != 0) return;
        chosen = keys[0];
        if (chosen != NOT_FINITE) chosen = keys[draw(settings, weight, heated, candidates, p.uniforms[index])];
    }
    if (threadIdx.x != 0) return;
    const int token = chosen == NOT_FINITE ? -1 : static_cast<int>(token_of(chosen));
    p.text[index] = token;
    p.inputs[0] = max(token, 0);
    p.inputs[1] = index;
    p.inputs[2]++;
    if (settings.repeat_last_n > 0 && token >= 0) {
        p.counts[token]++;
        if (index >= settings.repeat_last_n) p.counts[p.text[index - settings.repeat_last_n]]--;
    }
}
