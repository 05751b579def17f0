// The beginning of a decode step: x[c] = E[token, c] * scale, and x * (the first norm's weights), quantized, for the
// first product.
//
// For a chunk of tokens only x.
//
// Bound: latency; a row is a few kilobytes. Grid: one thread for each value, 256 a block along x; tokens along y.
#include "types/all.cuh"

extern "C" __global__ void __launch_bounds__(256) embed(const __grid_constant__ EmbedParams p) {
    wait_for_predecessor();
    launch_dependents();
    const int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= p.columns) return;
    const float value = p.scale * matrix_value(p.type, p.weights, p.columns, p.token[blockIdx.y], column);
    p.x[size_t(blockIdx.y) * p.columns + column] = value;
    if (!p.next.q) return;
    const int group = column / ACTIVATION_GROUP;
    store_group(p.next, group, p.norm ? value * p.norm[column] : value);
    const float squares = warp_sum(value * value);
    if (threadIdx.x % WARP == 0) p.next_squares[group] = squares;
}
