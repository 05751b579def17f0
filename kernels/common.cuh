// What every kernel file shares: dependent launch, warps, activation quantization.
#pragma once

#include "params.h"

#include <cuda_bf16.h>

constexpr int WARP = 32;
constexpr int WARPGROUP = 4 * WARP;
__host__ __device__ constexpr int round_up(int value, int multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

// Values that share one scale in a quantized activation.
constexpr int ACTIVATION_GROUP = 32;

// Dependent launch, in which a kernel may start before its predecessor has ended. Three rules keep it sound:
//
// - every kernel waits, on every path: then "the predecessor has ended" implies that all before it have;
// - before the wait a kernel touches only what no kernel writes (weights);
// - but a kernel that follows one that let it start only after its own wait may read whatever earlier kernels wrote.

// Lets the next kernel of the stream start, once all blocks have called this or ended.
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Waits until the previous kernel has ended and its writes are visible.
__device__ __forceinline__ void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// True in one lane of a whole warp. From sm_90 in a way that tells the compiler that a branch on it has one thread:
// what takes its operands from uniform registers (barriers, bulk copies) then needs no loop over lanes.
__device__ __forceinline__ bool elect() {
#if __CUDA_ARCH__ >= 900
    uint32_t elected;
    asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }" : "=r"(elected));
    return elected;
#else
    return threadIdx.x % WARP == 0;
#endif
}

// The same value, which all lanes share, from a register of another lane: it is kept, and not computed again wherever
// it is used.
__device__ __forceinline__ uint32_t warp_uniform(uint32_t value) { return __shfl_sync(~0u, value, 0); }

__device__ __forceinline__ uint32_t bits(half2 value) { return *reinterpret_cast<const uint32_t *>(&value); }
__device__ __forceinline__ half2 as_half2(uint32_t value) { return *reinterpret_cast<const half2 *>(&value); }

// 2^x, as fast as it goes.
__device__ __forceinline__ float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// c + the sum of four products, unsigned bytes of `a` times signed bytes of `b`.
__device__ __forceinline__ int dot4(uint32_t a, int b, int c) {
    int d;
    asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
    return value;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) value = fmaxf(value, __shfl_xor_sync(~0u, value, offset));
    return value;
}

// The largest magnitude: bits of positive numbers have their order.
__device__ __forceinline__ float warp_max_magnitude(float value) {
    return __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(fabsf(value))));
}

// The integer for `value` in a group whose largest magnitude is `largest`.
__device__ __forceinline__ int quantize(float value, float largest) {
    return __float2int_rn(value * __fdividef(127.f, fmaxf(largest, 1e-30f)));
}

// What the integers of that group are multiplied with.
__device__ __forceinline__ float group_scale(float largest) { return largest * (1.f / 127.f); }

// Stores one group, held one value a lane.
__device__ __forceinline__ void store_group(const Activation &out, int group, float value) {
    const int lane = threadIdx.x % WARP;
    const float largest = warp_max_magnitude(value);
    out.q[group * ACTIVATION_GROUP + lane] = static_cast<int8_t>(quantize(value, largest));
    out.value[group * ACTIVATION_GROUP + lane] = value;
    if (lane == 0) out.scale[group] = group_scale(largest);
}

// Stores four values a lane from value `first` on, if they exist: a group has eight lanes, one behind another.
__device__ __forceinline__ void store_four(const Activation &out, bool exist, int first, const float4 &value) {
    float largest = fmaxf(fmaxf(fabsf(value.x), fabsf(value.y)), fmaxf(fabsf(value.z), fabsf(value.w)));
#pragma unroll
    for (int offset = ACTIVATION_GROUP / 4 / 2; offset > 0; offset /= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, offset));
    }
    if (!exist) return;
    const auto q = [&](float x) { return static_cast<signed char>(quantize(x, largest)); };
    *reinterpret_cast<char4 *>(out.q + first) = {q(value.x), q(value.y), q(value.z), q(value.w)};
    *reinterpret_cast<float4 *>(out.value + first) = value;
    if (first % ACTIVATION_GROUP == 0) out.scale[first / ACTIVATION_GROUP] = group_scale(largest);
}
