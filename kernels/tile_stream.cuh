// A team's share of the tokens that are kept in tiles (kv_tiles.cuh): their codes pass through a ring in shared memory
// that is private to the warp, filled by bulk copies that start before the kernel waits for its predecessor.
#pragma once

#include "copy.cuh"
#include "tile_piece.cuh"

namespace decode_attention {

constexpr int MAX_TILE_DEPTH = 8;  // places in a warp's ring

template <int D, typename Tile>
struct TileStream {
    using Piece = TilePiece<D, Tile>;
    static constexpr int PLACE = Piece::CODES + Piece::KEY_GROUPS + Piece::VALUE_GROUPS;  // bytes

    CopyBarrier *arrived;
    uint8_t *ring;
    const uint8_t *records;
    uint64_t policy;
    int first, count, depth;  // the first of its pieces of TILE_TOKENS in the text, how many, and places of the ring

    // Of key/value head `head`, tokens begin .. end: multiples of TILE_TOKENS. `ring` has room for p.tile_depth places
    // of each warp.
    __device__ __forceinline__ TileStream(const DecodeAttentionParams &p, uint8_t *ring, int head, int begin, int end)
        : ring(ring + threadIdx.x / WARP * p.tile_depth * PLACE),
          records(p.tiles.records + head * p.tiles.head_bytes),
          policy(read_once()),
          first(begin / TILE_TOKENS + team()),
          count(max((end - begin) / TILE_TOKENS - team() + TEAMS<D> - 1, 0) / TEAMS<D>),
          depth(p.tile_depth) {
        __shared__ CopyBarrier barriers[WARPS][MAX_TILE_DEPTH];
        arrived = barriers[threadIdx.x / WARP];
        if (elect()) {
#pragma unroll
            for (int place = 0; place < MAX_TILE_DEPTH; place++) arrived[place].init();
            Barrier::publish();
        }
        __syncwarp();
#pragma unroll 1
        for (int i = 0; i < min(depth, count); i++) load(i, i);
    }

    __device__ static __forceinline__ int team() { return threadIdx.x / WARP / PARTS<D>; }

    // Starts copying this team's `i`th piece to `place`.
    __device__ __forceinline__ void load(int place, int i) const {
        constexpr int IN_TILE = kv_tiles::TILE / TILE_TOKENS;
        const int number = first + i * TEAMS<D>, piece = number % IN_TILE, part = part_of_warp<D>();
        const uint8_t *record = records + size_t(number / IN_TILE) * Tile::bytes;
        arrived[place].template copy_parts<Piece::KEYS, Piece::VALUES, Piece::KEY_GROUPS, Piece::VALUE_GROUPS>(
            ring + place * PLACE,
            {record + Tile::keys_at(part, piece * Piece::HALVES), record + Tile::values_at(part, piece * Piece::HALVES),
             record + Tile::key_groups_at(piece * Piece::HALVES, part * (Tile::part / 8)),
             record + Tile::value_groups + piece * Piece::VALUE_GROUPS},
            policy);
    }

    // Adds all of them. `finish` is Gathered's.
    template <typename Finish>
    __device__ __forceinline__ void add_to(Gathered<D> &gathered, const QueryFragments<D> &query, Finish finish) const {
        int place = 0, parity = 0;
        float zeros = 0.f;
#pragma unroll 1
        for (int i = 0; i < count; i++) {
            arrived[place].wait(parity);
            const uint8_t *at = ring + place * PLACE;
            const Piece piece{at, at + Piece::KEYS, at + Piece::CODES, at + Piece::CODES + Piece::KEY_GROUPS};
            piece.add_to(gathered, zeros, query, first + i * TEAMS<D> == 0, finish);
            __syncwarp();
            if (i + depth < count) load(place, i + depth);
            if (++place == depth) place = 0, parity ^= 1;
        }
        Piece::add_zeros(gathered, zeros);
    }
};

}  // namespace decode_attention
