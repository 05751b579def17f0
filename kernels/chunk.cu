// What a chunk of tokens needs between its products.
//
//   norm_tokens   out[token] = x[token] / sqrt(mean(x[token]^2) + epsilon) * weight, as Tiles
//   rope_tokens   q, k = rope(rms_norm(q)), rope(rms_norm(k)); q in f16 times log2(e) / sqrt(head_dim); k and v to the cache
//   gate_tokens   out[token] = silu(gate[token]) * up[token] * factor, as Tiles (where gate and up differ in type)
//   float_to_half the same matrix in f16, for matmul_f16
//
// Bound: bytes; each input is read once. Grids: norm_tokens, a block of whole warps for each token, best with a thread for 4 values;
// rope_tokens, (tokens, blocks along heads as the host likes) x 256; gate_tokens, (columns rounded up to 128) / 4 threads in
// blocks of 256 along x, tokens along y; float_to_half, one thread for each 8 values of a row, 256 a block along x, rows along y.
#include "formats.cuh"
#include "tiles.cuh"

extern "C" __global__ void __launch_bounds__(1024)
norm_tokens(const float *x, const float *weight, __half *out, float epsilon, int columns, int padded_tokens) {
    __shared__ float part[WARP];
    launch_dependents();
    const int token = blockIdx.x, first = threadIdx.x * 4, stride = blockDim.x * 4;
    const auto load = [&](const float *from, int c) { return c < columns ? *reinterpret_cast<const float4 *>(from + c) : float4{}; };
    const float4 first_weight = load(weight, first);  // no kernel writes it
    wait_for_predecessor();
    x += size_t(token) * columns;
    const float4 first_value = load(x, first);
    const auto squares_of = [](float4 v) { return v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w; };
    float squares = squares_of(first_value);
    for (int c = first + stride; c < columns; c += stride) squares += squares_of(load(x, c));
    squares = warp_sum(squares);
    if (threadIdx.x % WARP == 0) part[threadIdx.x / WARP] = squares;
    __syncthreads();
    squares = warp_sum(threadIdx.x % WARP < blockDim.x / WARP ? part[threadIdx.x % WARP] : 0.f);
    const float scale = 1.f / sqrtf(squares / columns + epsilon);

    const Tiles tiles{out, padded_tokens};
    for (int c = first; c < round_up(columns, STEP_VALUES); c += stride) {
        const float4 v = c == first ? first_value : load(x, c), w = c == first ? first_weight : load(weight, c);
        tiles.store(token, c, {v.x * scale * w.x, v.y * scale * w.y, v.z * scale * w.z, v.w * scale * w.w});
    }
}

extern "C" __global__ void __launch_bounds__(256)
gate_tokens(const float *gate, const float *up, __half *out, float factor, int columns, int padded_tokens) {
    launch_dependents();
    wait_for_predecessor();
    const int token = blockIdx.y, c = (blockIdx.x * blockDim.x + threadIdx.x) * 4;
    if (c >= round_up(columns, STEP_VALUES)) return;
    float4 v = {};
    if (c < columns) {
        const float4 g = *reinterpret_cast<const float4 *>(gate + size_t(token) * columns + c);
        const float4 u = *reinterpret_cast<const float4 *>(up + size_t(token) * columns + c);
        const auto gated = [&](float a, float b) { return fminf(fmaxf(a / (1.f + __expf(-a)) * b * factor, -65504.f), 65504.f); };
        v = {gated(g.x, u.x), gated(g.y, u.y), gated(g.z, u.z), gated(g.w, u.w)};
    }
    Tiles{out, padded_tokens}.store(token, c, v);
}

// `out` as formats.cuh lays out F16.
extern "C" __global__ void __launch_bounds__(256)
float_to_half(const uint8_t *weights, int type, int columns, uint8_t *out) {
    launch_dependents();
    wait_for_predecessor();
    const size_t row = blockIdx.y;
    const int c = (blockIdx.x * blockDim.x + threadIdx.x) * 8;
    __half *to = reinterpret_cast<__half *>(out + row * float_stride(F16, columns));
    weights += row * float_stride(type, columns);
    for (int i = c; i < min(c + 8, columns); i++) {
        to[i] = type == F32 ? __float2half_rn(reinterpret_cast<const float *>(weights)[i])
                            : __float2half_rn(__bfloat162float(reinterpret_cast<const __nv_bfloat16 *>(weights)[i]));
    }
}

struct RopeParams {
    const float *q;            // (head_count * head_dim, tokens)
    const float *k;            // (head_count_kv * head_dim, tokens)
    const float *v;            // (head_count_kv * head_dim, tokens)
    const float *q_norm;       // (head_dim) or null
    const float *k_norm;       // (head_dim) or null
    const float *frequencies;  // (rope_dims / 2): radians a position
    __half *q_out;             // (head_dim, head_count, tokens)
    __half *k_cache;           // (head_dim, context, head_count_kv), of this layer
    __half *v_cache;           // likewise
    const int *position;       // of the first token
    float epsilon;
    int context;
    int head_count;
    int head_count_kv;
    int rope_dims;
    int interleaved;
};

namespace {

template <int D>
__device__ __forceinline__ void rope(const RopeParams &p) {
    __shared__ float2 turn[D / 2];
    __shared__ float row[8][D];
    launch_dependents();
    wait_for_predecessor();
    const int token = blockIdx.x, position = *p.position + token;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int half = p.rope_dims / 2;
    for (int i = threadIdx.x; i < half; i += blockDim.x) turn[i] = rotation(position, p.frequencies[i]);
    __syncthreads();

    const int heads = p.head_count + 2 * p.head_count_kv;
    for (int head = blockIdx.y * 8 + warp; head < heads; head += gridDim.y * 8) {
        const int kv = head - p.head_count, v = kv - p.head_count_kv;
        if (v >= 0) {
            const float *in = p.v + (size_t(token) * p.head_count_kv + v) * D;
            __half *to = p.v_cache + (size_t(v) * p.context + position) * D;
            for (int d = lane * 2; d < D; d += WARP * 2) *reinterpret_cast<__half2 *>(to + d) = __floats2half2_rn(in[d], in[d + 1]);
            continue;
        }
        const float *in = kv >= 0 ? p.k + (size_t(token) * p.head_count_kv + kv) * D : p.q + (size_t(token) * p.head_count + head) * D;
        const float *norm = kv >= 0 ? p.k_norm : p.q_norm;
        __half *to = kv >= 0 ? p.k_cache + (size_t(kv) * p.context + position) * D : p.q_out + (size_t(token) * p.head_count + head) * D;
        const float factor = kv >= 0 ? 1.f : rsqrtf(float(D)) * 1.44269504f;

        float value[D / WARP], squares = 0.f;
#pragma unroll
        for (int i = 0; i < D / WARP; i++) {
            value[i] = in[i * WARP + lane];
            squares += value[i] * value[i];
        }
        const float scale = norm ? 1.f / sqrtf(warp_sum(squares) / D + p.epsilon) : 1.f;
        __syncwarp();
#pragma unroll
        for (int i = 0; i < D / WARP; i++) row[warp][i * WARP + lane] = norm ? value[i] * scale * norm[i * WARP + lane] : value[i];
        __syncwarp();
        for (int d = lane * 2; d < D; d += WARP * 2) {  // values d and d + 1
            float y[2];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int at = d + j;
                if (at >= p.rope_dims) {
                    y[j] = row[warp][at];
                } else {
                    const int i = p.interleaved ? at / 2 : at % half;
                    const bool second = p.interleaved ? at % 2 : at >= half;
                    const float a = row[warp][p.interleaved ? 2 * i : i], b = row[warp][p.interleaved ? 2 * i + 1 : i + half];
                    y[j] = second ? a * turn[i].y + b * turn[i].x : a * turn[i].x - b * turn[i].y;
                }
            }
            *reinterpret_cast<__half2 *>(to + d) = __floats2half2_rn(y[0] * factor, y[1] * factor);
        }
    }
}

}  // namespace

#define ROPE(D)                                         \
    extern "C" __global__ void __launch_bounds__(256)   \
    rope_tokens_d##D(const __grid_constant__ RopeParams p) { rope<D>(p); }
ROPE(64)
ROPE(128)
ROPE(256)
