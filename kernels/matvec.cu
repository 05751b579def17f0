// Matrix-vector products: y[r] = sum over c of W[r, c] * a[c], W in any ggml type, a quantized to 8 bits (DESIGN below).
//
//   norm_matvec    y = W rms_norm(x) (+ bias) for up to three matrices in one launch: QKV, and the output matrix
//   norm_gate_up   a = silu(G rms_norm(x)) * (U rms_norm(x)), quantized
//   matvec_add     x += W a
//
// Bound: the bytes of W, each read once; arithmetic is about 80 instructions for each 64 weights of a lane, a third of
// what an H100 issues while their 36 (Q4_K) to 53 (Q6_K) bytes arrive.
//
// DESIGN. Grid: one block a multiprocessor, each with an equal, contiguous share of the rows. A row is cut into slices of 2,048 values;
// warp w of a block handles slice w % slices of every (warps / slices)-th row, so a lane meets the same 64 activations
// in every row and keeps them in registers. Weights go through a ring in shared memory, private to the warp, filled by
// asynchronous copies that start before the kernel waits for its predecessor: about 80 kB a multiprocessor are under
// way at any time, and two kernels' rings fit beside each other. Norm and quantization are repeated by every block,
// which costs less than a kernel of their own. Each warp leaves one partial sum for each row; after one barrier
// they are added in slice order and the row's epilogue runs.
#include "formats.cuh"

namespace {

// Bytes of a warp's ring. Devices with 100 kB of shared memory take half.
#if __CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200
constexpr int RING_BYTES = 3456;
#else
#ifndef RING_SET
#define RING_SET 6912
#endif
#ifdef LATE
#define TRIGGER_EARLY
#define TRIGGER_LATE launch_dependents()
#else
#define TRIGGER_EARLY launch_dependents()
#define TRIGGER_LATE
#endif
constexpr int RING_BYTES = RING_SET;
#endif
#ifndef MT
#define MT 448
#define MB 2
#endif
constexpr int MAX_THREADS = MT;
// Rows whose sums a warp reduces together.
constexpr int BATCH = 4;
#ifndef PAIR
#define PAIR 1
#endif
constexpr int TOGETHER = PAIR;

struct Matrix {
    const uint8_t *data;
    int type;
    int rows;
};

// The rows of one block: of one matrix in order, or (`interleaved`) of two matrices of one type in turn.
struct Rows {
    const uint8_t *first, *second;
    bool interleaved;
    int matrix_rows;
    int begin, count;

    __device__ __forceinline__ const uint8_t *data(int i) const { return interleaved && i % 2 ? second : first; }
    // Past the end of the matrix (a ragged group of 32): the last row, whose result is not used.
    __device__ __forceinline__ int row(int i) const { return min(begin + (interleaved ? i / 2 : i), matrix_rows - 1); }
};

// Dynamic shared memory, in this order.
struct Shared {
    uint8_t *ring;   // (warps * RING_BYTES)
    int8_t *q;       // norm_*: (columns rounded up to 64)
    float *scale;    // norm_*: (columns rounded up to 64, / 32)
    float *partial;  // (slices, rows of the block; norm_gate_up: of both matrices), rounded up to 16 bytes
    float *value;    // norm_* with float weights: (columns rounded up to 64)
};

struct Work {
    int columns;
    int units, slices;
    int warp, lane;
    int slice, slice_units;  // of this warp
    int group, groups;       // this warp's rows are group, group + groups, ... of its block's

    __device__ explicit Work(int columns)
        : columns(columns),
          units((columns + UNIT - 1) / UNIT),
          slices((units + SLICE_UNITS - 1) / SLICE_UNITS),
          warp(threadIdx.x / WARP),
          lane(threadIdx.x % WARP),
          slice(warp % slices),
          slice_units(min(units - slice * SLICE_UNITS, SLICE_UNITS)),
          group(warp / slices),
          groups(blockDim.x / WARP / slices) {}
};

// One warp's stream of weights: slices of its rows, in order, through its ring.
template <int TYPE>
struct Stream {
    using F = Format<TYPE>;
    static constexpr int DEPTH = RING_BYTES / F::slice_bytes;
    static_assert(DEPTH >= 1);

    const Planes<TYPE> planes;
    const Rows &rows;
    const Work &work;
    uint8_t *ring;
    size_t code_at, high_at, scale_at, super_at;  // of this lane in row 0

    __device__ __forceinline__ Stream(const Rows &rows, const Work &work, uint8_t *ring)
        : planes(rows.matrix_rows, work.units), rows(rows), work(work), ring(ring + work.warp * RING_BYTES) {
        const int unit = work.slice * SLICE_UNITS + work.lane;
        code_at = size_t(work.slice) * SLICE_UNITS * F::code_bytes + work.lane * 16;
        high_at = planes.high_at + unit * F::high_bytes;
        scale_at = planes.scale_at + unit * F::scale_bytes;
        super_at = planes.super_at + work.slice * 16 + work.lane * 4;
    }

    // Starts copying the block's row `i` (none past the end) to place `slot`, as one group.
    __device__ __forceinline__ void load(int i, int slot) {
        if (i < rows.count && work.lane < work.slice_units) {
            const uint8_t *data = rows.data(i);
            const size_t row = rows.row(i);
            uint8_t *to = ring + slot * F::slice_bytes;
#pragma unroll
            for (int piece = 0; piece < F::code_pieces; piece++) {
                copy_async<16>(to + (piece * SLICE_UNITS + work.lane) * 16,
                               data + code_at + row * planes.code_stride + piece * work.slice_units * 16);
            }
            if constexpr (F::high_bytes > 0) {
                copy_async<F::high_bytes>(to + F::high_at + work.lane * F::high_bytes, data + high_at + row * planes.high_stride);
            }
            copy_async<F::scale_bytes>(to + F::scale_at + work.lane * F::scale_bytes, data + scale_at + row * planes.scale_stride);
            if (TYPE == Q6_K && work.lane < (work.slice_units / 4 + 1) / 2) {
                copy_async<4>(to + F::super_at + work.lane * 4, data + super_at + row * planes.super_stride);
            }
        }
        commit_copies();
    }

    __device__ __forceinline__ void prefetch() {
#pragma unroll 1
        for (int slot = 0; slot < DEPTH; slot++) load(work.group + slot * work.groups, slot);
    }

    // Adds up the rows' products: partial[i] for each row `i` of this warp. Call prefetch() before.
    __device__ __forceinline__ void multiply(const int8_t *q, const float *scale, float *partial) {
        ActivationUnit<TYPE> a;
        {
            const int unit = work.slice * SLICE_UNITS + min(work.lane, work.slice_units - 1);
            int4 values[4];
#pragma unroll
            for (int j = 0; j < 4; j++) values[j] = reinterpret_cast<const int4 *>(q)[unit * 4 + j];
            const float2 scales = reinterpret_cast<const float2 *>(scale)[unit];
            a.prepare(values, scales.x, scales.y);
        }
        const bool active = work.lane < work.slice_units;
        int slot = 0;
        for (int i = work.group; i < rows.count; i += BATCH * work.groups) {
            float sum[BATCH];
#pragma unroll
            for (int b = 0; b < BATCH; b += TOGETHER) {
                const int at = i + b * work.groups;
#pragma unroll
                for (int j = 0; j < TOGETHER; j++) sum[b + j] = 0.f;
                if (at < rows.count) {
                    wait_for_copies<DEPTH - TOGETHER>();
                    __syncwarp();
                    int slots[TOGETHER];
#pragma unroll
                    for (int j = 0; j < TOGETHER; j++) {
                        slots[j] = slot;
                        slot = slot + 1 == DEPTH ? 0 : slot + 1;
                        const float product = dot_unit<TYPE>(ring + slots[j] * F::slice_bytes, work.lane, a);
                        sum[b + j] = active && at + j * work.groups < rows.count ? product : 0.f;
                    }
                    __syncwarp();
#pragma unroll
                    for (int j = 0; j < TOGETHER; j++) load(at + (j + DEPTH) * work.groups, slots[j]);
                }
            }
            // Halves exchange sums so that eight lanes end with each row's total.
            const bool upper = work.lane & 16, odd = work.lane & 8;
            const float s0 = (upper ? sum[2] : sum[0]) + __shfl_xor_sync(~0u, upper ? sum[0] : sum[2], 16);
            const float s1 = (upper ? sum[3] : sum[1]) + __shfl_xor_sync(~0u, upper ? sum[1] : sum[3], 16);
            float total = (odd ? s1 : s0) + __shfl_xor_sync(~0u, odd ? s0 : s1, 8);
#pragma unroll
            for (int offset = 4; offset > 0; offset /= 2) total += __shfl_xor_sync(~0u, total, offset);
            const int at = i + work.lane / 8 * work.groups;
            if (work.lane % 8 == 0 && at < rows.count) partial[at] = total;
        }
    }
};

// A row of float weights times float activations, by one warp.
template <typename T>
__device__ float float_dot(const T *row, const float *a, int columns, int lane) {
    constexpr int N = 16 / sizeof(T);
    float sum = 0.f;
    const int whole = columns / N * N;
#pragma unroll 4
    for (int c = lane * N; c < whole; c += WARP * N) {
        const uint4 raw = __ldcs(reinterpret_cast<const uint4 *>(row + c));
        const T *w = reinterpret_cast<const T *>(&raw);
#pragma unroll
        for (int j = 0; j < N; j++) sum += static_cast<float>(w[j]) * a[c + j];
    }
    if (whole + lane < columns) sum += static_cast<float>(row[whole + lane]) * a[whole + lane];
    return warp_sum(sum);
}

template <typename T>
__device__ void float_multiply(const Rows &rows, const Work &work, int type, const float *a, float *partial) {
    const int warps = blockDim.x / WARP;
    for (int i = work.warp; i < rows.count; i += warps) {
        const uint8_t *row = rows.data(i) + rows.row(i) * float_stride(type, work.columns);
        const float sum = float_dot(reinterpret_cast<const T *>(row), a, work.columns, work.lane);
        if (work.lane == 0) partial[i] = sum;
    }
}

// Starts the weights' way into the ring.
__device__ __forceinline__ void prefetch(int type, const Rows &rows, const Work &work, const Shared &shared) {
#define PREFETCH(TYPE) Stream<TYPE>(rows, work, shared.ring).prefetch()
    FOR_QUANTIZED(type, PREFETCH)
#undef PREFETCH
}

// partial[s][i], s a slice, i a row of the block; then a barrier. Float weights have one slice.
__device__ __forceinline__ void multiply(int type, const Rows &rows, const Work &work, const Shared &shared, const Activation &a) {
    if (type == F32) {
        float_multiply<float>(rows, work, type, a.value, shared.partial);
    } else if (type == F16) {
        float_multiply<__half>(rows, work, type, a.value, shared.partial);
    } else if (type == BF16) {
        float_multiply<__nv_bfloat16>(rows, work, type, a.value, shared.partial);
    } else {
        float *partial = shared.partial + work.slice * rows.count;
#define MULTIPLY(TYPE) Stream<TYPE>(rows, work, shared.ring).multiply(a.q, a.scale, partial)
        FOR_QUANTIZED(type, MULTIPLY)
#undef MULTIPLY
    }
    __syncthreads();
}

__device__ __forceinline__ float total(int type, const Work &work, const Shared &shared, int rows, int i) {
    const int slices = is_float(type) ? 1 : work.slices;
    float sum = shared.partial[i];
    for (int s = 1; s < slices; s++) sum += shared.partial[s * rows + i];
    return sum;
}

__device__ Shared carve(const Work &work, int rows) {
    extern __shared__ __align__(16) uint8_t bytes[];
    Shared shared;
    shared.ring = bytes;
    shared.q = reinterpret_cast<int8_t *>(bytes + blockDim.x / WARP * RING_BYTES);
    shared.scale = reinterpret_cast<float *>(shared.q + work.units * UNIT);
    shared.partial = shared.scale + (work.units * 2 + 3) / 4 * 4;
    shared.value = shared.partial + (work.slices * rows + 3) / 4 * 4;
    return shared;
}

// rms_norm(x) * weight, quantized to shared memory; for float weights also as floats. All of it takes one round trip to
// memory, which beside the weights' stream costs over a microsecond.
struct Norm {
    static constexpr int CHUNKS = 4;  // of 4 values that a thread keeps in registers; longer rows are read twice

    const float *weight;

    // Brings the norm's weights close; before the wait.
    __device__ __forceinline__ Norm(const float *weight, const Work &work) : weight(weight) {
        for (int c = threadIdx.x * 32; c < work.columns; c += blockDim.x * 32) asm volatile("prefetch.global.L2 [%0];" ::"l"(weight + c));
    }

    // Ends with a barrier.
    __device__ __forceinline__ Activation operator()(const float *x, float epsilon, const Work &work, const Shared &shared, bool floats) const {
        __shared__ float warp_squares[WARP];
        float4 v[CHUNKS], w[CHUNKS];
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) v[i] = load(x, at(i), work), w[i] = load(weight, at(i), work);
        float squares = 0.f;
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) squares += square(v[i]);
        for (int i = CHUNKS; at(i) < work.columns; i++) squares += square(load(x, at(i), work));
        squares = warp_sum(squares);
        if (work.lane == 0) warp_squares[work.warp] = squares;
        __syncthreads();
        squares = warp_sum(work.lane < blockDim.x / WARP ? warp_squares[work.lane] : 0.f);
        const float scale = 1.f / sqrtf(squares / work.columns + epsilon);
        // A warp stays together for its maxima.
        const int padded = work.units * UNIT;
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) {
            if (at(i) - work.lane * 4 < padded) store(v[i], w[i], scale, at(i), padded, shared, floats);
        }
        for (int i = CHUNKS; at(i) - work.lane * 4 < padded; i++) {
            store(load(x, at(i), work), load(weight, at(i), work), scale, at(i), padded, shared, floats);
        }
        __syncthreads();
        return {shared.q, shared.scale, shared.value};
    }

  private:
    __device__ static __forceinline__ int at(int i) { return (i * blockDim.x + threadIdx.x) * 4; }
    __device__ static __forceinline__ float4 load(const float *from, int c, const Work &work) {
        return c < work.columns ? *reinterpret_cast<const float4 *>(from + c) : float4{};
    }
    __device__ static __forceinline__ float square(float4 v) { return v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w; }

    // Eight lanes share a group of 32.
    __device__ static __forceinline__ void store(float4 v, float4 w, float scale, int c, int padded, const Shared &shared, bool floats) {
        v = {v.x * scale * w.x, v.y * scale * w.y, v.z * scale * w.z, v.w * scale * w.w};
        float largest = fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)));
#pragma unroll
        for (int offset = 4; offset > 0; offset /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, offset));
        if (c < padded) {
            const char4 q = make_char4(quantize(v.x, largest), quantize(v.y, largest), quantize(v.z, largest), quantize(v.w, largest));
            *reinterpret_cast<char4 *>(shared.q + c) = q;
            if (c % ACTIVATION_GROUP == 0) shared.scale[c / ACTIVATION_GROUP] = largest / 127.f;
            if (floats) *reinterpret_cast<float4 *>(shared.value + c) = v;
        }
    }
};

// This block's share of `count` things, `index` of `blocks`.
__device__ __forceinline__ int share(int count, int index, int blocks) { return static_cast<int>(int64_t(count) * index / blocks); }

}  // namespace

// One of the matrices of norm_matvec.
struct Segment {
    const uint8_t *weights;  // (columns, rows)
    const float *bias;       // (rows) or null
    float *out;              // (rows)
    int type;
    int rows;
    int blocks;  // of the grid that work on it; the segments' sum is the grid
    int unused;
};
struct Segments {
    Segment segment[3];
};

extern "C" __global__ void __launch_bounds__(MAX_THREADS, MB)
norm_matvec(const __grid_constant__ Segments segments, const float *x, const float *norm_weight, float epsilon, int columns) {
    int block = blockIdx.x, s = 0;
    while (s < 2 && block >= segments.segment[s].blocks) block -= segments.segment[s++].blocks;
    const Segment &segment = segments.segment[s];
    const int begin = share(segment.rows, block, segment.blocks), end = share(segment.rows, block + 1, segment.blocks);
    const Work work(columns);
    const Rows rows{segment.weights, nullptr, false, segment.rows, begin, end - begin};
    const Shared shared = carve(work, rows.count);

    const Norm norm(norm_weight, work);
    prefetch(segment.type, rows, work, shared);
    wait_for_predecessor();
    TRIGGER_EARLY;
    const Activation a = norm(x, epsilon, work, shared, is_float(segment.type));
    TRIGGER_LATE;
    multiply(segment.type, rows, work, shared, a);
    for (int i = threadIdx.x; i < rows.count; i += blockDim.x) {
        const float bias = segment.bias ? segment.bias[begin + i] : 0.f;
        segment.out[begin + i] = total(segment.type, work, shared, rows.count, i) + bias;
    }
}

extern "C" __global__ void __launch_bounds__(MAX_THREADS, MB)
matvec_add(const uint8_t *weights, int type, int matrix_rows, int columns, Activation a, float *x) {
    const int begin = share(matrix_rows, blockIdx.x, gridDim.x), end = share(matrix_rows, blockIdx.x + 1, gridDim.x);
    const Work work(columns);
    const Rows rows{weights, nullptr, false, matrix_rows, begin, end - begin};
    const Shared shared = carve(work, rows.count);

    prefetch(type, rows, work, shared);
    wait_for_predecessor();
    launch_dependents();
    const int first = threadIdx.x;
    const float old = first < rows.count ? x[begin + first] : 0.f;
    multiply(type, rows, work, shared, a);
    if (first < rows.count) x[begin + first] = old + total(type, work, shared, rows.count, first);
    for (int i = first + blockDim.x; i < rows.count; i += blockDim.x) x[begin + i] += total(type, work, shared, rows.count, i);
}

extern "C" __global__ void __launch_bounds__(MAX_THREADS, MB)
norm_gate_up(const uint8_t *gate, const uint8_t *up, int gate_type, int up_type, int matrix_rows, int columns, const float *x,
             const float *norm_weight, float epsilon, Activation out) {
    const int all_groups = (matrix_rows + ACTIVATION_GROUP - 1) / ACTIVATION_GROUP;
    const int group = share(all_groups, blockIdx.x, gridDim.x), groups = share(all_groups, blockIdx.x + 1, gridDim.x) - group;
    const int begin = group * ACTIVATION_GROUP, count = groups * ACTIVATION_GROUP;
    const Work work(columns);
    const Shared shared = carve(work, 2 * count);
    const bool interleaved = gate_type == up_type;

    const Rows rows{gate, up, interleaved, matrix_rows, begin, interleaved ? 2 * count : count};
    const Norm norm(norm_weight, work);
    prefetch(gate_type, rows, work, shared);
    wait_for_predecessor();
    TRIGGER_EARLY;
    const Activation a = norm(x, epsilon, work, shared, is_float(gate_type) || is_float(up_type));
    TRIGGER_LATE;
    multiply(gate_type, rows, work, shared, a);
    Shared second = shared;
    if (!interleaved) {
        second.partial += work.slices * count;
        const Rows up_rows{up, nullptr, false, matrix_rows, begin, count};
        prefetch(up_type, up_rows, work, second);
        multiply(up_type, up_rows, work, second, a);
    }
    for (int g = work.warp; g < groups; g += blockDim.x / WARP) {
        const int i = g * ACTIVATION_GROUP + work.lane;
        const float y = total(gate_type, work, shared, rows.count, interleaved ? 2 * i : i);
        const float factor = total(up_type, work, second, rows.count, interleaved ? 2 * i + 1 : i);
        store_group(out, group + g, begin + i < matrix_rows ? y / (1.f + __expf(-y)) * factor : 0.f);
    }
}
