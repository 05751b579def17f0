// Attention of one new token: what decode_attention.cu and the step kernel (step/attention.cuh) share, and so compute
// to the same bits.
//
//   q, k = rope(rms_norm(q)), rope(rms_norm(k))       (the norms where the model has them)
//   cache[position] = k, v                            (f16; v = rms_norm(v) where the model norms it)
//   out[head] = sum over t of softmax(scale * q . K[t]) V[t]
//
// where t are the tokens that the new one sees: all up to position, or the last `window` of these.
//
// The products run on tensor cores (m16n8k16): 8 heads fill half of the 16 rows, and the other half carries what
// rounding q to f16 left over, so that q counts as exact; probabilities are split likewise. Keys and values are read in
// 16-byte pieces, from whichever memory: `key(tile, c)` gives piece 4 c + t of token 8 tile + g of a step, `value(c,
// i)` piece 8 c + g of token i / 2 * 8 + 2 t + i % 2, where the lane is 4 g + t, and pieces are counted from where the
// warp's part of a row begins.
#pragma once

#include "kv_cache.cuh"
#include "mma.cuh"
#include "rope.cuh"

namespace decode_attention {

constexpr int WARPS = 8;  // that share a chunk: team w of them takes the steps w, w + TEAMS, ...
constexpr int HEADS = 8;  // query heads that are worked on together, at most
constexpr int STEP = 16;  // tokens that a team handles at a time
constexpr int MIN_CHUNK = 128;
constexpr int CHUNK_MULTIPLE = 32;
constexpr int MAX_SPLITS = 64;
constexpr float NO_SCORE = -1e30f;

// Warps of a team: they handle the same tokens, each with a part of the values, as one has no registers for rows of
// 512.
template <int D>
constexpr int PARTS = D > 256 ? 2 : 1;
// Values of a token that a warp handles.
template <int D>
constexpr int PART = D / PARTS<D>;
template <int D>
constexpr int TEAMS = WARPS / PARTS<D>;

// Which part is this warp's.
template <int D>
__device__ __forceinline__ int part_of_warp() {
    return threadIdx.x / WARP % PARTS<D>;
}

// How the tokens that are seen are cut: into equal chunks, one for each split, but no smaller than MIN_CHUNK tokens.
struct Chunks {
    int tokens, chunk, count;

    __device__ __forceinline__ Chunks(int tokens, int splits) : tokens(tokens) {
        const int share = (tokens + splits - 1) / splits;
        chunk = max((share + CHUNK_MULTIPLE - 1) / CHUNK_MULTIPLE * CHUNK_MULTIPLE, MIN_CHUNK);
        count = (tokens + chunk - 1) / chunk;
    }
};

// What a head is multiplied with to normalize it; value i * WARP + lane is value[i].
template <int D>
__device__ __forceinline__ float head_scale(const float (&value)[D / WARP], float epsilon) {
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < D / WARP; i++) squares += value[i] * value[i];
    return 1.f / sqrtf(warp_sum(squares) / D + epsilon);
}

// The weights of a norm of heads: of value i * WARP + lane those are [i]. 1 where there is no norm.
template <int D>
__device__ __forceinline__ void load_norm(const float *weights, float (&norm)[D / WARP]) {
#pragma unroll
    for (int i = 0; i < D / WARP; i++) norm[i] = weights ? weights[i * WARP + threadIdx.x % WARP] : 1.f;
}

// The frequency of a head's pair, where it is one that is rotated.
__device__ __forceinline__ double pair_frequency(const AttentionLayer &layer, int pair) {
    return pair < layer.rope_dims / 2 ? layer.frequencies[pair] : 0.;
}

// Normalizes a head (if `normalize`), of which this lane has values i * WARP + lane, and rotates it: pair i * WARP +
// lane by rotation_of(i). By one warp; `row` is float[D] of its own in shared memory.
template <int D, typename RotationOf>
__device__ __forceinline__ void rotate_head(float (&value)[D / WARP], bool normalize, const float (&norm)[D / WARP],
                                            const AttentionLayer &layer, float *row, RotationOf rotation_of) {
    const int lane = threadIdx.x % WARP;
    const float scale = normalize ? head_scale<D>(value, layer.epsilon) : 1.f;
#pragma unroll
    for (int i = 0; i < D / WARP; i++) row[i * WARP + lane] = value[i] * scale * norm[i];
    __syncwarp();
    const int half = layer.rope_dims / 2;
#pragma unroll
    for (int i = 0; i < D / 2 / WARP; i++) {
        const int pair = i * WARP + lane;
        if (pair < half) {
            float &first = row[layer.interleaved ? 2 * pair : pair];
            float &second = row[layer.interleaved ? 2 * pair + 1 : pair + half];
            const float a = first, b = second;
            const float2 by = rotation_of(i);
            first = a * by.x - b * by.y;
            second = a * by.y + b * by.x;
        }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < D / WARP; i++) value[i] = row[i * WARP + lane];
    __syncwarp();
}

// Query heads as matrix fragments in shared memory: for each 16 values the 32 lanes' four registers, high and low parts
// in turn.
template <int D>
struct QueryFragments {
    uint4 lanes[D / 16][WARP];

    // The head whose value i * WARP + lane is value[i], times `scale`. By a warp.
    __device__ __forceinline__ void store(int head, const float (&value)[D / WARP], float scale) {
#pragma unroll
        for (int i = 0; i < D / WARP; i++) store(head, i * WARP + threadIdx.x % WARP, value[i] * scale);
    }
    // Value `d` of head `head`.
    __device__ __forceinline__ void store(int head, int d, float x) {
        const half high = __float2half_rn(x), low = __float2half_rn(x - __half2float(high));
        // Value d of a lane's 8 consecutive ones (of 32) goes to matrix d / 4 % 2, register pair d / 2 % 2.
        half *at =
            reinterpret_cast<half *>(&lanes[d / 32 * 2 + d / 4 % 2][head * 4 + d / 8 % 4]) + d / 2 % 2 * 4 + d % 2;
        at[0] = high;
        at[2] = low;
    }
};

__device__ __forceinline__ uint32_t pack(half low, half high) {
    const half2 both = __halves2half2(low, high);
    return *reinterpret_cast<const uint32_t *>(&both);
}

// What a warp has gathered of its steps, of its part of the values.
template <int D>
struct Gathered {
    float out[PART<D> / 16][4] = {};             // of heads 2t, 2t + 1: values 64 i + 8 g + 2 j, + 1, at [4 i + j]
    float largest = NO_SCORE, exponentials = 0;  // of head g

    // Adds tokens from .. from + STEP, of which those from `end` on do not count. `between` is called when all keys are
    // read; `finish` makes scores of the products, those of head g with tokens 2t, 2t + 1, 8 + 2t and 9 + 2t.
    template <typename Key, typename Between, typename Finish, typename Value>
    __device__ __forceinline__ void add(const QueryFragments<D> &query, int from, int end, Key key, Between between,
                                        Finish finish, Value value) {
        const int lane = threadIdx.x % WARP, t = lane % 4;
        const int first = part_of_warp<D>() * (PART<D> / 16);
        float score[2][4] = {};
#pragma unroll
        for (int c = 0; c < PART<D> / 32; c++) {
            const uint4 a = query.lanes[first + 2 * c][lane], b = query.lanes[first + 2 * c + 1][lane];
#pragma unroll
            for (int tile = 0; tile < 2; tile++) {
                const uint4 k = key(tile, c);
                mma(score[tile], {a.x, a.y, a.z, a.w}, k.x, k.y);
                mma(score[tile], {b.x, b.y, b.z, b.w}, k.z, k.w);
            }
        }
        between();

        float probability[4];
#pragma unroll
        for (int i = 0; i < 4; i++) probability[i] = score[i / 2][i % 2] + score[i / 2][2 + i % 2];
        finish(probability);
        float top = largest;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int token = from + i / 2 * 8 + t * 2 + i % 2;
            if (token >= end) probability[i] = NO_SCORE;
            top = fmaxf(top, probability[i]);
        }
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
        const float shrink = exp2f(largest - top);
        largest = top;
        exponentials *= shrink;
        half high[4], low[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            probability[i] = exp2f(probability[i] - top);
            exponentials += probability[i];
            high[i] = __float2half_rn(probability[i]);
            low[i] = __float2half_rn(probability[i] - __half2float(high[i]));
        }
        const uint32_t high0 = pack(high[0], high[1]), high1 = pack(high[2], high[3]);
        const uint32_t low0 = pack(low[0], low[1]), low1 = pack(low[2], low[3]);
        const float shrink0 = __shfl_sync(~0u, shrink, t * 8), shrink1 = __shfl_sync(~0u, shrink, t * 8 + 4);
#pragma unroll
        for (int c = 0; c < PART<D> / 64; c++) {
            uint32_t word[4][4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const uint4 v = value(c, i);
                word[i][0] = v.x, word[i][1] = v.y, word[i][2] = v.z, word[i][3] = v.w;
            }
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float (&o)[4] = out[4 * c + j];
                o[0] *= shrink0, o[1] *= shrink1, o[2] *= shrink0, o[3] *= shrink1;
                const uint32_t a0 = __byte_perm(word[0][j], word[1][j], 0x5410),
                               a1 = __byte_perm(word[0][j], word[1][j], 0x7632);
                const uint32_t a2 = __byte_perm(word[2][j], word[3][j], 0x5410),
                               a3 = __byte_perm(word[2][j], word[3][j], 0x7632);
                mma(o, {a0, a1, a2, a3}, high0, high1);
                mma(o, {a0, a1, a2, a3}, low0, low1);
            }
        }
    }
};

// How the warps of a team add up their parts of scores: in two places in turn, so that one barrier a step is enough.
struct Exchange {
    float4 scores[2][WARPS][WARP];

    // Barriers 0 and 1 are those of all threads, and of the step kernel's consumers.
    __device__ __forceinline__ void operator()(float (&score)[4], int step) {
        constexpr int FIRST_BARRIER = 2;
        const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
        scores[step % 2][warp][lane] = {score[0], score[1], score[2], score[3]};
        asm volatile("bar.sync %0, %1;" ::"r"(FIRST_BARRIER + warp / 2), "n"(2 * WARP) : "memory");
        const float4 other = scores[step % 2][warp ^ 1][lane];
        score[0] += other.x, score[1] += other.y, score[2] += other.z, score[3] += other.w;
    }
};

// The sums of the teams, in shared memory.
template <int D>
struct TeamSums {
    float largest[WARPS][HEADS], exponentials[WARPS][HEADS];
    float top[HEADS], all[HEADS];  // of each head: the greatest score, and the sum of exponentials relative to it
    float *out;                    // (D + 2, heads that are joined together, TEAMS), at a multiple of 16 bytes

    // Where row `row` of `out` begins: at a multiple of 16 bytes, and so that lanes with different heads meet different
    // banks.
    __device__ __forceinline__ float *at(int row) const { return out + row * D + (row + 1) / 2 * 4; }

    // Tells the other teams what this one, one of the first `teams`, has gathered, and finds what its sums of heads 2t
    // and 2t + 1 count. `sync` is a barrier of all threads.
    template <typename Sync>
    __device__ __forceinline__ void weigh(Gathered<D> &gathered, int teams, Sync sync, float (&factor)[2]) {
        const int team = threadIdx.x / WARP / PARTS<D>, part = part_of_warp<D>();
        const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
        if (team < teams) {
            float &sum = gathered.exponentials;
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            if (t == 0 && part == 0) {
                largest[team][g] = gathered.largest;
                exponentials[team][g] = sum;
            }
        }
        sync();
        if (team >= teams) return;
        // Lane `head` (of 8, four times over) has the sums of that head.
        const int head = lane % HEADS;
        float greatest = NO_SCORE, sum = 0.f;
#pragma unroll
        for (int w = 0; w < TEAMS<D>; w++) {
            if (w < teams) greatest = fmaxf(greatest, largest[w][head]);
        }
        if (team == 0 && part == 0) {
#pragma unroll
            for (int w = 0; w < TEAMS<D>; w++) {
                if (w < teams) sum += exponentials[w][head] * exp2f(largest[w][head] - greatest);
            }
            if (lane < HEADS) top[head] = greatest, all[head] = sum;
        }
        const float own = exp2f(largest[team][head] - greatest);
        factor[0] = __shfl_sync(~0u, own, 2 * t), factor[1] = __shfl_sync(~0u, own, 2 * t + 1);
    }

    // Puts this team's sums of heads first .. first + joined into its rows of `out`: team * joined and those behind.
    __device__ __forceinline__ void put(const Gathered<D> &gathered, const float (&factor)[2], int first,
                                        int joined) const {
        const int team = threadIdx.x / WARP / PARTS<D>;
        const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int head = 2 * t + i;
            if (head < first || head >= first + joined) continue;
            float *to = at(team * joined + head - first) + part_of_warp<D>() * PART<D> + g * 8;
#pragma unroll
            for (int j = 0; j < PART<D> / 16; j++) {
                *reinterpret_cast<float2 *>(to + j / 4 * 64 + j % 4 * 2) = {gathered.out[j][i] * factor[i],
                                                                            gathered.out[j][2 + i] * factor[i]};
            }
        }
    }
};

// What each chunk's sums count in a head's: of[i] in a lane is that of chunk i * WARP + lane.
struct ChunkWeights {
    float of[MAX_SPLITS / WARP];

    // Of each chunk the greatest score and the sum of exponentials; NO_SCORE and 0 where there is none.
    __device__ __forceinline__ ChunkWeights(const float (&tops)[MAX_SPLITS / WARP],
                                            const float (&sums)[MAX_SPLITS / WARP]) {
        float top = NO_SCORE;
#pragma unroll
        for (int i = 0; i < MAX_SPLITS / WARP; i++) top = fmaxf(top, tops[i]);
        top = warp_max(top);
        float all = 0.f;
#pragma unroll
        for (int i = 0; i < MAX_SPLITS / WARP; i++) all += sums[i] * exp2f(tops[i] - top);
        all = warp_sum(all);
#pragma unroll
        for (int i = 0; i < MAX_SPLITS / WARP; i++) of[i] = exp2f(tops[i] - top) / all;
    }
};

}  // namespace decode_attention
