// The gated product where it is not part of the products before it: of a chunk of tokens whose gate and up matrices
// differ in type, and of what a layer takes of the tokens themselves:
//
//   out[token] = activate(gate[token]) * up[token] * factor, as TokenTiles; gate_token: quantized, without the factor
//
// Bound: bytes; each input is read once. Grid: (columns rounded up to 128) / 4 threads in blocks of 256 along x, tokens
// along y; gate_token: a thread a value, 256 a block.
#include "activate.cuh"
#include "token_tiles.cuh"

namespace {

template <bool ALIGNED>
__device__ __forceinline__ void gate(const GateParams &p) {
    launch_dependents();
    wait_for_predecessor();
    const int columns = p.columns, token = blockIdx.y, c = (blockIdx.x * blockDim.x + threadIdx.x) * 4;
    if (c >= round_up(columns, STEP_VALUES)) return;
    float4 v = {};
    if (c < columns) {
        const float4 g = load4<ALIGNED>(p.gate + size_t(token) * columns, c, columns);
        const float4 u = load4<ALIGNED>(p.up + size_t(token) * p.up_stride, c, columns);
        const float rms = p.rms ? p.rms[token] : 1.f;
        const auto gated = [&](float a, float b) {
            a *= rms;
            return fminf(fmaxf(a / (1.f + __expf(-sigmoid_input(p.gelu, a))) * b * p.factor, -65504.f), 65504.f);
        };
        v = {gated(g.x, u.x), gated(g.y, u.y), gated(g.z, u.z), gated(g.w, u.w)};
    }
    TokenTiles{p.out, p.padded_tokens}.store(token, c, v);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(256) gate_tokens(const __grid_constant__ GateParams p) {
    if (p.columns % 4 == 0 && p.up_stride % 4 == 0) {
        gate<true>(p);
    } else {
        gate<false>(p);
    }
}
extern "C" __global__ void __launch_bounds__(256) gate_token(const __grid_constant__ GateTokenParams p) {
    launch_dependents();
    wait_for_predecessor();
    const int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= round_up(p.columns, ACTIVATION_GROUP)) return;
    const bool exists = column < p.columns;
    store_group(p.out, column / ACTIVATION_GROUP, exists ? activate(p.gelu, p.gate[column]) * p.up[column] : 0.f);
}
