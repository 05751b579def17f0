// GEMM: out[token, row] = W[row] . x[token] for a chunk of tokens, with the epilogues of gemm.cuh. For few tokens there
// is gemm_strips.cu.
//
// Weights are decoded to f16 in registers, as the first operand of m16n8k16 (sm_90a: m64nNk16), and multiplied with a
// tile of tokens in shared memory; sums are f32.
//
// Bound: 2 * rows * columns * tokens operations on the matrix units. Weights are decoded anew for each tile of tokens.
//
// Grid: as many blocks as the host likes (what fits on the device at once); two warpgroups multiply, the first warp
// after them fetches tokens. A block takes whole tiles (ROWS rows x N tokens) while there are tiles for all blocks, and
// of the rest an equal share of steps, which may begin and end inside a tile. Parts of such a tile are left in the
// split-K workspace `partial`; the block that ends last adds them in order of columns, so the result does not depend on
// which it was.
#include "gemm.cuh"

namespace {

constexpr int CONSUMERS = 2 * WARPGROUP;
constexpr int STAGES = 2;  // runs of weights in shared memory
constexpr int MAX_STAGES = 8;

// Some runs of columns of one tile.
struct TilePart {
    int tile, begin, end;  // runs; an empty part ends a block's work
};

// How tiles are dealt out. See the file's head.
struct Schedule {
    int tiles, steps, waves, sharers, rest_begin, rest_end;

    __device__ Schedule(int tiles, int steps) : tiles(tiles), steps(steps), waves(tiles / int(gridDim.x)) {
        // A last wave that is nearly full is not worth adding parts.
        if (rest_tiles() * 8 > int(gridDim.x) * 7) {
            sharers = rest_tiles();
        } else {
            sharers = min(int(gridDim.x), rest_tiles() * steps);
        }
        rest_begin = first_step(blockIdx.x), rest_end = first_step(blockIdx.x + 1);
    }
    __device__ int rest_tiles() const { return tiles % int(gridDim.x); }
    __device__ int first_step(int block) const {
        return static_cast<int>(int64_t(rest_tiles()) * steps * min(block, sharers) / max(sharers, 1));
    }
    // The block whose share holds a step of the rest.
    __device__ int block_of(int step) const {
        return static_cast<int>(((int64_t(step) + 1) * sharers - 1) / (rest_tiles() * steps));
    }

    __device__ TilePart part(int i) const {
        if (i < waves) return {i * int(gridDim.x) + int(blockIdx.x), 0, steps};
        const int at = i == waves ? rest_begin : (rest_begin / steps + i - waves) * steps;
        if (at >= rest_end) return {0, 0, 0};
        return {waves * int(gridDim.x) + at / steps, at % steps, min(steps, at % steps + rest_end - at)};
    }
};

template <int MT, int N>
struct OutputTile {
    static constexpr int ROWS = 2 * 64 * MT;
    int matrix, row, token;  // Gate: rows row .. + ROWS / 2 of both matrices

    __device__ OutputTile(const GemmParams &p, int tile) {
        const int token_tiles = (p.tokens + N - 1) / N;
        token = tile % token_tiles * N;
        row = tile / token_tiles * (p.epilogue == Gate ? ROWS / 2 : ROWS);
        matrix = 0;
        if (p.epilogue == Gate) return;
        while (matrix + 1 < p.matrices && row >= round_up(p.matrix[matrix].rows, ROWS))
            row -= round_up(p.matrix[matrix++].rows, ROWS);
    }
    __device__ static int count(const GemmParams &p) {
        int rows = 0;
        if (p.epilogue == Gate) {
            rows = round_up(round_up(p.matrix[0].rows, STEP_VALUES), ROWS / 2) * 2;
        } else {
            for (int i = 0; i < p.matrices; i++) rows += round_up(p.matrix[i].rows, ROWS);
        }
        return rows / ROWS * ((p.tokens + N - 1) / N);
    }
    // The row that registers of fragment m, row group h belong to. Gate: h is the matrix.
    __device__ int row_of(const GemmParams &p, int m, int h) const {
        const int warp = threadIdx.x / WARP, g = threadIdx.x % WARP / 4;
        const int fragment = warp / 4 * MT * 4 + m * 4 + warp % 4;
        return p.epilogue == Gate ? row + fragment * 8 + g : row + fragment * 16 + h * 8 + g;
    }
};

__device__ __forceinline__ void consumers_sync() { asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory"); }

template <typename Type, int MT, int N, bool REGISTERS>
__device__ __forceinline__ void gemm(const GemmParams &p) {
    using Run = typename Type::template Run<MT>;
    using Fragment = typename Type::template Fragment<MT>;
    constexpr int ROWS = OutputTile<MT, N>::ROWS;
    constexpr int WEIGHT_BYTES = CONSUMERS / WARP * MT * Run::bytes;
    constexpr int STEPS = Run::values / STEP_VALUES;  // of a run
    extern __shared__ __align__(1024) uint8_t shared[];
    __shared__ uint64_t barriers[2][MAX_STAGES];
    __shared__ bool last;

    launch_dependents();
    const int warp = warp_uniform(threadIdx.x / WARP), lane = threadIdx.x % WARP;
    const uint32_t first_barrier = warp_uniform(shared_address(barriers)),
                   tokens = warp_uniform(shared_address(shared));
    const uint32_t weights = tokens + p.stages * TOKEN_BYTES<N>;
    const auto full = [&](int stage) { return Barrier{first_barrier + stage * 8}; };
    const auto empty = [&](int stage) { return Barrier{first_barrier + (MAX_STAGES + stage) * 8}; };
    if (threadIdx.x == 0) {
        for (int i = 0; i < p.stages; i++) {
            full(i).init(COPY_ARRIVALS);
            empty(i).init(CONSUMERS / WARP);
        }
        Barrier::publish();
    }
    __syncthreads();

    const Schedule schedule(OutputTile<MT, N>::count(p), (p.columns + Run::values - 1) / Run::values);
    const int steps = (p.columns + STEP_VALUES - 1) / STEP_VALUES;
    int stage = 0, parity = 0;
    const auto next_stage = [&] {
        if (++stage == p.stages) stage = 0, parity ^= 1;
    };

    if (warp >= CONSUMERS / WARP) {  // fetch tokens
        if constexpr (REGISTERS) give_registers<24>();
        if (warp > CONSUMERS / WARP) return;
        wait_for_predecessor();
        for (int i = 0;; i++) {
            const TilePart part = schedule.part(i);
            if (part.begin == part.end) return;
            const int token = OutputTile<MT, N>(p, part.tile).token;
            for (int step = part.begin * STEPS; step < min(part.end * STEPS, steps); step++) {
                empty(stage).wait(parity ^ 1);
                fetch_tokens<N>(p, tokens + stage * TOKEN_BYTES<N>, step, token, full(stage));
                next_stage();
            }
        }
    }

    if constexpr (REGISTERS) take_registers<240>();

    // Weights run STAGES - 1 runs ahead, past the ends of tiles. They are not written by kernels: no need to wait.
    int ahead = 0, ahead_slot = 0;
    const uint32_t own_weights = weights + warp * MT * Run::bytes;
    RowGroup groups[MT][2];
    TilePart loading = schedule.part(0);
    const auto load_tile = [&] {
        const OutputTile<MT, N> tile(p, loading.tile);
#pragma unroll
        for (int m = 0; m < MT; m++) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const GemmMatrix &matrix = p.matrix[p.epilogue == Gate ? h : tile.matrix];
                const int first = tile.row_of(p, m, h) - lane / 4;
                groups[m][h] = {Run::row_start(matrix.weights, first, p.columns), matrix.rows - first};
            }
        }
    };
    const auto load_run = [&] {
        if (loading.begin < loading.end) {
#pragma unroll
            for (int m = 0; m < MT; m++) {
                Run::copy(own_weights + ahead_slot * WEIGHT_BYTES + m * Run::bytes, groups[m], loading.begin,
                          p.columns);
            }
            if (++loading.begin == loading.end) {
                loading = schedule.part(++ahead);
                if (loading.begin < loading.end) load_tile();
            }
        }
        if (++ahead_slot == STAGES) ahead_slot = 0;
        commit_copies();
    };
    if (loading.begin < loading.end) load_tile();
    for (int i = 0; i < STAGES - 1; i++) load_run();
    wait_for_predecessor();

    const typename Fragment::Lane place;
    int slot = STAGES - 1;  // of the current run
    for (int i = 0;; i++) {
        const TilePart part = schedule.part(i);
        if (part.begin == part.end) return;
        float sum[MT][N / 8][4];
#pragma unroll
        for (int m = 0; m < MT; m++) {
#pragma unroll
            for (int j = 0; j < N / 8; j++) sum[m][j][0] = sum[m][j][1] = sum[m][j][2] = sum[m][j][3] = 0.f;
        }
#if WARPGROUP_MMA
        int previous = -1;  // the stage of the step before, until it is given back
#endif
        for (int step = part.begin * STEPS; step < min(part.end * STEPS, steps); step++) {
            if (step % STEPS == 0) {
                __syncwarp();  // all lanes have read the run that gives way
                load_run();
                wait_for_copies<STAGES - 1>();
                __syncwarp();
                if (++slot == STAGES) slot = 0;
            }
            Fragment row[MT][2];
            const int first_unit = step / STEPS * Run::units, slice = first_unit / SLICE_UNITS;
#pragma unroll
            for (int m = 0; m < MT; m++) {
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    row[m][h].load(own_weights + slot * WEIGHT_BYTES + m * Run::bytes, place, h, step % STEPS,
                                   first_unit % SLICE_UNITS,
                                   min((p.columns + UNIT - 1) / UNIT - slice * SLICE_UNITS, SLICE_UNITS));
                }
            }
            full(stage).wait(parity);
            const uint32_t tile = tokens + stage * TOKEN_BYTES<N>;
#if WARPGROUP_MMA
            uint32_t a[2][2][MT][4];
#else
            uint32_t a[1][2][MT][4];
#endif
#pragma unroll
            for (int w = 0; w < 4; w++) {  // a word of codes, two steps of the matrix instruction
#if WARPGROUP_MMA
                const int buffer = w % 2;
                warpgroup_wait<1>();
                if (w == 1) {
                    if (previous >= 0 && lane == 0) empty(previous).arrive();
                    previous = stage;
                }
#else
                const int buffer = 0;
#endif
                multiply<MT, N>(sum, a[buffer], row, w, tile);
            }
#if !WARPGROUP_MMA
            __syncwarp();
            if (lane == 0) empty(stage).arrive();
#endif
            next_stage();
        }
#if WARPGROUP_MMA
        warpgroup_wait<0>();
        if (lane == 0) empty(previous).arrive();
#endif

        const OutputTile<MT, N> tile(p, part.tile);
        if (part.end - part.begin < schedule.steps) {  // others work on this tile as well
            constexpr int TILE = ROWS * N;
            const int rest_tile = part.tile - schedule.waves * int(gridDim.x);
            const int from = rest_tile * schedule.steps;
            const int first = schedule.block_of(from),
                      contributors = schedule.block_of(from + schedule.steps - 1) - first + 1;
            const auto sums_of = [&](int block) {
                const bool second_part = schedule.first_step(block) / schedule.steps != rest_tile;
                return p.partial + (size_t(block) * 2 + second_part) * TILE + threadIdx.x;
            };
            float *own = sums_of(blockIdx.x);
#pragma unroll
            for (int m = 0; m < MT; m++) {
#pragma unroll
                for (int j = 0; j < N / 2; j++) __stcg(own + (m * N / 2 + j) * CONSUMERS, sum[m][j / 4][j % 4]);
            }
            consumers_sync();
            if (threadIdx.x == 0) {  // its fences speak for all threads that the barrier joined
                __threadfence();
                last = atomicAdd(p.finished + rest_tile, 1u) == unsigned(contributors - 1);
                if (last) p.finished[rest_tile] = 0;
                __threadfence();
            }
            consumers_sync();
            if (!last) continue;
#pragma unroll
            for (int m = 0; m < MT; m++) {
#pragma unroll
                for (int j = 0; j < N / 2; j++) sum[m][j / 4][j % 4] = 0.f;
            }
            for (int c = 0; c < contributors; c++) {
                const float *of = sums_of(first + c);
#pragma unroll
                for (int m = 0; m < MT; m++) {
#pragma unroll
                    for (int j = 0; j < N / 2; j++) sum[m][j / 4][j % 4] += __ldcg(of + (m * N / 2 + j) * CONSUMERS);
                }
            }
        }
#pragma unroll
        for (int m = 0; m < MT; m++)
            apply_epilogue<N>(p, tile.matrix, tile.row_of(p, m, 0), tile.row_of(p, m, 1), tile.token, sum[m]);
    }
}

}  // namespace

// MT: fragments of 16 rows that a warp holds.
#define GEMM(NAME, TYPE, MT, N, THREADS)                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) NAME(const __grid_constant__ GemmParams p) { \
        gemm<TYPE, MT, N, THREADS == 3 * WARPGROUP>(p);                                                   \
    }

// With 128 tokens a lane of a warpgroup holds 128 sums: a whole warpgroup fetches, to have registers to give away.
#define GEMMS(NAME, TYPE, NUMBER)                          \
    GEMM(gemm_##NAME##_n64, TYPE, 1, 64, CONSUMERS + WARP) \
    GEMM(gemm_##NAME##_n128, TYPE, WARPGROUP_MMA + 1, 128, 3 * WARPGROUP)

GEMM_TYPES(GEMMS)
