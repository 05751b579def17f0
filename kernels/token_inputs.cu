// What a token gives to every layer, for each layer's part of `width` values:
//
//   input = (row_scale * table[token] + rms_norm(projection_scale * projected)) * sum_scale
//
// Bound: latency; a row of the table is a few kilobytes, and nothing else of it is read. Grid: (layers, tokens) x 128.
#include "types/all.cuh"

constexpr int THREADS = 128;

extern "C" __global__ void __launch_bounds__(THREADS) token_inputs(const __grid_constant__ TokenInputsParams p) {
    __shared__ float part[THREADS / WARP];
    launch_dependents();
    wait_for_predecessor();
    const int token = blockIdx.y, first = blockIdx.x * p.width, columns = gridDim.x * p.width;
    float *to = p.projected + size_t(token) * columns + first;
    const float scale = p.projection_scale * (p.rms ? p.rms[token] : 1.f);
    float squares = 0.f;
    for (int i = threadIdx.x; i < p.width; i += THREADS) squares += scale * to[i] * (scale * to[i]);
    squares = warp_sum(squares);
    if (threadIdx.x % WARP == 0) part[threadIdx.x / WARP] = squares;
    __syncthreads();
    squares = 0.f;
    for (float sum : part) squares += sum;
    const float factor = scale / sqrtf(squares / p.width + p.epsilon);
    for (int i = threadIdx.x; i < p.width; i += THREADS) {
        const float row = p.row_scale * matrix_value(p.type, p.table, columns, p.token[token], first + i);
        to[i] = (row + to[i] * factor * p.norm[i]) * p.sum_scale;
    }
}
