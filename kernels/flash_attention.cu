// Causal attention of a chunk of tokens over the cache, which holds their own keys and values already:
//
//   out[token, head] = sum over s of softmax(q[token, head] . K[s]) V[s], as TokenTiles
//
// where s are the tokens that it sees: all up to position + token, or the last `window` of these; with q scaled by
// rope_tokens. Scores exist as fragments in registers only; sums are f32.
//
// Bound: 4 * head_dim operations for each visible (token, head, s) on the matrix units; for a handful of tokens by the
// cache's bytes. All query heads of a key/value head share what a block loads: the 128 rows of a block (32 where heads
// have 512 values) are 128 / group tokens x group heads.
//
// Grid: (tiles of tokens, head_count_kv, splits); two warpgroups multiply, the warps after them fetch keys and values
// in turn. What the tile's tokens see is cut into equal chunks, one for each split, but none shorter than MIN_CHUNK;
// the block of a tile that ends last adds up the chunks, in order, so the result does not depend on which it was.
#include "attend_chunk.cuh"

// 128 threads fetch.
#define ATTENTION(D)                                                           \
    extern "C" __global__ void __launch_bounds__(CONSUMERS + WARPGROUP, 1)     \
        flash_attention_d##D(const __grid_constant__ FlashAttentionParams p) { \
        attend<D>(p);                                                          \
    }
ATTENTION(64)
ATTENTION(128)
ATTENTION(256)
ATTENTION(512)
