// RMS norm of the tokens of a chunk:
//
//   out[token] = x[token] / rms * weight, rms = sqrt(mean(x[token]^2) + epsilon), as TokenTiles
//
// Bound: bytes; x is read once. Grid: a block of whole warps for each token, best with a thread for 4 values.
#include "token_tiles.cuh"

namespace {

template <bool ALIGNED>
__device__ __forceinline__ void norm(const NormParams &p) {
    launch_dependents();
    const int columns = p.columns, token = blockIdx.x, first = threadIdx.x * 4, stride = blockDim.x * 4;
    const auto load = [&](const float *from, int c) { return load4<ALIGNED>(from, c, columns); };
    const auto weight_at = [&](int c) { return p.weight ? load(p.weight, c) : float4{1.f, 1.f, 1.f, 1.f}; };
    const float4 first_weight = weight_at(first);  // no kernel writes it
    wait_for_predecessor();
    const float *x = p.x + size_t(token) * columns;
    const float4 first_value = load(x, first);
    float squares = squares_of(first_value);
    for (int c = first + stride; c < columns; c += stride) squares += squares_of(load(x, c));
    const float rms = sqrtf(block_sum(squares) / columns + p.epsilon), scale = 1.f / rms;
    if (p.rms && threadIdx.x == 0) p.rms[token] = rms;

    const TokenTiles tiles{p.out, p.padded_tokens};
    for (int c = first; c < round_up(columns, STEP_VALUES); c += stride) {
        const float4 v = c == first ? first_value : load(x, c), w = c == first ? first_weight : weight_at(c);
        tiles.store(token, c, {v.x * scale * w.x, v.y * scale * w.y, v.z * scale * w.z, v.w * scale * w.w});
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(1024) norm_tokens(const __grid_constant__ NormParams p) {
    if (p.columns % 4 == 0) {
        norm<true>(p);
    } else {
        norm<false>(p);
    }
}
