// GEMV: y[r] = sum over c of W[r, c] * a[c], W in any ggml type, a quantized to 8 bits:
//
//   STORE   out = y (+ bias), for up to three matrices in one launch: QKV, and the output matrix; of one also
//           activate(y) * factors: what a token gives to a layer
//   ADD     x += y; then x * (the next norm's weights), quantized: output and down projections
//   GATE  activate(y of gate) * (y of up), quantized
//
// A file that includes this one defines GEMV_TYPES first: the list of quantized types that its entry points tell apart,
// as QUANTIZED_TYPES of types/all.cuh. An entry point for one type alone names it (`Only`) instead.
//
// A norm in front of a product needs no kernel and no prologue: W rms_norm(x) = W (x * weight) / rms(x), so whoever
// writes x also writes x * weight, quantized, and the sums of x^2, and the quotient is taken with the product's own
// result.
//
// Bound: the bytes of W, each read once; arithmetic is about 85 (Q4_K) to 130 (Q6_K) instructions for each 64 weights
// of a lane, 36 to 53 bytes: less than half of what an H100 issues while they arrive.
//
// Grid: one block a multiprocessor, each with an equal, contiguous share of the rows. A row is cut into slices of 2,048
// values; warp w of a block handles slice w % slices of every (warps / slices)-th tile of two rows, so a lane meets the
// same 64 activations in every row and keeps them in registers. (Where the second of two slices is at most half as
// long, each half of a warp takes a tile of it, and the first slice has two warps for each one of the second.) Weights
// go through a ring in shared memory, private to the warp, filled by bulk copies that start before the kernel waits for
// its predecessor. Each warp leaves one partial sum for each row; after one barrier they are added in slice order.
#pragma once

#include "activate.cuh"
#include "types/all.cuh"

#include <type_traits>

namespace {

constexpr int MAX_WARPS = 14;
constexpr int MAX_DEPTH = 8;  // places in a warp's ring
constexpr int BATCH = 2;      // tiles whose sums a warp reduces together
// Tiles of a warp that are asked for before the activations are: behind another product, and behind what is shorter.
constexpr int EARLY_TILES = 2, MORE_EARLY_TILES = 4;
// Tiles for which a warp waits at a time in a kernel for one type alone: two, where a ring has several such places.
#if __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200
constexpr int TILES_OF_ONE_TYPE = BATCH;
#else
constexpr int TILES_OF_ONE_TYPE = 1;
#endif

// a / b rounded down, for counts and products of two of them: an integer division is several times as long.
__device__ __forceinline__ int quotient(float a, float b) { return static_cast<int>(__fdividef(a + 0.5f, b)); }

// Where the share of block `index` of `blocks` in `count` things starts; a share has at most one more than count /
// blocks rounded up.
__device__ __forceinline__ int share(int count, int index, int blocks) {
    return index == blocks ? count : quotient(float(count) * float(index), blocks);
}

// The rows of one block in tiles of 2: of one matrix in order, or (`interleaved`) of two matrices of one type in turn.
struct BlockRows {
    const uint8_t *first, *second;
    bool interleaved;
    int matrix_rows;
    int begin, pairs;  // row pairs, of each matrix; the last may lie past its end, in a ragged group of 32 rows

    __device__ __forceinline__ int count() const { return interleaved ? 2 * pairs : pairs; }
    __device__ __forceinline__ int rows() const { return count() * TILE_ROWS; }
};

struct WarpRole {
    int columns;
    int units, slices;
    int warp, lane;
    int slice, slice_units;  // of this warp
    int group, groups;       // this warp's tiles are group, group + groups, ... of its block's
    int thread, threads;     // in the block
    bool halves;             // a tile for each half of the warp

    __device__ explicit WarpRole(int columns)
        : columns(columns),
          units(unit_count(columns)),
          slices((units + SLICE_UNITS - 1) / SLICE_UNITS),
          // From a register of another lane: a value that is not computed again wherever it is used.
          warp(__shfl_sync(~0u, (threadIdx.y * blockDim.x + threadIdx.x) / WARP, 0)),
          lane(threadIdx.x % WARP),
          slice(threadIdx.x / WARP),
          group(threadIdx.y),
          groups(blockDim.y),
          thread(threadIdx.y * blockDim.x + threadIdx.x),
          threads(blockDim.x * blockDim.y),
          halves(false) {
        if (blockDim.x / WARP > slices) {
            // Two warps for the first slice, and one for the second.
            halves = slice == 2;
            if (!halves) group = 2 * group + slice, groups *= 2;
            slice = halves;
        }
        slice_units = min(units - slice * SLICE_UNITS, SLICE_UNITS);
    }
};

struct SharedMemory {
    // Dynamic shared memory, in this order.
    uint8_t *ring;   // (warps * ring_bytes)
    float *partial;  // (slices, rows of the block's tiles; gemv_gate: of both matrices)

    int ring_bytes;
    CopyBarrier *arrived;  // of this warp: (MAX_DEPTH), for the first stream and for a second one

    __device__ __forceinline__ SharedMemory(const WarpRole &role, int ring_bytes) : ring_bytes(ring_bytes) {
        extern __shared__ __align__(128) uint8_t bytes[];
        __shared__ CopyBarrier barriers[MAX_WARPS][2 * MAX_DEPTH];
        ring = bytes;
        partial = reinterpret_cast<float *>(bytes + role.threads / WARP * ring_bytes);
        arrived = barriers[role.warp];
    }
};

// One warp's stream of weights: its slice of its tiles, in order, through its ring. Of one matrix it takes every
// `groups`th row pair; of two, the same pairs of both in turn. Each place of the ring holds TILES of them (1 or BATCH),
// asked for and waited for together.
template <typename Type, int TILES>
struct WeightStream {
    using Layout = typename Type::Layout;

    const BlockRows &tiles;
    const WarpRole &role;
    CopyBarrier *arrived;
    uint8_t *ring;
    uint64_t policy;
    int tile_bytes, depth;         // places of the ring
    int count;                     // tiles of this warp
    const uint8_t *next, *second;  // where the next tile to load is, and the one after it
    int step;                      // bytes from a tile to the next but one

    __device__ __forceinline__ WeightStream(const BlockRows &tiles, const WarpRole &role, const SharedMemory &shared,
                                            CopyBarrier *arrived)
        : tiles(tiles),
          role(role),
          arrived(arrived),
          ring(shared.ring + role.warp * shared.ring_bytes),
          policy(read_once()),
          tile_bytes(Layout::tile_bytes(role.slice_units)),
          depth(min(quotient(shared.ring_bytes, TILES * tile_bytes), MAX_DEPTH)) {
        const int pairs = min(tiles.pairs, (tiles.matrix_rows + TILE_ROWS - 1) / TILE_ROWS - tiles.begin);
        const int mine = quotient(max(pairs - role.group + role.groups - 1, 0), role.groups);
        const int pair_bytes = Layout::pair_bytes(role.units), stride = role.groups * pair_bytes;
        const size_t at = size_t(tiles.begin + role.group) * pair_bytes + role.slice * Layout::tile_bytes(SLICE_UNITS);
        count = tiles.interleaved ? 2 * mine : mine;
        next = tiles.first + at;
        second = tiles.interleaved ? tiles.second + at : next + stride;
        step = tiles.interleaved ? stride : 2 * stride;
    }

    // Starts copying the next tiles, of which `first` is the first, to place `slot`. The last time one may lack.
    __device__ __forceinline__ void load(int slot, int first) {
        constexpr int MOST = Layout::tile_bytes(SLICE_UNITS);
        uint8_t *to = ring + slot * TILES * tile_bytes;
        if constexpr (TILES == 1) {
            arrived[slot].template copy<MOST>(to, {next}, 1, tile_bytes, policy);
            const uint8_t *after = next + step;
            next = second;
            second = after;
        } else {
            arrived[slot].template copy<MOST>(to, {next, second}, min(count - first, TILES), tile_bytes, policy);
            next += step, second += step;
        }
    }

    // Starts filling the ring for the first time, from place `from` up to place `to`.
    __device__ __forceinline__ void prefetch(int from, int to) {
        const int filled = (count + TILES - 1) / TILES;
#pragma unroll 1
        for (int slot = from; slot < min(min(depth, filled), to); slot++) load(slot, slot * TILES);
    }

    // Adds up the rows' products: partial[i] for each row `i` of this warp. `request` makes the activations readable
    // and asks for other things that `use` takes. `early_tiles` tiles are asked for before the activations are, and the
    // others after: else these would wait in line behind the whole ring.
    template <typename Request, typename Use>
    __device__ __forceinline__ void multiply(const int8_t *q, const float *scale, float *partial, int early_tiles,
                                             Request request, Use use) {
        if (elect()) {
#pragma unroll
            for (int slot = 0; slot < MAX_DEPTH; slot++) arrived[slot].init();
            Barrier::publish();
        }
        __syncwarp();
        prefetch(0, early_tiles / TILES);
        request();
        typename Type::Activations a;
        const bool halves = TILES == BATCH && role.halves;
        const int n = role.slice_units, place_in_tile = halves ? role.lane % (WARP / 2) : role.lane,
                  lane = min(place_in_tile, n - 1);  // lanes without a unit multiply another's by zero
        {
            const int unit = role.slice * SLICE_UNITS + lane;
            int4 values[4];
#pragma unroll
            for (int j = 0; j < 4; j++)
                values[j] = place_in_tile < n ? reinterpret_cast<const int4 *>(q)[unit * 4 + j] : int4{};
            const float2 scales = reinterpret_cast<const float2 *>(scale)[unit];
            prefetch(early_tiles / TILES, MAX_DEPTH);
            a.prepare(values, scales.x, scales.y);
            use();
        }
        if (halves) {
            add_up<true>(a, n, lane, partial);
        } else {
            add_up<false>(a, n, lane, partial);
        }
    }

    // The sums of this warp's rows, of which this lane multiplies unit `lane` of `n`. HALVES: a tile for each half of
    // the warp; known before the loop, as a branch in it keeps the products of two tiles apart.
    template <bool HALVES>
    __device__ __forceinline__ void add_up(const typename Type::Activations &a, int n, int lane, float *partial) {
        // After a warp's sum, lane 8 i has row i of a batch.
        const int batch_tile = role.lane / 16, row = role.lane / 8 % 2;
        const int place = tiles.interleaved ? 2 * role.group + batch_tile : role.group + batch_tile * role.groups;
        float *to = partial + place * TILE_ROWS + row;
        int slot = 0;
        uint32_t parity = 0;
#pragma unroll 1
        for (int i = 0; i < count; i += BATCH) {
            float sum[BATCH][TILE_ROWS];
#pragma unroll
            for (int b = 0; b < BATCH; b += TILES) {
                sum[b][0] = sum[b][1] = 0.f;
                if (b == 0 || i + b < count) {
                    arrived[slot].wait(parity);
                    // The sums of a tile that lacks are not stored.
#pragma unroll
                    for (int t = 0; t < TILES; t++) {
                        if (t > 0 && HALVES) break;
                        const uint8_t *tile = ring + (slot * TILES + t) * tile_bytes;
                        if (HALVES) tile += batch_tile * tile_bytes;
#pragma unroll
                        for (int r = 0; r < TILE_ROWS; r++) sum[b + t][r] = Type::dot(tile, n, r, lane, a);
                    }
                    __syncwarp();
                    if (i + b + TILES * depth < count) load(slot, i + b + TILES * depth);
                    if (++slot == depth) slot = 0, parity ^= 1;
                }
            }
            // Halves exchange sums so that eight lanes end with each row's total.
            const bool upper = role.lane & 16, odd = role.lane & 8;
            float s0, s1;
            if (HALVES) {
                s0 = sum[0][0] + 0.f, s1 = sum[0][1] + 0.f;  // as with zeros of the other half
            } else {
                s0 = (upper ? sum[1][0] : sum[0][0]) + __shfl_xor_sync(~0u, upper ? sum[0][0] : sum[1][0], 16);
                s1 = (upper ? sum[1][1] : sum[0][1]) + __shfl_xor_sync(~0u, upper ? sum[0][1] : sum[1][1], 16);
            }
            float total = (odd ? s1 : s0) + __shfl_xor_sync(~0u, odd ? s0 : s1, 8);
#pragma unroll
            for (int offset = 4; offset > 0; offset /= 2) total += __shfl_xor_sync(~0u, total, offset);
            if (role.lane % 8 == 0 && i + batch_tile < count) to[i * role.groups * TILE_ROWS] = total;
        }
    }
};

// Asks the L2 cache for the beginning of what `float_multiply` reads, before there is anything to multiply with.
template <typename Type>
__device__ __forceinline__ void float_prefetch(const BlockRows &tiles, const WarpRole &role) {
    constexpr int LINE = 128, MOST = 16'384;
    const size_t stride = Type::stride(role.columns);
    const int pairs = tiles.interleaved ? tiles.count() / 2 : tiles.count();
    const int rows = min((tiles.begin + pairs) * TILE_ROWS, tiles.matrix_rows) - tiles.begin * TILE_ROWS;
    const uint8_t *from = tiles.first + tiles.begin * TILE_ROWS * stride;
    const int bytes = min(rows * stride, size_t(role.threads / WARP * MOST));
    for (int at = role.thread * LINE; at < bytes; at += role.threads * LINE) {
        asm volatile("prefetch.global.L2 [%0];" ::"l"(from + at));
    }
}

template <typename Type>
__device__ void float_multiply(const BlockRows &tiles, const WarpRole &role, const float *a, float *partial) {
    const int warps = role.threads / WARP;
    for (int i = role.warp; i < tiles.rows(); i += warps) {
        const int tile = i / TILE_ROWS, pair = tiles.interleaved ? tile / 2 : tile;
        const int row = min((tiles.begin + pair) * TILE_ROWS + i % TILE_ROWS, tiles.matrix_rows - 1);
        const uint8_t *weights =
            (tiles.interleaved && tile % 2 ? tiles.second : tiles.first) + row * Type::stride(role.columns);
        const float sum =
            float_dot(reinterpret_cast<const typename Type::Value *>(weights), a, role.columns, role.lane);
        if (role.lane == 0) partial[i] = sum;
    }
}

// partial[s][i], s a slice, i a row of the block; then a barrier. Float weights have one slice. `request` is called
// once the first weights are on their way, and makes the activations readable; `use` once these have arrived.
template <typename Only, typename Request, typename Use>
__device__ __forceinline__ void multiply(int type, const BlockRows &tiles, const WarpRole &role,
                                         const SharedMemory &shared, CopyBarrier *arrived, const Activation &a,
                                         float *partial, int early_tiles, Request request, Use use) {
    if constexpr (!std::is_void_v<Only>) {
        float *sums = partial + role.slice * tiles.rows();
        WeightStream<Only, TILES_OF_ONE_TYPE>(tiles, role, shared, arrived)
            .multiply(a.q, a.scale, sums, early_tiles, request, use);
    } else if (is_float(type)) {
        for_float(type, [&](auto chosen) { float_prefetch<decltype(chosen)>(tiles, role); });
        request();
        use();
        for_float(type, [&](auto chosen) { float_multiply<decltype(chosen)>(tiles, role, a.value, partial); });
    } else {
        float *sums = partial + role.slice * tiles.rows();
        switch (type) {
#define MULTIPLY(NAME, TYPE, NUMBER)                                                                                 \
    case NUMBER:                                                                                                     \
        WeightStream<TYPE, 1>(tiles, role, shared, arrived).multiply(a.q, a.scale, sums, early_tiles, request, use); \
        break;
            GEMV_TYPES(MULTIPLY)
#undef MULTIPLY
            default: break;
        }
    }
    __syncthreads();
}

__device__ __forceinline__ float total(int type, const WarpRole &role, const float *partial, int rows, int i) {
    const int slices = is_float(type) ? 1 : role.slices;
    float sum = partial[i];
#pragma unroll 1
    for (int s = 1; s < slices; s++) sum += partial[s * rows + i];
    return sum;
}

// 1 / rms of the vector whose groups' sums of squares these are; 1 where there are none.
struct RmsScale {
    static constexpr int KEPT = 4;  // sums that a lane loads at once
    const float *squares = nullptr;
    float kept[KEPT] = {};
    int groups;

    __device__ __forceinline__ explicit RmsScale(const WarpRole &role) : groups(role.columns / ACTIVATION_GROUP) {}

    __device__ __forceinline__ void load(const float *from, const WarpRole &role) {
        squares = from;
        if (!squares) return;
#pragma unroll
        for (int i = 0; i < KEPT; i++) kept[i] = i * WARP + role.lane < groups ? squares[i * WARP + role.lane] : 0.f;
    }

    __device__ __forceinline__ float operator()(float epsilon, const WarpRole &role) const {
        if (!squares) return 1.f;
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < KEPT; i++) sum += kept[i];
#pragma unroll 1
        for (int i = KEPT * WARP + role.lane; i < groups; i += WARP) sum += squares[i];
        return rsqrtf(warp_sum(sum) / role.columns + epsilon);
    }
};

}  // namespace

namespace {

enum Epilogue { STORE, ADD, GATE };

template <Epilogue EPILOGUE, typename Only = void>
__device__ __forceinline__ void gemv(const GemvParams &p) {
    // What follows QKV reads the position before its wait, and so may start only when all before QKV has ended.
    if (EPILOGUE != STORE) launch_dependents();
    int block = blockIdx.x, s = 0;
    if constexpr (EPILOGUE == STORE) {
        while (s < 2 && block >= p.matrix[s].blocks) block -= p.matrix[s++].blocks;
    }
    const GemvMatrix matrix = p.matrix[s];
    const int up_type = p.matrix[1].type;
    // Blocks own whole groups of an activation that they write.
    constexpr int GRAIN = EPILOGUE == STORE ? 1 : ACTIVATION_GROUP / TILE_ROWS;
    const int shares = (matrix.rows + GRAIN * TILE_ROWS - 1) / (GRAIN * TILE_ROWS);
    const int begin = share(shares, block, matrix.blocks) * GRAIN,
              count = share(shares, block + 1, matrix.blocks) * GRAIN - begin;
    const bool interleaved = EPILOGUE == GATE && (!std::is_void_v<Only> || matrix.type == up_type);

    const WarpRole role(p.columns);
    const SharedMemory shared(role, p.ring_bytes);
    const BlockRows tiles{matrix.weights, p.matrix[1].weights, interleaved, matrix.rows, begin, count};
    const int first = begin * TILE_ROWS + role.thread, past = min((begin + count) * TILE_ROWS, matrix.rows);
    const float norm = EPILOGUE == ADD && first < past ? p.next_norm[first] : 0.f;
    float old = 0.f, scale = 1.f;
    RmsScale rms(role);
    const auto request = [&] {
        wait_for_predecessor();
        if (EPILOGUE == STORE) launch_dependents();
        if (EPILOGUE == ADD && first < past) old = matrix.out[first];
        if (EPILOGUE != ADD) rms.load(p.squares, role);
    };
    const auto use = [&] { scale = rms(p.epsilon, role); };
    const int early_tiles = EPILOGUE == STORE && !p.squares ? MORE_EARLY_TILES : EARLY_TILES;
    multiply<Only>(matrix.type, tiles, role, shared, shared.arrived, p.a, shared.partial, early_tiles, request, use);

    if constexpr (EPILOGUE == STORE) {
#pragma unroll 1
        for (int row = first; row < past; row += role.threads) {
            const float bias = matrix.bias ? matrix.bias[row] : 0.f;
            const float y =
                scale * total(matrix.type, role, shared.partial, tiles.rows(), row - begin * TILE_ROWS) + bias;
            matrix.out[row] = p.factors ? activate(p.gelu, y) * p.factors[row] : y;
        }
    } else if constexpr (EPILOGUE == ADD) {
#pragma unroll 1
        for (int i = role.thread; i < count * TILE_ROWS; i += role.threads) {
            const int row = begin * TILE_ROWS + i;
            float x = 0.f, weight = 0.f;
            if (row < matrix.rows) {
                x = (row == first ? old : matrix.out[row]) +
                    scale * total(matrix.type, role, shared.partial, tiles.rows(), i);
                weight = row == first ? norm : p.next_norm[row];
                matrix.out[row] = x;
            }
            store_group(p.next, row / ACTIVATION_GROUP, x * weight);
            const float squares = warp_sum(x * x);
            if (role.lane == 0) p.next_squares[row / ACTIVATION_GROUP] = squares;
        }
    } else {
        const float *up_partial = shared.partial;
        if (!interleaved) {
            const BlockRows up_tiles{p.matrix[1].weights, nullptr, false, matrix.rows, begin, count};
            float *partial = shared.partial + role.slices * tiles.rows();
            multiply<Only>(
                up_type, up_tiles, role, shared, shared.arrived + MAX_DEPTH, p.a, partial, early_tiles, [] {}, [] {});
            up_partial = partial;
        }
#pragma unroll 1
        for (int i = role.thread; i < count * TILE_ROWS; i += role.threads) {
            const int at = interleaved ? i / TILE_ROWS * 2 * TILE_ROWS + i % TILE_ROWS : i;
            const float gate = scale * total(matrix.type, role, shared.partial, tiles.rows(), at);
            const float up = scale * total(up_type, role, up_partial, tiles.rows(), interleaved ? at + TILE_ROWS : at);
            const int row = begin * TILE_ROWS + i;
            store_group(p.next, row / ACTIVATION_GROUP, row < matrix.rows ? activate(p.gelu, gate) * up : 0.f);
        }
    }
}

}  // namespace
