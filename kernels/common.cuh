// What every kernel file shares: dependent launch, asynchronous copies, warp reductions, activation quantization.
#pragma once

#include "params.h"

#include <cuda_bf16.h>

constexpr int WARP = 32;
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

// The cache policy of data that is used once: it leaves the L2 cache first, so that activations and code stay.
__device__ __forceinline__ uint64_t read_once() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// True in one lane of a whole warp. From sm_90 in a way that tells the compiler that a branch on it has one thread: what takes its
// operands from uniform registers (barriers, bulk copies) then needs no loop over lanes.
__device__ __forceinline__ bool elect() {
#if __CUDA_ARCH__ >= 900
    uint32_t elected;
    asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }" : "=r"(elected));
    return elected;
#else
    return threadIdx.x % WARP == 0;
#endif
}

// A barrier in shared memory that the copies of one warp complete: the copy engine's from sm_90, before it the lanes' own.
struct CopyBarrier {
    uint64_t state;

    __device__ __forceinline__ uint32_t address() const { return static_cast<uint32_t>(__cvta_generic_to_shared(&state)); }

    // By one lane; then publish(), before any use.
    __device__ __forceinline__ void init() {
#if __CUDA_ARCH__ >= 900
        asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(address()) : "memory");
#else
        asm volatile("mbarrier.init.shared.b64 [%0], 32;" ::"r"(address()) : "memory");
#endif
    }

    // Lets the copy engine see what init() did.
    static __device__ __forceinline__ void publish() {
#if __CUDA_ARCH__ >= 900
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
    }

    // Starts copying `bytes` (a multiple of 16, at most MOST) from global to shared memory as the barrier's next phase. By all
    // lanes of a warp.
    template <int MOST>
    __device__ __forceinline__ void copy(void *shared, const uint8_t *global, int bytes, uint64_t policy) {
        const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
#if __CUDA_ARCH__ >= 900
        if (elect()) {
            asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(address()), "r"(bytes) : "memory");
            asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(to),
                         "l"(global), "r"(bytes), "r"(address()), "l"(policy)
                         : "memory");
        }
#else
        const int lane = threadIdx.x % WARP;
#pragma unroll
        for (int at = 0; at < MOST; at += WARP * 16) {
            const int from = at + lane * 16;
            if (from < bytes) {
                asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to + from), "l"(global + from), "l"(policy) : "memory");
            }
        }
        asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(address()) : "memory");
#endif
    }

    // Waits for the end of a phase of this parity.
    __device__ __forceinline__ void wait(uint32_t parity) {
        uint32_t done;
        do {
#if __CUDA_ARCH__ >= 900
            asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                         : "=r"(done) : "r"(address()), "r"(parity) : "memory");
#else
            asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                         : "=r"(done) : "r"(address()), "r"(parity) : "memory");
#endif
        } while (!done);
    }
};

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

// The integer for `value` in a group whose largest magnitude is `largest`.
__device__ __forceinline__ int quantize(float value, float largest) {
    return __float2int_rn(value * __fdividef(127.f, fmaxf(largest, 1e-30f)));
}

// Stores one group, held one value a lane.
__device__ __forceinline__ void store_group(const Activation &out, int group, float value) {
    const int lane = threadIdx.x % WARP;
    const float largest = warp_max(fabsf(value));
    out.q[group * ACTIVATION_GROUP + lane] = static_cast<int8_t>(quantize(value, largest));
    out.value[group * ACTIVATION_GROUP + lane] = value;
    if (lane == 0) out.scale[group] = largest * (1.f / 127.f);
}

// cos and sin of position * frequency, for rotary embeddings. The angle is reduced in double precision; the fast functions are good to
// 4e-7 within a turn.
__device__ __forceinline__ float2 rotation(int position, float frequency) {
    constexpr double TURN = 6.283185307179586476925;
    const double angle = double(position) * double(frequency);
    const float reduced = static_cast<float>(angle - TURN * rint(angle * (1 / TURN)));
    return {__cosf(reduced), __sinf(reduced)};
}
