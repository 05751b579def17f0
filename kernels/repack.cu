// Rearranges a file's blocks into the tiles of types/type.cuh, bit for bit. Runs once, at upload.
//
// Bound: the file's bytes, read once and written once. Grid: 256 threads a block, one thread for each unit of 64 values
// of row_count + 1 rows; float types: one for each value.
#include "types/all.cuh"

extern "C" __global__ void __launch_bounds__(256) repack(const __grid_constant__ RepackParams p) {
    const size_t thread = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (is_float(p.type)) {
        const size_t row = thread / p.columns, column = thread % p.columns;
        if (row >= size_t(p.row_count)) return;
        for_float(p.type, [&](auto type) {
            using Type = decltype(type);
            using Value = typename Type::Value;
            uint8_t *to = p.out + (p.row_begin + row) * Type::stride(p.columns);
            reinterpret_cast<Value *>(to)[column] = reinterpret_cast<const Value *>(p.in)[thread];
        });
        return;
    }
    const int units = unit_count(p.columns);
    const size_t row_in = thread / units, row = p.row_begin + row_in;
    const int index = static_cast<int>(thread % units);
    const bool real = row_in < size_t(p.row_count);
    // The thread past the last row has work only where that is an odd one of the matrix: the row of zeros beside it.
    if (!real && (row >= size_t(p.matrix_rows + 1) / TILE_ROWS * TILE_ROWS || row < size_t(p.matrix_rows))) return;
#define REPACK(NAME, TYPE, NUMBER)                                                                     \
    case NUMBER: {                                                                                     \
        const int blocks = p.columns / TYPE::block_values;                                             \
        const FileUnit<TYPE> in{p.in + row_in * blocks * TYPE::block_bytes, real ? blocks : 0, index}; \
        TYPE::repack(in, unit_at<TYPE::Layout>(p.out, units, row, index));                             \
        break;                                                                                         \
    }
    FOR_QUANTIZED(p.type, REPACK)
#undef REPACK
}
