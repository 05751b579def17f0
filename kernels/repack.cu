// Rearranges a file's blocks into the tiles of formats.cuh, bit for bit. Runs once, at upload.
//
// Bound: the file's bytes, read once and written once. Grid: 256 threads a block, one thread for each unit of 64 values of
// row_count + 1 rows; float types: one for each value.
#include "formats.cuh"
#include "params.h"

namespace {

template <int TYPE>
struct Block {
    static constexpr int values = Format<TYPE>::super_blocks ? 256 : 32;
    static constexpr int bytes = TYPE == Q4_0 ? 18 : TYPE == Q4_1 ? 20 : TYPE == Q5_0 ? 22 : TYPE == Q5_1 ? 24 : TYPE == Q8_0 ? 34
                                 : TYPE == Q4_K ? 144 : TYPE == Q5_K ? 176 : 210;

    // The code of value `i`, without the type's offset.
    __device__ static int code(const uint8_t *block, int i) {
        if constexpr (TYPE == Q4_K || TYPE == Q5_K) {
            const int group = i / 32, j = i % 32;
            const uint8_t *low = block + (TYPE == Q4_K ? 16 : 48);
            const int high = TYPE == Q5_K ? block[16 + j] >> group & 1 : 0;
            return (low[group / 2 * 32 + j] >> group % 2 * 4 & 15) | high << 4;
        } else if constexpr (TYPE == Q6_K) {
            const int half = i / 128, j = i % 128;
            const int low = block[half * 64 + j % 64] >> j / 64 * 4 & 15;
            return low | (block[128 + half * 32 + j % 32] >> j / 32 * 2 & 3) << 4;
        } else if constexpr (TYPE == Q8_0) {
            return block[2 + i];
        } else {
            constexpr int header = TYPE == Q4_1 || TYPE == Q5_1 ? 4 : 2;
            constexpr bool five = TYPE == Q5_0 || TYPE == Q5_1;
            const int high = five ? block[header + i / 8] >> i % 8 & 1 : 0;
            return (block[header + (five ? 4 : 0) + i % 16] >> i / 16 * 4 & 15) | high << 4;
        }
    }
};

// Unit `index` of row `row` of the matrix, from that row's `blocks` blocks (0 of a row that only fills up a tile).
template <int TYPE>
__device__ void repack_unit(const uint8_t *in, int blocks, uint8_t *out, size_t row, int index, int units) {
    using F = Format<TYPE>;
    using B = Block<TYPE>;
    // The code of value `i` of the unit.
    auto code = [&](int i) {
        const int value = index * UNIT + i;
        return value / B::values < blocks ? B::code(in + size_t(value / B::values) * B::bytes, value % B::values) : 0;
    };
    const int slice = index / SLICE_UNITS, unit = index % SLICE_UNITS;
    const int n = min(units - slice * SLICE_UNITS, SLICE_UNITS), r = row % TILE_ROWS;
    uint8_t *tile = out + row / TILE_ROWS * F::pair_bytes(units) + slice * F::tile_bytes(SLICE_UNITS);
    for (int i = 0; i < F::code_pieces * 16; i++) {
        tile[((i / 16 * TILE_ROWS + r) * n + unit) * 16 + i % 16] =
            static_cast<uint8_t>(TYPE == Q8_0 ? code(i) : (code(i) & 15) | (code(32 + i) & 15) << 4);
    }

    uint8_t *high = tile + F::high_at(n) + (r * n + unit) * F::high_bytes;
    if constexpr (F::high_bytes == 8) {
        for (int byte = 0; byte < 8; byte++) {
            int bits = 0;
            for (int k = 0; k < 8; k++) bits |= (code(byte / 4 * 32 + 4 * k + byte % 4) >> 4) << k;
            high[byte] = static_cast<uint8_t>(bits);
        }
    } else if constexpr (F::high_bytes == 16) {
        for (int byte = 0; byte < 16; byte++) {
            const int i = byte / 4 * 8 + byte % 4;
            high[byte] = static_cast<uint8_t>(code(i) >> 4 | code(32 + i) >> 4 << 2 | code(i + 4) >> 4 << 4 | code(36 + i) >> 4 << 6);
        }
    }

    uint8_t *scales = tile + F::scale_at(n) + (r * n + unit) * F::scale_bytes;
    const uint8_t *block = in + size_t(index) * UNIT / B::values * B::bytes;
    const bool real = blocks > 0;
    if constexpr (F::packed_scales) {
        if (unit % 4 != 0) return;
        const uint8_t *packed = block + 4;
        auto scale = [&](int j) { return j < 4 ? packed[j] & 63 : (packed[j + 4] & 15) | packed[j - 4] >> 6 << 4; };
        auto minimum = [&](int j) { return j < 4 ? packed[j + 4] & 63 : packed[j + 4] >> 4 | packed[j] >> 6 << 4; };
        for (int i = 0; i < 4; i++) scales[i] = real ? block[i] : 0;
        for (int u = 0; u < 4; u++) {
            const int bits = real ? scale(2 * u) | scale(2 * u + 1) << 6 | minimum(2 * u) << 12 | minimum(2 * u + 1) << 18 : 0;
            for (int byte = 0; byte < 3; byte++) scales[4 + 4 * byte + u] = static_cast<uint8_t>(bits >> 8 * byte);
        }
    } else if constexpr (TYPE == Q6_K) {
        for (int i = 0; i < 4; i++) scales[i] = real ? block[192 + unit % 4 * 4 + i] : 0;
        uint8_t *super = tile + F::super_at(n) + (r * (n / 4) + unit / 4) * 2;
        if (unit % 4 < 2) super[unit % 4] = real ? block[208 + unit % 4] : 0;
    } else {
        constexpr int half = F::scale_bytes / 2;
        for (int i = 0; i < F::scale_bytes; i++) scales[i] = index * 2 + i / half < blocks ? block[i / half * B::bytes + i % half] : 0;
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(256)
repack(const __grid_constant__ RepackParams p) {
    const size_t thread = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (is_float(p.type)) {
        const size_t row = thread / p.columns, column = thread % p.columns;
        if (row >= size_t(p.row_count)) return;
        const int bytes = p.type == F32 ? 4 : 2;
        uint8_t *to = p.out + (p.row_begin + row) * float_stride(p.type, p.columns) + column * bytes;
        for (int i = 0; i < bytes; i++) to[i] = p.in[thread * bytes + i];
        return;
    }
    const int units = (p.columns + UNIT - 1) / UNIT;
    const size_t row = thread / units;
    const int unit = static_cast<int>(thread % units);
    const bool real = row < size_t(p.row_count);
    if (!real && (p.row_begin + row >= size_t(p.matrix_rows + 1) / TILE_ROWS * TILE_ROWS || p.row_begin + row < size_t(p.matrix_rows))) return;
#define REPACK(TYPE)                                                                                                        \
    repack_unit<TYPE>(p.in + row * (p.columns / Block<TYPE>::values) * Block<TYPE>::bytes, real ? p.columns / Block<TYPE>::values : 0, p.out, \
                      p.row_begin + row, unit, units)
    FOR_QUANTIZED(p.type, REPACK)
#undef REPACK
}
