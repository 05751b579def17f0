// Super-blocks whose scales take 24 bits for each unit: headers of 16 bytes, byte u of whose second, third and fourth
// words makes the bits of unit u, the lowest first.
#pragma once

#include "type.cuh"

namespace unit_bits {

__device__ inline void store(uint8_t *header, int u, int bits) {
    for (int byte = 0; byte < 3; byte++) header[4 + 4 * byte + u] = static_cast<uint8_t>(bits >> 8 * byte);
}
__device__ inline int load(const uint8_t *header, int u) {
    return header[4 + u] | header[8 + u] << 8 | header[12 + u] << 16;
}
__device__ __forceinline__ uint32_t load(const uint4 &header, uint32_t u) {
    const uint32_t two = __byte_perm(header.y, header.z, u | (u + 4) << 4);
    return __byte_perm(two, header.w, 0x7010 | (u + 4) << 8) & 0xffffffu;
}

template <typename Layout, int MT>
struct Lane : LaneLayout<Layout, MT> {
    uint32_t pick[2];  // which bytes of the header are the unit's

    __device__ __forceinline__ Lane() {
        pick[0] = this->unit | (this->unit + 4) << 4, pick[1] = 0x7010 | (this->unit + 4) << 8;
    }
    // Loads a header from the run at `from`; the top byte is not the unit's.
    __device__ __forceinline__ uint32_t load(uint4 &header, uint32_t from, int h, int step) const {
        using Run = WeightRun<Layout, MT>;
        const uint32_t supers = from + this->super + h * 8 * Run::supers * Run::super_bytes;
        header = load_shared<uint4>(supers + step / 2 * 16);
        const uint32_t two = __byte_perm(header.y, header.z, pick[0] + step % 2 * 0x22);
        return __byte_perm(two, header.w, pick[1] + step % 2 * 0x200);
    }
};

// Two fields of 6 bits, the first one FROM bits up, less ZERO.
template <int ZERO, int FROM = 0>
__device__ __forceinline__ half2 two_to_half(uint32_t bits) {
    return field_to_half<0x003f003fu, 0, ZERO>(
        __byte_perm(bits >> FROM, FROM < 10 ? bits << (10 - FROM) : bits >> (FROM - 10), 0x7610));
}

}  // namespace unit_bits
