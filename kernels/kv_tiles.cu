// What a compressed KV cache does besides attention:
//
//   compress_tiles   keys and values of whole tiles become records (kv_tiles.cuh); of tile 0 the sinks are kept, too
//   copy_tokens      between a layer's ring and the buffer of a chunk of a prompt, which all layers share
//
// Bound: bytes. compress_tiles has a block for each key/value head and tile that the new tokens could end; those
// without one end at once: so a decoded token's launch, a block for each key/value head of every layer, is the same for
// every place.
#include "kv_cache.cuh"
#include "kv_tiles.cuh"

namespace {

using namespace kv_tiles;

constexpr int THREADS = 256;

struct Group {
    half scale, zero;

    template <int BITS>
    __device__ static __forceinline__ Group of(float least, float greatest) {
        return {__float2half_rn(__fdiv_rn(greatest - least, GREATEST<BITS>)), __float2half_rn(least)};
    }
    template <int BITS>
    __device__ __forceinline__ uint32_t code(half number) const {
        const float by = __half2float(scale);
        if (by == 0.f) return 0;
        const float code = rintf(__fdiv_rn(__half2float(number) - __half2float(zero), by));
        return static_cast<uint32_t>(fminf(fmaxf(code, 0.f), GREATEST<BITS>));
    }
};

// Eight values of a token.
struct Eight {
    half value[8];

    __device__ __forceinline__ explicit Eight(const half *from) {
        *reinterpret_cast<uint4 *>(value) = __ldcg(reinterpret_cast<const uint4 *>(from));
    }
};

// Makes a record of the tokens whose keys and values begin at `keys` and `values`, (D, TILE). `first`: those before it
// count for nothing.
template <int D, int KEY_BITS, int VALUE_BITS>
__device__ __forceinline__ void compress(const half *keys, const half *values, int first, uint8_t *record) {
    using Tile = KvTile<D, KEY_BITS, VALUE_BITS>;
    constexpr int GROUPS = TILE / KEY_GROUP, OCTETS = D / 8;
    __shared__ Group key_groups[GROUPS][D], value_groups[TILE];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    for (int i = threadIdx.x; i < GROUPS * D; i += THREADS) {
        const int group = i / D, channel = i % D;
        float least = INFINITY, greatest = -INFINITY;
#pragma unroll 8
        for (int token = group * KEY_GROUP; token < (group + 1) * KEY_GROUP; token++) {
            if (token < first) continue;
            const float number = __half2float(keys[token * D + channel]);
            least = fminf(least, number), greatest = fmaxf(greatest, number);
        }
        key_groups[group][channel] = Group::of<KEY_BITS>(least, greatest);
    }
    for (int token = warp; token < TILE; token += THREADS / WARP) {
        float least = INFINITY, greatest = -INFINITY;
#pragma unroll
        for (int i = 0; i < D / WARP; i++) {
            const float number = __half2float(values[token * D + i * WARP + lane]);
            least = fminf(least, number), greatest = fmaxf(greatest, number);
        }
        least = -warp_max(-least), greatest = warp_max(greatest);
        if (lane == 0) value_groups[token] = Group::of<VALUE_BITS>(least, greatest);
    }
    __syncthreads();

    for (int i = threadIdx.x; i < GROUPS * D; i += THREADS) {
        const int group = i / D, channel = i % D;
        half *to = reinterpret_cast<half *>(record + Tile::key_groups_at(group * (KEY_GROUP / STEP), channel / 8));
        to[channel % 8] = key_groups[group][channel].scale;
        to[8 + channel % 8] = key_groups[group][channel].zero;
    }
    for (int token = threadIdx.x; token < TILE; token += THREADS) {
        reinterpret_cast<Group *>(record + Tile::value_groups)[token] = value_groups[token];
    }
    const auto store = [&](int at, uint32_t word) { *reinterpret_cast<uint32_t *>(record + at) = word; };
    // A warp has one piece of each lane's, of all in a step.
    constexpr int PART_OCTETS = Tile::part / 8;
    for (int i = warp; i < STEPS * OCTETS * STEP / WARP; i += THREADS / WARP) {
        const int step = i / (OCTETS * STEP / WARP), piece = i % (OCTETS * STEP / WARP);
        const int part = piece / (PART_OCTETS / 2), in_part = piece % (PART_OCTETS / 2);
        const int j = in_part / (PART_OCTETS / 4), c = in_part % (PART_OCTETS / 4);
        const int octet = part * PART_OCTETS + 4 * c + lane % 4, token = step * STEP + j * 8 + lane / 4;
        const Eight from(keys + token * D + octet * 8);
        uint32_t words[KEY_WORDS<KEY_BITS>] = {};
#pragma unroll
        for (int d = 0; d < 8; d++) {
            const Group &group = key_groups[token / KEY_GROUP][octet * 8 + d];
            add_key<KEY_BITS>(words, d, group.template code<KEY_BITS>(from.value[d]));
        }
#pragma unroll
        for (int w = 0; w < KEY_WORDS<KEY_BITS>; w++) {
            store(Tile::keys_at(part, step) + Tile::key_word_at(in_part * KEY_WORDS<KEY_BITS> + w, lane), words[w]);
        }
    }
    for (int i = warp; i < STEPS * OCTETS / 8; i += THREADS / WARP) {
        const int step = i / (OCTETS / 8), part = i % (OCTETS / 8) / (PART_OCTETS / 8), c = i % (PART_OCTETS / 8);
        const int octet = part * PART_OCTETS + 8 * c + lane / 4;
        uint32_t words[VALUE_WORDS<VALUE_BITS>] = {};
#pragma unroll
        for (int later = 0; later < 2; later++) {
#pragma unroll
            for (int odd = 0; odd < 2; odd++) {
                const int token = step * STEP + later * 8 + lane % 4 * 2 + odd;
                const Eight from(values + token * D + octet * 8);
#pragma unroll
                for (int d = 0; d < 8; d++) {
                    const uint32_t code = value_groups[token].template code<VALUE_BITS>(from.value[d]);
                    add_value<VALUE_BITS>(words, later, odd, d, code);
                }
            }
        }
#pragma unroll
        for (int w = 0; w < VALUE_WORDS<VALUE_BITS>; w++) {
            store(Tile::values_at(part, step) + Tile::value_word_at(c * VALUE_WORDS<VALUE_BITS> + w, lane), words[w]);
        }
    }
}

template <int D, int KEY_BITS, int VALUE_BITS>
__device__ __forceinline__ void compress_tiles(const CompressTilesParams &p) {
    wait_for_predecessor();
    launch_dependents();
    const int place = *p.place, tile = place / TILE + blockIdx.y, head = blockIdx.x;
    if ((tile + 1) * TILE > place + p.tokens) return;
    const CompressedLayer &layer = p.layers[blockIdx.z];
    const size_t row = KvCache<D>::row(head, KvCache<D>::slot_of(tile * TILE, layer.context), layer.context);
    const half *keys = layer.k_cache + row * D, *values = layer.v_cache + row * D;
    uint8_t *record = layer.tiles.records + head * layer.tiles.head_bytes;
    compress<D, KEY_BITS, VALUE_BITS>(keys, values, tile == 0 ? SINKS : 0,
                                      record + size_t(tile) * KvTile<D, KEY_BITS, VALUE_BITS>::bytes);
    if (tile > 0) return;
    half *sinks = layer.tiles.sinks + head * (2 * SINKS * D);
    for (int i = threadIdx.x; i < SINKS * D; i += THREADS) {
        sinks[i] = keys[i];
        sinks[SINKS * D + i] = values[i];
    }
}

}  // namespace

// Tokens from one ring to another. Grid: (head_count_kv, 2, blocks along tokens as the host likes).
extern "C" __global__ void __launch_bounds__(THREADS) copy_tokens(const __grid_constant__ CopyTokensParams p) {
    wait_for_predecessor();
    launch_dependents();
    const int place = *p.place, end = place + p.tokens;
    // What the chunk's tokens see of those before it; or what later tokens will see of the chunk.
    const int first = p.tokens == 0 ? tiles_seen(place) * TILE : max(end - p.to_context, place);
    const half *from = blockIdx.y == 0 ? p.k_from : p.v_from;
    half *to = blockIdx.y == 0 ? p.k_to : p.v_to;
    const int pieces = p.head_dim / 8;
    for (int i = blockIdx.z * THREADS + threadIdx.x; i < (end - first) * pieces; i += gridDim.z * THREADS) {
        const int token = first + i / pieces, piece = i % pieces;
        const size_t source = size_t(blockIdx.x) * p.from_context + token % p.from_context;
        const size_t target = size_t(blockIdx.x) * p.to_context + token % p.to_context;
        reinterpret_cast<uint4 *>(to)[target * pieces + piece] =
            reinterpret_cast<const uint4 *>(from)[source * pieces + piece];
    }
}

#define COMPRESS(D, NAME, KEY_BITS, VALUE_BITS)                                       \
    extern "C" __global__ void __launch_bounds__(THREADS)                             \
        compress_tiles_d##D##_##NAME(const __grid_constant__ CompressTilesParams p) { \
        compress_tiles<D, KEY_BITS, VALUE_BITS>(p);                                   \
    }
KV_FORMATS(COMPRESS, 64)
KV_FORMATS(COMPRESS, 128)
KV_FORMATS(COMPRESS, 256)
KV_FORMATS(COMPRESS, 512)
