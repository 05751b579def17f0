// Rotary position embedding (RoPE), as decode_attention.cu and rope.cu share it: pairs (a, b) of a head's values become
// factor * (a cos - b sin, a sin + b cos) of the pair's angle, position * frequency.
#pragma once

#include "common.cuh"

// factor * (cos, sin) of position * frequency, for rotary embeddings. The angle is reduced in double precision; the
// fast functions are good to 4e-7 between -pi and pi.
__device__ __forceinline__ float2 rotation(int position, double frequency, float factor) {
    constexpr double TWO_PI = 6.283185307179586476925;
    const double angle = position * frequency;
    const float reduced = static_cast<float>(angle - TWO_PI * rint(angle * (1 / TWO_PI)));
    return {factor * __cosf(reduced), factor * __sinf(reduced)};
}
