// Products of a quantized matrix with a chunk of tokens:
//
//   store   out[token, row] = W[row] . x[token] (+ bias[row])
//   add     out[token, row] += factor * W[row] . x[token]
//   gate    out[token, row] = silu(Wg[row] . x[token]) * (Wu[row] . x[token]) * factor, as Tiles
//
// Weights are decoded to f16 in registers, as the first operand of m16n8k16 (sm_90a: m64nNk16), and meet a tile of tokens in
// shared memory; sums are f32. f16 holds a decoded weight to 2^-12 of its size.
//
// Bound: up to some 64 tokens by the weights' bytes, each read from memory once; beyond by 2 * rows * columns * tokens
// operations on the matrix units. Decoding costs about 1.7 instructions a weight for each tile of tokens.
//
// Grid: as many blocks as the host likes (what fits on the device at once); two warpgroups multiply, the first warp after
// them fetches tokens. A block takes whole tiles (ROWS rows x N tokens) while there are tiles for all blocks, and of the rest an equal
// share of steps, which may begin and end inside a tile. Parts of such a tile meet in `partial`; the block that ends last
// adds them in order of columns, so the result does not depend on which it was.
#include "formats.cuh"
#include "tiles.cuh"

struct Matrix {
    const uint8_t *weights;
    const float *bias;  // (rows) or null
    float *out;         // (out_stride, tokens); with Gate unused
    int rows;
    int out_stride;
};

enum Epilogue : int { Store = 0, Add = 1, Gate = 2 };

struct ProductParams {
    Matrix matrix[3];    // of one type; Gate: gate and up, of as many rows
    const __half *x;     // Tiles (columns, padded_tokens)
    __half *gated;       // Gate: Tiles (rows, padded_tokens)
    float *partial;      // scratch: 2 tiles for each block
    unsigned *finished;  // scratch: one for each block, zero before the first launch; left zero
    float factor;
    int matrices;
    int epilogue;
    int tokens;
    int padded_tokens;  // rounded up to a multiple of 8
    int columns;
    int stages;  // token tiles in shared memory
};

namespace {

constexpr int CONSUMERS = 2 * WARPGROUP;
constexpr int STAGES = 2;  // runs of weights in shared memory

// What a warp holds of the 16 rows of a fragment in shared memory, for one run of `units` units of each row: whole cache lines
// of codes, or half ones where shared memory is short. (Steps of two units would make a request of every 32 bytes, which
// took twice as long as all the rest.)
template <int TYPE, int MT>
struct Run {
    using F = Format<TYPE>;
    static constexpr bool plain = TYPE == F16;
    static constexpr int units = plain ? 2 : MT == 1 && F::high_bytes == 0 && F::code_pieces == 2 ? 8 : 4;
    static constexpr int values = units * UNIT;
    static constexpr int pieces = plain ? 8 : F::code_pieces;  // of 16 bytes a unit
    static constexpr int high_bytes = plain ? 0 : F::high_bytes;
    static constexpr int scale_bytes = plain || F::packed_scales ? 0 : F::scale_bytes;

    // Parts one after another, each [row 16][unit], codes [row 16][piece][unit]; packed scales [row 16][super-block].
    static constexpr int high_at = 16 * pieces * units * 16;
    static constexpr int scale_at = high_at + 16 * units * high_bytes;
    static constexpr int super_at = scale_at + (!plain && F::packed_scales ? 16 * units / 4 * 16 : 16 * units * scale_bytes);
    static constexpr int bytes = super_at + (TYPE == Q6_K ? 16 * units / 4 * 4 : 0);

    // Where a piece of codes lies: swizzled, so that both the lanes that copy and those that read meet all banks.
    __device__ static __forceinline__ int code_at(int row, int piece, int unit) {
        if constexpr (plain) return row * 256 + ((unit * 8 + piece) ^ row % 8) * 16;
        return ((row * pieces + piece) * units + (unit ^ (units == 8 ? row % 2 * 4 + piece % 2 * 2 : row % 2 * 2))) * 16;
    }
    __device__ static __forceinline__ int high_of(int row, int unit) {
        return high_at + (row * units + (high_bytes == 16 ? unit ^ row / 2 % 2 * 2 : unit)) * high_bytes;
    }
};

// Eight rows of a fragment: where the first one starts, and how many there are (perhaps none); what is missing counts as zeros.
struct Half {
    const uint8_t *start;
    int rows;
};

// Where row `first`, an even one, starts: the pair's tile of the first slice, or the row's values.
template <int TYPE>
__device__ __forceinline__ const uint8_t *row_start(const uint8_t *weights, size_t first, int columns) {
    if constexpr (TYPE == F16) return weights + first * float_stride(F16, columns);
    else return weights + first / TILE_ROWS * Format<TYPE>::pair_bytes((columns + UNIT - 1) / UNIT);
}

// Starts copying run `run` of a fragment's 16 rows. By all lanes of a warp.
template <int TYPE, int MT>
__device__ __forceinline__ void copy_run(uint8_t *to, const Half (&half)[2], int run, int columns) {
    using R = Run<TYPE, MT>;
    using F = Format<TYPE>;
    const int lane = threadIdx.x % WARP, units = (columns + UNIT - 1) / UNIT;
    if constexpr (R::plain) {
        const int piece = lane % 16, column = run * R::values + piece * 8;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int row = i * 2 + lane / 16;
            copy_or_zero<16, true>(to + R::code_at(row, piece % 8, piece / 8), half[i / 4].start + row % 8 * float_stride(F16, columns) + column * 2,
                                   row % 8 < half[i / 4].rows && column < columns);
        }
    } else {
        const int slice = run * R::units / SLICE_UNITS, n = min(units - slice * SLICE_UNITS, SLICE_UNITS);
        const int first_unit = run * R::units % SLICE_UNITS;
        const int pair_bytes = F::pair_bytes(units);
        const auto exists = [&](int row, int unit) { return row % 8 < (row / 8 ? half[1].rows : half[0].rows) && unit < n; };
        const auto tile_of = [&](int row) {
            return (row / 8 ? half[1].start : half[0].start) + row % 8 / TILE_ROWS * pair_bytes + slice * F::tile_bytes(SLICE_UNITS);
        };
        constexpr int GROUPS = WARP / R::units;  // of lanes, one for each unit
        const int unit = lane % R::units, in_slice = first_unit + unit;
#pragma unroll
        for (int i = 0; i < 16 * R::pieces / GROUPS; i++) {
            const int which = i * GROUPS + lane / R::units, row = which / R::pieces, piece = which % R::pieces;
            const bool valid = exists(row, in_slice);
            copy_or_zero<16, true>(to + R::code_at(row, piece, unit), tile_of(row) + ((piece * TILE_ROWS + row % TILE_ROWS) * n + in_slice) * 16, valid);
        }
#pragma unroll
        for (int i = 0; i < 16 / GROUPS; i++) {
            const int row = i * GROUPS + lane / R::units, at = row % TILE_ROWS * n + in_slice;
            const bool valid = exists(row, in_slice);
            const uint8_t *tile = tile_of(row);
            if constexpr (R::high_bytes > 0) {
                copy_or_zero<R::high_bytes, true>(to + R::high_of(row, unit), tile + F::high_at(n) + at * R::high_bytes, valid);
            }
            if constexpr (R::scale_bytes > 0) {
                copy_or_zero<R::scale_bytes>(to + R::scale_at + (row * R::units + unit) * R::scale_bytes, tile + F::scale_at(n) + at * R::scale_bytes, valid);
            }
        }
        constexpr int SUPERS = R::units / 4;  // of a row
        if (F::super_blocks && lane < 16 * SUPERS) {
            const int row = lane / SUPERS, super = lane % SUPERS, index = row % TILE_ROWS * (n / 4) + first_unit / 4 + super;
            const bool valid = exists(row, first_unit + super * 4);
            const uint8_t *tile = tile_of(row);
            if constexpr (F::packed_scales) {
                copy_or_zero<16>(to + R::scale_at + lane * 16, tile + F::scale_at(n) + index * 16, valid);
            } else {
                copy_or_zero<4>(to + R::super_at + lane * 4, tile + F::super_at(n) + index / 2 * 4, valid);
            }
        }
    }
}

// What lane t of four decodes of one row for one step, in registers: 32 values of a unit, 16 from each half. See tiles.cuh.
template <int TYPE, int MT>
struct Decoder {
    using R = Run<TYPE, MT>;
    static constexpr int pieces = TYPE == F16 ? 4 : R::pieces / 2;
    uint32_t code[4 * pieces];
    uint2 high;
    __half2 scale[2], minimum[2];  // of the first and the second half; minimum is added

    // Step `step` of the run at `from`, whose units count from `first_unit` of a slice of `n`.
    __device__ __forceinline__ void load(const uint8_t *from, int row, int step, int t, int first_unit, int n) {
        const int part = t % 2, unit = 2 * step + t / 2;
#pragma unroll
        for (int i = 0; i < pieces; i++) {
            const int piece = TYPE == F16 ? i / 2 * 4 + part * 2 + i % 2 : 2 * i + part;
            const uint4 v = *reinterpret_cast<const uint4 *>(from + R::code_at(row, piece, unit));
            code[4 * i] = v.x, code[4 * i + 1] = v.y, code[4 * i + 2] = v.z, code[4 * i + 3] = v.w;
        }
        if constexpr (R::high_bytes > 0) {
            high = *reinterpret_cast<const uint2 *>(from + R::high_of(row, unit) + (R::high_bytes == 16 ? part * 8 : 0));
        }
        const uint8_t *scales = from + R::scale_at + (row * R::units + unit) * R::scale_bytes;
        if constexpr (TYPE != F16 && Format<TYPE>::packed_scales) {
            const uint4 header = *reinterpret_cast<const uint4 *>(from + R::scale_at + (row * (R::units / 4) + unit / 4) * 16);
            const uint32_t u = unit % 4;
            const uint32_t two = __byte_perm(header.y, header.z, u | (u + 4) << 4);
            const uint32_t packed = __byte_perm(two, header.w, 0x7010 | (u + 4) << 8);
            // 1,024 + an integer below 1,024 is that integer in the lowest bits of an f16.
            const __half2 kilo = __half2half2(__ushort_as_half(0x6400));
            const __half2 two_scales = __hsub2(as_half2((packed & 63) | (packed << 10 & 0x3f0000) | 0x64006400u), kilo);
            const __half2 two_minima = __hsub2(as_half2((packed >> 12 & 63) | (packed >> 2 & 0x3f0000) | 0x64006400u), kilo);
            const __half2 d = as_half2(header.x);
            const __half2 s = __hmul2(__low2half2(d), two_scales), m = __hmul2(__hneg2(__high2half2(d)), two_minima);
            scale[0] = __low2half2(s), scale[1] = __high2half2(s);
            minimum[0] = __low2half2(m), minimum[1] = __high2half2(m);
        } else if constexpr (TYPE == Q6_K) {
            const uint32_t packed = *reinterpret_cast<const uint32_t *>(scales);
            const __half2 supers = *reinterpret_cast<const __half2 *>(from + R::super_at + (row * (R::units / 4) + unit / 4) * 4);
            const int index = row % TILE_ROWS * (n / 4) + (first_unit + unit) / 4;
            const float d = __half2float(index % 2 ? __high2half(supers) : __low2half(supers));
            scale[0] = __float2half2_rn(d * static_cast<int8_t>(packed >> 8 * part));
            scale[1] = __float2half2_rn(d * static_cast<int8_t>(packed >> (16 + 8 * part)));
        } else if constexpr (R::scale_bytes == 8) {
            const uint2 both = *reinterpret_cast<const uint2 *>(scales);
            scale[0] = __low2half2(as_half2(both.x)), minimum[0] = __high2half2(as_half2(both.x));
            scale[1] = __low2half2(as_half2(both.y)), minimum[1] = __high2half2(as_half2(both.y));
        } else if constexpr (R::scale_bytes == 4) {
            const __half2 both = *reinterpret_cast<const __half2 *>(scales);
            scale[0] = __low2half2(both), scale[1] = __high2half2(both);
        }
    }

    // Values 4 w + (0, 2) and 4 w + (1, 3) of half HALF of the piece.
    template <int HALF>
    __device__ __forceinline__ void decode(int w, uint32_t &even, uint32_t &odd) const {
        constexpr uint32_t KILO = 0x64006400u, BYTES = 0x00ff00ffu;
        if constexpr (TYPE == F16) {
            const uint32_t first = code[HALF * 8 + 2 * w], second = code[HALF * 8 + 2 * w + 1];
            even = __byte_perm(first, second, 0x5410), odd = __byte_perm(first, second, 0x7632);
        } else if constexpr (TYPE == Q8_0) {
            const uint32_t c = code[HALF * 4 + w] ^ 0x80808080u;
            const __half2 offset = __half2half2(__ushort_as_half(0x6480));  // 1,024 + 128
            even = bits(__hmul2(__hsub2(as_half2((c & BYTES) | KILO), offset), scale[HALF]));
            odd = bits(__hmul2(__hsub2(as_half2((c >> 8 & BYTES) | KILO), offset), scale[HALF]));
        } else {
            constexpr int zero = TYPE == Q4_0 ? 8 : TYPE == Q5_0 ? 16 : TYPE == Q6_K ? 32 : 0;
            constexpr bool has_minimum = TYPE == Q4_K || TYPE == Q5_K || TYPE == Q4_1 || TYPE == Q5_1;
            __half2 x, y;
            if constexpr (R::high_bytes == 0 && HALF == 1) {
                // 1,024 + 16 times the code.
                constexpr uint32_t HIGH = 0x00f000f0u;
                const __half2 sixteenth = __half2half2(__ushort_as_half(0x2c00)), offset = __float2half2_rn(-64.f - zero);
                x = __hfma2(as_half2((code[w] & HIGH) | KILO), sixteenth, offset);
                y = __hfma2(as_half2((code[w] >> 8 & HIGH) | KILO), sixteenth, offset);
            } else {
                const __half2 offset = __float2half2_rn(1024.f + zero);
                uint32_t c = code[w], mask = 0x000f000fu;
                if constexpr (R::high_bytes > 0) {
                    c = (HALF ? c >> 4 : c) & 0x0f0f0f0fu;
                    mask = BYTES;
                    if constexpr (TYPE == Q6_K) {
                        const uint32_t h = w / 2 ? high.y : high.x;
                        const int shift = 4 - 4 * (w % 2) - 2 * HALF;  // to the left
                        c |= (shift >= 0 ? h << shift : h >> -shift) & 0x30303030u;
                    } else {
                        const int part = threadIdx.x % 2;
                        c |= ((HALF ? high.y : high.x) >> (4 * part + w) & 0x01010101u) << 4;
                    }
                }
                x = __hsub2(as_half2((c & mask) | KILO), offset);
                y = __hsub2(as_half2((c >> 8 & mask) | KILO), offset);
            }
            if constexpr (has_minimum) {
                even = bits(__hfma2(x, scale[HALF], minimum[HALF])), odd = bits(__hfma2(y, scale[HALF], minimum[HALF]));
            } else {
                even = bits(__hmul2(x, scale[HALF])), odd = bits(__hmul2(y, scale[HALF]));
            }
        }
    }
};

// Some runs of columns of one tile.
struct Item {
    int tile, begin, end;  // runs; an empty item ends a block's work
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
    __device__ int first_step(int block) const { return static_cast<int>(int64_t(rest_tiles()) * steps * min(block, sharers) / max(sharers, 1)); }
    // The block whose share holds a step of the rest.
    __device__ int block_of(int step) const { return static_cast<int>(((int64_t(step) + 1) * sharers - 1) / (rest_tiles() * steps)); }

    __device__ Item item(int i) const {
        if (i < waves) return {i * int(gridDim.x) + int(blockIdx.x), 0, steps};
        const int at = i == waves ? rest_begin : (rest_begin / steps + i - waves) * steps;
        if (at >= rest_end) return {0, 0, 0};
        return {waves * int(gridDim.x) + at / steps, at % steps, min(steps, at % steps + rest_end - at)};
    }
};

template <int MT, int N>
struct Tile {
    static constexpr int ROWS = 2 * 64 * MT;
    int matrix, row, token;  // Gate: rows row .. + ROWS / 2 of both matrices

    __device__ Tile(const ProductParams &p, int tile) {
        const int token_tiles = (p.tokens + N - 1) / N;
        token = tile % token_tiles * N;
        row = tile / token_tiles * (p.epilogue == Gate ? ROWS / 2 : ROWS);
        matrix = 0;
        if (p.epilogue == Gate) return;
        while (matrix + 1 < p.matrices && row >= round_up(p.matrix[matrix].rows, ROWS)) row -= round_up(p.matrix[matrix++].rows, ROWS);
    }
    __device__ static int count(const ProductParams &p) {
        int rows = 0;
        if (p.epilogue == Gate) {
            rows = round_up(round_up(p.matrix[0].rows, STEP_VALUES), ROWS / 2) * 2;
        } else {
            for (int i = 0; i < p.matrices; i++) rows += round_up(p.matrix[i].rows, ROWS);
        }
        return rows / ROWS * ((p.tokens + N - 1) / N);
    }
    // The row that registers of fragment m, half h belong to. Gate: h is the matrix.
    __device__ int row_of(const ProductParams &p, int m, int h) const {
        const int warp = threadIdx.x / WARP, g = threadIdx.x % WARP / 4;
        const int fragment = warp / 4 * MT * 4 + m * 4 + warp % 4;
        return p.epilogue == Gate ? row + fragment * 8 + g : row + fragment * 16 + h * 8 + g;
    }
};

__device__ __forceinline__ void consumers_sync() { asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory"); }

__device__ __forceinline__ float finite_half(float x) { return fminf(fmaxf(x, -65504.f), 65504.f); }

template <int TYPE, int MT, int N>
__device__ __forceinline__ void finish(const ProductParams &p, const Tile<MT, N> &tile, const float (&sum)[MT][N / 8][4]) {
    const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int m = 0; m < MT; m++) {
        const int row0 = tile.row_of(p, m, 0), row1 = tile.row_of(p, m, 1);
        if (p.epilogue == Gate) {
            const Tiles gated{p.gated, p.padded_tokens};
            const int rows = p.matrix[0].rows;
            const bool inside = row0 < rows, odd = g / 2 % 2, filled = row0 < round_up(rows, STEP_VALUES);
#pragma unroll
            for (int i = 0; i < N / 8; i++) {
                float y[2];
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    const float gate = sum[m][i][j], up = sum[m][i][2 + j];
                    y[j] = inside ? finite_half(gate / (1.f + __expf(-gate)) * up * p.factor) : 0.f;
                }
                // Rows r and r + 2 stand side by side: this lane takes both for one of its two tokens.
                const float other = __shfl_xor_sync(~0u, odd ? y[0] : y[1], 8);
                const int token = tile.token + i * 8 + 2 * t + odd;
                if (token < p.tokens && filled) {
                    *gated.pair(token, row0 & ~3, row0 & 1) = odd ? __floats2half2_rn(other, y[1]) : __floats2half2_rn(y[0], other);
                }
            }
        } else {
            const Matrix &matrix = p.matrix[tile.matrix];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int row = h ? row1 : row0;
                if (row >= matrix.rows) continue;
                const float bias = matrix.bias ? matrix.bias[row] : 0.f;
                float *out = matrix.out + size_t(tile.token + 2 * t) * matrix.out_stride + row;
                const int tokens = p.tokens - tile.token - 2 * t;
                float before[N / 8][2];  // all loads before the first store
#pragma unroll
                for (int i = 0; i < N / 4; i++) {
                    const int token = i / 2 * 8 + i % 2;
                    before[i / 2][i % 2] = p.epilogue == Add && token < tokens ? out[size_t(token) * matrix.out_stride] : bias;
                }
#pragma unroll
                for (int i = 0; i < N / 4; i++) {
                    const int token = i / 2 * 8 + i % 2;
                    if (token < tokens) out[size_t(token) * matrix.out_stride] = sum[m][i / 2][2 * h + i % 2] * p.factor + before[i / 2][i % 2];
                }
            }
        }
    }
}

template <int TYPE, int MT, int N, bool REGISTERS>
__device__ __forceinline__ void product(const ProductParams &p) {
    constexpr int ROWS = Tile<MT, N>::ROWS;
    constexpr int TOKEN_BYTES = N * STEP_VALUES * 2;  // of a stage: two blocks of N tokens x 128 bytes
    constexpr int WEIGHT_BYTES = CONSUMERS / WARP * MT * Run<TYPE, MT>::bytes;
    constexpr int STEPS = Run<TYPE, MT>::values / STEP_VALUES;  // of a run
    extern __shared__ __align__(1024) uint8_t shared[];
    __shared__ uint64_t barriers[2][8];
    __shared__ bool last;
    uint8_t *tokens = shared, *weights = shared + p.stages * TOKEN_BYTES;

    launch_dependents();
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, t = lane % 4;
    const auto full = [&](int stage) { return Barrier{&barriers[0][stage]}; };
    const auto empty = [&](int stage) { return Barrier{&barriers[1][stage]}; };
    if (threadIdx.x == 0) {
        for (int i = 0; i < p.stages; i++) {
#if __CUDA_ARCH__ >= 900
            full(i).init(1);
#else
            full(i).init(WARP);
#endif
            empty(i).init(CONSUMERS / WARP);
        }
        Barrier::publish();
    }
    __syncthreads();

    const Schedule schedule(Tile<MT, N>::count(p), (p.columns + Run<TYPE, MT>::values - 1) / Run<TYPE, MT>::values);
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
            const Item item = schedule.item(i);
            if (item.begin == item.end) return;
            const int token = Tile<MT, N>(p, item.tile).token;
            const int rows = min(N, p.padded_tokens - token);
            for (int step = item.begin * STEPS; step < min(item.end * STEPS, steps); step++) {
                empty(stage).wait(parity ^ 1);
                uint8_t *to = tokens + stage * TOKEN_BYTES;
                const uint8_t *from = reinterpret_cast<const uint8_t *>(p.x) + (size_t(2 * step) * p.padded_tokens + token) * 128;
                const size_t block_stride = size_t(p.padded_tokens) * 128;
#if __CUDA_ARCH__ >= 900
                if (lane == 0) {
                    expect_bytes(full(stage), 2 * rows * 128);
                    copy_bulk(to, from, rows * 128, full(stage));
                    copy_bulk(to + TOKEN_BYTES / 2, from + block_stride, rows * 128, full(stage));
                }
#else
                for (int i = lane * 16; i < rows * 128; i += WARP * 16) {
                    copy_or_zero<16>(to + i, from + i, true);
                    copy_or_zero<16>(to + TOKEN_BYTES / 2 + i, from + block_stride + i, true);
                }
                full(stage).arrive_after_copies();
#endif
                next_stage();
            }
        }
    }

    if constexpr (REGISTERS) take_registers<240>();

    // Weights run STAGES - 1 runs ahead, past the ends of tiles. They are not written by kernels: no need to wait.
    int ahead = 0, ahead_slot = 0;
    uint8_t *const own_weights = weights + warp * MT * Run<TYPE, MT>::bytes;
    Half halves[MT][2];
    Item loading = schedule.item(0);
    const auto load_tile = [&] {
        const Tile<MT, N> tile(p, loading.tile);
#pragma unroll
        for (int m = 0; m < MT; m++) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const Matrix &matrix = p.matrix[p.epilogue == Gate ? h : tile.matrix];
                const int first = tile.row_of(p, m, h) - lane / 4;
                halves[m][h] = {row_start<TYPE>(matrix.weights, first, p.columns), matrix.rows - first};
            }
        }
    };
    const auto load_run = [&] {
        if (loading.begin < loading.end) {
#pragma unroll
            for (int m = 0; m < MT; m++) {
                copy_run<TYPE, MT>(own_weights + ahead_slot * WEIGHT_BYTES + m * Run<TYPE, MT>::bytes, halves[m], loading.begin, p.columns);
            }
            if (++loading.begin == loading.end) {
                loading = schedule.item(++ahead);
                if (loading.begin < loading.end) load_tile();
            }
        }
        if (++ahead_slot == STAGES) ahead_slot = 0;
        commit_copies();
    };
    if (loading.begin < loading.end) load_tile();
    for (int i = 0; i < STAGES - 1; i++) load_run();
    wait_for_predecessor();

    int slot = STAGES - 1;  // of the current run
    for (int i = 0;; i++) {
        const Item item = schedule.item(i);
        if (item.begin == item.end) return;
        float sum[MT][N / 8][4];
#pragma unroll
        for (int m = 0; m < MT; m++) {
#pragma unroll
            for (int j = 0; j < N / 8; j++) sum[m][j][0] = sum[m][j][1] = sum[m][j][2] = sum[m][j][3] = 0.f;
        }
#if WARPGROUP_MMA
        int previous = -1;  // the stage of the step before, until it is given back
#endif
        for (int step = item.begin * STEPS; step < min(item.end * STEPS, steps); step++) {
            if (step % STEPS == 0) {
                __syncwarp();  // all lanes have read the run that gives way
                load_run();
                wait_for_copies<STAGES - 1>();
                __syncwarp();
                if (++slot == STAGES) slot = 0;
            }
            Decoder<TYPE, MT> row[MT][2];
            const int first_unit = step / STEPS * Run<TYPE, MT>::units, slice = first_unit / SLICE_UNITS;
#pragma unroll
            for (int m = 0; m < MT; m++) {
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    row[m][h].load(own_weights + slot * WEIGHT_BYTES + m * Run<TYPE, MT>::bytes, h * 8 + lane / 4, step % STEPS, t, first_unit % SLICE_UNITS,
                                   min((p.columns + UNIT - 1) / UNIT - slice * SLICE_UNITS, SLICE_UNITS));
                }
            }
            full(stage).wait(parity);
            const uint32_t tile = shared_address(tokens + stage * TOKEN_BYTES);
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
#pragma unroll
                for (int m = 0; m < MT; m++) {
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        row[m][h].template decode<0>(w, a[buffer][0][m][h], a[buffer][0][m][2 + h]);
                        row[m][h].template decode<1>(w, a[buffer][1][m][h], a[buffer][1][m][2 + h]);
                    }
                }
                const uint32_t block = tile + w / 2 * (TOKEN_BYTES / 2);
#if WARPGROUP_MMA
#pragma unroll
                for (int i = 0; i < 8 * MT; i++) settle(a[buffer][i / (4 * MT)][i / 4 % MT][i % 4]);
                warpgroup_arrive();
#pragma unroll
                for (int k = 0; k < 2; k++) {
#pragma unroll
                    for (int m = 0; m < MT; m++) warpgroup_mma(sum[m], a[buffer][k][m], matrix_descriptor(block) + (w % 2 * 2 + k) * 2);
                }
                warpgroup_commit();
#else
#pragma unroll
                for (int k = 0; k < 2; k++) {
#pragma unroll
                    for (int j = 0; j < N / 16; j++) {
                        const int token = j * 16 + lane / 16 * 8 + lane % 8, piece = (w % 2 * 2 + k) * 2 + lane / 8 % 2;
                        uint32_t b[4];
                        load_matrices(b, block + token * 128 + (piece ^ token % 8) * 16);
#pragma unroll
                        for (int m = 0; m < MT; m++) {
                            mma(sum[m][2 * j], a[buffer][k][m], b[0], b[1]);
                            mma(sum[m][2 * j + 1], a[buffer][k][m], b[2], b[3]);
                        }
                    }
                }
#endif
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

        const Tile<MT, N> tile(p, item.tile);
        if (item.end - item.begin < schedule.steps) {  // others work on this tile as well
            constexpr int TILE = ROWS * N;
            const int rest_tile = item.tile - schedule.waves * int(gridDim.x);
            const int from = rest_tile * schedule.steps;
            const int first = schedule.block_of(from), contributors = schedule.block_of(from + schedule.steps - 1) - first + 1;
            const auto part = [&](int block) {
                const bool second_part = schedule.first_step(block) / schedule.steps != rest_tile;
                return p.partial + (size_t(block) * 2 + second_part) * TILE + threadIdx.x;
            };
            float *own = part(blockIdx.x);
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
#pragma unroll(N == 32 ? 4 : 1)
            for (int c = 0; c < contributors; c++) {
                const float *of = part(first + c);
#pragma unroll
                for (int m = 0; m < MT; m++) {
#pragma unroll
                    for (int j = 0; j < N / 2; j++) sum[m][j / 4][j % 4] += __ldcg(of + (m * N / 2 + j) * CONSUMERS);
                }
            }
        }
        finish<TYPE, MT, N>(p, tile, sum);
    }
}

}  // namespace

// MT: fragments of 16 rows that a warp holds.
#define PRODUCT(NAME, TYPE, MT, N, THREADS, BLOCKS)                               \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                 \
    NAME(const __grid_constant__ ProductParams p) { product<TYPE, MT, N, THREADS == 3 * WARPGROUP>(p); }

// With 128 tokens a lane of a warpgroup holds 128 sums: a whole warpgroup fetches, to have registers to give away.
#define PRODUCTS(NAME, TYPE)                                              \
    PRODUCT(matmul_##NAME##_n32, TYPE, 1, 32, CONSUMERS + WARP, 2)       \
    PRODUCT(matmul_##NAME##_n64, TYPE, 1, 64, CONSUMERS + WARP, 1)       \
    PRODUCT(matmul_##NAME##_n128, TYPE, WARPGROUP_MMA + 1, 128, 3 * WARPGROUP, 1)

PRODUCTS(q4_k, Q4_K)
PRODUCTS(q6_k, Q6_K)
PRODUCTS(q5_k, Q5_K)
PRODUCTS(q8_0, Q8_0)
PRODUCTS(q4_0, Q4_0)
PRODUCTS(q4_1, Q4_1)
PRODUCTS(q5_0, Q5_0)
PRODUCTS(q5_1, Q5_1)
PRODUCTS(f16, F16)
