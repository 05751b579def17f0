// What crosses from the host to a kernel: each kernel takes exactly one of these structs, by value. The host declares
// the same structs and asserts the same sizes and offsets.
//
// Pointers are device pointers. A shape names the contiguous dimension first. Fields called `unused` make the padding
// explicit; what a launch does not use is null or 0. `type` is ggml's number for a tensor type (types/all.cuh); weights
// lie as types/type.cuh describes, 16-byte aligned.
#pragma once

#include <cuda_fp16.h>
#include <stddef.h>
#include <stdint.h>

#define FIELD(STRUCT, NAME, OFFSET) static_assert(offsetof(STRUCT, NAME) == OFFSET, #STRUCT "." #NAME)

// A vector that matrix-vector products read: for each group of 32 values, 8-bit integers and one scale, value = scale *
// integer with scale = max |value| / 127; and the same values unquantized, for float weights. Lengths are rounded up to
// 64 values; what lies past the vector's own length stays zero.
struct Activation {
    int8_t *q;     // (length rounded up to 64)
    float *scale;  // (length rounded up to 64, / 32)
    float *value;  // (length rounded up to 64)
};
static_assert(sizeof(Activation) == 24, "Activation");
FIELD(Activation, q, 0);
FIELD(Activation, scale, 8);
FIELD(Activation, value, 16);

// embed
struct EmbedParams {
    const uint8_t *weights;  // (columns, vocabulary)
    const int *token;        // (tokens)
    float *x;                // (columns, tokens)
    const float *norm;       // (columns), the first layer's; or null for ones
    Activation next;         // (columns): x * norm, of one token; null for a chunk of tokens
    float *next_squares;     // (columns / 32): sums of x^2, of one token
    int type;
    int columns;  // a multiple of 32
    float scale;  // of the row
    int unused;
};
static_assert(sizeof(EmbedParams) == 80, "EmbedParams");
FIELD(EmbedParams, weights, 0);
FIELD(EmbedParams, token, 8);
FIELD(EmbedParams, x, 16);
FIELD(EmbedParams, norm, 24);
FIELD(EmbedParams, next, 32);
FIELD(EmbedParams, next_squares, 56);
FIELD(EmbedParams, type, 64);
FIELD(EmbedParams, columns, 68);
FIELD(EmbedParams, scale, 72);
FIELD(EmbedParams, unused, 76);

// A matrix of a gemv_* launch.
struct GemvMatrix {
    const uint8_t *weights;  // (columns, rows)
    const float *bias;       // (rows) or null, gemv_store
    float *out;              // (rows), gemv_store and gemv_add
    int type;
    int rows;
    int blocks;  // of the grid that work on it: gemv_store's sum up to the grid, the others' are the grid
    int unused;
};
static_assert(sizeof(GemvMatrix) == 40, "GemvMatrix");
FIELD(GemvMatrix, weights, 0);
FIELD(GemvMatrix, bias, 8);
FIELD(GemvMatrix, out, 16);
FIELD(GemvMatrix, type, 24);
FIELD(GemvMatrix, rows, 28);
FIELD(GemvMatrix, blocks, 32);
FIELD(GemvMatrix, unused, 36);

// gemv_store, gemv_add, gemv_gate
struct GemvParams {
    GemvMatrix matrix[3];  // gemv_store: one to three; gemv_add: one; gemv_gate: gate and up, of as many rows
    Activation a;          // (columns)
    const float *squares;  // (columns / 32): `a` is x * norm weight, these are the sums of x^2, and y is divided by x's
                           // rms; or null
    Activation next;       // (rows): output of gemv_add (x * next_norm) and gemv_gate
    const float *next_norm;  // (rows), gemv_add
    const float *factors;    // (rows), gemv_store of one matrix: what activate(y) is multiplied with; or null: y alone
    float *next_squares;     // (rows / 32), gemv_add: sums of x^2
    float epsilon;
    int columns;
    int ring_bytes;  // of shared memory for each warp's stream of weights
    int gelu;        // GELU in the place of SiLU (activate.cuh)
};
static_assert(sizeof(GemvParams) == 216, "GemvParams");
FIELD(GemvParams, matrix, 0);
FIELD(GemvParams, a, 120);
FIELD(GemvParams, squares, 144);
FIELD(GemvParams, next, 152);
FIELD(GemvParams, next_norm, 176);
FIELD(GemvParams, factors, 184);
FIELD(GemvParams, next_squares, 192);
FIELD(GemvParams, epsilon, 200);
FIELD(GemvParams, columns, 204);
FIELD(GemvParams, ring_bytes, 208);
FIELD(GemvParams, gelu, 212);

// A matrix of a gemm_* launch.
struct GemmMatrix {
    const uint8_t *weights;  // (columns, rows)
    const float *bias;       // (rows) or null
    float *out;              // (out_stride, tokens); with the epilogue Gate unused
    int rows;
    int out_stride;
};
static_assert(sizeof(GemmMatrix) == 32, "GemmMatrix");
FIELD(GemmMatrix, weights, 0);
FIELD(GemmMatrix, bias, 8);
FIELD(GemmMatrix, out, 16);
FIELD(GemmMatrix, rows, 24);
FIELD(GemmMatrix, out_stride, 28);

// gemm_*, gemm_strips_*
struct GemmParams {
    GemmMatrix matrix[3];  // of one type; Gate: gate and up, of as many rows
    const half *x;         // TokenTiles (columns, padded_tokens)
    half *gated;           // Gate: TokenTiles (rows, padded_tokens)
    float *partial;        // split-K workspace: partial sums of what several blocks share
    unsigned *finished;    // split-K workspace: one count for each shared part, zero before the first launch; left zero
    float factor;          // of the products
    int matrices;
    int epilogue;  // 0 Store, 1 Add, 2 Gate
    int tokens;
    int padded_tokens;  // rounded up to a multiple of 8
    int columns;
    int stages;  // token tiles in shared memory
    int gelu;    // Gate: GELU in the place of SiLU (activate.cuh)
};
static_assert(sizeof(GemmParams) == 160, "GemmParams");
FIELD(GemmParams, matrix, 0);
FIELD(GemmParams, x, 96);
FIELD(GemmParams, gated, 104);
FIELD(GemmParams, partial, 112);
FIELD(GemmParams, finished, 120);
FIELD(GemmParams, factor, 128);
FIELD(GemmParams, matrices, 132);
FIELD(GemmParams, epilogue, 136);
FIELD(GemmParams, tokens, 140);
FIELD(GemmParams, padded_tokens, 144);
FIELD(GemmParams, columns, 148);
FIELD(GemmParams, stages, 152);
FIELD(GemmParams, gelu, 156);

// What attention of one token takes of its layer.
struct AttentionLayer {
    const float *q_norm;        // (head_dim) or null
    const float *k_norm;        // (head_dim) or null
    const float *v_norm;        // (head_dim) or null
    const double *frequencies;  // (rope_dims / 2): radians a position
    half *k_cache;              // (head_dim, context, head_count_kv)
    half *v_cache;              // likewise
    float epsilon;
    int context;        // tokens that the cache holds: all, or as a ring the window and the longest chunk
    int group;          // query heads of a key/value head
    int rope_dims;      // leading values of a head that are rotated
    int interleaved;    // pairs are (2i, 2i + 1) rather than (i, i + rope_dims / 2)
    float scale;        // of scores, times log2(e)
    float rope_factor;  // of rotated values
    int window;         // tokens that a token sees, itself included; 0: all before it, too
    float softcap;      // scaled scores s become softcap * tanh(s / softcap): times log2(e); 0: they stay
    int stores;         // 0: the layer has no keys and values of its own, and reads what an earlier one has stored
};
static_assert(sizeof(AttentionLayer) == 88, "AttentionLayer");
FIELD(AttentionLayer, q_norm, 0);
FIELD(AttentionLayer, k_norm, 8);
FIELD(AttentionLayer, v_norm, 16);
FIELD(AttentionLayer, frequencies, 24);
FIELD(AttentionLayer, k_cache, 32);
FIELD(AttentionLayer, v_cache, 40);
FIELD(AttentionLayer, epsilon, 48);
FIELD(AttentionLayer, context, 52);
FIELD(AttentionLayer, group, 56);
FIELD(AttentionLayer, rope_dims, 60);
FIELD(AttentionLayer, interleaved, 64);
FIELD(AttentionLayer, scale, 68);
FIELD(AttentionLayer, rope_factor, 72);
FIELD(AttentionLayer, window, 76);
FIELD(AttentionLayer, softcap, 80);
FIELD(AttentionLayer, stores, 84);

// Of a layer whose older tokens are kept in tiles (kv_tiles.cuh); zeros where there are none.
struct KvTiles {
    uint8_t *records;     // (records, tiles, head_count_kv)
    uint64_t head_bytes;  // of a head's records
    half *sinks;          // (head_dim, SINKS, 2, head_count_kv): the first tokens' keys, and their values
};
static_assert(sizeof(KvTiles) == 24, "KvTiles");
FIELD(KvTiles, records, 0);
FIELD(KvTiles, head_bytes, 8);
FIELD(KvTiles, sinks, 16);

// decode_attention_*
struct DecodeAttentionParams {
    const float *q;  // (head_count * head_dim)
    const float *k;  // (head_count_kv * head_dim); null where the layer stores nothing
    const float *v;  // likewise
    AttentionLayer layer;
    const int *position;  // of the new token in the text
    const int *place;     // of it among those that are cached
    float *partial;       // scratch: (head_dim + 4, head_count, splits)
    unsigned *finished;   // scratch: (head_count_kv * blocks along z), zero before the first launch; left zero
    Activation out;       // (head_count * head_dim)
    KvTiles tiles;
    int tile_ring;   // where in shared memory the rings of tiles begin, in bytes
    int tile_depth;  // places of each
};
static_assert(sizeof(DecodeAttentionParams) == 200, "DecodeAttentionParams");
FIELD(DecodeAttentionParams, q, 0);
FIELD(DecodeAttentionParams, k, 8);
FIELD(DecodeAttentionParams, v, 16);
FIELD(DecodeAttentionParams, layer, 24);
FIELD(DecodeAttentionParams, position, 112);
FIELD(DecodeAttentionParams, place, 120);
FIELD(DecodeAttentionParams, partial, 128);
FIELD(DecodeAttentionParams, finished, 136);
FIELD(DecodeAttentionParams, out, 144);
FIELD(DecodeAttentionParams, tiles, 168);
FIELD(DecodeAttentionParams, tile_ring, 192);
FIELD(DecodeAttentionParams, tile_depth, 196);

// rope_tokens_*
struct RopeParams {
    const float *q;             // (head_count * head_dim, tokens)
    const float *k;             // (head_count_kv * head_dim, tokens); null where the layer stores nothing
    const float *v;             // likewise
    const float *q_norm;        // (head_dim) or null
    const float *k_norm;        // (head_dim) or null
    const float *v_norm;        // (head_dim) or null
    const double *frequencies;  // (rope_dims / 2): radians a position
    half *q_out;                // (head_dim, head_count, tokens), times scale
    half *k_cache;              // (head_dim, context, head_count_kv), of this layer
    half *v_cache;              // likewise
    const int *position;        // of the first token in the text
    const int *place;           // of it among those that are cached
    float epsilon;
    int context;  // tokens that the cache holds: all, or as a ring the window and the chunk
    int head_count;
    int head_count_kv;
    int rope_dims;      // leading values of a head that are rotated
    int interleaved;    // pairs are (2i, 2i + 1) rather than (i, i + rope_dims / 2)
    float scale;        // of scores, times log2(e)
    float rope_factor;  // of rotated values
    int stores;         // 0: the layer has no keys and values of its own, and only queries are rotated
    int compressed;     // all are rotated by a Hadamard transform, too (kv_tiles.cuh)
};
static_assert(sizeof(RopeParams) == 136, "RopeParams");
FIELD(RopeParams, q, 0);
FIELD(RopeParams, k, 8);
FIELD(RopeParams, v, 16);
FIELD(RopeParams, q_norm, 24);
FIELD(RopeParams, k_norm, 32);
FIELD(RopeParams, v_norm, 40);
FIELD(RopeParams, frequencies, 48);
FIELD(RopeParams, q_out, 56);
FIELD(RopeParams, k_cache, 64);
FIELD(RopeParams, v_cache, 72);
FIELD(RopeParams, position, 80);
FIELD(RopeParams, place, 88);
FIELD(RopeParams, epsilon, 96);
FIELD(RopeParams, context, 100);
FIELD(RopeParams, head_count, 104);
FIELD(RopeParams, head_count_kv, 108);
FIELD(RopeParams, rope_dims, 112);
FIELD(RopeParams, interleaved, 116);
FIELD(RopeParams, scale, 120);
FIELD(RopeParams, rope_factor, 124);
FIELD(RopeParams, stores, 128);
FIELD(RopeParams, compressed, 132);

// flash_attention_*
struct FlashAttentionParams {
    const half *q;        // (head_dim, head_count, tokens), from rope_tokens
    const half *k_cache;  // (head_dim, context, head_count_kv), of this layer
    const half *v_cache;  // likewise
    half *out;            // TokenTiles (head_count * head_dim, padded_tokens)
    const int *place;     // of the first token among those that are cached
    float *partial;       // scratch: (head_dim + 2, rows, splits, head_count_kv, tiles); unused with one split
    unsigned *finished;   // scratch: (head_count_kv * tiles), zero before the first launch; left zero
    int tokens;
    int padded_tokens;  // rounded up to a multiple of 8
    int context;        // tokens that the cache holds: all, or, as a ring, a multiple of 128
    int group;          // query heads of a key/value head; at most a block's rows
    int window;         // tokens that a token sees, itself included; 0: all before it, too
    float softcap;      // scaled scores s become softcap * tanh(s / softcap): times log2(e); 0: they stay
    KvTiles tiles;
    int tile_ring;   // where in shared memory the ring of tiles' codes begins, in bytes
    int tile_depth;  // its places
};
static_assert(sizeof(FlashAttentionParams) == 112, "FlashAttentionParams");
FIELD(FlashAttentionParams, q, 0);
FIELD(FlashAttentionParams, k_cache, 8);
FIELD(FlashAttentionParams, v_cache, 16);
FIELD(FlashAttentionParams, out, 24);
FIELD(FlashAttentionParams, place, 32);
FIELD(FlashAttentionParams, partial, 40);
FIELD(FlashAttentionParams, finished, 48);
FIELD(FlashAttentionParams, tokens, 56);
FIELD(FlashAttentionParams, padded_tokens, 60);
FIELD(FlashAttentionParams, context, 64);
FIELD(FlashAttentionParams, group, 68);
FIELD(FlashAttentionParams, window, 72);
FIELD(FlashAttentionParams, softcap, 76);
FIELD(FlashAttentionParams, tiles, 80);
FIELD(FlashAttentionParams, tile_ring, 104);
FIELD(FlashAttentionParams, tile_depth, 108);

// A layer of compress_tiles_*.
struct CompressedLayer {
    const half *k_cache;  // (head_dim, context, head_count_kv)
    const half *v_cache;  // likewise
    KvTiles tiles;
    int context;
    int unused;
};
static_assert(sizeof(CompressedLayer) == 48, "CompressedLayer");
FIELD(CompressedLayer, k_cache, 0);
FIELD(CompressedLayer, v_cache, 8);
FIELD(CompressedLayer, tiles, 16);
FIELD(CompressedLayer, context, 40);
FIELD(CompressedLayer, unused, 44);

// compress_tiles_*
struct CompressTilesParams {
    const CompressedLayer *layers;
    const int *place;  // of the first new token
    int tokens;        // that are new
    int unused;
};
static_assert(sizeof(CompressTilesParams) == 24, "CompressTilesParams");
FIELD(CompressTilesParams, layers, 0);
FIELD(CompressTilesParams, place, 8);
FIELD(CompressTilesParams, tokens, 16);
FIELD(CompressTilesParams, unused, 20);

// copy_tokens
struct CopyTokensParams {
    const half *k_from;  // (head_dim, from_context, head_count_kv), a ring
    const half *v_from;  // likewise
    half *k_to;          // (head_dim, to_context, head_count_kv), a ring
    half *v_to;          // likewise
    const int *place;    // of a chunk's first token
    int from_context;
    int to_context;
    int head_dim;
    int tokens;  // of the chunk, the last of which are copied; 0: those before it that it sees as they were stored
};
static_assert(sizeof(CopyTokensParams) == 56, "CopyTokensParams");
FIELD(CopyTokensParams, k_from, 0);
FIELD(CopyTokensParams, v_from, 8);
FIELD(CopyTokensParams, k_to, 16);
FIELD(CopyTokensParams, v_to, 24);
FIELD(CopyTokensParams, place, 32);
FIELD(CopyTokensParams, from_context, 40);
FIELD(CopyTokensParams, to_context, 44);
FIELD(CopyTokensParams, head_dim, 48);
FIELD(CopyTokensParams, tokens, 52);

// evict_observe_*, evict_join, evict_weigh_*, evict_norms_*, evict_select
struct EvictParams {
    const half *q;        // (head_dim, head_count, tokens), from rope_tokens
    const half *k_cache;  // (head_dim, context, head_count_kv), of this layer
    const half *v_cache;  // likewise
    KvTiles tiles;
    const half *grams;  // (head_dim, head_dim, head_count): of what a head's values are multiplied with, symmetric
    float *partial;     // scratch: (2, OBSERVERS, head_count, blocks)
    float *levels;      // scratch: (OBSERVERS, head_count)
    float *importance;  // scratch: (places, head_count)
    float *norms;       // scratch: (places, head_count)
    float *sums;        // scratch: (blocks, head_count), of importance
    float *scores;      // scratch: (places, head_count_kv)
    int *kept;          // (budget, head_count_kv): the places, ascending
    int tokens;         // of the chunk, the last of which observe
    int places;         // of all tokens that are cached, the chunk's included
    int context;        // tokens that the cache holds: all, or as a ring those that are not in tiles
    int group;          // query heads of a key/value head; at most 128
    float softcap;      // scaled scores s become softcap * tanh(s / softcap): times log2(e); 0: they stay
    int budget;         // places that are kept: fewer than there are, more than those that are kept in any case
    int blocks;         // of places
    int unused;
};
static_assert(sizeof(EvictParams) == 144, "EvictParams");
FIELD(EvictParams, q, 0);
FIELD(EvictParams, k_cache, 8);
FIELD(EvictParams, v_cache, 16);
FIELD(EvictParams, tiles, 24);
FIELD(EvictParams, grams, 48);
FIELD(EvictParams, partial, 56);
FIELD(EvictParams, levels, 64);
FIELD(EvictParams, importance, 72);
FIELD(EvictParams, norms, 80);
FIELD(EvictParams, sums, 88);
FIELD(EvictParams, scores, 96);
FIELD(EvictParams, kept, 104);
FIELD(EvictParams, tokens, 112);
FIELD(EvictParams, places, 116);
FIELD(EvictParams, context, 120);
FIELD(EvictParams, group, 124);
FIELD(EvictParams, softcap, 128);
FIELD(EvictParams, budget, 132);
FIELD(EvictParams, blocks, 136);
FIELD(EvictParams, unused, 140);

// evict_gather_*
struct GatherKeptParams {
    const half *k_from;  // (head_dim, context, head_count_kv), a ring
    const half *v_from;  // likewise
    half *k_to;  // (head_dim, to_context, head_count_kv), a ring; or where all are as they were stored, and have
                 // room, k_from: by one block along places
    half *v_to;  // likewise
    KvTiles tiles;
    const int *kept;  // (budget, head_count_kv)
    int context;
    int to_context;
    int budget;
    int places;  // of all tokens that are cached
    int first;   // new place
    int count;   // of them
};
static_assert(sizeof(GatherKeptParams) == 88, "GatherKeptParams");
FIELD(GatherKeptParams, k_from, 0);
FIELD(GatherKeptParams, v_from, 8);
FIELD(GatherKeptParams, k_to, 16);
FIELD(GatherKeptParams, v_to, 24);
FIELD(GatherKeptParams, tiles, 32);
FIELD(GatherKeptParams, kept, 56);
FIELD(GatherKeptParams, context, 64);
FIELD(GatherKeptParams, to_context, 68);
FIELD(GatherKeptParams, budget, 72);
FIELD(GatherKeptParams, places, 76);
FIELD(GatherKeptParams, first, 80);
FIELD(GatherKeptParams, count, 84);

// norm_tokens
struct NormParams {
    const float *x;       // (columns, tokens)
    const float *weight;  // (columns), or null for ones
    half *out;            // TokenTiles (columns, padded_tokens)
    float *rms;           // (tokens): what each token was divided by; or null
    float epsilon;
    int columns;
    int padded_tokens;  // rounded up to a multiple of 8
    int unused;
};
static_assert(sizeof(NormParams) == 48, "NormParams");
FIELD(NormParams, x, 0);
FIELD(NormParams, weight, 8);
FIELD(NormParams, out, 16);
FIELD(NormParams, rms, 24);
FIELD(NormParams, epsilon, 32);
FIELD(NormParams, columns, 36);
FIELD(NormParams, padded_tokens, 40);
FIELD(NormParams, unused, 44);

// add_branch_tokens
struct AddBranchTokensParams {
    float *x;             // (columns, tokens)
    const float *branch;  // (columns, tokens)
    const float *norm;    // (columns) or null
    float epsilon;
    float factor;  // of the branch, before its norm
    float scale;   // of the sum
    int columns;
};
static_assert(sizeof(AddBranchTokensParams) == 40, "AddBranchTokensParams");
FIELD(AddBranchTokensParams, x, 0);
FIELD(AddBranchTokensParams, branch, 8);
FIELD(AddBranchTokensParams, norm, 16);
FIELD(AddBranchTokensParams, epsilon, 24);
FIELD(AddBranchTokensParams, factor, 28);
FIELD(AddBranchTokensParams, scale, 32);
FIELD(AddBranchTokensParams, columns, 36);

// add_branch
struct AddBranchParams {
    float *x;                // (columns)
    const float *branch;     // (columns), or null where nothing is to be added
    const float *norm;       // (columns) or null
    const float *next_norm;  // (columns), or null for ones
    Activation next;         // (columns): x * next_norm
    float *next_squares;     // (columns / 32): sums of x^2
    float epsilon;
    float scale;  // of the sum
    int columns;  // a multiple of 32
    int unused;
};
static_assert(sizeof(AddBranchParams) == 80, "AddBranchParams");
FIELD(AddBranchParams, x, 0);
FIELD(AddBranchParams, branch, 8);
FIELD(AddBranchParams, norm, 16);
FIELD(AddBranchParams, next_norm, 24);
FIELD(AddBranchParams, next, 32);
FIELD(AddBranchParams, next_squares, 56);
FIELD(AddBranchParams, epsilon, 64);
FIELD(AddBranchParams, scale, 68);
FIELD(AddBranchParams, columns, 72);
FIELD(AddBranchParams, unused, 76);

// token_inputs
struct TokenInputsParams {
    const uint8_t *table;  // (width * layers, vocabulary)
    const int *token;      // (tokens)
    float *projected;      // (width * layers, tokens): the projection's product; becomes the inputs
    const float *rms;      // (tokens): a factor of each token's projection; or null
    const float *norm;     // (width)
    float row_scale, projection_scale, sum_scale;
    float epsilon;
    int type;
    int width;
};
static_assert(sizeof(TokenInputsParams) == 64, "TokenInputsParams");
FIELD(TokenInputsParams, table, 0);
FIELD(TokenInputsParams, token, 8);
FIELD(TokenInputsParams, projected, 16);
FIELD(TokenInputsParams, rms, 24);
FIELD(TokenInputsParams, norm, 32);
FIELD(TokenInputsParams, row_scale, 40);
FIELD(TokenInputsParams, projection_scale, 44);
FIELD(TokenInputsParams, sum_scale, 48);
FIELD(TokenInputsParams, epsilon, 52);
FIELD(TokenInputsParams, type, 56);
FIELD(TokenInputsParams, width, 60);

// finish_logits
struct FinishLogitsParams {
    float *logits;          // (vocabulary, tokens)
    const int *suppressed;  // (suppressed_count)
    float softcap;          // 0 for none
    float suppressed_logit;
    int vocabulary;
    int suppressed_count;
};
static_assert(sizeof(FinishLogitsParams) == 32, "FinishLogitsParams");
FIELD(FinishLogitsParams, logits, 0);
FIELD(FinishLogitsParams, suppressed, 8);
FIELD(FinishLogitsParams, softcap, 16);
FIELD(FinishLogitsParams, suppressed_logit, 20);
FIELD(FinishLogitsParams, vocabulary, 24);
FIELD(FinishLogitsParams, suppressed_count, 28);

// How choose_* choose; lies in device memory, since it changes from text to text and launches do not.
struct ChoiceSettings {
    float temperature;
    int top_k;  // 1 to 64; 0 takes the likeliest token
    float top_p;
    float min_p;
    float repeat_penalty;
    float presence_penalty;
    float frequency_penalty;
    int repeat_last_n;  // tokens of the text that are counted; 0 where penalties are off
    int adjusts;        // whether `counts` changes any logit
};
static_assert(sizeof(ChoiceSettings) == 36, "ChoiceSettings");
FIELD(ChoiceSettings, temperature, 0);
FIELD(ChoiceSettings, top_k, 4);
FIELD(ChoiceSettings, top_p, 8);
FIELD(ChoiceSettings, min_p, 12);
FIELD(ChoiceSettings, repeat_penalty, 16);
FIELD(ChoiceSettings, presence_penalty, 20);
FIELD(ChoiceSettings, frequency_penalty, 24);
FIELD(ChoiceSettings, repeat_last_n, 28);
FIELD(ChoiceSettings, adjusts, 32);

// choose_best, choose_token
struct ChooseParams {
    const float *logits;  // (vocabulary)
    const ChoiceSettings *settings;
    uint32_t *counts;        // (vocabulary): of the last repeat_last_n tokens; the highest bit bans
    uint64_t *lists;         // (64, vocabulary / 1024 rounded up): the best keys of each block
    int *inputs;             // the token that was computed, its position and place; then the chosen one and its own
    const double *uniforms;  // (context + 1), in the host's memory: from 0 to below 1, by place in the text
    int *text;               // (context + 1), in the host's memory: tokens; -1 where logits are no numbers
    const uint32_t
        *allowed;    // (vocabulary / 32 rounded up), in the host's memory, or null: a bit for each token that may be
    int vocabulary;  // at most 1024 * 1024
    int unused;
};
static_assert(sizeof(ChooseParams) == 72, "ChooseParams");
FIELD(ChooseParams, logits, 0);
FIELD(ChooseParams, settings, 8);
FIELD(ChooseParams, counts, 16);
FIELD(ChooseParams, lists, 24);
FIELD(ChooseParams, inputs, 32);
FIELD(ChooseParams, uniforms, 40);
FIELD(ChooseParams, text, 48);
FIELD(ChooseParams, allowed, 56);
FIELD(ChooseParams, vocabulary, 64);
FIELD(ChooseParams, unused, 68);

// A block's share of a matrix in a product of the step kernel: row pairs, one after another. Their tiles are entries of
// the ring, `entry_tiles` at a time.
struct StepMatrix {
    const uint8_t *weights;  // (columns, rows)
    const float *bias;       // (rows) or null
    int type;
    int pairs;
    int rows;         // that the matrix has of them
    int first_row;    // where the first one is in the stage's output
    int bytes;        // of all tiles
    int entry_tiles;  // of floats, rows; 0 where two rows are longer than an entry
    int entry_bytes;  // of so many tiles, each as long as the first one; or of such a row
    int lacking;      // what the last tile of each pair has less than that, in bytes
};
static_assert(sizeof(StepMatrix) == 48, "StepMatrix");
FIELD(StepMatrix, weights, 0);
FIELD(StepMatrix, bias, 8);
FIELD(StepMatrix, type, 16);
FIELD(StepMatrix, pairs, 20);
FIELD(StepMatrix, rows, 24);
FIELD(StepMatrix, first_row, 28);
FIELD(StepMatrix, bytes, 32);
FIELD(StepMatrix, entry_tiles, 36);
FIELD(StepMatrix, entry_bytes, 40);
FIELD(StepMatrix, lacking, 44);

// A stage of the step kernel but attention, as one block does it: the embedding, or a product and what follows it.
struct StepProduct {
    int kind;  // StepKind
    int columns;
    int matrices;
    float factor;              // Embed: of the row; else the norm's epsilon
    const float *norm;         // Embed (columns), Add (all_rows): weights of the next norm; null where there is none
    int rows;                  // of all matrices' row pairs
    int floats;                // whether a matrix is of floats
    StepMatrix matrix[3];      // Embed: the table, its share being of the columns; Gate: gate and up; Qkv: up to three
    int slices;                // into which quantized rows are cut
    uint32_t slices_inverse;   // 2^32 / slices, rounded up
    int gelu;                  // Gate, GateInputs: GELU in the place of SiLU (activate.cuh)
    float scale;               // Add: of the sum
    const float *branch_norm;  // (all_rows), Add: weights of the norm of what is added; or null
    float branch_epsilon;
    int all_rows;         // Add and Gate: of all blocks together
    const float *inputs;  // (all rows), GateInputs: what is gated
    // Where in dynamic shared memory, in bytes, lies what a product takes behind its vector:
    int squares;      // float (3, groups): of a norm's vector, the squares of what it was made of, and padding
    int unquantized;  // float (columns): where a matrix is of floats
    int row_sums;     // float (rows, slices)
    int plain;        // whether the vector comes as plain values, at StepParams::qkv
    int unused[2];
};
static_assert(sizeof(StepProduct) == 240, "StepProduct");
FIELD(StepProduct, kind, 0);
FIELD(StepProduct, columns, 4);
FIELD(StepProduct, matrices, 8);
FIELD(StepProduct, factor, 12);
FIELD(StepProduct, norm, 16);
FIELD(StepProduct, rows, 24);
FIELD(StepProduct, floats, 28);
FIELD(StepProduct, matrix, 32);
FIELD(StepProduct, slices, 176);
FIELD(StepProduct, slices_inverse, 180);
FIELD(StepProduct, gelu, 184);
FIELD(StepProduct, scale, 188);
FIELD(StepProduct, branch_norm, 192);
FIELD(StepProduct, branch_epsilon, 200);
FIELD(StepProduct, all_rows, 204);
FIELD(StepProduct, inputs, 208);
FIELD(StepProduct, squares, 216);
FIELD(StepProduct, unquantized, 220);
FIELD(StepProduct, row_sums, 224);
FIELD(StepProduct, plain, 228);
FIELD(StepProduct, unused, 232);

// Attention as a stage of the step kernel.
struct StepAttention {
    int kind;             // StepKind
    int values_are_keys;  // before their norms: they have no product of their own
    AttentionLayer layer;
    uint64_t *newest;  // (head_dim, head_count_kv, 2): packets of the newest token's key and value, where layers share
                       // them: of the layer that stores them, and those that read them; else null
    int newest_age;    // stages since it stored them
    int heads;         // of StepParams::heads
    KvTiles tiles;     // step_*_k4v4 and its like
    uint64_t padding[13];
};
static_assert(sizeof(StepAttention) == 240, "StepAttention");
FIELD(StepAttention, kind, 0);
FIELD(StepAttention, values_are_keys, 4);
FIELD(StepAttention, layer, 8);
FIELD(StepAttention, newest, 96);
FIELD(StepAttention, newest_age, 104);
FIELD(StepAttention, heads, 108);
FIELD(StepAttention, tiles, 112);
FIELD(StepAttention, padding, 136);

// A vector between two stages of the step kernel, as packets of it that carry an epoch (step/packet.cuh).
struct StepVector {
    uint4 *groups;     // (4, length / 32): quantized
    uint64_t *values;  // (length): unquantized, for float weights; null where no matrix has any
};
static_assert(sizeof(StepVector) == 16, "StepVector");
FIELD(StepVector, groups, 0);
FIELD(StepVector, values, 8);

// What layers of the step kernel have in common that share their jobs of attention.
struct StepHeads {
    int head_dim;  // 0 where there are no such layers
    int head_count_kv;
    int group;   // query heads of a key/value head
    int splits;  // pieces of what a token sees that are worked on side by side, at most
    int window;  // as AttentionLayer::window
};
static_assert(sizeof(StepHeads) == 20, "StepHeads");
FIELD(StepHeads, head_dim, 0);
FIELD(StepHeads, head_count_kv, 4);
FIELD(StepHeads, group, 8);
FIELD(StepHeads, splits, 12);
FIELD(StepHeads, window, 16);
constexpr int HEAD_KINDS = 2;

// step_*
struct StepParams {
    const StepProduct *stages;  // (grid, stage_count): or StepAttention, of the same size
    unsigned *epochs;           // (grid): the same in each; zero before the first launch, as are all packets
    const int *inputs;          // the token, its position and its place
    StepVector normed;          // (hidden_size): x times the next norm's weights
    StepVector activation;      // (the widest): of what the heads gathered, and what was gated
    uint64_t *qkv;              // (rows of Q, K and V, or of gated inputs): packets of one value
    uint64_t *partial;          // (head_dim, head_count, splits): packets of one value
    uint4 *partial_sums;        // (head_count, splits): packets of the greatest score and the sum of exponentials
    float *logits;              // (vocabulary)
    uint64_t *branch_squares;   // (hidden_size / 32): packets of a branch's sums of squares
    uint64_t *spill;            // (rows of what is quantized): packets of rows whose group another block owns
    uint64_t *failure;          // in the host's memory: what a block waited for in vain; see step/packet.cuh
    int stage_count;
    int slots;               // of the ring
    uint32_t slots_inverse;  // 2^32 / slots, rounded up
    int in_flight;           // entries of the ring that are asked for and have not come, at most
    // Where in dynamic shared memory, in bytes, lie
    int hidden;     // float (rows): the block's part of the residual stream
    int attention;  // AttentionMemory, where products have what follows
    int vector;     // uint32_t (9, groups): the vector that a product reads, integers and scale of each group
    int unused;
    StepHeads heads[HEAD_KINDS];
};
static_assert(sizeof(StepParams) == 184, "StepParams");
FIELD(StepParams, stages, 0);
FIELD(StepParams, epochs, 8);
FIELD(StepParams, inputs, 16);
FIELD(StepParams, normed, 24);
FIELD(StepParams, activation, 40);
FIELD(StepParams, qkv, 56);
FIELD(StepParams, partial, 64);
FIELD(StepParams, partial_sums, 72);
FIELD(StepParams, logits, 80);
FIELD(StepParams, branch_squares, 88);
FIELD(StepParams, spill, 96);
FIELD(StepParams, failure, 104);
FIELD(StepParams, stage_count, 112);
FIELD(StepParams, slots, 116);
FIELD(StepParams, slots_inverse, 120);
FIELD(StepParams, in_flight, 124);
FIELD(StepParams, hidden, 128);
FIELD(StepParams, attention, 132);
FIELD(StepParams, vector, 136);
FIELD(StepParams, unused, 140);
FIELD(StepParams, heads, 144);

// gate_tokens
struct GateParams {
    const float *gate;  // (columns, tokens)
    const float *up;    // (up_stride, tokens), of which columns count
    const float *rms;   // (tokens): a factor of each token's gate; or null
    half *out;          // TokenTiles (columns, padded_tokens)
    float factor;
    int columns;
    int up_stride;
    int padded_tokens;  // rounded up to a multiple of 8
    int gelu;           // GELU in the place of SiLU (activate.cuh)
    int unused;
};
static_assert(sizeof(GateParams) == 56, "GateParams");
FIELD(GateParams, gate, 0);
FIELD(GateParams, up, 8);
FIELD(GateParams, rms, 16);
FIELD(GateParams, out, 24);
FIELD(GateParams, factor, 32);
FIELD(GateParams, columns, 36);
FIELD(GateParams, up_stride, 40);
FIELD(GateParams, padded_tokens, 44);
FIELD(GateParams, gelu, 48);
FIELD(GateParams, unused, 52);

// gate_token
struct GateTokenParams {
    const float *gate;  // (columns)
    const float *up;    // (columns)
    Activation out;     // (columns)
    int columns;
    int gelu;  // GELU in the place of SiLU (activate.cuh)
};
static_assert(sizeof(GateTokenParams) == 48, "GateTokenParams");
FIELD(GateTokenParams, gate, 0);
FIELD(GateTokenParams, up, 8);
FIELD(GateTokenParams, out, 16);
FIELD(GateTokenParams, columns, 40);
FIELD(GateTokenParams, gelu, 44);

// float_to_half
struct ConvertParams {
    const uint8_t *weights;  // (columns, rows), F32 or BF16
    half *out;               // (columns, rows) as F16: rows filled up to a multiple of 16 bytes
    int type;
    int columns;
};
static_assert(sizeof(ConvertParams) == 24, "ConvertParams");
FIELD(ConvertParams, weights, 0);
FIELD(ConvertParams, out, 8);
FIELD(ConvertParams, type, 16);
FIELD(ConvertParams, columns, 20);

// repack
struct RepackParams {
    const uint8_t *in;  // rows row_begin .. row_begin + row_count of a matrix: their blocks as in the file
    uint8_t *out;       // the whole matrix, as types/type.cuh describes
    int type;
    int matrix_rows;
    int columns;
    int row_begin;
    int row_count;
    int unused;
};
static_assert(sizeof(RepackParams) == 40, "RepackParams");
FIELD(RepackParams, in, 0);
FIELD(RepackParams, out, 8);
FIELD(RepackParams, type, 16);
FIELD(RepackParams, matrix_rows, 20);
FIELD(RepackParams, columns, 24);
FIELD(RepackParams, row_begin, 28);
FIELD(RepackParams, row_count, 32);
FIELD(RepackParams, unused, 36);

// read_all
struct ReadParams {
    const uint4 *from;  // (count)
    size_t count;
    uint32_t *sum;
};
static_assert(sizeof(ReadParams) == 24, "ReadParams");
FIELD(ReadParams, from, 0);
FIELD(ReadParams, count, 8);
FIELD(ReadParams, sum, 16);

#undef FIELD
