// The ring in shared memory through which weights and cached keys and values reach the consumers of a block: `slots`
// entries of SLOT_BYTES, filled by one thread, which runs ahead of the consumers across the borders of stages.
//
// What is in flight and what is buffered are two numbers: the ring is as deep as shared memory allows, but only as much
// is asked for at a time as keeps the memory busy, since whatever else a block reads waits in line behind it.
//
// A barrier's parity tells two phases apart, not three: a consumer may wait for entry e only when entry e - slots is
// known to have come. All of a stage have when the next one begins. Within a stage it has waited for one not long
// before e, since warps take turns, and all more than `in_flight` before that one have come: the ring needs as many
// slots as both together (`stride` of src/cuda/launches/step.rs).
#pragma once

#include "../copy.cuh"

namespace step {

// Warps. A multiple of 6, so that in most matrices each warp has always the same slice of a row: its activations stay.
constexpr int CONSUMERS = 12;
constexpr int CONSUMER_THREADS = CONSUMERS * WARP;
constexpr int SLOT_BYTES = 10'112;  // 4 tiles of Q4_K, 3 of Q6_K
constexpr int MAX_SLOTS = 24;
constexpr int SHARES = 8;  // of an entry, each released by one warp; tiles in an entry, at most

// Entry e is in slot e % slots, for the (e / slots)th time, of which the barriers see whether it is odd.
struct Place {
    int slot;
    uint32_t parity;
};

// Dynamic shared memory begins with the barriers, two for each slot; then come the stages at hand (step.cu), a norm's
// scale, a report, the jobs of attention, the ring, and what StepParams places behind it.
constexpr int FULL_AT = 0, EMPTY_AT = FULL_AT + 8 * MAX_SLOTS, STAGES_AT = EMPTY_AT + 8 * MAX_SLOTS, SCALE_AT = 1344,
              REPORT_AT = 1352, JOBS_AT = 1368, PRODUCER_JOBS_AT = 1568, RING_AT = 1792;

// A barrier of all consumers of a block.
__device__ __forceinline__ void sync_consumers() { asm volatile("bar.sync 1, %0;" ::"n"(CONSUMER_THREADS) : "memory"); }

// threadIdx.x and blockIdx.x, found out anew, so that the compiler keeps nothing that follows from them.
__device__ __forceinline__ int this_thread() {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
}
__device__ __forceinline__ int this_block() {
    int block;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
    return block;
}

// What lies at a place in dynamic shared memory.
template <typename T>
__device__ __forceinline__ T *shared_at(int at) {
    extern __shared__ __align__(128) uint8_t bytes[];
    return reinterpret_cast<T *>(bytes + at);
}

// What a wait that ends in vain reports: in shared memory, as nothing else takes it.
struct Report {
    uint64_t *failure;  // StepParams::failure
    int stage;          // that is at work
};

struct Ring {
    __device__ static __forceinline__ Barrier full(int slot) {
        return {shared_address(shared_at<uint64_t>(FULL_AT)) + 8 * slot};
    }
    __device__ static __forceinline__ Barrier empty(int slot) {
        return {shared_address(shared_at<uint64_t>(EMPTY_AT)) + 8 * slot};
    }
    // By one thread, before any use.
    __device__ static __forceinline__ void init(const StepParams &p) {
        for (int slot = 0; slot < p.slots; slot++) {
            full(slot).init(1);
            empty(slot).init(SHARES);
        }
        Barrier::publish();
    }
    __device__ static __forceinline__ Place place(const StepParams &p, uint32_t entry) {
        const int round = __umulhi(entry, p.slots_inverse);
        return {static_cast<int>(entry) - round * p.slots, round & 1u};
    }
    // The place of the entry that comes `entries` (less than all slots) after the one at `place`.
    __device__ static __forceinline__ void advance(const StepParams &p, Place &place, int entries) {
        const uint32_t slot = place.slot + entries;
        place.slot = min(slot, slot - p.slots);  // which is more where it is less than none
        if (place.slot < entries) place.parity ^= 1;
    }
    __device__ static __forceinline__ const uint8_t *entry(const Place &place) {
        return shared_at<const uint8_t>(RING_AT) + place.slot * SLOT_BYTES;
    }

    // For consumers: waits until an entry has come.
    __device__ static __forceinline__ void wait(const Place &place) { full(place.slot).wait(place.parity); }
    // By one lane: gives back so many of an entry's shares.
    __device__ static __forceinline__ void release(const Place &place, int shares) {
#if __CUDA_ARCH__ >= 900
        asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0], %1; }" ::"r"(empty(place.slot).at),
                     "r"(shares)
                     : "memory");
#endif
    }
};

// By a warp: gives back shares of an entry once all lanes' reads have ended. They may wait in line for long, as rows
// lie in the same banks, and nothing that is done with them need have begun.
__device__ __forceinline__ void give_back(const Place &place, int shares) {
    __threadfence_block();
    __syncwarp();
    if (elect()) Ring::release(place, shares);
}

// The thread that fills the ring.
struct Producer {
    const StepParams &p;
    uint64_t policy;
    int entry = 0;
    Place next{0, 0}, oldest{0, 0};  // the next entry's place, and that of the oldest one that may be in flight

    __device__ __forceinline__ explicit Producer(const StepParams &p) : p(p), policy(read_once()) {}

    // Waits for room, and announces the next entry's bytes.
    __device__ __forceinline__ void begin(int bytes) {
        if (entry >= p.slots) Ring::empty(next.slot).wait(next.parity ^ 1);
        if (entry >= p.in_flight) {
            Ring::wait(oldest);
            Ring::advance(p, oldest, 1);
        }
        expect_bytes(Ring::full(next.slot), bytes);
    }
    // Starts copying `bytes` (a multiple of 16) of the entry to `offset` in it.
    __device__ __forceinline__ void copy(int offset, const void *from, int bytes) const {
#if __CUDA_ARCH__ >= 900
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], "
            "%4;" ::"r"(shared_address(Ring::entry(next)) + offset),
            "l"(from), "r"(bytes), "r"(Ring::full(next.slot).at), "l"(policy)
            : "memory");
#endif
    }
    __device__ __forceinline__ void end() {
        entry++;
        Ring::advance(p, next, 1);
    }
};

}  // namespace step
