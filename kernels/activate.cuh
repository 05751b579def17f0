// The functions that gates go through, as x times a sigmoid: x / (1 + exp(-sigmoid_input(x))).
//
//   silu(x) = x / (1 + exp(-x))
//   gelu(x) = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) = x / (1 + exp(-2 sqrt(2 / pi) * (x + 0.044715
//   x^3)))
#pragma once

#include "common.cuh"

__device__ __forceinline__ float sigmoid_input(bool gelu, float x) {
    return gelu ? 1.5957691216f * (x + 0.044715f * x * x * x) : x;
}

__device__ __forceinline__ float activate(bool gelu, float x) {
    return __fdividef(x, 1.f + __expf(-sigmoid_input(gelu, x)));
}
