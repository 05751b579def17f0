// How weight matrices lie in device memory, and the product of 64 weights with 64 activations for each ggml type.
//
// A row is cut into units of 64 values, one unit for one lane, and a slice of 32 units (the last one may be shorter) for
// one warp. A tile is one slice of 2 consecutive rows, contiguous, so that one copy of a few kilobytes brings it. Tiles lie
// slice by slice, then row pair by row pair. With n units in a slice, a tile holds these planes one after another
// and is filled up to a multiple of 16 bytes; an odd last row gets a row of zeros beside it, and a row of an odd count of
// 32-value blocks a block of zeros at its end:
//
//   plane    shape (last index runs fastest)  content
//   codes    [piece 2 (Q8_0: 4)][row 2][n]    16 bytes each. The 4 low bits of the values' codes: byte i of the 32 that the unit's
//                                             two pieces make holds value i low, value 32 + i high. Q8_0: the bytes in order
//   high     [row 2][n], 8 bytes (Q5_*)       bit 8 * (i % 4) + i / 4 of the first word is bit 4 of value i's code; second
//                                             word: of value 32 + i's
//            [row 2][n], 16 bytes (Q6_K)      word i / 8, byte i % 4: bits 4 and 5 of value i's code at bit 4 * (i / 4 % 2), of
//                                             value 32 + i's two bits higher
//   scales   [row 2][n], 4 (Q4_0 Q5_0 Q8_0)   d of both blocks, f16
//            [row 2][n], 8 (Q4_1 Q5_1)        d, m of the first block, d, m of the second, f16
//            [row 2][n / 4], 16 (Q4_K Q5_K)   of a super-block: d and dmin in the first word (f16); byte u of the second, third and
//                                             fourth words make 24 bits for unit u: scale and scale of its first and second
//                                             32 values, then min and min, 6 bits each from the lowest bit up
//            [row 2][n], 4 (Q6_K)             the 4 signed scales, one for each 16 values
//   super    [row 2][n / 4], 2 (Q6_K)         d of each super-block, f16
//
// F32, F16 and BF16 keep the file's values; each row is filled up to a multiple of 16 bytes.
#pragma once

#include "common.cuh"

// ggml's own numbers.
enum Type : int { F32 = 0, F16 = 1, Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q4_K = 12, Q5_K = 13, Q6_K = 14, BF16 = 30 };

constexpr int UNIT = 64;
constexpr int SLICE_UNITS = WARP;

constexpr int TILE_ROWS = 2;

template <int TYPE>
struct Format {
    static constexpr bool super_blocks = TYPE == Q4_K || TYPE == Q5_K || TYPE == Q6_K;
    static constexpr bool packed_scales = TYPE == Q4_K || TYPE == Q5_K;
    static constexpr int code_pieces = TYPE == Q8_0 ? 4 : 2;
    static constexpr int high_bytes = TYPE == Q6_K ? 16 : TYPE == Q5_0 || TYPE == Q5_1 || TYPE == Q5_K ? 8 : 0;
    static constexpr int scale_bytes = TYPE == Q4_1 || TYPE == Q5_1 ? 8 : 4;

    // Where a tile's planes start, for `n` units, and its size.
    __host__ __device__ static constexpr int high_at(int n) { return code_pieces * 16 * TILE_ROWS * n; }
    __host__ __device__ static constexpr int scale_at(int n) { return high_at(n) + high_bytes * TILE_ROWS * n; }
    __host__ __device__ static constexpr int super_at(int n) { return scale_at(n) + scale_bytes * TILE_ROWS * n; }
    __host__ __device__ static constexpr int tile_bytes(int n) { return (super_at(n) + (TYPE == Q6_K ? TILE_ROWS * n / 2 : 0) + 15) / 16 * 16; }

    // Bytes of two rows of `units` units.
    __host__ __device__ static constexpr int pair_bytes(int units) {
        return units / SLICE_UNITS * tile_bytes(SLICE_UNITS) + (units % SLICE_UNITS ? tile_bytes(units % SLICE_UNITS) : 0);
    }
};

__host__ __device__ constexpr bool is_float(int type) { return type == F32 || type == F16 || type == BF16; }

// Bytes between rows of a float matrix.
__host__ __device__ constexpr size_t float_stride(int type, int columns) {
    return (size_t(columns) * (type == F32 ? 4 : 2) + 15) / 16 * 16;
}

// Calls CALL<TYPE> for the quantized type that `type` names at run time.
#define FOR_QUANTIZED(type, CALL)              \
    switch (type) {                                \
        case Q4_K: CALL(Q4_K); break;              \
        case Q6_K: CALL(Q6_K); break;              \
        case Q5_K: CALL(Q5_K); break;              \
        case Q8_0: CALL(Q8_0); break;              \
        case Q4_0: CALL(Q4_0); break;              \
        case Q4_1: CALL(Q4_1); break;              \
        case Q5_0: CALL(Q5_0); break;              \
        case Q5_1: CALL(Q5_1); break;              \
        default: break;                            \
    }

// 64 quantized activations in registers, with what a type needs of them beside the integers.
template <int TYPE>
struct ActivationUnit {
    int x[16];
    // One scale for each 32 values. Where high codes are used in place (times 16), the second is divided by 16.
    float scale0, scale1;
    // Q6_K: what a sum over 16 products starts from, -32 * (sum of the integers), since codes are offset by 32;
    // Q4_0, Q5_0: likewise for 32 values.
    int start[4];
    // Types with minima: scale * (sum of the integers) of each 32 values.
    float sum0, sum1;

    __device__ __forceinline__ void prepare(const int4 (&q)[4], float s0, float s1) {
        int part[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            x[4 * i] = q[i].x, x[4 * i + 1] = q[i].y, x[4 * i + 2] = q[i].z, x[4 * i + 3] = q[i].w;
            part[i] = 0;
#pragma unroll
            for (int j = 0; j < 4; j++) part[i] = dot4(0x01010101u, x[4 * i + j], part[i]);
        }
        constexpr bool high_in_place = TYPE == Q4_K || TYPE == Q4_0 || TYPE == Q4_1;
        scale0 = s0;
        scale1 = high_in_place ? s1 / 16.f : s1;
        sum0 = s0 * (part[0] + part[1]);
        sum1 = s1 * (part[2] + part[3]);
        if (TYPE == Q6_K) {
#pragma unroll
            for (int i = 0; i < 4; i++) start[i] = -32 * part[i];
        } else {
            const int offset = TYPE == Q4_0 ? 8 : TYPE == Q5_0 ? 16 : 0;
            start[0] = -offset * (part[0] + part[1]);
            start[1] = -offset * (part[2] + part[3]) * (high_in_place ? 16 : 1);
            start[2] = start[3] = 0;
        }
    }
};

__device__ __forceinline__ float2 half2_at(const void *at) { return __half22float2(*static_cast<const half2 *>(at)); }

// The product of unit `lane` of row `row` of a tile of `n` units, in shared memory, with the lane's activations.
template <int TYPE>
__device__ __forceinline__ float dot_unit(const uint8_t *tile, int n, int row, int lane, const ActivationUnit<TYPE> &a) {
    using F = Format<TYPE>;
    constexpr uint32_t LOW = 0x0f0f0f0fu;
    uint32_t word[4 * F::code_pieces];
#pragma unroll
    for (int i = 0; i < F::code_pieces; i++) {
        const uint4 piece = reinterpret_cast<const uint4 *>(tile)[(i * TILE_ROWS + row) * n + lane];
        word[4 * i] = piece.x, word[4 * i + 1] = piece.y, word[4 * i + 2] = piece.z, word[4 * i + 3] = piece.w;
    }
    const uint8_t *scales = tile + F::scale_at(n) + row * n * F::scale_bytes;
    const uint8_t *highs = tile + F::high_at(n) + row * n * F::high_bytes;

    if constexpr (TYPE == Q8_0) {
        int first = 0, second = 0;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            first = __dp4a(static_cast<int>(word[i]), a.x[i], first);
            second = __dp4a(static_cast<int>(word[8 + i]), a.x[8 + i], second);
        }
        const float2 d = half2_at(scales + 4 * lane);
        return d.x * a.scale0 * first + d.y * a.scale1 * second;
    } else if constexpr (TYPE == Q6_K) {
        const uint4 high = reinterpret_cast<const uint4 *>(highs)[lane];
        const uint32_t bits[4] = {high.x, high.y, high.z, high.w};
        constexpr uint32_t TOP = 0x30303030u;
        int sum[4] = {a.start[0], a.start[1], a.start[2], a.start[3]};
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const uint32_t h = bits[i / 2];
            const uint32_t first = (word[i] & LOW) | ((i % 2 ? h : h << 4) & TOP);
            const uint32_t second = (word[i] >> 4 & LOW) | ((i % 2 ? h >> 2 : h << 2) & TOP);
            sum[i / 4] = dot4(first, a.x[i], sum[i / 4]);
            sum[2 + i / 4] = dot4(second, a.x[8 + i], sum[2 + i / 4]);
        }
        const char4 s = *reinterpret_cast<const char4 *>(scales + 4 * lane);
        const float d = __half2float(reinterpret_cast<const half *>(tile + F::super_at(n))[row * (n / 4) + lane / 4]);
        return d * (a.scale0 * (s.x * sum[0] + s.y * sum[1]) + a.scale1 * (s.z * sum[2] + s.w * sum[3]));
    } else {
        int first = a.start[0], second = a.start[1];
        uint2 high = {};
        if constexpr (F::high_bytes > 0) high = reinterpret_cast<const uint2 *>(highs)[lane];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            uint32_t low_codes = word[i] & LOW;
            uint32_t high_codes = word[i] & ~LOW;
            if constexpr (F::high_bytes > 0) {
                constexpr uint32_t BIT = 0x10101010u;
                low_codes |= (i < 4 ? high.x << (4 - i) : high.x >> (i - 4)) & BIT;
                high_codes = high_codes >> 4 | ((i < 4 ? high.y << (4 - i) : high.y >> (i - 4)) & BIT);
            }
            first = dot4(low_codes, a.x[i], first);
            second = dot4(high_codes, a.x[8 + i], second);
        }
        if constexpr (F::packed_scales) {
            const uint4 header = reinterpret_cast<const uint4 *>(scales)[lane / 4];
            const uint32_t u = lane % 4;
            const uint32_t two = __byte_perm(header.y, header.z, u | (u + 4) << 4);
            const uint32_t packed = __byte_perm(two, header.w, 0x7010 | (u + 4) << 8) & 0xffffffu;
            const int scale0 = packed & 63, scale1 = packed >> 6 & 63, min0 = packed >> 12 & 63, min1 = packed >> 18;
            const float2 d = __half22float2(*reinterpret_cast<const half2 *>(&header.x));
            return d.x * (a.scale0 * (scale0 * first) + a.scale1 * (scale1 * second)) - d.y * (a.sum0 * min0 + a.sum1 * min1);
        } else if constexpr (F::scale_bytes == 8) {
            const float2 block0 = half2_at(scales + 8 * lane), block1 = half2_at(scales + 8 * lane + 4);
            return block0.x * a.scale0 * first + block1.x * a.scale1 * second + block0.y * a.sum0 + block1.y * a.sum1;
        } else {
            const float2 d = half2_at(scales + 4 * lane);
            return d.x * a.scale0 * first + d.y * a.scale1 * second;
        }
    }
}
