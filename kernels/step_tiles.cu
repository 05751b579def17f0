// A whole decode step as one kernel where tokens far behind are kept in tiles: step.cu for a compressed cache, to the
// same bits as decode_attention_tiles.cu and the others. Tiles come through the ring like weights and newer tokens.
//
// Heads of 64 and 128 values alone: larger ones lack registers for tiles.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

#include "step/run.cuh"

#define ENTRY_POINT(D, NAME, KEY_BITS, VALUE_BITS)                  \
    extern "C" __global__ void __launch_bounds__(step::THREADS, 1)  \
        step_d##D##_##NAME(const __grid_constant__ StepParams p) {  \
        step::run<D, kv_tiles::KvTile<D, KEY_BITS, VALUE_BITS>>(p); \
    }
KV_FORMATS(ENTRY_POINT, 64)
KV_FORMATS(ENTRY_POINT, 128)
#endif
