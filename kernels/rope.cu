// Rotary embedding of a chunk's queries and keys, and its keys and values to the cache:
//
//   q, k, v = rope(rms_norm(q)), rope(rms_norm(k)), rms_norm(v)   (the norms where the model has them)
//   out[token] = q * scale; cache[place + token] = k, v   (f16)
//
// Bound: bytes; each input is read once. Grid: (tokens, blocks along heads as the host likes) x 256, a warp a head.
#include "kv_cache.cuh"
#include "kv_tiles.cuh"
#include "rope.cuh"

namespace {

template <int D>
__device__ __forceinline__ void rope(const RopeParams &p) {
    using Cache = KvCache<D>;
    __shared__ float2 rotations[D / 2];
    __shared__ float row[8][D];
    launch_dependents();
    wait_for_predecessor();
    const int token = blockIdx.x, position = *p.position + token;
    const int slot = Cache::slot_of(*p.place + token, p.context);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int pairs = p.rope_dims / 2;
    for (int i = threadIdx.x; i < pairs; i += blockDim.x) {
        rotations[i] = rotation(position, p.frequencies[i], p.rope_factor);
    }
    __syncthreads();

    const int heads = p.head_count + (p.stores ? 2 * p.head_count_kv : 0);
    for (int head = blockIdx.y * 8 + warp; head < heads; head += gridDim.y * 8) {
        const int kv = head - p.head_count, v = kv - p.head_count_kv;
        if (v >= 0 && !p.v_norm && !p.compressed) {
            const float *in = p.v + (size_t(token) * p.head_count_kv + v) * D;
            half *to = p.v_cache + Cache::row(v, slot, p.context) * D;
            for (int d = lane * 2; d < D; d += WARP * 2) Cache::store(to + d, in[d], in[d + 1]);
            continue;
        }
        const float *in = v >= 0    ? p.v + (size_t(token) * p.head_count_kv + v) * D
                          : kv >= 0 ? p.k + (size_t(token) * p.head_count_kv + kv) * D
                                    : p.q + (size_t(token) * p.head_count + head) * D;
        const float *norm = v >= 0 ? p.v_norm : kv >= 0 ? p.k_norm : p.q_norm;
        const int rope_dims = v >= 0 ? 0 : p.rope_dims;
        half *to = v >= 0    ? p.v_cache + Cache::row(v, slot, p.context) * D
                   : kv >= 0 ? p.k_cache + Cache::row(kv, slot, p.context) * D
                             : p.q_out + (size_t(token) * p.head_count + head) * D;
        const float factor = kv >= 0 ? 1.f : p.scale;

        float value[D / WARP], squares = 0.f;
#pragma unroll
        for (int i = 0; i < D / WARP; i++) {
            value[i] = in[i * WARP + lane];
            squares += value[i] * value[i];
        }
        const float scale = norm ? 1.f / sqrtf(warp_sum(squares) / D + p.epsilon) : 1.f;
        __syncwarp();
#pragma unroll
        for (int i = 0; i < D / WARP; i++)
            row[warp][i * WARP + lane] = norm ? value[i] * scale * norm[i * WARP + lane] : value[i];
        __syncwarp();
        float2 turned[D / WARP / 2];
#pragma unroll
        for (int d = lane * 2; d < D; d += WARP * 2) {  // values d and d + 1
            float y[2];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int at = d + j;
                if (at >= rope_dims) {
                    y[j] = row[warp][at];
                } else {
                    const int i = p.interleaved ? at / 2 : at % pairs;
                    const bool second = p.interleaved ? at % 2 : at >= pairs;
                    const float a = row[warp][p.interleaved ? 2 * i : i],
                                b = row[warp][p.interleaved ? 2 * i + 1 : i + pairs];
                    y[j] = second ? a * rotations[i].y + b * rotations[i].x : a * rotations[i].x - b * rotations[i].y;
                }
            }
            if (p.compressed) {
                turned[d / (WARP * 2)] = {y[0], y[1]};
            } else {
                *reinterpret_cast<half2 *>(to + d) = __floats2half2_rn(y[0] * factor, y[1] * factor);
            }
        }
        if (!p.compressed) continue;
        __syncwarp();
#pragma unroll
        for (int i = 0; i < D / WARP / 2; i++) {
            *reinterpret_cast<float2 *>(&row[warp][(i * WARP + lane) * 2]) = turned[i];
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < D / WARP; i++) value[i] = row[warp][i * WARP + lane];
        kv_tiles::rotate<D>(value);
#pragma unroll
        for (int i = 0; i < D / WARP; i++) Cache::store(to + i * WARP + lane, value[i] * factor);
    }
}

}  // namespace

#define ROPE(D)                                                                                                \
    extern "C" __global__ void __launch_bounds__(256) rope_tokens_d##D(const __grid_constant__ RopeParams p) { \
        rope<D>(p);                                                                                            \
    }
ROPE(64)
ROPE(128)
ROPE(256)
ROPE(512)
