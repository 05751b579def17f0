// Attention of one new token, from the products of QKV to the quantized input of the output projection, in one kernel:
//
//   q, k = rope(rms_norm(q)), rope(rms_norm(k))       (the norms where the model has them)
//   cache[position] = k, v                            (f16)
//   out[head] = sum over t <= position of softmax(scale * q . K[t]) V[t], quantized
//
// Bound: 4 * head_dim bytes for each cached token and key/value head, each read once: a block serves all query heads of
// its key/value head (8 at most; more take another layer of blocks). The products run on tensor cores (m16n8k16): 8
// heads fill half of the 16 rows, and the other half carries what rounding q to f16 left over, so that q counts as
// exact; probabilities are split likewise.
//
// Grid: (head_count_kv, splits, (group + 7) / 8) x 256 threads. The context is cut into equal chunks, one for each of
// the `splits` blocks, but no smaller than MIN_CHUNK tokens; what a chunk is follows from the position in device
// memory, so the launch is the same for every position. Blocks without a chunk end at once. The block of a head that
// finishes last adds up the chunks, in order, so the result does not depend on which it was.
#include "kv_cache.cuh"
#include "mma.cuh"
#include "rope.cuh"

namespace {

constexpr int WARPS = 8;
constexpr int HEADS = 8;  // query heads of a block, at most
constexpr int STEP = 16;  // tokens that a warp handles at a time
constexpr int MIN_CHUNK = 128;
constexpr int CHUNK_MULTIPLE = 32;
constexpr int MAX_SPLITS = 64;
constexpr int AT_ONCE = 16;  // chunks whose sums a thread loads together
constexpr float NO_SCORE = -1e30f;

__device__ __forceinline__ uint32_t pack(half low, half high) {
    const half2 both = __halves2half2(low, high);
    return *reinterpret_cast<const uint32_t *>(&both);
}

// Norm and rotation of a query and a key head: what they take, loaded once for a lane's values.
template <int D>
struct HeadRope {
    float query_norm[D / WARP], key_norm[D / WARP];
    float2 rotations[D / 2 / WARP];

    __device__ __forceinline__ HeadRope(const DecodeAttentionParams &p, int position) {
        const int lane = threadIdx.x % WARP;
#pragma unroll
        for (int i = 0; i < D / WARP; i++) {
            query_norm[i] = p.q_norm ? p.q_norm[i * WARP + lane] : 1.f;
            key_norm[i] = p.k_norm ? p.k_norm[i * WARP + lane] : 1.f;
        }
#pragma unroll
        for (int i = 0; i < D / 2 / WARP; i++) {
            const int pair = i * WARP + lane;
            rotations[i] =
                pair < p.rope_dims / 2 ? rotation(position, p.frequencies[pair], p.rope_factor) : float2{1.f, 0.f};
        }
    }

    // Gives the head `in`, normalized (if `normalize`) and rotated, value by value to `store(d, value)`. By one warp;
    // `row` is float[D] of its own in shared memory.
    template <typename Store>
    __device__ __forceinline__ void operator()(const float *in, bool normalize, const float (&norm)[D / WARP],
                                               const DecodeAttentionParams &p, float *row, Store store) const {
        const int lane = threadIdx.x % WARP;
        float value[D / WARP], squares = 0.f;
#pragma unroll
        for (int i = 0; i < D / WARP; i++) value[i] = in[i * WARP + lane];
#pragma unroll
        for (int i = 0; i < D / WARP; i++) squares += value[i] * value[i];
        const float scale = normalize ? 1.f / sqrtf(warp_sum(squares) / D + p.epsilon) : 1.f;
#pragma unroll
        for (int i = 0; i < D / WARP; i++) row[i * WARP + lane] = value[i] * scale * norm[i];
        __syncwarp();
        const int half = p.rope_dims / 2;
#pragma unroll
        for (int i = 0; i < D / 2 / WARP; i++) {
            const int pair = i * WARP + lane;
            if (pair < half) {
                const int first = p.interleaved ? 2 * pair : pair, second = p.interleaved ? 2 * pair + 1 : pair + half;
                const float a = row[first], b = row[second];
                store(first, a * rotations[i].x - b * rotations[i].y);
                store(second, a * rotations[i].y + b * rotations[i].x);
            }
        }
        for (int d = p.rope_dims + lane; d < D; d += WARP) store(d, row[d]);
        __syncwarp();
    }
};

template <int D>
__device__ __forceinline__ void attend(const DecodeAttentionParams &p) {
    using Cache = KvCache<D>;
    // Query heads as matrix fragments: for each 16 values the 32 lanes' four registers, high and low parts in turn.
    __shared__ __align__(16) uint4 query[D / 16][WARP];
    __shared__ float row[WARPS][D];
    __shared__ float warp_largest[WARPS][HEADS], warp_sum_of[WARPS][HEADS], weight[MAX_SPLITS][HEADS];
    __shared__ bool last;
    extern __shared__ float warp_out[];  // (D + 1, heads, WARPS)

    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int g = lane / 4, t = lane % 4;  // as the matrix instruction numbers them
    const int head_kv = blockIdx.x, split = blockIdx.y, splits = gridDim.y;
    const int heads = min(p.group - int(blockIdx.z) * HEADS, HEADS);
    const int first_head = head_kv * p.group + blockIdx.z * HEADS;

    // The position and the older tokens' keys and values may be read before the wait: this kernel started when all
    // before its predecessor had ended, since a kernel lets its successor start only after its own wait.
    const int position = *p.position, tokens = position + 1;
    const int share = (tokens + splits - 1) / splits;
    const int chunk = max((share + CHUNK_MULTIPLE - 1) / CHUNK_MULTIPLE * CHUNK_MULTIPLE, MIN_CHUNK);
    const int chunks = (tokens + chunk - 1) / chunk;
    const int begin = split * chunk, end = min(begin + chunk, tokens);
    if (begin >= tokens) {
        wait_for_predecessor();
        launch_dependents();
        return;
    }
    const bool newest = end == tokens;
    half *k_cache = p.k_cache + Cache::row(head_kv, 0, p.context) * D;
    half *v_cache = p.v_cache + Cache::row(head_kv, 0, p.context) * D;

    // Of 16 tokens: 16-byte pieces of keys (tokens g and 8 + g) and values (2t, 2t + 1, 8 + 2t, 9 + 2t). Plain loads:
    // this block writes the newest token.
    uint4 key[2][D / 32], value[D / 64][4];
    auto load_keys = [&](int from) {
#pragma unroll
        for (int tile = 0; tile < 2; tile++) {
            const half *at = k_cache + size_t(Cache::slot_of(min(from + tile * 8 + g, end - 1), p.context)) * D + t * 8;
#pragma unroll
            for (int c = 0; c < D / 32; c++) key[tile][c] = Cache::load(at + c * 32);
        }
    };
    auto load_values = [&](int from) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int token = min(from + i / 2 * 8 + t * 2 + i % 2, end - 1);
            const half *at = v_cache + size_t(Cache::slot_of(token, p.context)) * D + g * 8;
#pragma unroll
            for (int c = 0; c < D / 64; c++) value[c][i] = Cache::load(at + c * 64);
        }
    };
    int from = begin + warp * STEP;
    const bool early = min(from + STEP, end) <= position;
    if (early && from < end) {
        load_keys(from);
        load_values(from);
    }

    // One warp rotates the new key, and after it the last query head of a full group.
    const bool for_key = newest && warp == WARPS - 1;
    const HeadRope<D> head_rope(p, position);
    wait_for_predecessor();
    launch_dependents();
    const int slot = Cache::slot_of(position, p.context);
    if (newest && threadIdx.x < D)
        Cache::store(v_cache + size_t(slot) * D + threadIdx.x, p.v[head_kv * D + threadIdx.x]);
    auto store_query = [&](int d, float x) {
        const half high = __float2half_rn(x), low = __float2half_rn(x - __half2float(high));
        // Value d of a lane's 8 consecutive ones (of 32) goes to matrix d / 4 % 2, register pair d / 2 % 2.
        half *at =
            reinterpret_cast<half *>(&query[d / 32 * 2 + d / 4 % 2][warp * 4 + d / 8 % 4]) + d / 2 % 2 * 4 + d % 2;
        at[0] = high;
        at[2] = low;
    };
    if (for_key) {
        half *to = k_cache + size_t(slot) * D;
        head_rope(p.k + head_kv * D, p.k_norm, head_rope.key_norm, p, row[warp],
                  [&](int d, float x) { Cache::store(to + d, x); });
    }
    if (warp < heads) {
        head_rope(p.q + (first_head + warp) * D, p.q_norm, head_rope.query_norm, p, row[warp],
                  [&](int d, float x) { store_query(d, x * p.scale); });
    } else {
        for (int d = lane; d < D; d += WARP) store_query(d, 0.f);
    }
    __syncthreads();
    if (!early && from < end) {
        load_keys(from);
        load_values(from);
    }

    float out[D / 16][4] = {};                   // of heads 2t, 2t + 1: values 64 i + 8 g + 2 j, + 1, at [4 i + j]
    float largest = NO_SCORE, exponentials = 0;  // of head g

    for (; from < end; from += WARPS * STEP) {
        float score[2][4] = {};
#pragma unroll
        for (int c = 0; c < D / 32; c++) {
            const uint4 a = query[2 * c][lane], b = query[2 * c + 1][lane];
#pragma unroll
            for (int tile = 0; tile < 2; tile++) {
                mma(score[tile], {a.x, a.y, a.z, a.w}, key[tile][c].x, key[tile][c].y);
                mma(score[tile], {b.x, b.y, b.z, b.w}, key[tile][c].z, key[tile][c].w);
            }
        }
        const int next = from + WARPS * STEP;
        if (next < end) load_keys(next);

        float probability[4];
        float top = largest;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int token = from + i / 2 * 8 + t * 2 + i % 2;
            probability[i] = token < end ? score[i / 2][i % 2] + score[i / 2][2 + i % 2] : NO_SCORE;
            top = fmaxf(top, probability[i]);
        }
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
        const float shrink = exp2f(largest - top);
        largest = top;
        exponentials *= shrink;
        half high[4], low[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            probability[i] = exp2f(probability[i] - top);
            exponentials += probability[i];
            high[i] = __float2half_rn(probability[i]);
            low[i] = __float2half_rn(probability[i] - __half2float(high[i]));
        }
        const uint32_t high0 = pack(high[0], high[1]), high1 = pack(high[2], high[3]);
        const uint32_t low0 = pack(low[0], low[1]), low1 = pack(low[2], low[3]);
        const float shrink0 = __shfl_sync(~0u, shrink, t * 8), shrink1 = __shfl_sync(~0u, shrink, t * 8 + 4);
#pragma unroll
        for (int c = 0; c < D / 64; c++) {
            const uint32_t word[4][4] = {{value[c][0].x, value[c][0].y, value[c][0].z, value[c][0].w},
                                         {value[c][1].x, value[c][1].y, value[c][1].z, value[c][1].w},
                                         {value[c][2].x, value[c][2].y, value[c][2].z, value[c][2].w},
                                         {value[c][3].x, value[c][3].y, value[c][3].z, value[c][3].w}};
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float (&o)[4] = out[4 * c + j];
                o[0] *= shrink0, o[1] *= shrink1, o[2] *= shrink0, o[3] *= shrink1;
                const uint32_t a0 = __byte_perm(word[0][j], word[1][j], 0x5410),
                               a1 = __byte_perm(word[0][j], word[1][j], 0x7632);
                const uint32_t a2 = __byte_perm(word[2][j], word[3][j], 0x5410),
                               a3 = __byte_perm(word[2][j], word[3][j], 0x7632);
                mma(o, {a0, a1, a2, a3}, high0, high1);
                mma(o, {a0, a1, a2, a3}, low0, low1);
            }
        }
        if (next < end) load_values(next);
    }
    exponentials += __shfl_xor_sync(~0u, exponentials, 1);
    exponentials += __shfl_xor_sync(~0u, exponentials, 2);

    // The block's warps, added in order.
    if (t == 0) {
        warp_largest[warp][g] = largest;
        warp_sum_of[warp][g] = exponentials;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int head = 2 * t + i;
        if (head >= heads) continue;
        float top = warp_largest[0][head];
        for (int w = 1; w < WARPS; w++) top = fmaxf(top, warp_largest[w][head]);
        const float factor = exp2f(warp_largest[warp][head] - top);
        float *to = warp_out + (warp * heads + head) * (D + 1) + g * 8;
#pragma unroll
        for (int j = 0; j < D / 16; j++) {
            to[j / 4 * 64 + j % 4 * 2] = out[j][i] * factor;
            to[j / 4 * 64 + j % 4 * 2 + 1] = out[j][2 + i] * factor;
        }
    }
    __syncthreads();
    const int head_count = p.group * gridDim.x;
    for (int i = threadIdx.x; i < heads * D; i += blockDim.x) {
        const int head = i / D, d = i % D;
        float top = warp_largest[0][head];
        for (int w = 1; w < WARPS; w++) top = fmaxf(top, warp_largest[w][head]);
        float sum = 0.f, all = 0.f;
        for (int w = 0; w < WARPS; w++) {
            sum += warp_out[(w * heads + head) * (D + 1) + d];
            all += warp_sum_of[w][head] * exp2f(warp_largest[w][head] - top);
        }
        if (chunks == 1) {
            store_group(p.out, ((first_head + head) * D + d) / ACTIVATION_GROUP, sum / all);
        } else {
            float *to = p.partial + (size_t(split) * head_count + first_head + head) * (D + 2);
            to[d] = sum;
            if (d == 0) {
                to[D] = top;
                to[D + 1] = all;
            }
        }
    }
    if (chunks == 1) return;

    // The block that ends last adds up the chunks.
    unsigned *finished = p.finished + head_kv + gridDim.x * blockIdx.z;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(finished, 1u) == unsigned(chunks - 1);
        if (last) *finished = 0;
    }
    __syncthreads();
    if (!last) return;
    __threadfence();
    const auto partial = [&](int s, int head) {
        return p.partial + (size_t(s) * head_count + first_head + head) * (D + 2);
    };
    for (int head = warp; head < heads; head += WARPS) {
        float top = NO_SCORE, sums[MAX_SPLITS / WARP], tops[MAX_SPLITS / WARP];
#pragma unroll
        for (int i = 0; i < MAX_SPLITS / WARP; i++) {
            const int s = i * WARP + lane;
            tops[i] = s < chunks ? __ldcg(partial(s, head) + D) : NO_SCORE;
            sums[i] = s < chunks ? __ldcg(partial(s, head) + D + 1) : 0.f;
            top = fmaxf(top, tops[i]);
        }
        top = warp_max(top);
        float all = 0.f;
#pragma unroll
        for (int i = 0; i < MAX_SPLITS / WARP; i++) all += sums[i] * exp2f(tops[i] - top);
        all = warp_sum(all);
#pragma unroll
        for (int i = 0; i < MAX_SPLITS / WARP; i++) weight[i * WARP + lane][head] = exp2f(tops[i] - top) / all;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < heads * D; i += blockDim.x) {
        const int head = i / D, d = i % D;
        float sum = 0.f;
        for (int first = 0; first < chunks; first += AT_ONCE) {
            float part[AT_ONCE];
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++) part[j] = first + j < chunks ? __ldcg(partial(first + j, head) + d) : 0.f;
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++) sum += part[j] * weight[first + j][head];
        }
        store_group(p.out, ((first_head + head) * D + d) / ACTIVATION_GROUP, sum);
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(WARPS *WARP, 2)
    decode_attention_d64(const __grid_constant__ DecodeAttentionParams p) {
    attend<64>(p);
}
extern "C" __global__ void __launch_bounds__(WARPS *WARP, 1)
    decode_attention_d128(const __grid_constant__ DecodeAttentionParams p) {
    attend<128>(p);
}
extern "C" __global__ void __launch_bounds__(WARPS *WARP, 1)
    decode_attention_d256(const __grid_constant__ DecodeAttentionParams p) {
    attend<256>(p);
}
