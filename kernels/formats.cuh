// How weight matrices lie in device memory, and the product of 64 weights with 64 activations for each ggml type.
//
// A row is cut into units of 64 values, one unit for one lane, and a slice of up to 32 units for one warp. What a type
// stores for a unit goes to separate planes, each holding all rows one after another, so that a warp reads every plane
// in whole lines and each lane copies naturally aligned pieces. Nothing is added but alignment: planes start at
// multiples of 16 bytes, and a row of an odd count of 32-value blocks is filled up with one block of zeros.
//
//   plane   bytes a unit      content
//   codes   32 (Q8_0: 64)     pieces of 16 bytes; within a slice all lanes' first pieces, then all second ones, ...
//                             4 low bits of the values' codes: byte i holds value i low, value 32 + i high.
//                             Q8_0: the signed bytes in order
//   high    8 (Q5_*)          bit 8 * (i % 4) + i / 4 of the first word is bit 4 of value i's code; second word: value 32 + i
//           16 (Q6_K)         word i / 8, byte i % 4: bits 4 and 5 of value i's code at bit 4 * (i / 4 % 2), of
//                             value 32 + i's two bits higher
//   scales  4 (Q4_0 Q5_0 Q8_0) d of both blocks, f16
//           8 (Q4_1 Q5_1)     d, m of the first block, d, m of the second, f16
//           4 (Q4_K Q5_K)     16 bytes for the 4 units of a super-block: d and dmin in the first word (f16); byte u of the second,
//                             third and fourth words make 24 bits for unit u: scale and scale of its first and second 32
//                             values, then min and min, 6 bits each from the lowest bit up
//           4 (Q6_K)          the 4 signed scales, one for each 16 values
//   super   1/2 (Q6_K)        d of each super-block, f16; a row is filled up to a multiple of 4 bytes
//
// F32, F16 and BF16 keep the file's values; each row is filled up to a multiple of 16 bytes.
#pragma once

#include "common.cuh"

// ggml's own numbers.
enum Type : int { F32 = 0, F16 = 1, Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q4_K = 12, Q5_K = 13, Q6_K = 14, BF16 = 30 };

constexpr int UNIT = 64;
constexpr int SLICE_UNITS = WARP;

template <int TYPE>
struct Format {
    static constexpr bool super_blocks = TYPE == Q4_K || TYPE == Q5_K || TYPE == Q6_K;
    static constexpr bool packed_scales = TYPE == Q4_K || TYPE == Q5_K;
    static constexpr int code_pieces = TYPE == Q8_0 ? 4 : 2;
    static constexpr int high_bytes = TYPE == Q6_K ? 16 : TYPE == Q5_0 || TYPE == Q5_1 || TYPE == Q5_K ? 8 : 0;
    static constexpr int scale_bytes = TYPE == Q4_1 || TYPE == Q5_1 ? 8 : 4;
    static constexpr int code_bytes = 16 * code_pieces;

    // One row's slice in shared memory, planes one after another.
    static constexpr int high_at = code_bytes * SLICE_UNITS;
    static constexpr int scale_at = high_at + high_bytes * SLICE_UNITS;
    static constexpr int super_at = scale_at + scale_bytes * SLICE_UNITS;
    static constexpr int slice_bytes = super_at + (TYPE == Q6_K ? 16 : 0);
};

// Where the planes of a `rows` x (64 * `units`) matrix start and how far apart its rows are, in bytes.
template <int TYPE>
struct Planes {
    using F = Format<TYPE>;
    int code_stride, high_stride, scale_stride, super_stride;
    size_t high_at, scale_at, super_at;

    __host__ __device__ Planes(int rows, int units)
        : code_stride(F::code_bytes * units),
          high_stride(F::high_bytes * units),
          scale_stride(F::scale_bytes * units),
          super_stride(TYPE == Q6_K ? (units / 4 * 2 + 3) / 4 * 4 : 0),
          high_at(size_t(rows) * code_stride),
          scale_at(high_at + align(size_t(rows) * high_stride)),
          super_at(scale_at + align(size_t(rows) * scale_stride)) {}

    __host__ __device__ static size_t align(size_t bytes) { return (bytes + 15) / 16 * 16; }
    __host__ __device__ size_t bytes(int rows) const { return super_at + align(size_t(rows) * super_stride); }
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

__device__ __forceinline__ float2 half2_at(const void *at) { return __half22float2(*static_cast<const __half2 *>(at)); }

// The product of the lane's 64 weights, in a slice in shared memory, with its activations.
template <int TYPE>
__device__ __forceinline__ float dot_unit(const uint8_t *slice, int lane, const ActivationUnit<TYPE> &a) {
    using F = Format<TYPE>;
    constexpr uint32_t LOW = 0x0f0f0f0fu;
    uint32_t word[4 * F::code_pieces];
#pragma unroll
    for (int i = 0; i < F::code_pieces; i++) {
        const uint4 piece = reinterpret_cast<const uint4 *>(slice)[i * SLICE_UNITS + lane];
        word[4 * i] = piece.x, word[4 * i + 1] = piece.y, word[4 * i + 2] = piece.z, word[4 * i + 3] = piece.w;
    }
    const uint8_t *scales = slice + F::scale_at;

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
        const uint4 high = reinterpret_cast<const uint4 *>(slice + F::high_at)[lane];
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
        const float d = __half2float(reinterpret_cast<const __half *>(slice + F::super_at)[lane / 4]);
        return d * (a.scale0 * (s.x * sum[0] + s.y * sum[1]) + a.scale1 * (s.z * sum[2] + s.w * sum[3]));
    } else {
        int first = a.start[0], second = a.start[1];
        uint2 high = {};
        if constexpr (F::high_bytes > 0) high = reinterpret_cast<const uint2 *>(slice + F::high_at)[lane];
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
            const float2 d = __half22float2(*reinterpret_cast<const __half2 *>(&header.x));
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
