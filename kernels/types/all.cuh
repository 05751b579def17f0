// The tensor types. A new one takes its file, included here, and its line in the list.
#pragma once

#include "float.cuh"
#include "iq2_s.cuh"
#include "iq3_s.cuh"
#include "iq3_xxs.cuh"
#include "iq4_nl.cuh"
#include "iq4_xs.cuh"
#include "mxfp4.cuh"
#include "q2_k.cuh"
#include "q3_k.cuh"
#include "q4_0.cuh"
#include "q4_1.cuh"
#include "q4_k.cuh"
#include "q5_0.cuh"
#include "q5_1.cuh"
#include "q5_k.cuh"
#include "q6_k.cuh"
#include "q8_0.cuh"

// CALL(name in entry points, type, ggml's number), for the types that gemv.cu takes. `gemv_kernels` of
// src/cuda/tensor_types.rs lists the same.
#define FREQUENT_TYPES(CALL) \
    CALL(q4_k, Q4_K, 12)     \
    CALL(q6_k, Q6_K, 14)     \
    CALL(q5_k, Q5_K, 13)     \
    CALL(q8_0, Q8_0, 8)      \
    CALL(q4_0, Q4_0, 2)      \
    CALL(q4_1, Q4_1, 3)      \
    CALL(q5_0, Q5_0, 6)      \
    CALL(q5_1, Q5_1, 7)

// All of them.
#define QUANTIZED_TYPES(CALL)  \
    FREQUENT_TYPES(CALL)       \
    CALL(q3_k, Q3_K, 11)       \
    CALL(q2_k, Q2_K, 10)       \
    CALL(iq4_nl, IQ4_NL, 20)   \
    CALL(iq4_xs, IQ4_XS, 23)   \
    CALL(mxfp4, MXFP4, 39)     \
    CALL(iq3_s, IQ3_S, 21)     \
    CALL(iq3_xxs, IQ3_XXS, 18) \
    CALL(iq2_s, IQ2_S, 22)

// Those that GEMM takes.
#define GEMM_TYPES(CALL)  \
    QUANTIZED_TYPES(CALL) \
    CALL(f16, F16, 1)

// Runs the case of the quantized type that `type` numbers: CASE(NAME, TYPE, NUMBER) is `case NUMBER: ...; break;`.
#define FOR_QUANTIZED(type, CASE) \
    switch (type) {               \
        QUANTIZED_TYPES(CASE)     \
        default: break;           \
    }

// Value `column` of row `row` of a matrix of this type.
__device__ __forceinline__ float matrix_value(int type, const uint8_t *weights, int columns, size_t row, int column) {
    float value = 0.f;
    if (is_float(type)) {
        for_float(type, [&](auto chosen) {
            using Type = decltype(chosen);
            const uint8_t *values = weights + row * Type::stride(columns);
            value = static_cast<float>(reinterpret_cast<const typename Type::Value *>(values)[column]);
        });
    } else {
        const int units = unit_count(columns);
#define VALUE(NAME, TYPE, NUMBER) \
    case NUMBER: value = TYPE::value(unit_at<TYPE::Layout>(weights, units, row, column / UNIT), column % UNIT); break;
        FOR_QUANTIZED(type, VALUE)
#undef VALUE
    }
    return value;
}
