// What every kernel file shares: dependent launch, asynchronous copies, warp reductions, activation quantization.
#pragma once

#include <cuda_fp16.h>
#include <cuda_bf16.h>
#include <cstdint>

constexpr int WARP = 32;
// Values that share one scale in a quantized activation.
constexpr int ACTIVATION_GROUP = 32;

// Lets the next kernel of the stream start. Every kernel calls it first, so that its successor's weight loads run
// beside it; nothing a kernel writes becomes readable by this.
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Waits until the previous kernel has ended and its writes are visible. Every kernel calls it, on every path and before
// its first access to memory that any other kernel writes: only then does "the previous kernel has ended" imply that
// all before it have.
__device__ __forceinline__ void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Copies BYTES (4, 8 or 16, both sides so aligned) from global to shared memory without passing through registers. Such
// data is used once: it leaves the L2 cache first, so that activations, norms and code stay.
template <int BYTES>
__device__ __forceinline__ void copy_async(void *shared, const void *global) {
    const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
#ifdef EF
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    if constexpr (BYTES == 16) {
        asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "l"(policy) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global.L2::cache_hint [%0], [%1], %2, %3;" ::"r"(to), "l"(global), "n"(BYTES), "l"(policy) : "memory");
    }
#else
    if constexpr (BYTES == 16) {  // past L1: weights are used once
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global), "n"(BYTES) : "memory");
    }
#endif
}

// Ends a group of asynchronous copies (it may be empty).
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most PENDING of this thread's latest groups are under way.
template <int PENDING>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// c + the sum of four products, unsigned bytes of `a` times signed bytes of `b`.
__device__ __forceinline__ int dot4(uint32_t a, int b, int c) {
#if __CUDA_ARCH__ >= 610
    int d;
    asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
#else
    return c;
#endif
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

// A vector that products read: for each group of 32 values, 8-bit integers and one scale, value = scale * integer with
// scale = max |value| / 127; and the same values unquantized, for float weights. Lengths are rounded up to 64 values; what lies past the
// vector's own length stays zero.
struct Activation {
    int8_t *q;     // (length rounded up to 64)
    float *scale;  // (length rounded up to 64, / 32)
    float *value;  // (length rounded up to 64)
};

// The integer for `value` in a group whose largest magnitude is `largest`.
__device__ __forceinline__ int quantize(float value, float largest) {
    return largest > 0.f ? __float2int_rn(value * (127.f / largest)) : 0;
}

// Stores one group, held one value a lane.
__device__ __forceinline__ void store_group(const Activation &out, int group, float value) {
    const int lane = threadIdx.x % WARP;
    const float largest = warp_max(fabsf(value));
    out.q[group * ACTIVATION_GROUP + lane] = static_cast<int8_t>(quantize(value, largest));
    out.value[group * ACTIVATION_GROUP + lane] = value;
    if (lane == 0) out.scale[group] = largest / 127.f;
}
