// The step kernel of step.cu and step_tiles.cu: the loop over stages, and what each does but attention.
#pragma once

#include "../activate.cuh"
#include "../types/all.cuh"
#include "attention.cuh"

namespace step {

constexpr int THREADS = CONSUMER_THREADS + WARP;
constexpr int STAGE_PIECES = sizeof(StepProduct) / 16;

// Stages in turn, each copied here while the one before is at work.
struct StageBuffer {
    StepProduct stage[2];

    // Starts copying a piece of stage `s`.
    __device__ __forceinline__ void fetch(const StepParams &p, int s, int piece) {
        if (s >= p.stage_count || piece >= STAGE_PIECES) return;
        copy_or_zero<16>(shared_address(&stage[s % 2]) + piece * 16,
                         reinterpret_cast<const uint4 *>(p.stages + (this_block() * p.stage_count + s)) + piece, true);
    }
    // By all consumers, while a stage is at work and nobody is at the one before.
    __device__ __forceinline__ void fetch_next(const StepParams &p, int s, int thread) {
        fetch(p, s + 1, thread);
        commit_copies();
    }
    __device__ __forceinline__ const StepProduct &operator[](int s) const { return stage[s % 2]; }
};
__device__ __forceinline__ const StepAttention &as_attention(const StepProduct &stage) {
    return reinterpret_cast<const StepAttention &>(stage);
}

// Whether layers may have what Gemma's have beside others': norms behind their branches, what the token gives to them,
// GELU, and shares of which two blocks have rows of a group. That is for large heads alone, as others' stages would run
// past the code of it, at more than 1% of their speed.
template <int D>
constexpr bool GEMMA = D > 128;

template <int D>
struct HeadDim {
    static constexpr int value = D;
};

// Calls `f(dim)` with a layer's head size as dim.value: it is D, or beside 256 also 512.
template <int D, typename F>
__device__ __forceinline__ void with_head_dim(const StepHeads &heads, F f) {
    if constexpr (D == 256) {
        if (heads.head_dim == 512) return f(HeadDim<512>());
    }
    f(HeadDim<D>());
}

// Tile: of the tokens that lie far behind (kv_tiles.cuh); void where all are kept as they were stored.
template <int D, typename Tile>
__device__ __forceinline__ void produce(const StepParams &p, StageBuffer &stages) {
    Producer producer(p);
    const auto fetch = [&](int s) {
        for (int piece = 0; piece < STAGE_PIECES; piece++) stages.fetch(p, s, piece);
    };
    bool first_attention = true;
    fetch(0);
    for (int s = 0; s < p.stage_count; s++) {
        commit_copies();
        wait_for_copies<0>();
        fetch(s + 1);
        const StepProduct &stage = stages[s];
        if (stage.kind == EMBED) continue;
        if (stage.kind == ATTEND) {
            if (first_attention) {
                wait_for_predecessor();
                find_jobs(p, PRODUCER_JOBS_AT);
                first_attention = false;
            }
            const StepAttention &attention = as_attention(stage);
            const Jobs &jobs = shared_at<Jobs>(PRODUCER_JOBS_AT)[attention.heads];
            with_head_dim<D>(jobs.heads, [&](auto dim) { stream<dim.value, Tile>(producer, attention, jobs); });
            continue;
        }
        const Slices slices(stage);
        for (int m = 0; m < stage.matrices; m++) stream(producer, stage.matrix[m], slices);
    }
    wait_for_copies<0>();
}

// The consumers of one block.
template <int D, typename Tile>
struct Block {
    const StepParams &p;
    Consumer &consumer;

    // x = E[token] * factor
    __device__ __forceinline__ void embed(const StepProduct &stage) const {
        const StepMatrix &table = stage.matrix[0];
        const int token = __ldcg(p.inputs);
        for (int i = consumer.thread; i < table.rows; i += CONSUMER_THREADS) {
            const int column = table.first_row + i;
            const float value = stage.factor * matrix_value(table.type, table.weights, stage.columns, token, column);
            shared_at<float>(p.hidden)[i] = value;
            put_group(p.normed, column / ACTIVATION_GROUP, consumer.lane,
                      stage.norm ? value * stage.norm[column] : value, warp_sum(value * value), consumer.now());
        }
    }

    // 1 / rms of what is about to be added, of which all blocks have given the sums of the squares of their groups. By
    // a warp.
    __device__ __forceinline__ float branch_scale(const StepProduct &stage) const {
        constexpr int AT_ONCE = 4;
        const int columns = stage.all_rows, groups = columns / ACTIVATION_GROUP;
        float sum = 0.f;
        for (int first = consumer.lane; first < groups; first += AT_ONCE * WARP) {
            take<AT_ONCE>(
                Wait{consumer.now()}, [&](int i) { return first + i * WARP < groups; },
                [&](int i) { return p.branch_squares + first + i * WARP; },
                [&](int i, const ValuePacket &packet) { sum += packet.value; });
        }
        return 1.f / sqrtf(warp_sum(sum) / columns + stage.branch_epsilon);
    }

    // Multiplies with all matrices of a stage, and does what follows.
    __device__ __forceinline__ void product(const StepProduct &stage, int s, StageBuffer &stages) const {
        const bool adds = stage.kind == ADD_TO_HIDDEN, normed = !adds && (!GEMMA<D> || stage.kind != GATE_INPUTS);
        const int rows = stage.rows;
        // What the end takes is on its way before the wait.
        const int first_group = stage.matrix[0].first_row / ACTIVATION_GROUP * ACTIVATION_GROUP;
        const bool has_one = adds && first_group + consumer.thread < stage.all_rows;
        const float norm = has_one && stage.norm ? stage.norm[first_group + consumer.thread] : 1.f;
        const float branch_norm =
            GEMMA<D> && has_one && stage.branch_norm ? stage.branch_norm[first_group + consumer.thread] : 1.f;
        if (GEMMA<D> && rows > 0 && stage.plain) {
            gather_plain(p, consumer, stage);
        } else if (rows > 0) {
            gather(p, consumer, adds ? p.activation : p.normed, stage, normed);
        }
        sync_consumers();
        consumer.begin<D>();
        stages.fetch_next(p, s, consumer.thread);
        int sums = stage.row_sums;
#pragma unroll 1
        for (int m = 0; m < stage.matrices; m++) {
            multiply(p, consumer, stage, stage.matrix[m], sums);
            sums += stage.matrix[m].pairs * TILE_ROWS * sizeof(float);
        }
        consumer.begin<D>();
        // By a warp that has none of the last tiles.
        if (normed && consumer.first() == 0) {
            const float scale = rms_scale(stage.squares, consumer.lane, stage.columns, stage.factor);
            if (elect()) *shared_at<float>(SCALE_AT) = scale;
        }
        wait_for_copies<0>();
        sync_consumers();
        const float scale = normed ? *shared_at<float>(SCALE_AT) : 1.f;

        // The sum of row `i` of the block's, which is one of matrix `m`.
        const auto total = [&](int m, int i) {
            const int count = is_float(stage.matrix[m].type) ? 1 : stage.slices;
            const float *partial = shared_at<const float>(stage.row_sums) + i;
            float sum = partial[0];
#pragma unroll 4
            for (int s = 1; s < count; s++) sum += partial[s * rows];
            return sum;
        };
        if (stage.kind == QKV || stage.kind == LOGITS || (GEMMA<D> && stage.kind == GATE_INPUTS)) {
            int from = 0;
            for (int m = 0; m < stage.matrices; m++) {
                const StepMatrix &matrix = stage.matrix[m];
                for (int i = consumer.thread; i < matrix.rows; i += CONSUMER_THREADS) {
                    const int row = matrix.first_row + i;
                    float y = scale * total(m, from + i) + (matrix.bias ? matrix.bias[i] : 0.f);
                    if (stage.kind == LOGITS) {
                        p.logits[row] = y;
                        continue;
                    }
                    if (GEMMA<D> && stage.kind == GATE_INPUTS) y = activate(stage.gelu, y) * stage.inputs[row];
                    put(p.qkv + row, y, consumer.now());
                }
                from += matrix.pairs * TILE_ROWS;
            }
            return;
        }
        const StepMatrix &matrix = stage.matrix[0];
        // A block owns the groups of which it has the first row, and gets their other rows' values from the blocks
        // behind.
        const int before = GEMMA<D> ? matrix.first_row - first_group : 0;
        for (int i = consumer.thread; i < round_up(before + matrix.rows, ACTIVATION_GROUP); i += CONSUMER_THREADS) {
            const int own = i - before, row = matrix.first_row + own, group = row / ACTIVATION_GROUP;
            const bool mine = own >= 0 && own < matrix.rows;
            float value = 0.f;
            if (mine) {
                value = scale * total(0, own);
                if (!adds)
                    value =
                        activate(GEMMA<D> && stage.gelu, value) * (scale * total(1, matrix.pairs * TILE_ROWS + own));
            }
            if (before > 0 && i < ACTIVATION_GROUP) {
                if (mine) put(p.spill + row, value, consumer.now());
                continue;
            }
            const bool exists = row < stage.all_rows;
            if (GEMMA<D> && exists && !mine) {
                take<1>(
                    Wait{consumer.now()}, [](int) { return true; }, [&](int) { return p.spill + row; },
                    [&](int, const ValuePacket &packet) { value = packet.value; });
            }
            if (!adds) {
                put_group(p.activation, group, consumer.lane, value, 0.f, consumer.now());
                continue;
            }
            float x = 0.f, weight = 1.f, branch_weight = 1.f;
            if (GEMMA<D> && stage.branch_norm) {
                const float squares = warp_sum(value * value);
                if (consumer.lane == 0) put(p.branch_squares + group, squares, consumer.now());
                value *= branch_scale(stage);
                if (exists) branch_weight = i == consumer.thread ? branch_norm : stage.branch_norm[row];
            }
            if (exists) {
                float &old = shared_at<float>(p.hidden)[row - round_up(matrix.first_row, ACTIVATION_GROUP)];
                x = GEMMA<D> ? fmaf(value, branch_weight, old) * stage.scale : old + value;
                weight = i == consumer.thread || !stage.norm ? norm : stage.norm[row];
                old = x;
            }
            put_group(p.normed, group, consumer.lane, x * weight, warp_sum(x * x), consumer.now());
        }
    }

    __device__ __forceinline__ void attend(const StepProduct &stage, int s, StageBuffer &stages) const {
        sync_consumers();
        stages.fetch_next(p, s, consumer.thread);
        const StepAttention &attention = as_attention(stage);
        Jobs &jobs = shared_at<Jobs>(JOBS_AT)[attention.heads];
        with_head_dim<D>(jobs.heads,
                         [&](auto dim) { AttentionStage<dim.value, Tile>{p, attention, jobs, consumer}.run(); });
        wait_for_copies<0>();
        sync_consumers();
    }
};

template <int D, typename Tile = void>
__device__ __forceinline__ void run(const StepParams &p) {
    StageBuffer &consumed = shared_at<StageBuffer>(STAGES_AT)[0], &produced = shared_at<StageBuffer>(STAGES_AT)[1];
    static_assert(STAGES_AT + 2 * sizeof(StageBuffer) <= SCALE_AT && REPORT_AT + sizeof(Report) <= JOBS_AT &&
                  JOBS_AT + HEAD_KINDS * sizeof(Jobs) <= PRODUCER_JOBS_AT &&
                  PRODUCER_JOBS_AT + HEAD_KINDS * sizeof(Jobs) <= RING_AT);
    if (threadIdx.x == 0) Ring::init(p);
    consumed.fetch(p, 0, threadIdx.x);
    consumed.fetch(p, 1, threadIdx.x);
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
    if (threadIdx.x >= CONSUMER_THREADS) {
        if (elect()) produce<D, Tile>(p, produced);
        return;
    }

    wait_for_predecessor();
    Consumer consumer;
    const Block<D, Tile> block{p, consumer};
    consumer.begin();
    consumer.epoch = p.epochs[this_block()];
    Report &report = *shared_at<Report>(REPORT_AT);
    if (consumer.thread == 0) {
        report.failure = p.failure;
        find_jobs(p, JOBS_AT);
    }
    for (int s = 0; s < p.stage_count; s++) {
        if (consumer.thread == 0) report.stage = s;
        const StepProduct &stage = consumed[s];
        if (stage.kind == EMBED) {
            block.embed(stage);
        } else if (stage.kind == ATTEND) {
            block.attend(stage, s, consumed);
        } else {
            block.product(stage, s, consumed);
        }
        consumer.begin();
        consumer.epoch++;
    }
    if (consumer.thread == 0) p.epochs[this_block()] = consumer.epoch;
}

}  // namespace step
