// GEMV where matrices of a launch differ in type, and one has a type that few files hold: see gemv.cu.
#include "types/all.cuh"
#define GEMV_TYPES QUANTIZED_TYPES
#include "gemv.cuh"

extern "C" __global__ void __launch_bounds__(MAX_WARPS *WARP, 1) gemv_any_store(const __grid_constant__ GemvParams p) {
    gemv<STORE>(p);
}
extern "C" __global__ void __launch_bounds__(MAX_WARPS *WARP, 1) gemv_any_gate(const __grid_constant__ GemvParams p) {
    gemv<GATE>(p);
}
