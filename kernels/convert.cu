// An F32 or BF16 matrix in f16, rounded, for gemm_f16.
//
// Bound: bytes; each weight is read once. Grid: a thread for 8 values of a row, 256 a block along x; rows along y.
#include "types/all.cuh"

namespace {

template <typename Type>
__device__ __forceinline__ void convert(const uint8_t *row, half *to, int begin, int end) {
    const auto *from = reinterpret_cast<const typename Type::Value *>(row);
    for (int i = begin; i < end; i++) to[i] = __float2half_rn(static_cast<float>(from[i]));
    // GEMM reads 8 values at once.
    for (int i = end; i < round_up(end, 8); i++) to[i] = __float2half_rn(0.f);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(256) float_to_half(const __grid_constant__ ConvertParams p) {
    launch_dependents();
    wait_for_predecessor();
    const size_t row = blockIdx.y;
    const int begin = (blockIdx.x * blockDim.x + threadIdx.x) * 8, end = min(begin + 8, p.columns);
    half *to = reinterpret_cast<half *>(reinterpret_cast<uint8_t *>(p.out) + row * F16::stride(p.columns));
    if (p.type == F32::number) {
        convert<F32>(p.weights + row * F32::stride(p.columns), to, begin, end);
    } else {
        convert<BF16>(p.weights + row * BF16::stride(p.columns), to, begin, end);
    }
}
