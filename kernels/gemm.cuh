// What the GEMM kernels share: how tokens reach shared memory, the products of a step, and the epilogues.
//
//   store   out[token, row] = W[row] . x[token] (+ bias[row])
//   add     out[token, row] += factor * W[row] . x[token]
//   gate    out[token, row] = activate(Wg[row] . x[token]) * (Wu[row] . x[token]) * factor, as TokenTiles
#pragma once

#include "activate.cuh"
#include "copy.cuh"
#include "mma.cuh"
#include "token_tiles.cuh"
#include "types/all.cuh"

enum Epilogue : int { Store = 0, Add = 1, Gate = 2 };

// Starts copying step `step` of the tokens from `token` on to a stage that `full` guards. By all lanes of a warp.
template <int N>
__device__ __forceinline__ void fetch_tokens(const GemmParams &p, uint32_t to, int step, int token,
                                             const Barrier &full) {
    const int lane = threadIdx.x % WARP, bytes = min(N, p.padded_tokens - token) * 128;
    const uint8_t *from = reinterpret_cast<const uint8_t *>(p.x) + (size_t(2 * step) * p.padded_tokens + token) * 128;
    const size_t block_stride = size_t(p.padded_tokens) * 128;
#if __CUDA_ARCH__ >= 900
    if (lane == 0) {
        expect_bytes(full, 2 * bytes);
        copy_bulk(to, from, bytes, full);
        copy_bulk(to + TOKEN_BYTES<N> / 2, from + block_stride, bytes, full);
    }
#else
    for (int i = lane * 16; i < bytes; i += WARP * 16) {
        copy_or_zero<16>(to + i, from + i, true);
        copy_or_zero<16>(to + TOKEN_BYTES<N> / 2 + i, from + block_stride + i, true);
    }
    full.arrive_after_copies();
#endif
}

// Adds the products of word w of a step's codes, which is two steps of the matrix instruction: MT fragments of rows,
// decoded to `a`, with the N tokens at `tokens`. On sm_90a the products are only started; `a` and the tokens must stay
// until they have been waited for.
template <int MT, int N, typename Fragment>
__device__ __forceinline__ void multiply(float (&sum)[MT][N / 8][4], uint32_t (&a)[2][MT][4],
                                         const Fragment (&row)[MT][2], int w, uint32_t tokens) {
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            row[m][h].template decode<0>(w, a[0][m][h], a[0][m][2 + h]);
            row[m][h].template decode<1>(w, a[1][m][h], a[1][m][2 + h]);
        }
    }
    const uint32_t block = tokens + w / 2 * (TOKEN_BYTES<N> / 2);
#if WARPGROUP_MMA
#pragma unroll
    for (int i = 0; i < 8 * MT; i++) pin_operand(a[i / (4 * MT)][i / 4 % MT][i % 4]);
    warpgroup_arrive();
#pragma unroll
    for (int k = 0; k < 2; k++) {
#pragma unroll
        for (int m = 0; m < MT; m++) warpgroup_mma(sum[m], a[k][m], matrix_descriptor(block) + (w % 2 * 2 + k) * 2);
    }
    warpgroup_commit();
#else
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int k = 0; k < 2; k++) {
#pragma unroll
        for (int j = 0; j < N / 16; j++) {
            const int token = j * 16 + lane / 16 * 8 + lane % 8, piece = (w % 2 * 2 + k) * 2 + lane / 8 % 2;
            uint32_t b[4];
            load_matrices(b, block + token * 128 + (piece ^ token % 8) * 16);
#pragma unroll
            for (int m = 0; m < MT; m++) {
                mma(sum[m][2 * j], a[k][m], b[0], b[1]);
                mma(sum[m][2 * j + 1], a[k][m], b[2], b[3]);
            }
        }
    }
#endif
}

__device__ __forceinline__ float finite_half(float x) { return fminf(fmaxf(x, -65504.f), 65504.f); }

// Ends the sums of a fragment of 16 rows and N tokens from `first_token` on. This lane's are those of rows `row0` and
// `row1` of matrix `index`; Gate: of row `row0` of both matrices.
template <int N>
__device__ __forceinline__ void apply_epilogue(const GemmParams &p, int index, int row0, int row1, int first_token,
                                               const float (&sum)[N / 8][4]) {
    const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    if (p.epilogue == Gate) {
        const TokenTiles gated{p.gated, p.padded_tokens};
        const int rows = p.matrix[0].rows;
        const bool inside = row0 < rows, odd = g / 2 % 2, filled = row0 < round_up(rows, STEP_VALUES);
#pragma unroll
        for (int i = 0; i < N / 8; i++) {
            float y[2];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const float gate = sum[i][j], up = sum[i][2 + j];
                y[j] = inside ? finite_half(activate(p.gelu, gate) * up * p.factor) : 0.f;
            }
            // Rows r and r + 2 stand side by side: this lane takes both for one of its two tokens.
            const float other = __shfl_xor_sync(~0u, odd ? y[0] : y[1], 8);
            const int token = first_token + i * 8 + 2 * t + odd;
            if (token < p.tokens && filled) {
                *gated.pair(token, row0 & ~3, row0 & 1) =
                    odd ? __floats2half2_rn(other, y[1]) : __floats2half2_rn(y[0], other);
            }
        }
    } else {
        const GemmMatrix &matrix = p.matrix[index];
        const unsigned stride = matrix.out_stride;
        float *out = matrix.out + size_t(first_token + 2 * t) * stride;
        const int tokens = p.tokens - first_token - 2 * t;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int row = h ? row1 : row0;
            if (row >= matrix.rows) continue;
            const float bias = matrix.bias ? matrix.bias[row] : 0.f;
            float before[N / 8][2];  // all loads before the first store
#pragma unroll
            for (int i = 0; i < N / 4; i++) {
                const int token = i / 2 * 8 + i % 2;
                before[i / 2][i % 2] = p.epilogue == Add && token < tokens ? out[row + token * stride] : bias;
            }
#pragma unroll
            for (int i = 0; i < N / 4; i++) {
                const int token = i / 2 * 8 + i % 2;
                if (token < tokens)
                    out[row + token * stride] = sum[i / 2][2 * h + i % 2] * p.factor + before[i / 2][i % 2];
            }
        }
    }
}
