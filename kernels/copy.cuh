// Copies from device to shared memory that pass no register, and the barriers on which threads wait for them.
#pragma once

#include "common.cuh"

__device__ __forceinline__ uint32_t shared_address(const void *at) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

// A value in shared memory.
template <typename T>
__device__ __forceinline__ T load_shared(uint32_t from) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
    uint32_t word[sizeof(T) / 4];
    if constexpr (sizeof(T) == 16) {
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
                     : "r"(from)
                     : "memory");
    } else if constexpr (sizeof(T) == 8) {
        asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(word[0]), "=r"(word[1]) : "r"(from) : "memory");
    } else {
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word[0]) : "r"(from) : "memory");
    }
    return *reinterpret_cast<T *>(word);
}

// The cache policy of data that is used once: it leaves the L2 cache first, so that activations and code stay.
__device__ __forceinline__ uint64_t read_once() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// A barrier in shared memory on which threads wait for copies and arrivals.
struct Barrier {
    uint32_t at;  // address in shared memory, of 8 bytes

    __device__ __forceinline__ void init(int arrivals) const {
        asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(at), "r"(arrivals) : "memory");
    }
    // After the last init, by the thread that called it.
    static __device__ __forceinline__ void publish() {
#if __CUDA_ARCH__ >= 900
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
    }
    __device__ __forceinline__ void arrive() const {
        asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(at) : "memory");
    }
    // Arrives once the calling thread's asynchronous copies so far have.
    __device__ __forceinline__ void arrive_after_copies() const {
        asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(at) : "memory");
    }
    // Waits for the end of the phase of this parity.
    __device__ __forceinline__ void wait(int parity) const {
        uint32_t done = 0;
        while (!done) {
#if __CUDA_ARCH__ >= 900
            asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                         : "=r"(done)
                         : "r"(at), "r"(parity)
                         : "memory");
#elif __CUDA_ARCH__ >= 800
            asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                         : "=r"(done)
                         : "r"(at), "r"(parity)
                         : "memory");
#endif
        }
    }
};

// How many arrivals, copies aside, complete a barrier that the copies of one warp fill.
#if __CUDA_ARCH__ >= 900
constexpr int COPY_ARRIVALS = 1;
#else
constexpr int COPY_ARRIVALS = WARP;
#endif

// A barrier in shared memory that the copies of one warp complete: the copy engine's from sm_90, before it the lanes'
// own.
struct CopyBarrier {
    uint64_t state;

    __device__ __forceinline__ uint32_t address() const {
        return static_cast<uint32_t>(__cvta_generic_to_shared(&state));
    }

    // By one lane; then Barrier::publish(), before any use.
    __device__ __forceinline__ void init() { Barrier{address()}.init(COPY_ARRIVALS); }
    // Waits for the end of a phase of this parity.
    __device__ __forceinline__ void wait(int parity) { Barrier{address()}.wait(parity); }

    // Starts copying `bytes` (a multiple of 16, at most MOST) from each of the first `count` places in `global` to
    // shared memory, one behind another, as the barrier's next phase. By all lanes of a warp.
    template <int MOST, int N>
    __device__ __forceinline__ void copy(void *shared, const uint8_t *const (&global)[N], int count, int bytes,
                                         uint64_t policy) {
        const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
#if __CUDA_ARCH__ >= 900
        if (elect()) {
            asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(address()), "r"(count * bytes)
                         : "memory");
#pragma unroll
            for (int i = 0; i < N; i++) {
                if (i == 0 || i < count) {
                    asm volatile(
                        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                        "[%0], [%1], %2, [%3], %4;" ::"r"(to + i * bytes),
                        "l"(global[i]), "r"(bytes), "r"(address()), "l"(policy)
                        : "memory");
                }
            }
        }
#else
        const int lane = threadIdx.x % WARP;
#pragma unroll
        for (int i = 0; i < N; i++) {
#pragma unroll
            for (int at = 0; at < MOST; at += WARP * 16) {
                const int from = at + lane * 16;
                if (from < bytes && (i == 0 || i < count)) {
                    asm volatile(
                        "cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to + i * bytes + from),
                        "l"(global[i] + from), "l"(policy)
                        : "memory");
                }
            }
        }
        asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(address()) : "memory");
#endif
    }

    // The same for one piece of each length, all multiples of 16.
    template <int... BYTES>
    __device__ __forceinline__ void copy_parts(void *shared, const uint8_t *const (&global)[sizeof...(BYTES)],
                                               uint64_t policy) {
        constexpr int N = sizeof...(BYTES), LENGTHS[N] = {BYTES...};
        uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
#if __CUDA_ARCH__ >= 900
        if (elect()) {
            asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(address()), "r"((BYTES + ...))
                         : "memory");
#pragma unroll
            for (int i = 0; i < N; i++) {
                asm volatile(
                    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                    "[%0], [%1], %2, [%3], %4;" ::"r"(to),
                    "l"(global[i]), "r"(LENGTHS[i]), "r"(address()), "l"(policy)
                    : "memory");
                to += LENGTHS[i];
            }
        }
#else
        const int lane = threadIdx.x % WARP;
#pragma unroll
        for (int i = 0; i < N; i++) {
            for (int from = lane * 16; from < LENGTHS[i]; from += WARP * 16) {
                asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to + from),
                             "l"(global[i] + from), "l"(policy)
                             : "memory");
            }
            to += LENGTHS[i];
        }
        asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(address()) : "memory");
#endif
    }
};

// Copies `bytes` (a multiple of 16) to `to` in shared memory; `full` counts them. One thread calls it.
__device__ __forceinline__ void copy_bulk(uint32_t to, const void *global, int bytes, const Barrier &full) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(global), "r"(bytes), "r"(full.at)
                 : "memory");
#endif
}
__device__ __forceinline__ void expect_bytes(const Barrier &full, int bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("{ .reg .b64 state; mbarrier.arrive.expect_tx.shared.b64 state, [%0], %1; }" ::"r"(full.at), "r"(bytes)
                 : "memory");
#endif
}

// Copies BYTES (4, 8 or 16, both sides so aligned) to `to` in shared memory without passing through registers; zeros
// where `valid` is false. AHEAD: what follows is wanted soon; the memory is read in larger pieces than a lane's.
template <int BYTES, bool AHEAD = false>
__device__ __forceinline__ void copy_or_zero(uint32_t to, const void *global, bool valid) {
    const int bytes = valid ? BYTES : 0;
    if constexpr (BYTES == 16 && AHEAD) {
        asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes)
                     : "memory");
    } else if constexpr (BYTES == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global), "n"(BYTES), "r"(bytes)
                     : "memory");
    }
}

// Ends a group of such copies (it may be empty).
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most PENDING of this thread's latest groups are under way.
template <int PENDING>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
