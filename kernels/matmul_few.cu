// Products of a quantized matrix with up to 32 tokens, as products.cuh has them.
//
// Bound: the weights' bytes, each read from memory once. Arithmetic is some 27 instructions of a warp for each 256 weights.
//
// Grid: each warp but the last multiplies a strip of 16 rows (Gate: 8 of both matrices) with all tokens; the last one fetches
// tokens, which the block's warps share. Rows are cut into `slices` as well, so that a block has about the same work for every
// shape: block b takes strips (b / slices) * warps .. of slice b % slices, then those of b + gridDim.x. Weights wait in a ring
// of the warp's own, filled from before the predecessor has ended, so that a whole small matrix is under way at once. A strip's slices
// meet in `partial`; the warp that ends last adds them in order of columns, so the result does not depend on which it was.
#include "fragments.cuh"
#include "products.cuh"

namespace {

constexpr int N = 32;
constexpr int STRIP = 16;
constexpr int MAX_WARPS = 16;
constexpr int MAX_STAGES = 16;
constexpr int RING = 3;            // runs of weights a warp
constexpr int PART = STRIP * N;    // sums of a strip

// Which rows a strip holds: `row` .. of one matrix; Gate: row .. row + 7 of both.
struct Strip {
    int matrix, row;

    __device__ Strip(const ProductParams &p, int strip) : matrix(0), row(strip * (p.epilogue == Gate ? STRIP / 2 : STRIP)) {
        if (p.epilogue == Gate) return;
        while (matrix + 1 < p.matrices && row >= round_up(p.matrix[matrix].rows, STRIP)) row -= round_up(p.matrix[matrix++].rows, STRIP);
    }
    __device__ static int count(const ProductParams &p) {
        if (p.epilogue == Gate) return round_up(p.matrix[0].rows, STEP_VALUES) / (STRIP / 2);
        int rows = 0;
        for (int i = 0; i < p.matrices; i++) rows += round_up(p.matrix[i].rows, STRIP);
        return rows / STRIP;
    }
    // Where the rows of half h of the fragment begin.
    __device__ int first(const ProductParams &p, int h) const { return p.epilogue == Gate ? row : row + h * 8; }
};

// One warp's part of the work: a strip (perhaps past the last), and runs of its columns.
struct Item {
    int strip, slice, begin, end;

    __device__ Item(const ProductParams &p, int index, int warps, int runs) {
        slice = index % p.slices;
        strip = index / p.slices * warps + int(threadIdx.x) / WARP;
        begin = runs * slice / p.slices, end = runs * (slice + 1) / p.slices;
    }
};

// Adds up the products of one step, in shared memory: weights of a run at `from`, whose units count from `first_unit` of a slice of `units`, and
// tokens at `tokens`. `piece[i]`: where a lane reads pieces 2 i and 2 i + 1 of a block of tokens.
template <int TYPE>
__device__ __forceinline__ void multiply(float (&sum)[N / 8][4], const uint8_t *from, const Place<TYPE, 1> &place, int step, int first_unit, int units,
                                         uint32_t tokens, const uint32_t (&piece)[4]) {
    Decoder<TYPE, 1> row[2];
#pragma unroll
    for (int h = 0; h < 2; h++) row[h].load(from, place, h, step, first_unit, units);
#pragma unroll
    for (int w = 0; w < 4; w++) {  // a word of codes, two steps of the matrix instruction
        uint32_t a[2][4];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            row[h].template decode<0>(w, a[0][h], a[0][2 + h]);
            row[h].template decode<1>(w, a[1][h], a[1][2 + h]);
        }
#pragma unroll
        for (int k = 0; k < 2; k++) {
#pragma unroll
            for (int j = 0; j < N / 16; j++) {
                uint32_t b[4];
                load_matrices(b, tokens + piece[w % 2 * 2 + k] + w / 2 * (TOKEN_BYTES<N> / 2) + j * 16 * 128);
                mma(sum[2 * j], a[k], b[0], b[1]);
                mma(sum[2 * j + 1], a[k], b[2], b[3]);
            }
        }
    }
}

// Joins a strip's slices. True in the warp that has all of them, in `sum`.
__device__ __forceinline__ bool join(const ProductParams &p, const Item &item, float (&sum)[N / 8][4]) {
    const int lane = threadIdx.x % WARP;
    float4 *parts = reinterpret_cast<float4 *>(p.partial + size_t(item.strip) * p.slices * PART) + lane;
    const auto part = [&](int slice, int j) { return parts + slice * (PART / 4) + j * WARP; };
#pragma unroll
    for (int j = 0; j < N / 8; j++) __stcg(part(item.slice, j), {sum[j][0], sum[j][1], sum[j][2], sum[j][3]});
    __threadfence();
    __syncwarp();
    unsigned ended = 0;
    if (lane == 0) {
        ended = atomicAdd(p.finished + item.strip, 1u) + 1;
        if (ended == unsigned(p.slices)) p.finished[item.strip] = 0;
    }
    if (__shfl_sync(~0u, ended, 0) < unsigned(p.slices)) return false;
    __threadfence();
#pragma unroll
    for (int j = 0; j < N / 8; j++) sum[j][0] = sum[j][1] = sum[j][2] = sum[j][3] = 0.f;
#pragma unroll 4
    for (int slice = 0; slice < p.slices; slice++) {
#pragma unroll
        for (int j = 0; j < N / 8; j++) {
            const float4 of = __ldcg(part(slice, j));
            sum[j][0] += of.x, sum[j][1] += of.y, sum[j][2] += of.z, sum[j][3] += of.w;
        }
    }
    return true;
}

template <int TYPE>
__device__ __forceinline__ void product(const ProductParams &p) {
    using R = Run<TYPE, 1>;
    constexpr int STEPS = R::values / STEP_VALUES;  // of a run
    extern __shared__ __align__(1024) uint8_t shared[];
    __shared__ uint64_t barriers[2][MAX_STAGES];

    launch_dependents();
    const int warps = blockDim.x / WARP - 1, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const auto full = [&](int stage) { return Barrier{&barriers[0][stage]}; };
    const auto empty = [&](int stage) { return Barrier{&barriers[1][stage]}; };
    if (threadIdx.x == 0) {
        for (int i = 0; i < p.stages; i++) full(i).init(FETCH_ARRIVALS), empty(i).init(warps);
        Barrier::publish();
    }
    __syncthreads();

    const int strips = Strip::count(p), items = (strips + warps - 1) / warps * p.slices;
    const int units = (p.columns + UNIT - 1) / UNIT;
    const int steps = (p.columns + STEP_VALUES - 1) / STEP_VALUES, runs = (p.columns + R::values - 1) / R::values;
    int stage = 0, parity = 0;
    const auto next_stage = [&] {
        if (++stage == p.stages) stage = 0, parity ^= 1;
    };

    if (warp == warps) {  // fetch tokens
        wait_for_predecessor();
        for (int index = blockIdx.x; index < items; index += gridDim.x) {
            const Item item(p, index, warps, runs);
            for (int step = item.begin * STEPS; step < min(item.end * STEPS, steps); step++) {
                empty(stage).wait(parity ^ 1);
                fetch_tokens<N>(p, shared + stage * TOKEN_BYTES<N>, step, 0, full(stage));
                next_stage();
            }
        }
        return;
    }

    // Weights run RING - 1 runs ahead, past the ends of items. They are not written by kernels: no need to wait.
    uint8_t *const ring = shared + p.stages * TOKEN_BYTES<N> + warp * RING * R::bytes;
    int ahead = blockIdx.x, ahead_slot = 0, ahead_run = 0, ahead_end = 0;
    Half half[2];
    const auto load_item = [&] {
        const Item item(p, ahead, warps, runs);
        ahead_run = item.begin, ahead_end = ahead < items ? item.end : item.begin;
        const Strip strip(p, item.strip);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const Matrix &matrix = p.matrix[p.epilogue == Gate ? h : strip.matrix];
            const int first = strip.first(p, h);
            half[h] = {row_start<TYPE>(matrix.weights, first, p.columns), matrix.rows - first};
        }
    };
    const auto load_run = [&] {
        if (ahead_run < ahead_end) {
            copy_run<TYPE, 1>(ring + ahead_slot * R::bytes, half, ahead_run, p.columns);
            if (++ahead_run == ahead_end) {
                ahead += gridDim.x;
                load_item();
            }
        }
        if (++ahead_slot == RING) ahead_slot = 0;
        commit_copies();
    };
    load_item();
    for (int i = 0; i < RING - 1; i++) load_run();
    wait_for_predecessor();

    const Place<TYPE, 1> place;
    uint32_t piece[4];
#pragma unroll
    for (int i = 0; i < 4; i++) piece[i] = (lane / 16 * 8 + lane % 8) * 128 + ((2 * i + lane / 8 % 2) ^ lane % 8) * 16;
    const uint32_t first_stage = shared_address(shared);
    int slot = RING - 1;  // of the current run
    for (int index = blockIdx.x; index < items; index += gridDim.x) {
        const Item item(p, index, warps, runs);
        float sum[N / 8][4];
#pragma unroll
        for (int j = 0; j < N / 8; j++) sum[j][0] = sum[j][1] = sum[j][2] = sum[j][3] = 0.f;
        for (int run = item.begin; run < item.end; run++) {
            __syncwarp();  // all lanes have read the run that gives way
            load_run();
            wait_for_copies<RING - 1>();
            __syncwarp();
            if (++slot == RING) slot = 0;
            const int first_unit = run * R::units, slice = first_unit / SLICE_UNITS;
            const int slice_units = min(units - slice * SLICE_UNITS, SLICE_UNITS);
            for (int step = 0; step < min(STEPS, steps - run * STEPS); step++) {
                full(stage).wait(parity);
                if (item.strip < strips) {
                    multiply<TYPE>(sum, ring + slot * R::bytes, place, step, first_unit % SLICE_UNITS, slice_units,
                                   first_stage + stage * TOKEN_BYTES<N>, piece);
                }
                __syncwarp();
                if (lane == 0) empty(stage).arrive();
                next_stage();
            }
        }
        if (item.strip >= strips || (p.slices > 1 && !join(p, item, sum))) continue;
        const Strip strip(p, item.strip);
        finish<N>(p, strip.matrix, strip.first(p, 0) + lane / 4, strip.first(p, 1) + lane / 4, 0, sum);
    }
}

}  // namespace

#define PRODUCT(NAME, TYPE)                                            \
    extern "C" __global__ void __launch_bounds__(MAX_WARPS * WARP, 1)  \
    matmul_few_##NAME(const __grid_constant__ ProductParams p) { product<TYPE>(p); }
PRODUCT(q4_k, Q4_K)
PRODUCT(q6_k, Q6_K)
PRODUCT(q5_k, Q5_K)
PRODUCT(q8_0, Q8_0)
PRODUCT(q4_0, Q4_0)
PRODUCT(q4_1, Q4_1)
PRODUCT(q5_0, Q5_0)
PRODUCT(q5_1, Q5_1)
PRODUCT(f16, F16)
