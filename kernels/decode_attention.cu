// Attention of one new token, from the products of QKV to the quantized input of the output projection, in one kernel;
// its arithmetic is decode_attention.cuh's.
//
// Bound: 4 * head_dim bytes for each token that is seen and key/value head, each read once: a block serves all query
// heads of its key/value head (8 at most; more take another layer of blocks).
//
// Grid: (head_count_kv, splits, (group + 7) / 8) x 256 threads. What a chunk of the tokens is follows from the position
// in device memory, so the launch is the same for every position. Blocks without a chunk end at once. The block of a
// head that finishes last adds up the chunks, in order, so the result does not depend on which it was.
#include "decode_attention.cuh"
#include "softcap.cuh"

namespace {

using namespace decode_attention;

constexpr int AT_ONCE = 16;  // chunks whose sums a thread loads together

template <int D>
__device__ __forceinline__ void attend(const DecodeAttentionParams &p) {
    using Cache = KvCache<D>;
    __shared__ __align__(16) QueryFragments<D> query;
    __shared__ float row[WARPS][D];
    __shared__ WarpSums sums;
    __shared__ float weight[MAX_SPLITS][HEADS];
    __shared__ bool last;
    extern __shared__ __align__(16) float warp_out[];

    const AttentionLayer &layer = p.layer;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int g = lane / 4, t = lane % 4;  // as the matrix instruction numbers them
    const int team = warp / PARTS<D>, part = part_of_warp<D>();
    const int head_kv = blockIdx.x, split = blockIdx.y, splits = gridDim.y;
    const int heads = min(layer.group - int(blockIdx.z) * HEADS, HEADS);
    const int first_head = head_kv * layer.group + blockIdx.z * HEADS;

    // The position and the older tokens' keys and values may be read before the wait: this kernel started when all
    // before its predecessor had ended, since a kernel lets its successor start only after its own wait. So may the
    // newest token's where an earlier layer has stored them: the predecessor computed this layer's queries, and that
    // layer's attention came before it.
    const int position = *p.position;
    const int first = layer.window ? max(position + 1 - layer.window, 0) : 0;
    const Chunks chunks(position + 1 - first, splits);
    const int begin = first + split * chunks.chunk, end = min(begin + chunks.chunk, position + 1);
    if (begin > position) {
        wait_for_predecessor();
        launch_dependents();
        return;
    }
    const bool stores_newest = layer.stores && end > position;
    const int stored = layer.stores ? position : position + 1;  // tokens whose keys and values are there
    const typename Cache::Slots slot_of(begin, layer.context);
    half *k_cache = layer.k_cache + Cache::row(head_kv, 0, layer.context) * D;
    half *v_cache = layer.v_cache + Cache::row(head_kv, 0, layer.context) * D;

    // Of 16 tokens. Plain loads: this block writes the newest token.
    uint4 key[2][PART<D> / 32], value[PART<D> / 64][4];
    auto load_keys = [&](int from) {
#pragma unroll
        for (int tile = 0; tile < 2; tile++) {
            const half *at = k_cache + size_t(slot_of(min(from + tile * 8 + g, end - 1))) * D + part * PART<D> + t * 8;
#pragma unroll
            for (int c = 0; c < PART<D> / 32; c++) key[tile][c] = Cache::load(at + c * 32);
        }
    };
    auto load_values = [&](int from) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int token = min(from + i / 2 * 8 + t * 2 + i % 2, end - 1);
            const half *at = v_cache + size_t(slot_of(token)) * D + part * PART<D> + g * 8;
#pragma unroll
            for (int c = 0; c < PART<D> / 64; c++) value[c][i] = Cache::load(at + c * 64);
        }
    };
    int from = begin + team * STEP;
    const bool early = min(from + STEP, end) <= stored;
    if (early && from < end) {
        load_keys(from);
        load_values(from);
    }

    // One warp rotates the new key, and after it the last query head of a full group; one normalizes the new value.
    const bool for_key = stores_newest && warp == WARPS - 1;
    const bool for_value = stores_newest && layer.v_norm && warp == WARPS - 2;
    const HeadRope<D> head_rope(layer, position);
    float query_norm[D / WARP], key_norm[D / WARP];
    load_norm<D>(layer.q_norm, query_norm);
    load_norm<D>(layer.k_norm, key_norm);
    wait_for_predecessor();
    launch_dependents();
    const size_t newest = size_t(slot_of(position)) * D;
    if (stores_newest && !layer.v_norm) {
        for (int d = threadIdx.x; d < D; d += WARPS * WARP) Cache::store(v_cache + newest + d, p.v[head_kv * D + d]);
    }
    auto load_head = [&](const float *in, float (&x)[D / WARP]) {
#pragma unroll
        for (int i = 0; i < D / WARP; i++) x[i] = in[i * WARP + lane];
    };
    float x[D / WARP];
    if (for_value) {
        load_head(p.v + head_kv * D, x);
        const float scale = head_scale<D>(x, layer.epsilon);
#pragma unroll
        for (int i = 0; i < D / WARP; i++) {
            const int d = i * WARP + lane;
            Cache::store(v_cache + newest + d, x[i] * scale * layer.v_norm[d]);
        }
    }
    if (for_key) {
        half *to = k_cache + newest;
        load_head(p.k + head_kv * D, x);
        head_rope(x, layer.k_norm, key_norm, layer, row[warp]);
#pragma unroll
        for (int i = 0; i < D / WARP; i++) Cache::store(to + i * WARP + lane, x[i]);
    }
    if (warp < heads) {
        load_head(p.q + (first_head + warp) * D, x);
        head_rope(x, layer.q_norm, query_norm, layer, row[warp]);
    } else {
#pragma unroll
        for (float &value : x) value = 0.f;
    }
    query.store(warp, x, layer.scale);
    __syncthreads();
    if (!early && from < end) {
        load_keys(from);
        load_values(from);
    }

    Gathered<D> gathered;
    const float softcap = layer.softcap;
    for (int step = 0; from < end; from += TEAMS<D> * STEP, step++) {
        const int next = from + TEAMS<D> * STEP;
        gathered.add(
            query, from, end, [&](int tile, int c) { return key[tile][c]; },
            [&] {
                if (next < end) load_keys(next);
            },
            [&](float (&score)[4]) {
                if constexpr (PARTS<D> == 2) {
                    __shared__ Exchange exchange;
                    exchange(score, step);
                }
                if (softcap != 0.f) cap_scores(score, softcap);
            },
            [&](int c, int i) { return value[c][i]; });
        if (next < end) load_values(next);
    }

    sums.out = warp_out;
    const int head_count = layer.group * gridDim.x;
    const auto sync = [] { __syncthreads(); };
    join_warps(gathered, heads, min((end - begin + STEP - 1) / STEP, TEAMS<D>), threadIdx.x, WARPS * WARP, sums, sync,
               [&](int head, int d, float sum, float top, float all) {
                   if (chunks.count == 1) {
                       store_group(p.out, ((first_head + head) * D + d) / ACTIVATION_GROUP, sum / all);
                   } else {
                       float *to = p.partial + (size_t(split) * head_count + first_head + head) * (D + 2);
                       to[d] = sum;
                       if (d == 0) {
                           to[D] = top;
                           to[D + 1] = all;
                       }
                   }
               });
    if (chunks.count == 1) return;

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
    const auto partial = [&](int s, int head) {
        return p.partial + (size_t(s) * head_count + first_head + head) * (D + 2);
    };
    for (int head = warp; head < heads; head += WARPS) {
        float tops[MAX_SPLITS / WARP], all[MAX_SPLITS / WARP];
#pragma unroll
        for (int i = 0; i < MAX_SPLITS / WARP; i++) {
            const int s = i * WARP + lane;
            tops[i] = s < chunks.count ? __ldcg(partial(s, head) + D) : NO_SCORE;
            all[i] = s < chunks.count ? __ldcg(partial(s, head) + D + 1) : 0.f;
        }
        const ChunkWeights weights(tops, all);
#pragma unroll
        for (int i = 0; i < MAX_SPLITS / WARP; i++) weight[i * WARP + lane][head] = weights.of[i];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < heads * D; i += blockDim.x) {
        const int head = i / D, d = i % D;
        float sum = 0.f;
        for (int first = 0; first < chunks.count; first += AT_ONCE) {
            float part[AT_ONCE];
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++)
                part[j] = first + j < chunks.count ? __ldcg(partial(first + j, head) + d) : 0.f;
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
extern "C" __global__ void __launch_bounds__(WARPS *WARP, 1)
    decode_attention_d512(const __grid_constant__ DecodeAttentionParams p) {
    attend<512>(p);
}
