// Attention of one new token, from the products of QKV to the quantized input of the output projection, in one kernel;
// its arithmetic is decode_attention.cuh's.
//
// Bound: 4 * head_dim bytes for each token that is seen and key/value head, each read once: a block serves all query
// heads of its key/value head (8 at most; more take another layer of blocks).
//
// Grid: (head_count_kv, splits, (group + 7) / 8) x 256 threads. What a chunk of the tokens is follows from the position
// in device memory, so the launch is the same for every position. Blocks without a chunk end at once. The block of a
// head that finishes last adds up the chunks, in order, so the result does not depend on which it was.
#include "attend_token.cuh"

extern "C" __global__ void __launch_bounds__(WARPS *WARP, 2)
    decode_attention_d64(const __grid_constant__ DecodeAttentionParams p) {
    attend<64>(p);
}
extern "C" __global__ void __launch_bounds__(WARPS *WARP, 1)
    decode_attention_d128(const __grid_constant__ DecodeAttentionParams p) {
    attend<128>(p);
}
extern "C" __global__ void __launch_bounds__(WARPS *WARP, 1)
    decode_attention_d256(const __grid_constant__ DecodeAttentionParams p) {
    attend<256>(p);
}
extern "C" __global__ void __launch_bounds__(WARPS *WARP, 1)
    decode_attention_d512(const __grid_constant__ DecodeAttentionParams p) {
    attend<512>(p);
}
