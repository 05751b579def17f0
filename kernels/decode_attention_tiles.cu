// Attention of one new token where those far behind are kept in tiles: decode_attention.cu for a compressed cache. A
// chunk's tokens are read from their tiles, through rings in shared memory, up to the tile before the new token's own.
#include "attend_token.cuh"

#define ATTENTION(D, NAME, KEY_BITS, VALUE_BITS)                                          \
    extern "C" __global__ void __launch_bounds__(WARPS *WARP, 1)                          \
        decode_attention_d##D##_##NAME(const __grid_constant__ DecodeAttentionParams p) { \
        attend<D, kv_tiles::KvTile<D, KEY_BITS, VALUE_BITS>>(p);                          \
    }
KV_FORMATS(ATTENTION, 64)
KV_FORMATS(ATTENTION, 128)
KV_FORMATS(ATTENTION, 256)
KV_FORMATS(ATTENTION, 512)
