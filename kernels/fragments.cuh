// Quantized rows as the first operand of a matrix instruction: how a warp brings 16 of them to shared memory, and how its lanes
// decode what they hold to f16. f16 holds a decoded weight to 2^-12 of its size.
#pragma once

#include "formats.cuh"
#include "tiles.cuh"

// 1,024 + the integer that MASK picks from each half of `word`, as f16: an integer below 1,024 fits the lowest bits. One
// instruction, which the compiler does not make of an `and` and an `or` with two constants.
template <uint32_t MASK>
__device__ __forceinline__ uint32_t kilo_plus(uint32_t word) {
    uint32_t result;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(word), "n"(MASK), "r"(0x64006400u));
    return result;
}

// What a warp that has MT fragments of 16 rows holds of one in shared memory, for one run of `units` units of each row: whole
// cache lines of codes, or half ones where shared memory is short. (Runs of two units would make a request of every 32 bytes,
// which took twice as long as all the rest.)
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

    // Where a piece of codes lies, and high bits: swizzled, so that both the lanes that copy and those that read meet all banks.
    __device__ static __forceinline__ int code_swizzle(int row, int piece) { return units == 8 ? row % 2 * 4 + piece % 2 * 2 : row % 2 * 2; }
    __device__ static __forceinline__ int high_swizzle(int row) { return high_bytes == 16 ? row / 2 % 2 * 2 : 0; }
    __device__ static __forceinline__ int code_at(int row, int piece, int unit) {
        if constexpr (plain) return row * 256 + ((unit * 8 + piece) ^ row % 8) * 16;
        return ((row * pieces + piece) * units + (unit ^ code_swizzle(row, piece))) * 16;
    }
    __device__ static __forceinline__ int high_of(int row, int unit) { return high_at + (row * units + (unit ^ high_swizzle(row))) * high_bytes; }
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
__device__ __forceinline__ void copy_run(uint32_t to, const Half (&half)[2], int run, int columns) {
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
        // In pass i a lane copies of a plane what belongs to row i * ROWS + `row`; ROWS is even, so that passes lie whole pairs apart.
        constexpr int GROUPS = WARP / R::units;  // of lanes, one for each unit
        const int slice = run * R::units / SLICE_UNITS, n = min(units - slice * SLICE_UNITS, SLICE_UNITS);
        const int pair_bytes = F::pair_bytes(units), slice_at = slice * F::tile_bytes(SLICE_UNITS);
        const int unit = lane % R::units, group = lane / R::units, in_slice = run * R::units % SLICE_UNITS + unit;
        {
            constexpr int ROWS = GROUPS / R::pieces;
            const int row = group / R::pieces, piece = group % R::pieces;
            const int offset = slice_at + row / TILE_ROWS * pair_bytes + ((piece * TILE_ROWS + row % TILE_ROWS) * n + in_slice) * 16;
            const uint32_t first = to + R::code_at(row, piece, unit);
#pragma unroll
            for (int i = 0; i < 16 / ROWS; i++) {
                const Half &rows = half[i * ROWS / 8];
                copy_or_zero<16, true>(first + i * ROWS * R::pieces * R::units * 16, rows.start + (offset + i * ROWS % 8 / TILE_ROWS * pair_bytes),
                                       in_slice < n && row + i * ROWS % 8 < rows.rows);
            }
        }
        if constexpr (R::high_bytes + R::scale_bytes > 0) {
            constexpr int ROWS = GROUPS;
            const int offset = slice_at + group / TILE_ROWS * pair_bytes, at = group % TILE_ROWS * n + in_slice;
#pragma unroll
            for (int i = 0; i < 16 / ROWS; i++) {
                const Half &rows = half[i * ROWS / 8];
                const uint8_t *tile = rows.start + (offset + i * ROWS % 8 / TILE_ROWS * pair_bytes);
                const bool exists = in_slice < n && group + i * ROWS % 8 < rows.rows;
                if constexpr (R::high_bytes > 0) {
                    copy_or_zero<R::high_bytes, true>(to + R::high_of(group, unit) + i * ROWS * R::units * R::high_bytes,
                                                      tile + (F::high_at(n) + at * R::high_bytes), exists);
                }
                if constexpr (R::scale_bytes > 0) {
                    copy_or_zero<R::scale_bytes>(to + R::scale_at + ((i * ROWS + group) * R::units + unit) * R::scale_bytes,
                                                 tile + (F::scale_at(n) + at * R::scale_bytes), exists);
                }
            }
        }
        constexpr int SUPERS = R::units / 4;  // of a row
        if (F::super_blocks && lane < 16 * SUPERS) {
            const int row = lane / SUPERS, super = lane % SUPERS, first_unit = run * R::units % SLICE_UNITS + super * 4;
            const int index = row % TILE_ROWS * (n / 4) + first_unit / 4;
            const Half rows = row / 8 ? half[1] : half[0];
            const uint8_t *tile = rows.start + (slice_at + row % 8 / TILE_ROWS * pair_bytes);
            const bool exists = first_unit < n && row % 8 < rows.rows;
            if constexpr (F::packed_scales) {
                copy_or_zero<16>(to + R::scale_at + lane * 16, tile + (F::scale_at(n) + index * 16), exists);
            } else {
                copy_or_zero<4>(to + R::super_at + lane * 4, tile + (F::super_at(n) + index / 2 * 4), exists);
            }
        }
    }
}

// Where a lane finds what it decodes: it is lane t of the four of row g, and of row g + 8. In each step it takes 32 values of unit t / 2 of two
// (see tiles.cuh). All of this holds for every run, and is computed once.
template <int TYPE, int MT>
struct Place {
    using R = Run<TYPE, MT>;
    static constexpr bool packed_scales = TYPE != F16 && Format<TYPE>::packed_scales;
    int row, unit, part;
    int code, high, scale;  // bytes from the start of a run
    uint32_t pick[2];       // packed scales: which bytes of the header are the unit's

    __device__ __forceinline__ Place() : row(threadIdx.x % WARP / 4), unit(threadIdx.x % 4 / 2), part(threadIdx.x % 2) {
        code = row * R::pieces * R::units * 16 + (R::plain ? 0 : part * R::units * 16);
        high = R::high_at + row * R::units * R::high_bytes + (R::high_bytes == 16 ? part * 8 : 0);
        scale = R::scale_at + row * R::units * (packed_scales ? 4 : R::scale_bytes);
        pick[0] = unit | (unit + 4) << 4, pick[1] = 0x7010 | (unit + 4) << 8;
    }
    // Which unit of the run, as codes and high bits lie.
    __device__ __forceinline__ int code_unit(int step) const { return (2 * step) ^ (R::code_swizzle(row, part) + unit); }
    __device__ __forceinline__ int high_unit(int step) const { return (2 * step) ^ (R::high_swizzle(row) + unit); }
};

// What a lane decodes of one row in one step, in registers: 16 values of each half of its unit.
template <int TYPE, int MT>
struct Decoder {
    using R = Run<TYPE, MT>;
    static constexpr int pieces = TYPE == F16 ? 4 : R::pieces / 2;
    uint32_t code[4 * pieces];
    uint2 high;
    half2 scale[2], minimum[2];  // of the first and the second half; minimum is added

    // Of row g + 8 h in step `step` of the run at `from`, whose units count from `first_unit` of a slice of `n`.
    __device__ __forceinline__ void load(uint32_t from, const Place<TYPE, MT> &place, int h, int step, int first_unit, int n) {
        const uint32_t codes = from + place.code + (h * 8 * R::pieces * R::units * 16);
#pragma unroll
        for (int i = 0; i < pieces; i++) {
            uint4 v;
            if constexpr (R::plain) {
                v = load_shared<uint4>(codes + ((place.unit * 8 + i / 2 * 4 + place.part * 2 + i % 2) ^ place.row) * 16);
            } else {
                v = load_shared<uint4>(codes + (2 * i * R::units + place.code_unit(step)) * 16);
            }
            code[4 * i] = v.x, code[4 * i + 1] = v.y, code[4 * i + 2] = v.z, code[4 * i + 3] = v.w;
        }
        if constexpr (R::high_bytes > 0) {
            high = load_shared<uint2>(from + place.high + (h * 8 * R::units + place.high_unit(step)) * R::high_bytes);
        }
        const uint32_t scales = from + place.scale + h * 8 * R::units * (place.packed_scales ? 4 : R::scale_bytes);
        const int unit = 2 * step + place.unit;
        if constexpr (place.packed_scales) {
            const uint4 header = load_shared<uint4>(scales + step / 2 * 16);
            const uint32_t two = __byte_perm(header.y, header.z, place.pick[0] + step % 2 * 0x22);
            const uint32_t packed = __byte_perm(two, header.w, place.pick[1] + step % 2 * 0x200);
            const half2 kilo = __half2half2(__ushort_as_half(0x6400));
            const half2 two_scales = __hsub2(as_half2(kilo_plus<0x003f003fu>(__byte_perm(packed, packed << 10, 0x7610))), kilo);
            const half2 two_minima = __hsub2(as_half2(kilo_plus<0x003f003fu>(__byte_perm(packed >> 12, packed >> 2, 0x7610))), kilo);
            const half2 d = as_half2(header.x);
            const half2 s = __hmul2(__low2half2(d), two_scales), m = __hmul2(__hneg2(__high2half2(d)), two_minima);
            scale[0] = __low2half2(s), scale[1] = __high2half2(s);
            minimum[0] = __low2half2(m), minimum[1] = __high2half2(m);
        } else if constexpr (TYPE == Q6_K) {
            const uint32_t packed = load_shared<uint32_t>(scales + unit * 4);
            const half2 supers = load_shared<half2>(from + R::super_at + ((place.row + h * 8) * (R::units / 4) + unit / 4) * 4);
            const int index = place.row % TILE_ROWS * (n / 4) + (first_unit + unit) / 4;
            const float d = __half2float(index % 2 ? __high2half(supers) : __low2half(supers));
            scale[0] = __float2half2_rn(d * static_cast<int8_t>(packed >> 8 * place.part));
            scale[1] = __float2half2_rn(d * static_cast<int8_t>(packed >> (16 + 8 * place.part)));
        } else if constexpr (R::scale_bytes == 8) {
            const uint2 both = load_shared<uint2>(scales + unit * 8);
            scale[0] = __low2half2(as_half2(both.x)), minimum[0] = __high2half2(as_half2(both.x));
            scale[1] = __low2half2(as_half2(both.y)), minimum[1] = __high2half2(as_half2(both.y));
        } else if constexpr (R::scale_bytes == 4) {
            const half2 both = load_shared<half2>(scales + unit * 4);
            scale[0] = __low2half2(both), scale[1] = __high2half2(both);
        }
    }

    // Values 4 w + (0, 2) and 4 w + (1, 3) of half HALF of the piece.
    template <int HALF>
    __device__ __forceinline__ void decode(int w, uint32_t &even, uint32_t &odd) const {
        constexpr uint32_t BYTES = 0x00ff00ffu;
        if constexpr (TYPE == F16) {
            const uint32_t first = code[HALF * 8 + 2 * w], second = code[HALF * 8 + 2 * w + 1];
            even = __byte_perm(first, second, 0x5410), odd = __byte_perm(first, second, 0x7632);
        } else if constexpr (TYPE == Q8_0) {
            const uint32_t c = code[HALF * 4 + w] ^ 0x80808080u;
            const half2 offset = __half2half2(__ushort_as_half(0x6480));  // 1,024 + 128
            even = bits(__hmul2(__hsub2(as_half2(kilo_plus<BYTES>(c)), offset), scale[HALF]));
            odd = bits(__hmul2(__hsub2(as_half2(kilo_plus<BYTES>(c >> 8)), offset), scale[HALF]));
        } else {
            constexpr int zero = TYPE == Q4_0 ? 8 : TYPE == Q5_0 ? 16 : TYPE == Q6_K ? 32 : 0;
            constexpr bool has_minimum = TYPE == Q4_K || TYPE == Q5_K || TYPE == Q4_1 || TYPE == Q5_1;
            half2 x, y;
            if constexpr (R::high_bytes == 0 && HALF == 1) {
                // 1,024 + 16 times the code.
                constexpr uint32_t HIGH = 0x00f000f0u;
                const half2 sixteenth = __half2half2(__ushort_as_half(0x2c00)), offset = __float2half2_rn(-64.f - zero);
                x = __hfma2(as_half2(kilo_plus<HIGH>(code[w])), sixteenth, offset);
                y = __hfma2(as_half2(kilo_plus<HIGH>(code[w] >> 8)), sixteenth, offset);
            } else {
                const half2 offset = __float2half2_rn(1024.f + zero);
                constexpr uint32_t mask = R::high_bytes > 0 ? BYTES : 0x000f000fu;
                uint32_t c = code[w];
                if constexpr (R::high_bytes > 0) {
                    c = (HALF ? c >> 4 : c) & 0x0f0f0f0fu;
                    if constexpr (TYPE == Q6_K) {
                        const uint32_t h = w / 2 ? high.y : high.x;
                        const int shift = 4 - 4 * (w % 2) - 2 * HALF;  // to the left
                        c |= (shift >= 0 ? h << shift : h >> -shift) & 0x30303030u;
                    } else {
                        const int part = threadIdx.x % 2;
                        c |= ((HALF ? high.y : high.x) >> (4 * part + w) & 0x01010101u) << 4;
                    }
                }
                x = __hsub2(as_half2(kilo_plus<mask>(c)), offset);
                y = __hsub2(as_half2(kilo_plus<mask>(c >> 8)), offset);
            }
            if constexpr (has_minimum) {
                even = bits(__hfma2(x, scale[HALF], minimum[HALF])), odd = bits(__hfma2(y, scale[HALF], minimum[HALF]));
            } else {
                even = bits(__hmul2(x, scale[HALF])), odd = bits(__hmul2(y, scale[HALF]));
            }
        }
    }
};

// Adds the products of word w of a step's codes, which is two steps of the matrix instruction: MT fragments of rows, decoded to `a`, with the
// N tokens at `tokens`. On sm_90a the products are only started; `a` and the tokens must stay until they have been waited for.
template <int TYPE, int MT, int N>
__device__ __forceinline__ void multiply(float (&sum)[MT][N / 8][4], uint32_t (&a)[2][MT][4], const Decoder<TYPE, MT> (&row)[MT][2], int w, uint32_t tokens) {
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            row[m][h].template decode<0>(w, a[0][m][h], a[0][m][2 + h]);
            row[m][h].template decode<1>(w, a[1][m][h], a[1][m][2 + h]);
        }
    }
    const uint32_t block = tokens + w / 2 * (TOKEN_BYTES<N> / 2);
#if WARPGROUP_MMA
#pragma unroll
    for (int i = 0; i < 8 * MT; i++) settle(a[i / (4 * MT)][i / 4 % MT][i % 4]);
    warpgroup_arrive();
#pragma unroll
    for (int k = 0; k < 2; k++) {
#pragma unroll
        for (int m = 0; m < MT; m++) warpgroup_mma(sum[m], a[k][m], matrix_descriptor(block) + (w % 2 * 2 + k) * 2);
    }
    warpgroup_commit();
#else
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int k = 0; k < 2; k++) {
#pragma unroll
        for (int j = 0; j < N / 16; j++) {
            const int token = j * 16 + lane / 16 * 8 + lane % 8, piece = (w % 2 * 2 + k) * 2 + lane / 8 % 2;
            uint32_t b[4];
            load_matrices(b, block + token * 128 + (piece ^ token % 8) * 16);
#pragma unroll
            for (int m = 0; m < MT; m++) {
                mma(sum[m][2 * j], a[k][m], b[0], b[1]);
                mma(sum[m][2 * j + 1], a[k][m], b[2], b[3]);
            }
        }
    }
#endif
}

// Calls CALL(name, TYPE) for each type that has such fragments.
#define FOR_CHUNK_TYPES(CALL) \
    CALL(q4_k, Q4_K)          \
    CALL(q6_k, Q6_K)          \
    CALL(q5_k, Q5_K)          \
    CALL(q8_0, Q8_0)          \
    CALL(q4_0, Q4_0)          \
    CALL(q4_1, Q4_1)          \
    CALL(q5_0, Q5_0)          \
    CALL(q5_1, Q5_1)          \
    CALL(f16, F16)
