// GEMV where all matrices have the same quantized type: kernels for each, so short that those of a layer stay in the
// instruction cache side by side.
#include "types/all.cuh"
#define GEMV_TYPES(CALL)
#include "gemv.cuh"

#define ENTRY_POINT(NAME, TYPE, EPILOGUE)                                                                         \
    extern "C" __global__ void __launch_bounds__(MAX_WARPS *WARP, 1) NAME(const __grid_constant__ GemvParams p) { \
        gemv<EPILOGUE, TYPE>(p);                                                                                  \
    }
#define ENTRY_POINTS(NAME, TYPE, NUMBER)          \
    ENTRY_POINT(gemv_##NAME##_store, TYPE, STORE) \
    ENTRY_POINT(gemv_##NAME##_add, TYPE, ADD)     \
    ENTRY_POINT(gemv_##NAME##_gate, TYPE, GATE)
QUANTIZED_TYPES(ENTRY_POINTS)
