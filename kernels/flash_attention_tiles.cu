// Causal attention of a chunk of tokens where those far behind are kept in tiles: flash_attention.cu for a compressed
// cache. The warps that fetch make f16 of tiles' codes. What heads gather stays rotated.
#include "attend_chunk.cuh"

#define ATTENTION(D, NAME, KEY_BITS, VALUE_BITS)                                        \
    extern "C" __global__ void __launch_bounds__(CONSUMERS + WARPGROUP, 1)              \
        flash_attention_d##D##_##NAME(const __grid_constant__ FlashAttentionParams p) { \
        attend<D, kv_tiles::KvTile<D, KEY_BITS, VALUE_BITS>>(p);                        \
    }
#define HEADS_OF(D)          \
    ATTENTION(D, k8v8, 8, 8) \
    ATTENTION(D, k4v4, 4, 4) \
    ATTENTION(D, k4v3, 4, 3)
HEADS_OF(64)
HEADS_OF(128)
HEADS_OF(256)
HEADS_OF(512)
