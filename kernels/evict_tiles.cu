// Eviction where tokens far behind are kept in tiles: the kernels of evict.cu that read the cache.
#include "evict.cuh"

#define EVICT_TILES(D, NAME, KEY_BITS, VALUE_BITS) EVICT(D, _##NAME, kv_tiles::KvTile<D, KEY_BITS, VALUE_BITS>)
KV_FORMATS(EVICT_TILES, 64)
KV_FORMATS(EVICT_TILES, 128)
KV_FORMATS(EVICT_TILES, 256)
KV_FORMATS(EVICT_TILES, 512)
