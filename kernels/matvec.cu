// Matrix-vector products: y[r] = sum over c of W[r, c] * a[c], W in any ggml type, a quantized to 8 bits:
//
//   product_store   out = y (+ bias), for up to three matrices in one launch: QKV, and the output matrix
//   product_add     x += y; then x * (the next norm's weights), quantized: output and down projections
//   product_swiglu  silu(y of gate) * (y of up), quantized
//
// A norm in front of a product needs no kernel and no prologue: W rms_norm(x) = W (x * weight) / rms(x), so whoever writes x also
// writes x * weight, quantized, and the sums of x^2, and the quotient is taken with the product's own result.
//
// Bound: the bytes of W, each read once; arithmetic is about 110 instructions for each 64 weights of a lane, 36 (Q4_K)
// to 53 (Q6_K) bytes: half of what an H100 issues while they arrive.
//
// Grid: one block a multiprocessor, each with an equal, contiguous share of the rows. A row is cut into slices of 2,048 values; warp w
// of a block handles slice w % slices of every (warps / slices)-th tile of two rows, so a lane meets the same 64 activations in
// every row and keeps them in registers. Weights go through a ring in shared memory, private to the warp, filled by
// bulk copies that start before the kernel waits for its predecessor. Each warp leaves one partial sum for each row; after one barrier they are added in slice order.
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
    int thread, threads;     // in the block

    __device__ explicit Work(int columns)
        : columns(columns),
          units((columns + UNIT - 1) / UNIT),
          slices((units + SLICE_UNITS - 1) / SLICE_UNITS),
          warp((threadIdx.y * blockDim.x + threadIdx.x) / WARP),
          lane(threadIdx.x % WARP),
          slice(threadIdx.x / WARP),
          slice_units(min(units - slice * SLICE_UNITS, SLICE_UNITS)),
          group(threadIdx.y),
          groups(blockDim.y),
          thread(threadIdx.y * blockDim.x + threadIdx.x),
          threads(blockDim.x * blockDim.y) {}
};

struct Shared {
    // Dynamic shared memory, in this order.
    uint8_t *ring;   // (warps * ring_bytes)
    float *partial;  // (slices, rows of the block's tiles; product_swiglu: of both matrices)

    int ring_bytes;
    CopyBarrier *arrived;  // of this warp: (MAX_DEPTH)

    __device__ __forceinline__ Shared(const Work &work, int ring_bytes) : ring_bytes(ring_bytes) {
        extern __shared__ __align__(128) uint8_t bytes[];
        __shared__ CopyBarrier barriers[MAX_WARPS][MAX_DEPTH];
        ring = bytes;
        partial = reinterpret_cast<float *>(bytes + work.threads / WARP * ring_bytes);
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
            arrived[slot].template copy<F::tile_bytes(SLICE_UNITS)>(ring + slot * tile_bytes, from, tile_bytes);
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
    const int warps = work.threads / WARP;
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

// 1 / rms of the vector whose groups' sums of squares these are; 1 where there are none.
struct RmsScale {
    static constexpr int KEPT = 4;  // sums that a lane loads at once
    const float *squares;
    int groups;
    float kept[KEPT];

    __device__ __forceinline__ RmsScale(const float *squares, const Work &work)
        : squares(squares), groups(squares ? work.columns / ACTIVATION_GROUP : 0) {
#pragma unroll
        for (int i = 0; i < KEPT; i++) kept[i] = i * WARP + work.lane < groups ? squares[i * WARP + work.lane] : 0.f;
    }

    __device__ __forceinline__ float operator()(float epsilon, const Work &work) const {
        if (!squares) return 1.f;
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < KEPT; i++) sum += kept[i];
        for (int i = KEPT * WARP + work.lane; i < groups; i += WARP) sum += squares[i];
        return 1.f / sqrtf(warp_sum(sum) / work.columns + epsilon);
    }
};

// Where the share of block `index` of `blocks` in `count` things starts; a share has at most one more than count / blocks
// rounded up. A quotient of floats, since an integer division is several times as long.
__device__ __forceinline__ int share(int count, int index, int blocks) {
    return index == blocks ? count : static_cast<int>(__fdividef(float(count) * float(index) + 0.5f, float(blocks)));
}

}  // namespace

// A matrix of a launch.
struct Matrix {
    const uint8_t *weights;  // (columns, rows)
    const float *bias;       // (rows) or null, product_store
    float *out;              // (rows), product_store and product_add
    int type;
    int rows;
    int blocks;  // of the grid that work on it: product_store's sum up to the grid, the others' are the grid
    int unused;
};

struct ProductParams {
    Matrix matrix[3];        // product_store: one to three; product_add: one; product_swiglu: gate and up, of as many rows
    Activation a;            // (columns)
    const float *squares;    // (columns / 32): `a` is x * norm weight, these are the sums of x^2, and y is divided by x's rms; or null
    Activation next;         // (rows): output of product_add (x * next_norm) and product_swiglu
    const float *next_norm;  // (rows), product_add
    float *next_squares;     // (rows / 32), product_add: sums of x^2
    float epsilon;
    int columns;
    int ring_bytes;          // of shared memory for each warp's stream
    int unused;
};
static_assert(sizeof(ProductParams) == 208);

namespace {

enum Epilogue { STORE, ADD, SWIGLU };

template <Epilogue EPILOGUE>
__device__ __forceinline__ void product(const ProductParams &p) {
    // What follows QKV reads the position before its wait, and so may start only when all before QKV has ended.
    if (EPILOGUE != STORE) launch_dependents();
    int block = blockIdx.x, s = 0;
    if constexpr (EPILOGUE == STORE) {
        while (s < 2 && block >= p.matrix[s].blocks) block -= p.matrix[s++].blocks;
    }
    const Matrix matrix = p.matrix[s];
    const int up_type = p.matrix[1].type;
    // Blocks own whole groups of an activation that they write.
    constexpr int GRAIN = EPILOGUE == STORE ? 1 : ACTIVATION_GROUP / TILE_ROWS;
    const int shares = (matrix.rows + GRAIN * TILE_ROWS - 1) / (GRAIN * TILE_ROWS);
    const int begin = share(shares, block, matrix.blocks) * GRAIN, count = share(shares, block + 1, matrix.blocks) * GRAIN - begin;
    const bool interleaved = EPILOGUE == SWIGLU && matrix.type == up_type;

    const Work work(p.columns);
    const Shared shared(work, p.ring_bytes);
    const Tiles tiles{matrix.weights, p.matrix[1].weights, interleaved, matrix.rows, begin, interleaved ? 2 * count : count};
    const int first = begin * TILE_ROWS + work.thread, past = min((begin + count) * TILE_ROWS, matrix.rows);
    const float norm = EPILOGUE == ADD && first < past ? p.next_norm[first] : 0.f;
    prefetch(matrix.type, tiles, work, shared);
    wait_for_predecessor();
    if (EPILOGUE == STORE) launch_dependents();
    const float old = EPILOGUE == ADD && first < past ? matrix.out[first] : 0.f;
    const RmsScale rms(p.squares, work);
    uint32_t parity = 0;
    multiply(matrix.type, tiles, work, shared, p.a, shared.partial, parity);
    const float scale = rms(p.epsilon, work);

    if constexpr (EPILOGUE == STORE) {
        for (int row = first; row < past; row += work.threads) {
            const float bias = matrix.bias ? matrix.bias[row] : 0.f;
            matrix.out[row] = scale * total(matrix.type, work, shared.partial, tiles.rows(), row - begin * TILE_ROWS) + bias;
        }
    } else if constexpr (EPILOGUE == ADD) {
        for (int i = work.thread; i < count * TILE_ROWS; i += work.threads) {
            const int row = begin * TILE_ROWS + i;
            float x = 0.f, weight = 0.f;
            if (row < matrix.rows) {
                x = (row == first ? old : matrix.out[row]) + scale * total(matrix.type, work, shared.partial, tiles.rows(), i);
                weight = row == first ? norm : p.next_norm[row];
                matrix.out[row] = x;
            }
            store_group(p.next, row / ACTIVATION_GROUP, x * weight);
            const float squares = warp_sum(x * x);
            if (work.lane == 0) p.next_squares[row / ACTIVATION_GROUP] = squares;
        }
    } else {
        const float *up_partial = shared.partial;
        if (!interleaved) {
            const Tiles up_tiles{p.matrix[1].weights, nullptr, false, matrix.rows, begin, count};
            float *partial = shared.partial + work.slices * tiles.rows();
            prefetch(up_type, up_tiles, work, shared);
            multiply(up_type, up_tiles, work, shared, p.a, partial, parity);
            up_partial = partial;
        }
        for (int i = work.thread; i < count * TILE_ROWS; i += work.threads) {
            const int at = interleaved ? i / TILE_ROWS * 2 * TILE_ROWS + i % TILE_ROWS : i;
            const float gate = scale * total(matrix.type, work, shared.partial, tiles.rows(), at);
            const float up = scale * total(up_type, work, up_partial, tiles.rows(), interleaved ? at + TILE_ROWS : at);
            const int row = begin * TILE_ROWS + i;
            store_group(p.next, row / ACTIVATION_GROUP, row < matrix.rows ? gate / (1.f + __expf(-gate)) * up : 0.f);
        }
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(MAX_WARPS *WARP, 1) product_store(const __grid_constant__ ProductParams p) { product<STORE>(p); }
extern "C" __global__ void __launch_bounds__(MAX_WARPS *WARP, 1) product_add(const __grid_constant__ ProductParams p) { product<ADD>(p); }
extern "C" __global__ void __launch_bounds__(MAX_WARPS *WARP, 1) product_swiglu(const __grid_constant__ ProductParams p) { product<SWIGLU>(p); }
