// The KV cache: where a token's key or value sits, and in which format. f16.
//
// A token has a position in the text, which its rotation follows; a place among the tokens that are cached, which is
// its position as long as none were evicted, and which the mask follows; and a slot, in which it is stored. `slot_of`
// alone knows how places give slots.
#pragma once

#include "common.cuh"

// Of head size D.
template <int D>
struct KvCache {
    // The slot of the token at `place` in a head of `capacity` slots. These are a ring, in which a token takes that of
    // the one that is `capacity` before it; where all tokens have room, none does, and nothing is divided.
    __device__ static __forceinline__ int slot_of(int place, int capacity) {
        return place < capacity ? place : place % capacity;
    }

    // The slots of the token at `first` and of fewer than `capacity` behind it, with one division for all.
    struct Slots {
        int shift, capacity;

        __device__ __forceinline__ Slots(int first, int capacity)
            : shift(slot_of(first, capacity) - first),
              capacity(capacity) {}
        __device__ __forceinline__ int operator()(int place) const {
            const int slot = place + shift;
            return slot < capacity ? slot : slot - capacity;
        }
    };

    // A layer's keys or values are rows of D values, (D, capacity, head_count_kv): the row of a key/value head's slot.
    __device__ static __forceinline__ size_t row(int head, int slot, int capacity) {
        return size_t(head) * capacity + slot;
    }

    // Eight values of a token.
    __device__ static __forceinline__ uint4 load(const half *from) { return *reinterpret_cast<const uint4 *>(from); }
    // One value, or two.
    __device__ static __forceinline__ void store(half *to, float value) { *to = __float2half_rn(value); }
    __device__ static __forceinline__ void store(half *to, float value0, float value1) {
        *reinterpret_cast<half2 *>(to) = __floats2half2_rn(value0, value1);
    }
};
