// Attention as a stage of the step kernel: the arithmetic of decode_attention.cuh, on cached keys and values that come
// through the ring. Older tokens depend on nothing of this step, so the producer asks for them behind the weights of
// queries, keys and values, and they are there when the query is.
//
// The host leaves layers that cap scores to separate kernels.
//
// A job is a chunk of the context for up to 8 query heads of a key/value head: one job a block. Where there are several
// chunks, their sums travel as packets, and each group of 32 values is added up by one warp, in order.
//
// Where tokens far behind are kept in tiles, these come first in a chunk, then the sinks, then the tokens that are read
// as they were stored; heads are rotated, and what they gather is rotated back.
#pragma once

#include <type_traits>

#include "../decode_attention.cuh"
#include "../tile_piece.cuh"
#include "product.cuh"

namespace step {

// Keys and values of 16 tokens are one entry of the ring, or two, or four: keys before values, each of ROWS tokens.
template <int D>
struct CacheEntry {
    static constexpr int ROW_BYTES = D * int(sizeof(half)), STEP_BYTES = decode_attention::STEP * ROW_BYTES;
    static constexpr int COUNT = 2 * STEP_BYTES <= SLOT_BYTES ? 1 : STEP_BYTES <= SLOT_BYTES ? 2 : 4;
    static constexpr int ROWS = COUNT == 4 ? decode_attention::STEP / 2 : decode_attention::STEP;
    static_assert(ROWS * ROW_BYTES <= SLOT_BYTES);
};

// A job: for heads first_head .. first_head + heads, which share head_kv, the tokens begin .. end.
struct Job {
    int head_kv, split, first_head, heads;
    int begin, end;
};

// The jobs of a step, which are the same in each layer with the same heads, and the first one of a block: worked out
// once, as divisions take long.
struct Jobs {
    StepHeads heads;
    int position;         // of the newest token in the text
    int first_seen, end;  // of the places that it sees
    decode_attention::Chunks chunks;
    int head_groups, count;
    Job first, later;  // the block's first job, and where it has more, the one at hand

    __device__ __forceinline__ Jobs(const StepHeads &heads, int position, int place)
        : heads(heads),
          position(position),
          first_seen(heads.window ? max(place + 1 - heads.window, 0) : 0),
          end(place + 1),
          chunks(end - first_seen, heads.splits),
          head_groups((heads.group + decode_attention::HEADS - 1) / decode_attention::HEADS),
          count(heads.head_count_kv * head_groups * chunks.count),
          first(at(blockIdx.x)),
          later(first) {}

    // Of the newest token.
    __device__ __forceinline__ int place() const { return end - 1; }
    __device__ __forceinline__ Job at(int job) const {
        const int head_kv = job % heads.head_count_kv, head_group = job / heads.head_count_kv % head_groups;
        const int split = job / (heads.head_count_kv * head_groups);
        const int before = head_group * decode_attention::HEADS, begin = first_seen + split * chunks.chunk;
        return {head_kv,
                split,
                head_kv * heads.group + before,
                min(heads.group - before, decode_attention::HEADS),
                begin,
                min(begin + chunks.chunk, end)};
    }
};

// Those of each kind of heads lie at `at` in shared memory.
// Layers without a window evict, so that there a token's place need not be its position.
__device__ __forceinline__ void find_jobs(const StepParams &p, int at) {
    const int position = __ldcg(p.inputs + 1), place = __ldcg(p.inputs + 2);
#pragma unroll
    for (int i = 0; i < HEAD_KINDS; i++) {
        const StepHeads &heads = p.heads[i];
        if (heads.head_dim) shared_at<Jobs>(at)[i] = Jobs(heads, position, heads.window ? position : place);
    }
}

template <typename Tile>
constexpr bool HAS_TILES = !std::is_void_v<Tile>;

// How the tokens of a job are read.
template <typename Tile>
struct JobTokens {
    int exact;       // from here on as they were stored
    bool has_sinks;  // in front of these, in a step of their own
    int steps;       // of sinks and of tokens as they were stored

    __device__ __forceinline__ JobTokens(int begin, int end, int place) : exact(begin), has_sinks(false) {
        if constexpr (HAS_TILES<Tile>) {
            exact = kv_tiles::exact_from(place, begin, end);
            has_sinks = begin == 0 && exact > 0;
        }
        constexpr int STEP = decode_attention::STEP;
        steps = (end - exact + STEP - 1) / STEP + has_sinks;
    }
    // The first token of a step; that of the sinks is `from` < exact.
    __device__ __forceinline__ int from(int step) const { return exact + (step - has_sinks) * decode_attention::STEP; }
};

// Those that lie in tiles, as entries of the ring: pieces of TILE_TOKENS tokens, as many of a tile side by side as
// there is room for. An entry begins where as many pieces of a tile do; the first and the last one of a job may lack
// some.
template <int D, typename Tile>
struct TileEntries {
    using Piece = decode_attention::TilePiece<D, Tile>;
    static constexpr int IN_TILE = kv_tiles::TILE / decode_attention::TILE_TOKENS;
    // Pieces that share keys' scales and zeros.
    static constexpr int IN_GROUP = kv_tiles::KEY_GROUP / decode_attention::TILE_TOKENS;
    __host__ __device__ static constexpr int bytes(int pieces, int key_groups) {
        return pieces * (Piece::CODES + Piece::VALUE_GROUPS) + key_groups * Piece::KEY_GROUPS;
    }
    static constexpr int PIECES = bytes(IN_TILE, IN_TILE / IN_GROUP) <= SLOT_BYTES ? IN_TILE
                                  : bytes(IN_GROUP, 1) <= SLOT_BYTES               ? IN_GROUP
                                                                                   : 1;
    static constexpr int VALUES_AT = PIECES * Piece::KEYS, KEY_GROUPS_AT = PIECES * Piece::CODES,
                         VALUE_GROUPS_AT = KEY_GROUPS_AT + (PIECES + IN_GROUP - 1) / IN_GROUP * Piece::KEY_GROUPS;
    static_assert(VALUE_GROUPS_AT + PIECES * Piece::VALUE_GROUPS <= SLOT_BYTES && SHARES % PIECES == 0);
    static_assert(Tile::parts == 1 && CacheEntry<D>::COUNT == 1);

    int first, end;  // pieces of the text

    __device__ __forceinline__ TileEntries(int begin, int exact)
        : first(begin / decode_attention::TILE_TOKENS),
          end(exact / decode_attention::TILE_TOKENS) {}

    __device__ __forceinline__ int count() const { return end > first ? entry_of(end - 1) + 1 : 0; }
    __device__ __forceinline__ int entry_of(int piece) const { return piece / PIECES - first / PIECES; }
    // Shares of its entry that a piece stands for, of all entries but the last.
    __device__ __forceinline__ int shares(int piece) const {
        return SHARES / PIECES * (piece == first ? 1 + piece % PIECES : 1);
    }
    __device__ static __forceinline__ Piece at(const uint8_t *entry, int piece) {
        const int before = piece % PIECES;
        return {entry + before * Piece::KEYS, entry + VALUES_AT + before * Piece::VALUES,
                entry + KEY_GROUPS_AT + before / IN_GROUP * Piece::KEY_GROUPS,
                entry + VALUE_GROUPS_AT + before * Piece::VALUE_GROUPS};
    }

    // Asks for all of them, of a head's records.
    __device__ __forceinline__ void stream(Producer &producer, const uint8_t *records) const {
        for (int piece = first; piece < end;) {
            const int before = piece % PIECES, count = min(PIECES - before, end - piece);
            const int in_tile = piece % IN_TILE, step = in_tile * Piece::HALVES, group = in_tile / IN_GROUP;
            const int key_groups = (in_tile + count - 1) / IN_GROUP - group + 1;
            const uint8_t *record = records + size_t(piece / IN_TILE) * Tile::bytes;
            producer.begin(bytes(count, key_groups));
            producer.copy(before * Piece::KEYS, record + Tile::keys_at(0, step), count * Piece::KEYS);
            producer.copy(VALUES_AT + before * Piece::VALUES, record + Tile::values_at(0, step), count * Piece::VALUES);
            producer.copy(KEY_GROUPS_AT + before / IN_GROUP * Piece::KEY_GROUPS, record + Tile::key_groups_at(step, 0),
                          key_groups * Piece::KEY_GROUPS);
            producer.copy(VALUE_GROUPS_AT + before * Piece::VALUE_GROUPS,
                          record + Tile::value_groups + in_tile * Piece::VALUE_GROUPS, count * Piece::VALUE_GROUPS);
            producer.end();
            piece += count;
        }
    }
};

// Asks for the cached keys and values of a block's jobs, without those of the newest token.
template <int D, typename Tile>
__device__ __forceinline__ void stream(Producer &producer, const StepAttention &stage, const Jobs &jobs) {
    using Cache = KvCache<D>;
    using Entry = CacheEntry<D>;
    using decode_attention::STEP;
    const AttentionLayer &layer = stage.layer;
    constexpr int ROW_BYTES = Entry::ROW_BYTES;
    const int place = jobs.place(), context = layer.context;
    Job job = jobs.first;
    for (int at = blockIdx.x; at < jobs.count;) {
        const size_t head = Cache::row(job.head_kv, 0, context) * D;
        const half *keys = layer.k_cache + head, *values = layer.v_cache + head;
        const auto copy = [&](int offset, const half *cache, int slot, int tokens) {
            // Those that have no room behind lie at the beginning of the ring that the cache is.
            if (slot >= context) slot -= context;
            const int behind = min(tokens, context - slot);
            if (behind > 0) producer.copy(offset, cache + slot * D, behind * ROW_BYTES);
            if (behind < tokens) producer.copy(offset + behind * ROW_BYTES, cache, (tokens - behind) * ROW_BYTES);
        };
        const JobTokens<Tile> tokens_of(job.begin, job.end, place);
        if constexpr (HAS_TILES<Tile>) {
            const KvTiles &tiles = stage.tiles;
            const TileEntries<D, Tile> entries(job.begin, tokens_of.exact);
            entries.stream(producer, tiles.records + job.head_kv * tiles.head_bytes);
            if (tokens_of.has_sinks) {
                constexpr int SINKS = kv_tiles::SINKS;
                const half *sinks = tiles.sinks + job.head_kv * (2 * SINKS * D);
                producer.begin(2 * SINKS * ROW_BYTES);
                producer.copy(0, sinks, SINKS * ROW_BYTES);
                producer.copy(Entry::STEP_BYTES, sinks + SINKS * D, SINKS * ROW_BYTES);
                producer.end();
            }
        }
        int slot = Cache::slot_of(tokens_of.exact, context);
        for (int from = tokens_of.exact; from < job.end; from += STEP) {
            const int tokens = min(place - from, STEP);
            if constexpr (Entry::COUNT == 1) {
                producer.begin(2 * tokens * ROW_BYTES);
                copy(0, keys, slot, tokens);
                copy(Entry::STEP_BYTES, values, slot, tokens);
                producer.end();
            } else {
#pragma unroll
                for (int i = 0; i < Entry::COUNT; i++) {
                    const int before = i % (Entry::COUNT / 2) * Entry::ROWS;
                    const int rows = min(max(tokens - before, 0), Entry::ROWS);
                    producer.begin(rows * ROW_BYTES);
                    copy(0, i < Entry::COUNT / 2 ? keys : values, slot + before, rows);
                    producer.end();
                }
            }
            slot += STEP;
            if (slot >= context) slot -= context;
        }
        at += gridDim.x;
        if (at < jobs.count) job = jobs.at(at);
    }
}

// What attention keeps in shared memory.
template <int D>
struct AttentionMemory {
    union {
        decode_attention::QueryFragments<D> query;
        float joined[CONSUMERS][WARP];  // behind all jobs: values of heads that are yet to be rotated back
    };
    static_assert(sizeof(joined) <= sizeof(query));
    half key[D], value[D];  // of the newest token
    decode_attention::TeamSums<D> sums;
    // In turn, with barriers between:
    union {
        float rows[1];                        // (D, query heads and 1)
        decode_attention::Exchange exchange;  // where a team is two warps
        float team_out[1];                    // as TeamSums::out
    };
};

template <int D, typename Tile>
struct AttentionStage {
    using Memory = AttentionMemory<D>;
    using Cache = KvCache<D>;
    using Entry = CacheEntry<D>;
    static constexpr int KEY_WARP = decode_attention::WARPS, VALUE_WARP = KEY_WARP + 1;
    // Heads whose sums are joined together, at most: all, where shared memory is enough for them.
    static constexpr int JOINED_HEADS = D > 128 ? 2 : decode_attention::HEADS;

    const StepParams &p;
    const StepAttention &stage;
    Jobs &jobs;
    Consumer &consumer;

    __device__ __forceinline__ Memory &memory() const { return *shared_at<Memory>(p.attention); }

    // Behind a barrier, as whatever lay in this memory may then be overwritten.
    __device__ __forceinline__ void run() const {
        if (this_block() < jobs.count) {
            const Job *job = &jobs.first;
            for (int at = this_block();;) {
                attend(*job);
                at += gridDim.x;
                if (at >= jobs.count) break;
                sync_consumers();
                if (consumer.thread == 0) jobs.later = jobs.at(at);
                sync_consumers();
                job = &jobs.later;
            }
        }
        if (jobs.chunks.count > 1) {
            if constexpr (HAS_TILES<Tile>) {
                join_and_rotate_back();
            } else {
                join();
            }
        }
    }

    __device__ __forceinline__ void load_head(const Wait &wait, const uint64_t *from, float (&x)[D / WARP]) const {
        take<D / WARP>(
            wait, [](int) { return true; }, [&](int i) { return from + i * WARP + consumer.lane; },
            [&](int i, const ValuePacket &packet) { x[i] = packet.value; });
    }

    // By a warp of each part.
    __device__ __forceinline__ static void release(const Place &place) {
        give_back(place, SHARES / decode_attention::PARTS<D>);
    }

    // Where KEY_WARP and VALUE_WARP find their head in StepAttention::newest.
    __device__ __forceinline__ int newest_at(const Job &job) const {
        return ((consumer.warp == KEY_WARP ? 0 : jobs.heads.head_count_kv) + job.head_kv) * D;
    }

    // The newest token's key or value, for this block, and where the layer stores it for all: in the cache, and for
    // layers that share it. By KEY_WARP and VALUE_WARP.
    __device__ __forceinline__ void store_newest(const Job &job, const float (&x)[D / WARP]) const {
        const AttentionLayer &layer = stage.layer;
        const bool is_key = consumer.warp == KEY_WARP;
        half *newest = is_key ? memory().key : memory().value;
        half *cached = (is_key ? layer.k_cache : layer.v_cache) +
                       Cache::row(job.head_kv, Cache::slot_of(jobs.place(), layer.context), layer.context) * D;
#pragma unroll
        for (int i = 0; i < D / WARP; i++) {
            const int d = i * WARP + consumer.lane;
            Cache::store(newest + d, x[i]);
            if (!layer.stores) continue;
            Cache::store(cached + d, x[i]);
            if (stage.newest) put(stage.newest + newest_at(job) + d, x[i], consumer.now());
        }
    }

    // A copy, but where heads need all registers.
    __device__ __forceinline__ void attend(std::conditional_t<(D > 128), const Job &, const Job> job) const {
        using namespace decode_attention;
        const AttentionLayer &layer = stage.layer;
        const int warp = consumer.warp, lane = consumer.lane;
        const int newest = jobs.place();
        const bool for_query = warp < job.heads, is_key = warp == KEY_WARP;
        const bool for_newest = job.end > newest && (is_key || warp == VALUE_WARP);
        Memory &memory = this->memory();
        float2 rotations[D / 2 / WARP];
#pragma unroll
        for (int i = 0; i < D / 2 / WARP; i++) {
            rotations[i] = rotation(jobs.position, pair_frequency(layer, i * WARP + lane), layer.rope_factor);
        }
        const float *weights = for_query ? layer.q_norm : is_key ? layer.k_norm : layer.v_norm;
        float norm[D / WARP], x[D / WARP] = {};
        load_norm<D>(weights, norm);
        const uint64_t *from = p.qkv;
        Wait wait = consumer.wait();
        if (for_query) {
            from += (job.first_head + warp) * D;
        } else if (layer.stores) {
            const int key = jobs.heads.head_count_kv * jobs.heads.group + job.head_kv;
            const bool behind_keys = !is_key && !stage.values_are_keys;
            from += (key + (behind_keys ? jobs.heads.head_count_kv : 0)) * D;
        } else {
            from = stage.newest + newest_at(job);
            wait = {consumer.now() - stage.newest_age};
        }
        if (for_query || for_newest) load_head(wait, from, x);
        if (for_query || (for_newest && is_key && layer.stores)) {
            rotate_head<D>(x, weights, norm, layer, memory.rows + min(warp, job.heads) * D,
                           [&](int i) { return rotations[i]; });
        } else if (for_newest && layer.stores && weights) {
            const float scale = head_scale<D>(x, layer.epsilon);
#pragma unroll
            for (int i = 0; i < D / WARP; i++) x[i] = x[i] * scale * norm[i];
        }
        // What another layer shares comes rotated.
        if constexpr (HAS_TILES<Tile>) {
            if (warp < WARPS || layer.stores) kv_tiles::rotate<D>(x);
        }
        if (warp < WARPS) {
            memory.query.store(warp, x, layer.scale);
        } else if (for_newest) {
            store_newest(job, x);
        }
        sync_consumers();

        const int g = lane / 4, t = lane % 4;  // as the matrix instruction numbers them
        const int part = part_of_warp<D>() * PART<D>;
        const int begin = job.begin, end = job.end;
        const JobTokens<Tile> tokens(begin, end, newest);
        const int steps = tokens.steps;
        Gathered<D> gathered;
        int tile_entries = 0;
        if constexpr (HAS_TILES<Tile>) {
            const TileEntries<D, Tile> entries(job.begin, tokens.exact);
            tile_entries = entries.count();
            if (warp < WARPS) add_tiles(gathered, entries);
        }
        if (warp < WARPS) {
#pragma unroll 1
            for (int i = warp / PARTS<D>; i < steps; i += TEAMS<D>) {
                const int from = tokens.from(i);
                const bool is_sinks = HAS_TILES<Tile> && from < tokens.exact;
                // Keys, and as many behind them values, or both together.
                constexpr int OF_KEYS = (Entry::COUNT + 1) / 2;
                Place place[Entry::COUNT];
                place[0] = Ring::place(p, consumer.entries + tile_entries + i * Entry::COUNT);
#pragma unroll
                for (int j = 1; j < Entry::COUNT; j++) {
                    place[j] = place[j - 1];
                    Ring::advance(p, place[j], 1);
                }
                // Where values t, and those behind, of a token are.
                const auto row = [&](bool values, int token, const half *newest_row) {
                    const int last = is_sinks ? min(token, kv_tiles::SINKS - 1) : min(from + token, end - 1) - from;
                    if (last == newest - from) return newest_row;
                    const int first = values ? Entry::COUNT / 2 : 0;
                    const uint8_t *entry = Ring::entry(place[first]);
                    if (Entry::COUNT == 4 && last >= Entry::ROWS) entry = Ring::entry(place[first + Entry::COUNT / 4]);
                    if (Entry::COUNT == 1 && values) entry += Entry::STEP_BYTES;
                    return reinterpret_cast<const half *>(entry) + (Entry::COUNT == 4 ? last % Entry::ROWS : last) * D;
                };
                const half *key_at[2], *value_at[4];
#pragma unroll
                for (int tile = 0; tile < 2; tile++) key_at[tile] = row(false, tile * 8 + g, memory.key) + part + t * 8;
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    value_at[j] = row(true, j / 2 * 8 + t * 2 + j % 2, memory.value) + part + g * 8;
                }
#pragma unroll
                for (int j = 0; j < OF_KEYS; j++) Ring::wait(place[j]);
                gathered.add(
                    memory.query, from, end, [&](int tile, int c) { return Cache::load(key_at[tile] + c * 32); },
                    [&] {
                        if constexpr (Entry::COUNT > 1) {
#pragma unroll
                            for (int j = 0; j < OF_KEYS; j++) release(place[j]);
#pragma unroll
                            for (int j = OF_KEYS; j < Entry::COUNT; j++) Ring::wait(place[j]);
                        }
                    },
                    [&](float (&score)[4]) {
                        if constexpr (PARTS<D> == 2) memory.exchange(score, i / TEAMS<D>);
                        if (is_sinks) keep_sinks(score);
                    },
                    [&](int c, int j) { return Cache::load(value_at[j] + c * 64); });
#pragma unroll
                for (int j = Entry::COUNT / 2; j < Entry::COUNT; j++) release(place[j]);
            }
        }
        consumer.begin<D>();
        consumer.pass(0, tile_entries + steps * Entry::COUNT);

        const int head_count = jobs.heads.head_count_kv * jobs.heads.group;
        const int teams = min((end - begin + STEP - 1) / STEP, TEAMS<D>);
        memory.sums.out = memory.team_out;
        join_teams(gathered, job, teams, [&](int head, int d, float sum, float top, float all) {
            if (HAS_TILES<Tile> && jobs.chunks.count == 1) {
                // Until all of the head are here: this thread alone has read what lay in its place.
                memory.sums.at(head)[d] = sum / all;
                return;
            }
            head += job.first_head;
            if (jobs.chunks.count == 1) {
                put_group(p.activation, (head * D + d) / ACTIVATION_GROUP, consumer.lane, sum / all, 0.f,
                          consumer.now());
                return;
            }
            put(p.partial + (size_t(job.split) * head_count + head) * D + d, sum, consumer.now());
            if (d == 0) {
                put(p.partial_sums + job.split * head_count + head, __float_as_uint(top), __float_as_uint(all), 0,
                    consumer.now());
            }
        });
        if constexpr (HAS_TILES<Tile>) {
            if (jobs.chunks.count > 1) return;
            sync_consumers();
            if (consumer.warp >= job.heads) return;
            float value[D / WARP];
#pragma unroll
            for (int i = 0; i < D / WARP; i++) value[i] = memory.sums.at(consumer.warp)[i * WARP + consumer.lane];
            kv_tiles::rotate<D>(value);
#pragma unroll
            for (int i = 0; i < D / WARP; i++) {
                put_group(p.activation, (job.first_head + consumer.warp) * (D / ACTIVATION_GROUP) + i, consumer.lane,
                          value[i], 0.f, consumer.now());
            }
        }
    }

    // Adds a team's share of the tokens that lie in tiles.
    __device__ __forceinline__ void add_tiles(decode_attention::Gathered<D> &gathered,
                                              const TileEntries<D, Tile> &entries) const {
        using namespace decode_attention;
        using Piece = TilePiece<D, Tile>;
        const int last = entries.count() - 1;
        float zeros = 0.f;
#pragma unroll 1
        for (int piece = entries.first + consumer.warp; piece < entries.end; piece += TEAMS<D>) {
            const int entry = entries.entry_of(piece);
            const Place place = Ring::place(p, consumer.entries + entry);
            Ring::wait(place);
            entries.at(Ring::entry(place), piece).add_to(gathered, zeros, memory().query, piece == 0, [](float (&)[4]) {
            });
            if (entry < last) give_back(place, entries.shares(piece));
        }
        Piece::add_zeros(gathered, zeros);
        // All teams wait for the last entry, each with a share of it: from one's last piece to its next step there may
        // be more entries than a warp may leave out.
        if (last >= 0) {
            const Place place = Ring::place(p, consumer.entries + last);
            Ring::wait(place);
            give_back(place, SHARES / TEAMS<D>);
        }
    }

    // Adds up what the first `teams` teams have gathered, in their order, and gives it value by value to `store(head,
    // d, sum, top, all)`: a sum of exponentials relative to the greatest score `top`, times values, and `all` without
    // them.
    template <typename Store>
    __device__ __forceinline__ void join_teams(decode_attention::Gathered<D> &gathered, const Job &job, int teams,
                                               Store store) const {
        using namespace decode_attention;
        TeamSums<D> &sums = memory().sums;
        float factor[2] = {};
        sums.weigh(gathered, teams, sync_consumers, factor);
        const int last = JOINED_HEADS == HEADS ? 1 : job.heads;  // a constant where there is one round
#pragma unroll 1
        for (int first = 0; first < last; first += JOINED_HEADS) {
            const int joined = min(job.heads - first, JOINED_HEADS);
            if (consumer.warp / PARTS<D> < teams) sums.put(gathered, factor, first, joined);
            sync_consumers();
            for (int i = consumer.thread; i < joined * D; i += CONSUMER_THREADS) {
                const int head = i / D, d = i % D;
                float of_team[TEAMS<D>], sum = 0.f;
#pragma unroll
                for (int w = 0; w < TEAMS<D>; w++) of_team[w] = w < teams ? sums.at(w * joined + head)[d] : 0.f;
#pragma unroll
                for (int w = 0; w < TEAMS<D>; w++) sum += of_team[w];
                store(first + head, d, sum, sums.top[first + head], sums.all[first + head]);
            }
            if (first + JOINED_HEADS < last) sync_consumers();
        }
    }

    // The sum of all chunks of a head's value `d`, which is this lane's.
    __device__ __forceinline__ float sum_of_chunks(const Wait &wait, int chunks, int head_count, int head,
                                                   int d) const {
        using namespace decode_attention;
        constexpr int AT_ONCE = 16;
        float tops[MAX_SPLITS / WARP], all[MAX_SPLITS / WARP];
#pragma unroll
        for (int i = 0; i < MAX_SPLITS / WARP; i++) tops[i] = NO_SCORE, all[i] = 0.f;
        take<MAX_SPLITS / WARP>(
            wait, [&](int i) { return i * WARP + consumer.lane < chunks; },
            [&](int i) { return p.partial_sums + (i * WARP + consumer.lane) * head_count + head; },
            [&](int i, const Packet &packet) {
                tops[i] = __uint_as_float(packet.word[0]), all[i] = __uint_as_float(packet.word[1]);
            });
        const ChunkWeights weights(tops, all);
        float sum = 0.f;
        for (int first = 0; first < chunks; first += AT_ONCE) {
            float part[AT_ONCE] = {};
            take<AT_ONCE>(
                wait, [&](int j) { return first + j < chunks; },
                [&](int j) { return p.partial + (size_t(first + j) * head_count + head) * D + d; },
                [&](int j, const ValuePacket &packet) { part[j] = packet.value; });
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++) {
                const int chunk = first + j;
                const float weight = __shfl_sync(~0u, chunk / WARP == 0 ? weights.of[0] : weights.of[1], chunk % WARP);
                sum += part[j] * weight;
            }
        }
        return sum;
    }

    // Adds up the chunks.
    __device__ __forceinline__ void join() const {
        const Wait wait{consumer.now()};
        const int chunks = jobs.chunks.count, head_count = jobs.heads.head_count_kv * jobs.heads.group,
                  groups = head_count * (D / ACTIVATION_GROUP);
        for (int group = this_block() + consumer.warp * gridDim.x; group < groups; group += CONSUMERS * gridDim.x) {
            const int head = group / (D / ACTIVATION_GROUP), d = group % (D / ACTIVATION_GROUP) * WARP + consumer.lane;
            const float sum = sum_of_chunks(wait, chunks, head_count, head, d);
            put_group(p.activation, group, consumer.lane, sum, 0.f, consumer.now());
        }
    }

    // The same where heads are to be rotated back, which takes all values of one: a block has whole heads, each warp a
    // group of 32 values, and warps of a head meet in shared memory.
    __device__ __forceinline__ void join_and_rotate_back() const {
        constexpr int GROUPS = D / WARP, AT_ONCE = CONSUMERS / GROUPS;
        const Wait wait{consumer.now()};
        float (&joined)[CONSUMERS][WARP] = memory().joined;
        const int warp = consumer.warp, lane = consumer.lane, group = warp % GROUPS;
        const int head_count = jobs.heads.head_count_kv * jobs.heads.group, heads_a_round = AT_ONCE * gridDim.x;
        for (int first = this_block(); first < head_count; first += heads_a_round) {
            const int head = first + warp / GROUPS * gridDim.x;
            const bool exists = head < head_count;
            if (exists) {
                float value[1] = {sum_of_chunks(wait, jobs.chunks.count, head_count, head, group * WARP + lane)};
                kv_tiles::rotate_lanes(value);
                joined[warp][lane] = value[0];
            }
            sync_consumers();
            if (exists) {
                float value[GROUPS], own = 0.f;
#pragma unroll
                for (int i = 0; i < GROUPS; i++) value[i] = joined[warp - group + i][lane];
                kv_tiles::rotate_own<D>(value);
#pragma unroll
                for (int i = 0; i < GROUPS; i++) own = i == group ? value[i] : own;
                put_group(p.activation, head * GROUPS + group, lane, own, 0.f, consumer.now());
            }
            if (first + heads_a_round < head_count) sync_consumers();
        }
    }
};

}  // namespace step
