// Attention as a stage of the step kernel: the arithmetic of decode_attention.cuh, on cached keys and values that come
// through the ring. Older tokens depend on nothing of this step, so the producer asks for them behind the weights of
// queries, keys and values, and they are there when the query is.
//
// The host leaves layers that store nothing or cap scores to separate kernels.
//
// A job is a chunk of the context for up to 8 query heads of a key/value head: one job a block. Where there are several
// chunks, their sums travel as packets, and each group of 32 values is added up by one block, in order.
#pragma once

#include "../decode_attention.cuh"
#include "product.cuh"

namespace step {

// Keys and values of 16 tokens are one entry of the ring, or two.
template <int D>
struct CacheEntry {
    static constexpr int KEY_BYTES = decode_attention::STEP * D * int(sizeof(half));
    static constexpr int COUNT = 2 * KEY_BYTES <= SLOT_BYTES ? 1 : 2;
};

// A job: for heads first_head .. first_head + heads, which share head_kv, the tokens begin .. end.
struct Job {
    int head_kv, split, first_head, heads;
    int begin, end;
};

// The jobs of a step, which are the same in each layer with the same window (0 for none), and the first one of a block:
// worked out once, as divisions take long.
struct Jobs {
    int first_seen, end;  // of the tokens that the newest one sees
    decode_attention::Chunks chunks;
    int head_groups, count;
    Job first;

    __device__ __forceinline__ Jobs(const StepParams &p, int position, int window)
        : first_seen(window ? max(position + 1 - window, 0) : 0),
          end(position + 1),
          chunks(end - first_seen, p.splits),
          head_groups((p.group + decode_attention::HEADS - 1) / decode_attention::HEADS),
          count(p.head_count_kv * head_groups * chunks.count),
          first(at(p, blockIdx.x)) {}

    __device__ __forceinline__ Job at(const StepParams &p, int job) const {
        const int head_kv = job % p.head_count_kv, head_group = job / p.head_count_kv % head_groups;
        const int split = job / (p.head_count_kv * head_groups);
        const int before = head_group * decode_attention::HEADS, begin = first_seen + split * chunks.chunk;
        return {head_kv,
                split,
                head_kv * p.group + before,
                min(p.group - before, decode_attention::HEADS),
                begin,
                min(begin + chunks.chunk, end)};
    }
};

// Those of a layer, of the two that lie at `at` in shared memory.
__device__ __forceinline__ Jobs &jobs_of(const AttentionLayer &layer, int at) {
    return shared_at<Jobs>(at)[layer.window != 0];
}
__device__ __forceinline__ void find_jobs(const StepParams &p, int at, int position) {
    shared_at<Jobs>(at)[0] = Jobs(p, position, 0);
    if (p.window) shared_at<Jobs>(at)[1] = Jobs(p, position, p.window);
}

// Asks for the cached keys and values of a block's jobs, without those of the newest token.
template <int D>
__device__ __forceinline__ void stream(Producer &producer, const StepAttention &stage, const Jobs &jobs) {
    using Cache = KvCache<D>;
    using Entry = CacheEntry<D>;
    using decode_attention::STEP;
    const AttentionLayer &layer = stage.layer;
    constexpr int ROW_BYTES = D * int(sizeof(half));
    const int position = jobs.end - 1;
    Job job = jobs.first;
    for (int at = blockIdx.x; at < jobs.count;) {
        const typename Cache::Slots slot_of(job.begin, layer.context);
        for (int from = job.begin; from < job.end; from += STEP) {
            const int tokens = min(position - from, STEP), slot = slot_of(from);
            // The others lie at the beginning of the ring that the cache is.
            const int whole = min(tokens, layer.context - slot);
            const auto copy = [&](int offset, const half *cache) {
                const auto row = [&](int slot) { return cache + Cache::row(job.head_kv, slot, layer.context) * D; };
                if (whole > 0) producer.copy(offset, row(slot), whole * ROW_BYTES);
                if (whole < tokens) producer.copy(offset + whole * ROW_BYTES, row(0), (tokens - whole) * ROW_BYTES);
            };
            producer.begin(Entry::COUNT == 1 ? 2 * tokens * ROW_BYTES : tokens * ROW_BYTES);
            copy(0, layer.k_cache);
            if constexpr (Entry::COUNT == 2) {
                producer.end();
                producer.begin(tokens * ROW_BYTES);
            }
            copy(Entry::COUNT == 1 ? Entry::KEY_BYTES : 0, layer.v_cache);
            producer.end();
        }
        at += gridDim.x;
        if (at < jobs.count) job = jobs.at(producer.p, at);
    }
}

// What attention keeps in shared memory.
template <int D>
struct AttentionMemory {
    decode_attention::QueryFragments<D> query;
    half key[D], value[D];  // of the newest token
    decode_attention::WarpSums sums;
    float row[decode_attention::WARPS + 1][D];
    float warp_out[1];  // (D + 1, JOINED_HEADS, TEAMS)
};

template <int D>
struct AttentionStage {
    using Memory = AttentionMemory<D>;
    using Cache = KvCache<D>;
    static constexpr int KEY_WARP = decode_attention::WARPS, VALUE_WARP = KEY_WARP + 1;

    const StepParams &p;
    const StepAttention &stage;
    Consumer &consumer;
    int position;
    uint32_t now;  // the epoch of what this stage writes

    __device__ __forceinline__ Memory &memory() const { return *shared_at<Memory>(p.attention); }

    // Behind a barrier, as whatever lay in this memory may then be overwritten.
    __device__ __forceinline__ void run(const Wait &wait) const {
        const Jobs &jobs = jobs_of(stage.layer, JOBS_AT);
        if (int(blockIdx.x) < jobs.count) {
            Job job = jobs.first;
            for (int at = blockIdx.x;;) {
                attend(wait, jobs.chunks, job);
                at += gridDim.x;
                if (at >= jobs.count) break;
                sync_consumers();
                job = jobs.at(p, at);
            }
        }
        if (jobs.chunks.count > 1) join(Wait{now, wait.stage, wait.failure}, jobs.chunks);
    }

    __device__ __forceinline__ void load_head(const Wait &wait, int row, float (&x)[D / WARP]) const {
        take<D / WARP>(
            wait, [](int) { return true; }, [&](int i) { return p.qkv + row + i * WARP + consumer.lane; },
            [&](int i, const ValuePacket &packet) { x[i] = packet.value; });
    }

    // By a warp: gives back an entry once all its reads have ended. They may wait in line for long, as rows of a cache
    // lie in the same banks, and nothing that is done with them need have begun.
    __device__ __forceinline__ static void release(const Place &place) {
        __threadfence_block();
        __syncwarp();
        if (elect()) Ring::release(place, SHARES);
    }

    __device__ __forceinline__ void attend(const Wait &wait, const decode_attention::Chunks &chunks,
                                           const Job &job) const {
        using namespace decode_attention;
        using Entry = CacheEntry<D>;
        const AttentionLayer &layer = stage.layer;
        const int warp = consumer.warp, lane = consumer.lane;
        const int key_row = p.head_count_kv * p.group * D + job.head_kv * D;
        const int value_row = stage.values_are_keys ? key_row : key_row + p.head_count_kv * D;
        const bool newest = job.end > position;
        Memory &memory = this->memory();
        const HeadRope<D> head_rope(layer, position);
        float x[D / WARP] = {};
        if (warp < job.heads) {
            load_head(wait, (job.first_head + warp) * D, x);
        } else if (newest && (warp == KEY_WARP || warp == VALUE_WARP)) {
            load_head(wait, warp == KEY_WARP ? key_row : value_row, x);
        }
        const size_t slot = Cache::row(job.head_kv, Cache::slot_of(position, layer.context), layer.context) * D;
        if (warp < job.heads) {
            head_rope(x, layer.q_norm, head_rope.query_norm, layer, memory.row[warp],
                      [&](int d, float x) { memory.query.store(warp, d, x * layer.scale); });
        } else if (warp < WARPS) {
            for (int d = lane; d < D; d += WARP) memory.query.store(warp, d, 0.f);
        } else if (newest && warp == KEY_WARP) {
            head_rope(x, layer.k_norm, head_rope.key_norm, layer, memory.row[warp], [&](int d, float x) {
                Cache::store(memory.key + d, x);
                Cache::store(layer.k_cache + slot + d, x);
            });
        } else if (newest && warp == VALUE_WARP) {
            if (layer.v_norm) {
                const float scale = head_scale<D>(x, layer.epsilon);
#pragma unroll
                for (int i = 0; i < D / WARP; i++) x[i] = x[i] * scale * layer.v_norm[i * WARP + lane];
            }
#pragma unroll
            for (int i = 0; i < D / WARP; i++) {
                Cache::store(memory.value + i * WARP + lane, x[i]);
                Cache::store(layer.v_cache + slot + i * WARP + lane, x[i]);
            }
        }
        sync_consumers();

        const int g = lane / 4, t = lane % 4;  // as the matrix instruction numbers them
        const int steps = (job.end - job.begin + STEP - 1) / STEP;
        Gathered<D> gathered;
        if (warp < WARPS) {
#pragma unroll 1
            for (int i = warp; i < steps; i += WARPS) {
                const int from = job.begin + i * STEP;
                const Place keys = Ring::place(p, consumer.entries + i * Entry::COUNT);
                const Place values = Entry::COUNT == 1 ? keys : Ring::place(p, consumer.entries + i * 2 + 1);
                Ring::wait(keys);
                const half *key_at[2], *value_at[4];
                const auto row = [&](const Place &place, int offset, int token, const half *newest_row) {
                    const int last = min(from + token, job.end - 1);
                    return last == position
                               ? newest_row
                               : reinterpret_cast<const half *>(Ring::entry(place) + offset) + (last - from) * D;
                };
#pragma unroll
                for (int tile = 0; tile < 2; tile++) key_at[tile] = row(keys, 0, tile * 8 + g, memory.key) + t * 8;
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    value_at[j] =
                        row(values, Entry::COUNT == 1 ? Entry::KEY_BYTES : 0, j / 2 * 8 + t * 2 + j % 2, memory.value) +
                        g * 8;
                }
                gathered.add(
                    memory.query, from, job.end, [&](int tile, int c) { return Cache::load(key_at[tile] + c * 32); },
                    [&] {
                        if (Entry::COUNT == 1) return;
                        release(keys);
                        Ring::wait(values);
                    },
                    [](const float (&)[4]) {}, [&](int c, int j) { return Cache::load(value_at[j] + c * 64); });
                release(values);
            }
        }
        consumer.pass(0, steps * Entry::COUNT);

        const int head_count = p.head_count_kv * p.group;
        memory.sums.out = memory.warp_out;
        join_warps(gathered, job.heads, min(steps, WARPS), consumer.thread, CONSUMER_THREADS, memory.sums,
                   sync_consumers, [&](int head, int d, float sum, float top, float all) {
                       head += job.first_head;
                       if (chunks.count == 1) {
                           put_group(p.activation, (head * D + d) / ACTIVATION_GROUP, consumer.lane, sum / all, 0.f,
                                     now);
                           return;
                       }
                       put(p.partial + (size_t(job.split) * head_count + head) * D + d, sum, now);
                       if (d == 0) {
                           put(p.partial_sums + job.split * head_count + head, __float_as_uint(top),
                               __float_as_uint(all), 0, now);
                       }
                   });
    }

    // Adds up the chunks.
    __device__ __forceinline__ void join(const Wait &wait, const decode_attention::Chunks &chunks) const {
        using namespace decode_attention;
        constexpr int AT_ONCE = 16;
        const int head_count = p.head_count_kv * p.group, groups = head_count * (D / ACTIVATION_GROUP);
        for (int group = blockIdx.x + consumer.warp * gridDim.x; group < groups; group += CONSUMERS * gridDim.x) {
            const int head = group / (D / ACTIVATION_GROUP), d = group % (D / ACTIVATION_GROUP) * WARP + consumer.lane;
            float tops[MAX_SPLITS / WARP], all[MAX_SPLITS / WARP];
#pragma unroll
            for (int i = 0; i < MAX_SPLITS / WARP; i++) tops[i] = NO_SCORE, all[i] = 0.f;
            take<MAX_SPLITS / WARP>(
                wait, [&](int i) { return i * WARP + consumer.lane < chunks.count; },
                [&](int i) { return p.partial_sums + (i * WARP + consumer.lane) * head_count + head; },
                [&](int i, const Packet &packet) {
                    tops[i] = __uint_as_float(packet.word[0]), all[i] = __uint_as_float(packet.word[1]);
                });
            const ChunkWeights weights(tops, all);
            float sum = 0.f;
            for (int first = 0; first < chunks.count; first += AT_ONCE) {
                float part[AT_ONCE] = {};
                take<AT_ONCE>(
                    wait, [&](int j) { return first + j < chunks.count; },
                    [&](int j) { return p.partial + (size_t(first + j) * head_count + head) * D + d; },
                    [&](int j, const ValuePacket &packet) { part[j] = packet.value; });
#pragma unroll
                for (int j = 0; j < AT_ONCE; j++) {
                    const int chunk = first + j;
                    const float weight =
                        __shfl_sync(~0u, chunk / WARP == 0 ? weights.of[0] : weights.of[1], chunk % WARP);
                    sum += part[j] * weight;
                }
            }
            put_group(p.activation, group, consumer.lane, sum, 0.f, now);
        }
    }
};

}  // namespace step
