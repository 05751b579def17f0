// Causal attention of a chunk of tokens where those far behind are kept in tiles: flash_attention.cu for a compressed
// cache. The warps that fetch make f16 of tiles' codes. What heads gather stays rotated.
#include "attend_chunk.cuh"

#define ATTENTION(D, NAME, KEY_BITS, VALUE_BITS)                                        \
    extern "C" __global__ void __launch_bounds__(CONSUMERS + WARPGROUP, 1)              \
        flash_attention_d##D##_##NAME(const __grid_constant__ FlashAttentionParams p) { \
        attend<D, kv_tiles::KvTile<D, KEY_BITS, VALUE_BITS>>(p);                        \
    }
KV_FORMATS(ATTENTION, 64)
KV_FORMATS(ATTENTION, 128)
KV_FORMATS(ATTENTION, 256)
KV_FORMATS(ATTENTION, 512)
