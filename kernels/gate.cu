// The gated product of a chunk of tokens whose gate and up matrices differ in type, after a product of each:
//
//   out[token] = silu(gate[token]) * up[token] * factor, as TokenTiles
//
// Bound: bytes; each input is read once. Grid: (columns rounded up to 128) / 4 threads in blocks of 256 along x, tokens
// along y.
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
        const float4 u = load4<ALIGNED>(p.up + size_t(token) * columns, c, columns);
        const auto gated = [&](float a, float b) {
            return fminf(fmaxf(a / (1.f + __expf(-a)) * b * p.factor, -65504.f), 65504.f);
        };
        v = {gated(g.x, u.x), gated(g.y, u.y), gated(g.z, u.z), gated(g.w, u.w)};
    }
    TokenTiles{p.out, p.padded_tokens}.store(token, c, v);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(256) gate_tokens(const __grid_constant__ GateParams p) {
    if (p.columns % 4 == 0) {
        gate<true>(p);
    } else {
        gate<false>(p);
    }
}
