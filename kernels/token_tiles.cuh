// The order in which a chunk's activations lie for GEMM.
//
// A `TokenTiles` buffer holds one f16 vector for each token of a chunk. Vectors are filled up with zeros to a multiple
// of 128 values and cut into blocks of 64; a block of all tokens is contiguous:
//
//   half at [column block][token, filled up to a multiple of 8][64]
//
// so that one bulk copy brings a tile of tokens to shared memory as the matrix instructions read it: the 16-byte pieces
// of a token's 128 bytes stand at their index xor (token % 8), which keeps the eight rows of a fragment in different
// banks. Within 128 values the order is that in which a lane decodes packed weights: a product of sums does not care in
// which order it adds. Lane t of four decodes values 16 (t % 2) .. + 15 and 32 + 16 (t % 2) .. + 15 of unit t / 2, four
// consecutive values of each 16 per step of the matrix instruction.
#pragma once

#include "common.cuh"

constexpr int STEP_VALUES = 128;  // columns of one step of a product
constexpr int BLOCK_VALUES = 64;  // columns of one block of a TokenTiles buffer

// Bytes of one step of N tokens in shared memory: two blocks of N tokens x 128 bytes.
template <int N>
constexpr int TOKEN_BYTES = N * STEP_VALUES * 2;

// Places are unsigned: divisions by constants are then shifts.
struct TokenTiles {
    half *data;
    int tokens;  // rounded up to a multiple of 8

    // Where 16-byte piece `piece` (of 8) of a block of a token starts.
    __device__ __forceinline__ half *piece(unsigned block, unsigned token, unsigned piece) const {
        return data + (size_t(block) * tokens + token) * BLOCK_VALUES + (piece ^ token % 8) * 8;
    }

    // Where values `column` + odd and `column` + odd + 2 stand, side by side. `column` is a multiple of 4.
    __device__ __forceinline__ half2 *pair(unsigned token, unsigned column, unsigned odd) const {
        const unsigned v = column % STEP_VALUES;
        const unsigned lane = v / 64 * 2 + v / 16 % 2, step = v / 4 % 4 * 2 + v / 32 % 2;
        return reinterpret_cast<half2 *>(piece(column / STEP_VALUES * 2 + step / 4, token, step % 4 * 2 + odd) +
                                         2 * lane);
    }

    // Stores values `column` .. + 3.
    __device__ __forceinline__ void store(unsigned token, unsigned column, float4 v) const {
        *pair(token, column, 0) = __floats2half2_rn(v.x, v.z);
        *pair(token, column, 1) = __floats2half2_rn(v.y, v.w);
    }
};

// Values `column` .. + 3 of a row of `columns` values in device memory, with zeros past its end; `column` is a multiple
// of 4. ALIGNED: `columns` is one as well, so that the row's pieces of 16 bytes are aligned.
template <bool ALIGNED>
__device__ __forceinline__ float4 load4(const float *row, int column, int columns) {
    if (column >= columns) return {};
    if constexpr (ALIGNED) {
        return *reinterpret_cast<const float4 *>(row + column);
    } else {
        const auto at = [&](int c) { return c < columns ? row[c] : 0.f; };
        return {at(column), at(column + 1), at(column + 2), at(column + 3)};
    }
}

// The sum over all threads of a block of whole warps.
__device__ __forceinline__ float block_sum(float value) {
    __shared__ float part[WARP];
    value = warp_sum(value);
    if (threadIdx.x % WARP == 0) part[threadIdx.x / WARP] = value;
    __syncthreads();
    return warp_sum(threadIdx.x % WARP < blockDim.x / WARP ? part[threadIdx.x % WARP] : 0.f);
}

__device__ __forceinline__ float squares_of(float4 v) { return v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w; }
