// What a tensor type is to the kernels: one struct in a file of its own, listed in all.cuh.
//
// A quantized type has these members. The structs of this header and the headers of what several types share
// (nibbles.cuh, two_bits.cuh, codebook.cuh; packed_scales.cuh, unit_bits.cuh, block_scales.cuh) are there to build them
// from; a type with codes or scales of another kind has its own, and no kernel changes.
//
//   block_values, block_bytes         a block in the file
//   code(block, i)                    the code of value i of such a block
//   Layout                            the planes of a tile in device memory: a TileLayout
//   repack(FileUnit, TileUnit)        a unit from the file to its tile, bit for bit
//   value(TileUnit, i)                value i of a unit, for embed
//   Activations, prepare(q, s0, s1)   64 activations and their two scales, with what `dot` needs of them, for GEMV
//   dot(tile, n, row, lane, a)        their product with unit `lane` of row `row` of a tile of n units
//   Run<MT>                           a warp's weights in shared memory, for GEMM: see WeightRun
//   Fragment<MT>                      a lane's weights in registers, for GEMM: see WeightFragment
//
// Float types (float.cuh) keep the file's values.
//
// How quantized matrices lie in device memory: a row is cut into units of 64 values, one unit for one lane, and a slice
// of 32 units (the last one may be shorter) for one warp. A tile is one slice of 2 consecutive rows, contiguous, so
// that one copy of a few kilobytes brings it. Tiles lie slice by slice, then row pair by row pair. With n units in a
// slice, a tile holds the planes of its type's Layout one after another and is filled up to a multiple of 16 bytes; an
// odd last row gets a row of zeros beside it, and a row of an odd count of 32-value blocks a block of zeros at its end.
#pragma once

#include "../common.cuh"
#include "../copy.cuh"

constexpr int UNIT = 64;
constexpr int SLICE_UNITS = WARP;
constexpr int TILE_ROWS = 2;
constexpr int SUPER_UNITS = 4;  // of a super-block of 256 values

__host__ __device__ constexpr int unit_count(int columns) { return (columns + UNIT - 1) / UNIT; }

// The planes of a tile of n units; the last index runs fastest:
//
//     codes   [piece PIECES][row 2][n]   16 bytes each
//     high    [row 2][n]                 HIGH bytes each: bits of codes that have no room among `codes`
//     scales  [row 2][n]                 SCALE bytes each
//     supers  [row 2][n / 4]             SUPER bytes for each super-block of 4 units
template <int PIECES, int HIGH, int SCALE, int SUPER>
struct TileLayout {
    static constexpr int code_pieces = PIECES, high_bytes = HIGH, scale_bytes = SCALE, super_bytes = SUPER;

    // Where a tile's planes start, and its size.
    __host__ __device__ static constexpr int high_at(int n) { return PIECES * 16 * TILE_ROWS * n; }
    __host__ __device__ static constexpr int scale_at(int n) { return high_at(n) + HIGH * TILE_ROWS * n; }
    __host__ __device__ static constexpr int super_at(int n) { return scale_at(n) + SCALE * TILE_ROWS * n; }
    __host__ __device__ static constexpr int tile_bytes(int n) {
        constexpr bool WHOLE = SUPER % SUPER_UNITS == 0;  // bytes for each unit
        return (super_at(n) + (WHOLE ? SUPER / SUPER_UNITS * TILE_ROWS * n : SUPER * TILE_ROWS * n / SUPER_UNITS) +
                15) /
               16 * 16;
    }
    // Bytes of two rows of `units` units.
    __host__ __device__ static constexpr int pair_bytes(int units) {
        return units / SLICE_UNITS * tile_bytes(SLICE_UNITS) +
               (units % SLICE_UNITS ? tile_bytes(units % SLICE_UNITS) : 0);
    }
};

// Unit `unit` of row `row` (of 2) of a tile of n units.
template <typename Layout, typename Byte = const uint8_t>
struct TileUnit {
    Byte *tile;
    int n, row, unit;

    __device__ __forceinline__ Byte *codes(int piece) const {
        return tile + ((piece * TILE_ROWS + row) * n + unit) * 16;
    }
    __device__ __forceinline__ Byte *high() const {
        return tile + Layout::high_at(n) + (row * n + unit) * Layout::high_bytes;
    }
    __device__ __forceinline__ Byte *scales() const {
        return tile + Layout::scale_at(n) + (row * n + unit) * Layout::scale_bytes;
    }
    // Of the unit's super-block.
    __device__ __forceinline__ Byte *super() const {
        return tile + Layout::super_at(n) + (row * (n / SUPER_UNITS) + unit / SUPER_UNITS) * Layout::super_bytes;
    }
};

// Unit `index` of row `row` of a matrix whose rows have `units` units.
template <typename Layout, typename Byte>
__device__ __forceinline__ TileUnit<Layout, Byte> unit_at(Byte *weights, int units, size_t row, int index) {
    const int slice = index / SLICE_UNITS, n = min(units - slice * SLICE_UNITS, SLICE_UNITS);
    Byte *tile = weights + row / TILE_ROWS * Layout::pair_bytes(units) + slice * Layout::tile_bytes(SLICE_UNITS);
    return {tile, n, static_cast<int>(row % TILE_ROWS), index % SLICE_UNITS};
}

// Unit `index` of a row as it lies in a file, of `blocks` blocks: none in a row that only fills up a tile.
template <typename Type>
struct FileUnit {
    const uint8_t *row;
    int blocks, index;

    // The code of value `i` of the unit; 0 past the row's end.
    __device__ int code(int i) const {
        const int value = index * UNIT + i, block = value / Type::block_values;
        return block < blocks ? Type::code(row + size_t(block) * Type::block_bytes, value % Type::block_values) : 0;
    }
    // The block in which the unit begins.
    __device__ const uint8_t *block() const {
        return row + size_t(index) * UNIT / Type::block_values * Type::block_bytes;
    }
};

__device__ __forceinline__ float2 half2_at(const void *at) { return __half22float2(*static_cast<const half2 *>(at)); }

// 64 quantized activations of a lane, and the scale of each 32.
struct ActivationUnit {
    int x[16];
    float scale0, scale1;

    // `sum`: of each 16 integers.
    __device__ __forceinline__ void load(const int4 (&q)[4], float s0, float s1, int (&sum)[4]) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            x[4 * i] = q[i].x, x[4 * i + 1] = q[i].y, x[4 * i + 2] = q[i].z, x[4 * i + 3] = q[i].w;
            sum[i] = 0;
#pragma unroll
            for (int j = 0; j < 4; j++) sum[i] = dot4(0x01010101u, x[4 * i + j], sum[i]);
        }
        scale0 = s0, scale1 = s1;
    }
};

// GEMM: eight rows of a fragment of 16: where the first one starts, and how many there are (perhaps none); what is
// missing counts as zeros.
struct RowGroup {
    const uint8_t *start;
    int rows;
};

// What a warp that has MT fragments of 16 rows holds of one in shared memory, for one run of `units` units of each row:
// whole cache lines of codes, or half ones where shared memory is short. (Runs of two units would make a request of
// every 32 bytes, which took twice as long as all the rest.)
template <typename Layout, int MT>
struct WeightRun {
    static constexpr int units =
        Layout::code_pieces == 1 || (MT == 1 && Layout::high_bytes == 0 && Layout::code_pieces == 2) ? 8 : 4;
    static constexpr int values = units * UNIT;
    static constexpr int supers = units / SUPER_UNITS;
    // The smallest copy is of 4 bytes: smaller ones come with their neighbour.
    static constexpr int scale_bytes = Layout::scale_bytes == 2 ? 4 : Layout::scale_bytes;
    static constexpr int super_bytes = Layout::super_bytes == 2 ? 4 : Layout::super_bytes;

    // Planes one after another, each [row 16][unit], codes [row 16][piece][unit], supers [row 16][super-block].
    static constexpr int high_at = 16 * Layout::code_pieces * units * 16;
    static constexpr int scale_at = high_at + 16 * units * Layout::high_bytes;
    static constexpr int super_at = scale_at + 16 * units * scale_bytes;
    static constexpr int bytes = super_at + 16 * supers * super_bytes;

    // Codes and high bits are swizzled, so that both the lanes that copy and those that read meet all banks.
    __device__ static __forceinline__ int code_swizzle(int row, int piece) {
        if (Layout::code_pieces == 1) return row % 4 * 2;
        return units == 8 ? row % 2 * 4 + piece % 2 * 2 : row % 2 * 2;
    }
    __device__ static __forceinline__ int high_swizzle(int row) {
        return Layout::high_bytes * units == 64 ? row / 2 % 2 * 2 : 0;
    }
    __device__ static __forceinline__ int codes_of(int row, int piece, int unit) {
        return ((row * Layout::code_pieces + piece) * units + (unit ^ code_swizzle(row, piece))) * 16;
    }
    __device__ static __forceinline__ int high_of(int row, int unit) {
        return high_at + (row * units + (unit ^ high_swizzle(row))) * Layout::high_bytes;
    }

    // Where row `first`, an even one, starts: its pair's tile of the first slice.
    __device__ static __forceinline__ const uint8_t *row_start(const uint8_t *weights, size_t first, int columns) {
        return weights + first / TILE_ROWS * Layout::pair_bytes(unit_count(columns));
    }

    // Starts copying run `run` of a fragment's 16 rows. By all lanes of a warp.
    __device__ static __forceinline__ void copy(uint32_t to, const RowGroup (&groups)[2], int run, int columns) {
        // In pass i a lane copies of a plane what belongs to row i * ROWS + `row`; ROWS is even, so that passes lie
        // whole pairs apart.
        constexpr int GROUPS = WARP / units;  // of lanes, one for each unit
        const int lane = threadIdx.x % WARP, row_units = unit_count(columns);
        const int slice = run * units / SLICE_UNITS, n = min(row_units - slice * SLICE_UNITS, SLICE_UNITS);
        const int pair_bytes = Layout::pair_bytes(row_units), slice_at = slice * Layout::tile_bytes(SLICE_UNITS);
        const int unit = lane % units, group = lane / units, in_slice = run * units % SLICE_UNITS + unit;
        {
            constexpr int ROWS = GROUPS / Layout::code_pieces;
            const int row = group / Layout::code_pieces, piece = group % Layout::code_pieces;
            const int offset =
                slice_at + row / TILE_ROWS * pair_bytes + ((piece * TILE_ROWS + row % TILE_ROWS) * n + in_slice) * 16;
            const uint32_t first = to + codes_of(row, piece, unit);
#pragma unroll
            for (int i = 0; i < 16 / ROWS; i++) {
                const RowGroup &rows = groups[i * ROWS / 8];
                copy_or_zero<16, true>(first + i * ROWS * Layout::code_pieces * units * 16,
                                       rows.start + (offset + i * ROWS % 8 / TILE_ROWS * pair_bytes),
                                       in_slice < n && row + i * ROWS % 8 < rows.rows);
            }
        }
        if constexpr (Layout::high_bytes + Layout::scale_bytes > 0) {
            constexpr int ROWS = GROUPS;
            const int offset = slice_at + group / TILE_ROWS * pair_bytes, at = group % TILE_ROWS * n + in_slice;
#pragma unroll
            for (int i = 0; i < 16 / ROWS; i++) {
                const RowGroup &rows = groups[i * ROWS / 8];
                const uint8_t *tile = rows.start + (offset + i * ROWS % 8 / TILE_ROWS * pair_bytes);
                const bool exists = in_slice < n && group + i * ROWS % 8 < rows.rows;
                if constexpr (Layout::high_bytes > 0) {
                    copy_or_zero<Layout::high_bytes, true>(
                        to + high_of(group, unit) + i * ROWS * units * Layout::high_bytes,
                        tile + (Layout::high_at(n) + at * Layout::high_bytes), exists);
                }
                if constexpr (scale_bytes > 0) {
                    copy_or_zero<scale_bytes>(
                        to + scale_at + ((i * ROWS + group) * units + unit) * scale_bytes,
                        tile + (Layout::scale_at(n) + at / (scale_bytes / Layout::scale_bytes) * scale_bytes), exists);
                }
            }
        }
        if constexpr (super_bytes > 0) {
            if (lane < 16 * supers) {
                const int row = lane / supers, super = lane % supers,
                          first_unit = run * units % SLICE_UNITS + super * SUPER_UNITS;
                const int index = row % TILE_ROWS * (n / SUPER_UNITS) + first_unit / SUPER_UNITS;
                const RowGroup rows = row / 8 ? groups[1] : groups[0];
                const uint8_t *tile = rows.start + (slice_at + row % 8 / TILE_ROWS * pair_bytes);
                const bool exists = first_unit < n && row % 8 < rows.rows;
                copy_or_zero<super_bytes>(
                    to + super_at + lane * super_bytes,
                    tile + (Layout::super_at(n) + index / (super_bytes / Layout::super_bytes) * super_bytes), exists);
            }
        }
    }
};

// Where a lane finds what it decodes of a run: it is lane t of the four of row g, and of row g + 8. In each step it
// takes 32 values of unit t / 2 of two (see token_tiles.cuh). All of this holds for every run, and is computed once.
template <typename Layout, int MT>
struct LaneLayout {
    using Run = WeightRun<Layout, MT>;
    int row, unit, part;
    int code, high, scale, super;  // bytes from the start of a run

    __device__ __forceinline__ LaneLayout()
        : row(threadIdx.x % WARP / 4),
          unit(threadIdx.x % 4 / 2),
          part(threadIdx.x % 2) {
        code = row * Layout::code_pieces * Run::units * 16 + part * (Layout::code_pieces == 1 ? 8 : Run::units * 16);
        high = Run::high_at + row * Run::units * Layout::high_bytes + (Layout::high_bytes == 16 ? part * 8 : 0);
        scale = Run::scale_at + row * Run::units * Run::scale_bytes;
        super = Run::super_at + row * Run::supers * Run::super_bytes;
    }
    // Which unit of the run, as codes and high bits lie.
    __device__ __forceinline__ int code_unit(int step) const {
        return (2 * step) ^ (Run::code_swizzle(row, part) + unit);
    }
    __device__ __forceinline__ int high_unit(int step) const { return (2 * step) ^ (Run::high_swizzle(row) + unit); }
};

// What a lane decodes of one row in one step: 16 values of each half of its unit. A type uses what it needs.
template <int WORDS>
struct FragmentRegisters {
    uint32_t code[WORDS];
    uint2 high;
    half2 scale[2], minimum[2];  // of the first and the second half; minimum is added
};

// A fragment in those registers. Codes: `words`, `load`, and `decode<HALF>(registers, w, x, y)`, which gives the
// integers 4 w + (0, 2) and 4 w + (1, 3) of half HALF. Scales: `load`, `apply<HALF>(registers, x)`, and `Lane`, a
// LaneLayout.
template <typename Codes, typename Scales>
struct WeightFragment {
    using Lane = typename Scales::Lane;
    FragmentRegisters<Codes::words> registers;

    // Of row g + 8 h in step `step` of the run at `from`, whose units count from `first_unit` of a slice of `n`.
    __device__ __forceinline__ void load(uint32_t from, const Lane &lane, int h, int step, int first_unit, int n) {
        Codes::load(registers, from, lane, h, step);
        Scales::load(registers, from, lane, h, step, first_unit, n);
    }

    // Values 4 w + (0, 2) and 4 w + (1, 3) of half HALF, as the matrix instruction takes them.
    template <int HALF>
    __device__ __forceinline__ void decode(int w, uint32_t &even, uint32_t &odd) const {
        half2 x, y;
        Codes::template decode<HALF>(registers, w, x, y);
        even = bits(Scales::template apply<HALF>(registers, x)), odd = bits(Scales::template apply<HALF>(registers, y));
    }
};

// Integers to f16 by the magic number 1,024: 1,024 + the integer that MASK picks from each half of `word`, since an
// integer below 1,024 fits the lowest bits of that f16. One instruction, which the compiler does not make of an `and`
// and an `or` with two constants.
template <uint32_t MASK>
__device__ __forceinline__ half2 plus_1024(uint32_t word) {
    uint32_t result;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(word), "n"(MASK), "r"(0x64006400u));
    return as_half2(result);
}

// The integers that stand SHIFT bits up in bytes 0 and 2 of `word`, where MASK has them, less ZERO.
template <uint32_t MASK, int SHIFT, int ZERO>
__device__ __forceinline__ half2 field_to_half(uint32_t word) {
    const half2 field = plus_1024<MASK>(word);
    if constexpr (SHIFT == 0) return __hsub2(field, __float2half2_rn(1024.f + ZERO));
    constexpr float STEP = 1 << SHIFT;
    return __hfma2(field, __float2half2_rn(1.f / STEP), __float2half2_rn(-1024.f / STEP - ZERO));
}

// Bytes as integers: 0 and 2 of `word` in x, 1 and 3 in y, less `offset` - 1,024. With a MASK, of each byte's bits in
// it alone.
template <uint32_t MASK = 0x00ff00ffu>
__device__ __forceinline__ void bytes_to_half(uint32_t word, half2 offset, half2 &x, half2 &y) {
    x = __hsub2(plus_1024<MASK>(word), offset), y = __hsub2(plus_1024<MASK>(word >> 8), offset);
}
