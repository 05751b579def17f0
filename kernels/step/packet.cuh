// Values that travel from one block to another within the step kernel: packets that carry an epoch.
//
// Whoever waits for a value polls the packet that holds it until it has the epoch of the stage that writes it. Payload
// and epoch are written and read as one, so that no fence, counter or flag is between them, and a value takes one trip
// through the L2 cache. A packet may be overwritten by the next stage that writes its buffer, since that stage depends
// on all blocks that read it: each of them contributed to a stage between the two.
#pragma once

#include "ring.cuh"

namespace step {

// What a wait ends in where nothing comes: a value that a block waited for so long was lost with the block that was to
// write it.
constexpr uint64_t PATIENCE_NS = 20'000'000'000;
constexpr int POLLS_A_LOOK = 1024;  // polls between looks at the clock

__device__ __forceinline__ uint64_t nanoseconds() {
    uint64_t now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    return now;
}

// Ends the kernel, and leaves the host the stage (from 1 on) and the block.
__device__ __forceinline__ void fail() {
    const Report &report = *shared_at<Report>(REPORT_AT);
    *static_cast<volatile uint64_t *>(report.failure) = uint64_t(report.stage + 1) << 32 | this_block();
    __threadfence_system();
    __trap();
}

// A wait for packets of one epoch.
struct Wait {
    uint32_t epoch;

    // Polls with `poll()` until `arrived()`. Ends the kernel, and with it all that the process does on the GPU, when
    // that takes too long.
    template <typename Arrived, typename Poll>
    __device__ __forceinline__ void until(Arrived arrived, Poll poll) const {
        uint64_t since = 0;
        for (int polls = 1; !arrived(); polls++) {
            __nanosleep(40);  // or at the limit of its power the GPU would run slower
            poll();
            if (polls % POLLS_A_LOOK == 0) {
                const uint64_t now = nanoseconds();
                if (since == 0) since = now;
                if (now - since > PATIENCE_NS) fail();
            }
        }
    }
};

// A packet of 16 bytes: three words and the epoch.
struct Packet {
    uint32_t word[3], epoch;
};

__device__ __forceinline__ void put(uint4 *to, uint32_t word0, uint32_t word1, uint32_t word2, uint32_t epoch) {
    const uint64_t low = word0 | uint64_t(word1) << 32, high = word2 | uint64_t(epoch) << 32;
    asm volatile("{ .reg .b128 packet; mov.b128 packet, {%1, %2}; st.relaxed.gpu.global.b128 [%0], packet; }" ::"l"(to),
                 "l"(low), "l"(high)
                 : "memory");
}
__device__ __forceinline__ Packet peek(const uint4 *from) {
    uint64_t low, high;
    asm volatile("{ .reg .b128 packet; ld.relaxed.gpu.global.b128 packet, [%2]; mov.b128 {%0, %1}, packet; }"
                 : "=l"(low), "=l"(high)
                 : "l"(from)
                 : "memory");
    return {{uint32_t(low), uint32_t(low >> 32), uint32_t(high)}, uint32_t(high >> 32)};
}

// A packet of 8 bytes: a value and the epoch.
struct ValuePacket {
    float value;
    uint32_t epoch;
};

__device__ __forceinline__ void put(uint64_t *to, float value, uint32_t epoch) {
    asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(to), "l"(__float_as_uint(value) | uint64_t(epoch) << 32)
                 : "memory");
}
__device__ __forceinline__ ValuePacket peek(const uint64_t *from) {
    uint64_t packet;
    asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(packet) : "l"(from) : "memory");
    return {__uint_as_float(uint32_t(packet)), uint32_t(packet >> 32)};
}

// Waits for the packets at from(i), i < N, where has(i), all of them together, and gives them to use(i, packet).
template <int N, typename Has, typename From, typename Use>
__device__ __forceinline__ void take(const Wait &wait, Has has, From from, Use use) {
    // Registers that are not always written before they are read would be kept for the whole kernel.
    decltype(peek(from(0))) packet[N] = {};
    const auto here = [&](int i) { return !has(i) || packet[i].epoch == wait.epoch; };
#pragma unroll
    for (int i = 0; i < N; i++) {
        if (has(i)) packet[i] = peek(from(i));
    }
    // Polls only what lacks: a poll of all by all would take as much from the L2 cache as the weights do.
    wait.until(
        [&] {
            bool all = true;
#pragma unroll
            for (int i = 0; i < N; i++) all &= here(i);
            return all;
        },
        [&] {
#pragma unroll
            for (int i = 0; i < N; i++) {
                if (!here(i)) packet[i] = peek(from(i));
            }
        });
#pragma unroll
    for (int i = 0; i < N; i++) {
        if (has(i)) use(i, packet[i]);
    }
}

// Packets of one group of 32 quantized values: 8 words of integers, the scale, and the sum of the squares of what the
// vector was made of, where the vector is a norm's.
constexpr int GROUP_PACKETS = 4, PACKET_WORDS = 3;
constexpr int SCALE_WORD = 8, SQUARES_WORD = 9;
constexpr int GROUP_WORDS = SQUARES_WORD;                    // without the squares
constexpr int SQUARES_PACKET = SQUARES_WORD / PACKET_WORDS;  // has them alone, and padding

// Writes one group, held one value a lane, and `squares`, which all lanes have.
__device__ __forceinline__ void put_group(const StepVector &to, int group, int lane, float value, float squares,
                                          uint32_t epoch) {
    const float largest = warp_max_magnitude(value);
    // Four lanes' integers become a word in each of them; lane i < 4 then fetches words 3 i to 3 i + 2.
    uint32_t word = uint32_t(uint8_t(quantize(value, largest))) << 8 * (lane % 4);
    word |= __shfl_xor_sync(~0u, word, 1);
    word |= __shfl_xor_sync(~0u, word, 2);
    uint32_t words[3];
#pragma unroll
    for (int i = 0; i < 3; i++) {
        const int at = 3 * (lane % GROUP_PACKETS) + i;
        words[i] = __shfl_sync(~0u, word, 4 * at % WARP);
        if (at == SCALE_WORD) words[i] = __float_as_uint(group_scale(largest));
        if (at == SQUARES_WORD) words[i] = __float_as_uint(squares);
    }
    if (lane < GROUP_PACKETS) put(to.groups + group * GROUP_PACKETS + lane, words[0], words[1], words[2], epoch);
    if (to.values) put(to.values + group * ACTIVATION_GROUP + lane, value, epoch);
}

}  // namespace step
