// GEMM for up to 32 tokens, on sm_90a up to 128: out[token, row] = W[row] . x[token], with the epilogues of gemm.cuh.
//
// Bound: the weights' bytes, each read from memory once. Decoding takes some 30 instructions of a warp for 256 weights.
//
// Grid: (groups of strips, slices). Each warp but the last multiplies a strip of 16 rows (Gate: 8 of both matrices)
// with all tokens; the last one fetches tokens, which the block's warps share. Rows are cut into slices as well, so
// that blocks have about the same work for every shape. Block x takes strips x * warps .. and then those of block x +
// gridDim.x. Weights wait in a ring of the warp's own, filled from before the predecessor has ended, so that a whole
// small matrix is under way at once. A strip's slices are left in the split-K workspace `partial`; the warp that ends
// last adds them in order of columns, so the result does not depend on which it was. On sm_90a four warps multiply
// together: their number is a multiple of four.
#include "gemm.cuh"

namespace {

constexpr int STRIP = 16;
constexpr int MAX_WARPS = 16;
constexpr int MAX_STAGES = 16;

// Which rows a strip holds: `row` .. of one matrix; Gate: row .. row + 7 of both.
struct Strip {
    int matrix, row;

    __device__ Strip(const GemmParams &p, int strip)
        : matrix(0),
          row(strip * (p.epilogue == Gate ? STRIP / 2 : STRIP)) {
        if (p.epilogue == Gate) return;
        while (matrix + 1 < p.matrices && row >= round_up(p.matrix[matrix].rows, STRIP))
            row -= round_up(p.matrix[matrix++].rows, STRIP);
    }
    __device__ static int count(const GemmParams &p) {
        if (p.epilogue == Gate) return round_up(p.matrix[0].rows, STEP_VALUES) / (STRIP / 2);
        int rows = 0;
        for (int i = 0; i < p.matrices; i++) rows += round_up(p.matrix[i].rows, STRIP);
        return rows / STRIP;
    }
    // Where the rows of row group h of the fragment begin.
    __device__ int first(const GemmParams &p, int h) const { return p.epilogue == Gate ? row : row + h * 8; }
};

// How a block that multiplies N tokens at most is made up.
template <int N>
struct LaunchConfig {
    static constexpr int ring = N == 128 ? 2 : 3;      // runs of weights a warp
    static constexpr bool moves_registers = N == 128;  // from the warpgroup that fetches to the others
    static constexpr int fetching_warps = moves_registers ? WARPGROUP / WARP : 1;  // of which one works
};

// Split-K: adds up a strip's slices. True in the warp that has all of them, in `sum`.
template <int QUADS>
__device__ __forceinline__ bool add_slices(const GemmParams &p, int strip, float (&sum)[QUADS][4]) {
    const unsigned lane = threadIdx.x % WARP, slices = gridDim.y;
    float4 *parts = reinterpret_cast<float4 *>(p.partial) + size_t(strip) * (slices * QUADS * WARP) + lane;
#pragma unroll
    for (int i = 0; i < QUADS; i++)
        __stcg(parts + (blockIdx.y * QUADS + i) * WARP, {sum[i][0], sum[i][1], sum[i][2], sum[i][3]});
    __threadfence();
    __syncwarp();
    unsigned ended = 0;
    if (lane == 0) {
        ended = atomicAdd(p.finished + strip, 1u) + 1;
        if (ended == slices) p.finished[strip] = 0;
    }
    if (__shfl_sync(~0u, ended, 0) < slices) return false;
    __threadfence();
#pragma unroll
    for (int i = 0; i < QUADS; i++) sum[i][0] = sum[i][1] = sum[i][2] = sum[i][3] = 0.f;
#pragma unroll(16 / QUADS)
    for (unsigned slice = 0; slice < slices; slice++, parts += QUADS * WARP) {
#pragma unroll
        for (int i = 0; i < QUADS; i++) {
            const float4 of = __ldcg(parts + i * WARP);
            sum[i][0] += of.x, sum[i][1] += of.y, sum[i][2] += of.z, sum[i][3] += of.w;
        }
    }
    return true;
}

template <typename Type, int N>
__device__ __forceinline__ void gemm(const GemmParams &p) {
    using Run = typename Type::template Run<1>;
    using Fragment = typename Type::template Fragment<1>;
    constexpr int QUADS = N / 8;  // of sums that a lane holds
    constexpr int RING = LaunchConfig<N>::ring;
    constexpr int STEPS = Run::values / STEP_VALUES;  // of a run
    extern __shared__ __align__(1024) uint8_t shared[];
    __shared__ uint64_t barriers[2][MAX_STAGES];

    launch_dependents();
    const int warps = blockDim.x / WARP - LaunchConfig<N>::fetching_warps;  // that multiply
    const int warp = warp_uniform(threadIdx.x / WARP), lane = threadIdx.x % WARP;
    const uint32_t first_barrier = warp_uniform(shared_address(barriers)),
                   first_stage = warp_uniform(shared_address(shared));
    const auto full = [&](int stage) { return Barrier{first_barrier + stage * 8}; };
    const auto empty = [&](int stage) { return Barrier{first_barrier + (MAX_STAGES + stage) * 8}; };
    if (warp == warps && lane < p.stages) {
        full(lane).init(COPY_ARRIVALS), empty(lane).init(warps);
        Barrier::publish();
    }
    __syncthreads();

    const int strips = Strip::count(p), stride = gridDim.x * warps;
    const int units = (p.columns + UNIT - 1) / UNIT;
    const int steps = (p.columns + STEP_VALUES - 1) / STEP_VALUES, runs = (p.columns + Run::values - 1) / Run::values;
    // The block's slice, in runs.
    const int begin = int(runs * blockIdx.y / gridDim.y), end = int(runs * (blockIdx.y + 1) / gridDim.y);
    int stage = 0, parity = 0;
    const auto next_stage = [&] {
        if (++stage == p.stages) stage = 0, parity ^= 1;
    };

    if (warp >= warps) {  // fetch tokens
        if constexpr (LaunchConfig<N>::moves_registers) give_registers<40>();
        if (warp > warps) return;
        wait_for_predecessor();
        for (int first = blockIdx.x * warps; first < strips; first += stride) {
            for (int step = begin * STEPS; step < min(end * STEPS, steps); step++) {
                empty(stage).wait(parity ^ 1);
                fetch_tokens<N>(p, first_stage + stage * TOKEN_BYTES<N>, step, 0, full(stage));
                next_stage();
            }
        }
        return;
    }

    if constexpr (LaunchConfig<N>::moves_registers) take_registers<152>();

    // Weights run RING - 1 runs ahead, past the ends of strips. They are not written by kernels: no need to wait.
    const uint32_t ring = first_stage + p.stages * TOKEN_BYTES<N> + warp * RING * Run::bytes;
    int strip = blockIdx.x * warps + warp, run = begin;  // under way
    int next_strip = strip, next_run = end, slot = 0;    // to be loaded next, and where to
    RowGroup groups[2];
    const typename Fragment::Lane place;
    float sum[1][QUADS][4] = {};
    uint32_t a[2][2][1][4];  // two words in turn: products read one while the other is decoded
    int previous = -1;       // the stage of the step before, until it is given back
    const auto release = [&] {
        if (previous >= 0 && lane == 0) empty(previous).arrive();
    };
    for (int loaded = 1;; loaded++) {
        __syncwarp();  // all lanes have read the run that gives way
        if (next_run == end) {
            if (loaded > 1) next_strip += stride;
            next_run = begin;
            const Strip next(p, next_strip);
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const GemmMatrix &matrix = p.matrix[p.epilogue == Gate ? h : next.matrix];
                const int first = next.first(p, h);
                groups[h] = {Run::row_start(matrix.weights, first, p.columns), matrix.rows - first};
            }
        }
        if (next_strip < strips) Run::copy(ring + slot * Run::bytes, groups, next_run, p.columns);
        next_run++;
        commit_copies();
        if (++slot == RING) slot = 0;
        if (loaded < RING) continue;  // the ring is not full yet
        if (loaded == RING) wait_for_predecessor();

        wait_for_copies<RING - 1>();
        __syncwarp();
        const int first_unit = run * Run::units, slice = first_unit / SLICE_UNITS;
        const int slice_units = min(units - slice * SLICE_UNITS, SLICE_UNITS);
#pragma unroll 1
        for (int step = 0; step < min(STEPS, steps - run * STEPS); step++) {
            Fragment row[1][2];
#pragma unroll
            for (int h = 0; h < 2; h++)
                row[0][h].load(ring + slot * Run::bytes, place, h, step, first_unit % SLICE_UNITS, slice_units);
            full(stage).wait(parity);
#pragma unroll
            for (int w = 0; w < 4; w++) {
#if WARPGROUP_MMA
                warpgroup_wait<1>();
                if (w == 1) release(), previous = stage;
#endif
                multiply<1, N>(sum, a[w % 2], row, w, first_stage + stage * TOKEN_BYTES<N>);
            }
#if !WARPGROUP_MMA
            __syncwarp();
            previous = stage;
            release();
#endif
            next_stage();
        }
        if (++run < end) continue;

#if WARPGROUP_MMA
        warpgroup_wait<0>();
        release(), previous = -1;
#endif
        if (strip < strips && (gridDim.y == 1 || add_slices(p, strip, sum[0]))) {
            const Strip done(p, strip);
#pragma unroll
            for (int token = 0; token < N; token += 32) {  // few loads and stores at a time
                const auto &some = reinterpret_cast<const float (&)[4][4]>(sum[0][token / 8]);
                apply_epilogue<32>(p, done.matrix, done.first(p, 0) + lane / 4, done.first(p, 1) + lane / 4, token,
                                   some);
            }
        }
#pragma unroll
        for (int i = 0; i < QUADS; i++) sum[0][i][0] = sum[0][i][1] = sum[0][i][2] = sum[0][i][3] = 0.f;
        strip += stride, run = begin;
        if (strip - warp >= strips) return;
    }
}

}  // namespace

#define GEMM(NAME, TYPE, N)                                               \
    extern "C" __global__ void __launch_bounds__(MAX_WARPS *WARP, 1)      \
        gemm_strips_##NAME##_n##N(const __grid_constant__ GemmParams p) { \
        gemm<TYPE, N>(p);                                                 \
    }

#if WARPGROUP_MMA
#define GEMMS(NAME, TYPE, NUMBER) GEMM(NAME, TYPE, 32) GEMM(NAME, TYPE, 64) GEMM(NAME, TYPE, 128)
#else
#define GEMMS(NAME, TYPE, NUMBER) GEMM(NAME, TYPE, 32)
#endif

GEMM_TYPES(GEMMS)
