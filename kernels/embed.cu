// The beginning of a decode step: x[c] = E[token, c], and x * (the first norm's weights), quantized, for the first product.
//
// Without norm weights only x, for a chunk of tokens.
//
// Bound: latency; a row is a few kilobytes. Grid: one thread for each value, 256 a block along x; tokens along y.
#include "formats.cuh"
#include "params.h"

namespace {

// Value `column` of `row`.
template <int TYPE>
__device__ float value_at(const uint8_t *weights, int units, size_t row, int column) {
    using F = Format<TYPE>;
    const int i = column % UNIT, upper = i / 32;
    const int slice = column / UNIT / SLICE_UNITS, unit = column / UNIT % SLICE_UNITS;
    const int n = min(units - slice * SLICE_UNITS, SLICE_UNITS), r = row % TILE_ROWS;
    const uint8_t *tile = weights + row / TILE_ROWS * F::pair_bytes(units) + slice * F::tile_bytes(SLICE_UNITS);
    const int byte = TYPE == Q8_0 ? i : i % 32;
    int code = tile[((byte / 16 * TILE_ROWS + r) * n + unit) * 16 + byte % 16];
    if (TYPE != Q8_0) code = code >> upper * 4 & 15;
    const uint8_t *high = tile + F::high_at(n) + (r * n + unit) * F::high_bytes;
    if (F::high_bytes == 8) code |= (high[upper * 4 + i % 4] >> i % 32 / 4 & 1) << 4;
    if (F::high_bytes == 16) code |= (high[i % 32 / 8 * 4 + i % 4] >> (i / 4 % 2 * 4 + upper * 2) & 3) << 4;

    const uint8_t *scales = tile + F::scale_at(n) + r * n * F::scale_bytes;
    if constexpr (F::packed_scales) {
        const uint8_t *header = scales + unit / 4 * 16;
        const int u = unit % 4;
        const int packed = header[4 + u] | header[8 + u] << 8 | header[12 + u] << 16;
        const float2 d = half2_at(header);
        return d.x * (packed >> 6 * upper & 63) * code - d.y * (packed >> (12 + 6 * upper) & 63);
    } else if constexpr (TYPE == Q6_K) {
        const half *super = reinterpret_cast<const half *>(tile + F::super_at(n));
        return __half2float(super[r * (n / 4) + unit / 4]) * static_cast<int8_t>(scales[unit * 4 + i / 16]) * (code - 32);
    } else if constexpr (F::scale_bytes == 8) {
        const float2 block = half2_at(scales + unit * 8 + upper * 4);
        return block.x * code + block.y;
    } else {
        const float d = __half2float(reinterpret_cast<const half *>(scales)[unit * 2 + upper]);
        return d * (TYPE == Q8_0 ? static_cast<int8_t>(code) : code - (TYPE == Q4_0 ? 8 : 16));
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(256)
embed(const __grid_constant__ EmbedParams p) {
    wait_for_predecessor();
    launch_dependents();
    const int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= p.columns) return;
    const size_t row = p.token[blockIdx.y];
    const uint8_t *floats = p.weights + row * float_stride(p.type, p.columns);
    float value = 0.f;
    if (p.type == F32) {
        value = reinterpret_cast<const float *>(floats)[column];
    } else if (p.type == F16) {
        value = __half2float(reinterpret_cast<const half *>(floats)[column]);
    } else if (p.type == BF16) {
        value = __bfloat162float(reinterpret_cast<const __nv_bfloat16 *>(floats)[column]);
    } else {
#define VALUE(TYPE) value = value_at<TYPE>(p.weights, (p.columns + UNIT - 1) / UNIT, row, column)
        FOR_QUANTIZED(p.type, VALUE)
#undef VALUE
    }
    p.x[size_t(blockIdx.y) * p.columns + column] = value;
    if (!p.norm) return;
    const int group = column / ACTIVATION_GROUP;
    store_group(p.next, group, value * p.norm[column]);
    const float squares = warp_sum(value * value);
    if (threadIdx.x % WARP == 0) p.next_squares[group] = squares;
}
