// Float types: the file's values, each row filled up to a multiple of 16 bytes.
#pragma once

#include "type.cuh"

template <int NUMBER, typename V>
struct FloatType {
    static constexpr int number = NUMBER;  // ggml's
    using Value = V;

    // Bytes between rows.
    __host__ __device__ static constexpr size_t stride(int columns) {
        return (size_t(columns) * sizeof(V) + 15) / 16 * 16;
    }
};

struct F32 : FloatType<0, float> {};
struct BF16 : FloatType<30, __nv_bfloat16> {};

// The float type that GEMM takes. What fills up a row is zeros.
struct F16 : FloatType<1, half> {
    // As WeightRun: rows of 128 values, 16-byte pieces of 8.
    template <int MT>
    struct Run {
        static constexpr int units = 2;
        static constexpr int values = units * UNIT;
        static constexpr int bytes = 16 * values * 2;

        // Swizzled, so that both the lanes that copy and those that read meet all banks.
        __device__ static __forceinline__ int piece_at(int row, int piece, int unit) {
            return row * 256 + ((unit * 8 + piece) ^ row % 8) * 16;
        }
        __device__ static __forceinline__ const uint8_t *row_start(const uint8_t *weights, size_t first, int columns) {
            return weights + first * stride(columns);
        }
        __device__ static __forceinline__ void copy(uint32_t to, const RowGroup (&groups)[2], int run, int columns) {
            const int lane = threadIdx.x % WARP, piece = lane % 16, column = run * values + piece * 8;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const int row = i * 2 + lane / 16;
                copy_or_zero<16, true>(to + piece_at(row, piece % 8, piece / 8),
                                       groups[i / 4].start + row % 8 * stride(columns) + column * 2,
                                       row % 8 < groups[i / 4].rows && column < columns);
            }
        }
    };

    // As WeightFragment.
    template <int MT>
    struct Fragment : FragmentRegisters<16> {
        struct Lane {
            int row, unit, part;
            int code;

            __device__ __forceinline__ Lane()
                : row(threadIdx.x % WARP / 4),
                  unit(threadIdx.x % 4 / 2),
                  part(threadIdx.x % 2) {
                code = row * 256;
            }
        };
        __device__ __forceinline__ void load(uint32_t from, const Lane &lane, int h, int, int, int) {
            const uint32_t codes = from + lane.code + (h * 8 * 256);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const uint4 v =
                    load_shared<uint4>(codes + ((lane.unit * 8 + i / 2 * 4 + lane.part * 2 + i % 2) ^ lane.row) * 16);
                code[4 * i] = v.x, code[4 * i + 1] = v.y, code[4 * i + 2] = v.z, code[4 * i + 3] = v.w;
            }
        }
        template <int HALF>
        __device__ __forceinline__ void decode(int w, uint32_t &even, uint32_t &odd) const {
            const uint32_t first = code[HALF * 8 + 2 * w], second = code[HALF * 8 + 2 * w + 1];
            even = __byte_perm(first, second, 0x5410), odd = __byte_perm(first, second, 0x7632);
        }
    };
};

__host__ __device__ constexpr bool is_float(int type) {
    return type == F32::number || type == F16::number || type == BF16::number;
}

// Calls use(Type()) for the float type of this number.
template <typename Use>
__device__ __forceinline__ void for_float(int type, Use use) {
    if (type == F32::number) {
        use(F32());
    } else if (type == F16::number) {
        use(F16());
    } else {
        use(BF16());
    }
}

// Bytes of a row that a warp takes at a time: rows may be cut at multiples of these.
constexpr int FLOAT_ROUND = WARP * 16;

// Adds a lane's part of a row of float weights, or of a piece of one, times float activations; `load` reads 16 bytes.
template <typename T, typename Load>
__device__ __forceinline__ void add_products(float &sum, const T *row, const float *a, int columns, int lane,
                                             Load load) {
    constexpr int N = 16 / sizeof(T);
    const int whole = columns / N * N;
#pragma unroll 4
    for (int c = lane * N; c < whole; c += WARP * N) {
        const uint4 raw = load(reinterpret_cast<const uint4 *>(row + c));
        const T *w = reinterpret_cast<const T *>(&raw);
#pragma unroll
        for (int j = 0; j < N; j++) sum += static_cast<float>(w[j]) * a[c + j];
    }
    if (whole + lane < columns) sum += static_cast<float>(row[whole + lane]) * a[whole + lane];
}

// A row of float weights times float activations, by one warp.
template <typename T>
__device__ float float_dot(const T *row, const float *a, int columns, int lane) {
    float sum = 0.f;
    add_products(sum, row, a, columns, lane, [](const uint4 *from) { return __ldcs(from); });
    return warp_sum(sum);
}
