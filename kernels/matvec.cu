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

constexpr int MAX_WARPS = 14;
constexpr int MAX_DEPTH = 8;    // tiles in a warp's ring
constexpr int BATCH = 2;        // tiles whose sums a warp reduces together

// The rows of one block in tiles of 2: of one matrix in order, or (`interleaved`) of two matrices of one type in turn.
struct Tiles {
    const uint8_t *first, *second;
    bool interleaved;
    int matrix_rows;
    int begin, count;

    __device__ __forceinline__ const uint8_t *data(int i) const { return interleaved && i % 2 ? second : first; }
    // Past the end of the matrix (a ragged group of 32): the last tile, whose results are not used.
    __device__ __forceinline__ int tile(int i) const {
        return min(begin + (interleaved ? i / 2 : i), (matrix_rows + TILE_ROWS - 1) / TILE_ROWS - 1);
    }
    __device__ __forceinline__ int rows() const { return count * TILE_ROWS; }
};

struct Work {
    int columns;
    int units, slices;
    int warp, lane;
    int slice, slice_units;  // of this warp
    int group, groups;       // this warp's tiles are group, group + groups, ... of its block's

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

// Dynamic shared memory, in this order.
struct Shared {
    uint8_t *ring;   // (warps * ring_bytes)
    int8_t *q;       // norm_*: (columns rounded up to 64)
    float *scale;    // norm_*: (columns rounded up to 64, / 32), rounded up to 16 bytes
    float *partial;  // (slices, rows of the block's tiles; norm_gate_up: of both matrices), rounded up to 16 bytes
    float *value;    // norm_* with float weights: (columns rounded up to 64)
    int ring_bytes;
    CopyBarrier *arrived;  // of this warp: (MAX_DEPTH)

    __device__ __forceinline__ Shared(const Work &work, int ring_bytes, int rows) : ring_bytes(ring_bytes) {
        extern __shared__ __align__(128) uint8_t bytes[];
        __shared__ CopyBarrier barriers[MAX_WARPS][MAX_DEPTH];
        ring = bytes;
        q = reinterpret_cast<int8_t *>(bytes + blockDim.x / WARP * ring_bytes);
        scale = reinterpret_cast<float *>(q + work.units * UNIT);
        partial = scale + (work.units * 2 + 3) / 4 * 4;
        value = partial + (work.slices * rows + 3) / 4 * 4;
        arrived = barriers[work.warp];
        if (work.lane < MAX_DEPTH) arrived[work.lane].init();
        __syncwarp();
    }
};

// One warp's stream of weights: its slice of its tiles, in order, through its ring.
template <int TYPE>
struct Stream {
    using F = Format<TYPE>;

    const Tiles &tiles;
    const Work &work;
    CopyBarrier *arrived;
    uint8_t *ring;
    int tile_bytes, depth;

    __device__ __forceinline__ Stream(const Tiles &tiles, const Work &work, const Shared &shared)
        : tiles(tiles),
          work(work),
          arrived(shared.arrived),
          ring(shared.ring + work.warp * shared.ring_bytes),
          tile_bytes(F::tile_bytes(work.slice_units)),
          depth(min(shared.ring_bytes / tile_bytes, MAX_DEPTH)) {}

    // Starts copying the block's tile `i` (none past the end) to place `slot`.
    __device__ __forceinline__ void load(int i, int slot) {
        if (i < tiles.count) {
            const uint8_t *from = tiles.data(i) + size_t(tiles.tile(i)) * F::pair_bytes(work.units) + work.slice * F::tile_bytes(SLICE_UNITS);
            arrived[slot].copy(ring + slot * tile_bytes, from, tile_bytes);
        }
    }

    __device__ __forceinline__ void prefetch() {
#pragma unroll 1
        for (int slot = 0; slot < depth; slot++) load(work.group + slot * work.groups, slot);
    }

    // Adds up the rows' products: partial[i] for each row `i` of this warp. Call prefetch() before. `parity` (one bit a
    // slot) is what each slot's next phase has, and is left so for a later stream.
    __device__ __forceinline__ void multiply(const int8_t *q, const float *scale, float *partial, uint32_t &parity) {
        ActivationUnit<TYPE> a;
        const int n = work.slice_units, lane = min(work.lane, n - 1);  // lanes without a unit multiply another's by zero
        {
            const int unit = work.slice * SLICE_UNITS + lane;
            int4 values[4];
#pragma unroll
            for (int j = 0; j < 4; j++) values[j] = work.lane < n ? reinterpret_cast<const int4 *>(q)[unit * 4 + j] : int4{};
            const float2 scales = reinterpret_cast<const float2 *>(scale)[unit];
            a.prepare(values, scales.x, scales.y);
        }
        int slot = 0;
        for (int i = work.group; i < tiles.count; i += BATCH * work.groups) {
            float sum[BATCH * TILE_ROWS];
#pragma unroll
            for (int b = 0; b < BATCH; b++) {
                const int at = i + b * work.groups;
                sum[2 * b] = sum[2 * b + 1] = 0.f;
                if (at < tiles.count) {
                    arrived[slot].wait(parity >> slot & 1);
                    parity ^= 1u << slot;
                    const uint8_t *tile = ring + slot * tile_bytes;
#pragma unroll
                    for (int row = 0; row < TILE_ROWS; row++) sum[2 * b + row] = dot_unit<TYPE>(tile, n, row, lane, a);
                    __syncwarp();
                    load(at + depth * work.groups, slot);
                    slot = slot + 1 == depth ? 0 : slot + 1;
                }
            }
            // Halves exchange sums so that eight lanes end with each row's total.
            const bool upper = work.lane & 16, odd = work.lane & 8;
            const float s0 = (upper ? sum[2] : sum[0]) + __shfl_xor_sync(~0u, upper ? sum[0] : sum[2], 16);
            const float s1 = (upper ? sum[3] : sum[1]) + __shfl_xor_sync(~0u, upper ? sum[1] : sum[3], 16);
            float total = (odd ? s1 : s0) + __shfl_xor_sync(~0u, odd ? s0 : s1, 8);
#pragma unroll
            for (int offset = 4; offset > 0; offset /= 2) total += __shfl_xor_sync(~0u, total, offset);
            const int at = i + work.lane / 16 * work.groups;
            if (work.lane % 8 == 0 && at < tiles.count) partial[at * TILE_ROWS + work.lane / 8 % 2] = total;
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
__device__ void float_multiply(const Tiles &tiles, const Work &work, int type, const float *a, float *partial) {
    const int warps = blockDim.x / WARP;
    for (int i = work.warp; i < tiles.rows(); i += warps) {
        const int row = min(tiles.tile(i / TILE_ROWS) * TILE_ROWS + i % TILE_ROWS, tiles.matrix_rows - 1);
        const uint8_t *weights = tiles.data(i / TILE_ROWS) + row * float_stride(type, work.columns);
        const float sum = float_dot(reinterpret_cast<const T *>(weights), a, work.columns, work.lane);
        if (work.lane == 0) partial[i] = sum;
    }
}

// Starts the weights' way into the ring.
__device__ __forceinline__ void prefetch(int type, const Tiles &tiles, const Work &work, const Shared &shared) {
#define PREFETCH(TYPE) Stream<TYPE>(tiles, work, shared).prefetch()
    FOR_QUANTIZED(type, PREFETCH)
#undef PREFETCH
}

// partial[s][i], s a slice, i a row of the block; then a barrier. Float weights have one slice.
__device__ __forceinline__ void multiply(int type, const Tiles &tiles, const Work &work, const Shared &shared, const Activation &a,
                                         float *partial, uint32_t &parity) {
    if (type == F32) {
        float_multiply<float>(tiles, work, type, a.value, partial);
    } else if (type == F16) {
        float_multiply<__half>(tiles, work, type, a.value, partial);
    } else if (type == BF16) {
        float_multiply<__nv_bfloat16>(tiles, work, type, a.value, partial);
    } else {
        float *sums = partial + work.slice * tiles.rows();
#define MULTIPLY(TYPE) Stream<TYPE>(tiles, work, shared).multiply(a.q, a.scale, sums, parity)
        FOR_QUANTIZED(type, MULTIPLY)
#undef MULTIPLY
    }
    __syncthreads();
}

__device__ __forceinline__ float total(int type, const Work &work, const float *partial, int rows, int i) {
    const int slices = is_float(type) ? 1 : work.slices;
    float sum = partial[i];
    for (int s = 1; s < slices; s++) sum += partial[s * rows + i];
    return sum;
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
            if (c % ACTIVATION_GROUP == 0) shared.scale[c / ACTIVATION_GROUP] = largest * (1.f / 127.f);
            if (floats) *reinterpret_cast<float4 *>(shared.value + c) = v;
        }
    }
};

// This block's share of `count` things, `index` of `blocks`.
__device__ __forceinline__ int share(int count, int index, int blocks) { return unsigned(count) * unsigned(index) / unsigned(blocks); }

__device__ __forceinline__ int tile_count(int rows) { return (rows + TILE_ROWS - 1) / TILE_ROWS; }

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

extern "C" __global__ void __launch_bounds__(MAX_WARPS *WARP, 2)
norm_matvec(const __grid_constant__ Segments segments, const float *x, const float *norm_weight, float epsilon, int columns, int ring_bytes) {
    int block = blockIdx.x, s = 0;
    while (s < 2 && block >= segments.segment[s].blocks) block -= segments.segment[s++].blocks;
    const Segment &segment = segments.segment[s];
    const int all = tile_count(segment.rows), begin = share(all, block, segment.blocks), end = share(all, block + 1, segment.blocks);
    const Work work(columns);
    const Tiles tiles{segment.weights, nullptr, false, segment.rows, begin, end - begin};
    const Shared shared(work, ring_bytes, tiles.rows());

    const Norm norm(norm_weight, work);
    prefetch(segment.type, tiles, work, shared);
    wait_for_predecessor();
    launch_dependents();
    const Activation a = norm(x, epsilon, work, shared, is_float(segment.type));
    uint32_t parity = 0;
    multiply(segment.type, tiles, work, shared, a, shared.partial, parity);
    for (int i = threadIdx.x; i < tiles.rows(); i += blockDim.x) {
        const int row = begin * TILE_ROWS + i;
        if (row >= segment.rows) break;
        const float bias = segment.bias ? segment.bias[row] : 0.f;
        segment.out[row] = total(segment.type, work, shared.partial, tiles.rows(), i) + bias;
    }
}

extern "C" __global__ void __launch_bounds__(MAX_WARPS *WARP, 2)
matvec_add(const uint8_t *weights, int type, int matrix_rows, int columns, Activation a, float *x, int ring_bytes) {
    const int all = tile_count(matrix_rows), begin = share(all, blockIdx.x, gridDim.x), end = share(all, blockIdx.x + 1, gridDim.x);
    const Work work(columns);
    const Tiles tiles{weights, nullptr, false, matrix_rows, begin, end - begin};
    const Shared shared(work, ring_bytes, tiles.rows());

    prefetch(type, tiles, work, shared);
    wait_for_predecessor();
    launch_dependents();
    const int first = begin * TILE_ROWS + threadIdx.x, past = min(end * TILE_ROWS, matrix_rows);
    const float old = first < past ? x[first] : 0.f;
    uint32_t parity = 0;
    multiply(type, tiles, work, shared, a, shared.partial, parity);
    for (int row = first; row < past; row += blockDim.x) {
        x[row] = (row == first ? old : x[row]) + total(type, work, shared.partial, tiles.rows(), row - begin * TILE_ROWS);
    }
}

extern "C" __global__ void __launch_bounds__(MAX_WARPS *WARP, 2)
norm_gate_up(const uint8_t *gate, const uint8_t *up, int gate_type, int up_type, int matrix_rows, int columns, const float *x,
             const float *norm_weight, float epsilon, Activation out, int ring_bytes) {
    constexpr int GROUP_TILES = ACTIVATION_GROUP / TILE_ROWS;
    const int all_groups = (matrix_rows + ACTIVATION_GROUP - 1) / ACTIVATION_GROUP;
    const int group = share(all_groups, blockIdx.x, gridDim.x), groups = share(all_groups, blockIdx.x + 1, gridDim.x) - group;
    const int count = groups * GROUP_TILES;
    const Work work(columns);
    const Shared shared(work, ring_bytes, 2 * count * TILE_ROWS);
    const bool interleaved = gate_type == up_type;

    const Tiles tiles{gate, up, interleaved, matrix_rows, group * GROUP_TILES, interleaved ? 2 * count : count};
    const Norm norm(norm_weight, work);
    prefetch(gate_type, tiles, work, shared);
    wait_for_predecessor();
    launch_dependents();
    const Activation a = norm(x, epsilon, work, shared, is_float(gate_type) || is_float(up_type));
    uint32_t parity = 0;
    multiply(gate_type, tiles, work, shared, a, shared.partial, parity);
    const float *up_partial = shared.partial;
    if (!interleaved) {
        const Tiles up_tiles{up, nullptr, false, matrix_rows, tiles.begin, count};
        float *partial = shared.partial + work.slices * tiles.rows();
        prefetch(up_type, up_tiles, work, shared);
        multiply(up_type, up_tiles, work, shared, a, partial, parity);
        up_partial = partial;
    }
    for (int g = work.warp; g < groups; g += blockDim.x / WARP) {
        const int i = g * ACTIVATION_GROUP + work.lane, row = group * ACTIVATION_GROUP + i;
        const int at = interleaved ? i / TILE_ROWS * 2 * TILE_ROWS + i % TILE_ROWS : i;
        const float y = total(gate_type, work, shared.partial, tiles.rows(), at);
        const float factor = total(up_type, work, up_partial, tiles.rows(), interleaved ? at + TILE_ROWS : at);
        store_group(out, group + g, row < matrix_rows ? y / (1.f + __expf(-y)) * factor : 0.f);
    }
}
