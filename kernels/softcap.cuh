// Scores that are held between -softcap and softcap, as decode_attention.cu and flash_attention.cu share it.
#pragma once

#include "common.cuh"

// score = softcap * tanh(score / softcap), where `softcap`, which all lanes share, is not 0. By the accurate tanh: an
// error of a score is one of its exponential.
template <int N>
__device__ __forceinline__ void cap_scores(float (&score)[N], float softcap) {
    const float inverse = 1.f / softcap;
#pragma unroll
    for (int i = 0; i < N; i++) score[i] = softcap * tanhf(score[i] * inverse);
}
