// A plane of two bits for each value of a unit: in 16 bytes, byte i % 4 of word i / 8 has those of value i at bit
// 4 * (i / 4 % 2), of value 32 + i two bits higher.
#pragma once

#include "type.cuh"

namespace two_bits {

// `bits(i)`: of value i.
template <typename Bits>
__device__ void store(uint8_t *plane, Bits bits) {
    for (int byte = 0; byte < 16; byte++) {
        const int i = byte / 4 * 8 + byte % 4;
        plane[byte] = static_cast<uint8_t>(bits(i) | bits(32 + i) << 2 | bits(i + 4) << 4 | bits(36 + i) << 6);
    }
}
__device__ __forceinline__ int load(const uint8_t *plane, int i) {
    return plane[i % 32 / 8 * 4 + i % 4] >> (i / 4 % 2 * 4 + i / 32 * 2) & 3;
}

}  // namespace two_bits
