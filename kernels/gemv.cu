// GEMV where the matrices of a launch differ in type and each has one that most files hold, or is of floats. A kernel
// that tells more types apart is slower with each of them, since the compiler lays out registers and loops for all of
// them together: hence gemv_one.cu and gemv_any.cu.
#include "types/all.cuh"
#define GEMV_TYPES FREQUENT_TYPES
#include "gemv.cuh"

extern "C" __global__ void __launch_bounds__(MAX_WARPS *WARP, 1) gemv_store(const __grid_constant__ GemvParams p) {
    gemv<STORE>(p);
}
extern "C" __global__ void __launch_bounds__(MAX_WARPS *WARP, 1) gemv_add(const __grid_constant__ GemvParams p) {
    gemv<ADD>(p);
}
extern "C" __global__ void __launch_bounds__(MAX_WARPS *WARP, 1) gemv_gate(const __grid_constant__ GemvParams p) {
    gemv<GATE>(p);
}
