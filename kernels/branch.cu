// What a layer adds to the residual stream where it is normalized or scaled first:
//
//   x = (x + rms_norm(branch)) * scale      (the norm where the model has one)
//
// add_branch: of one token, the squares summed up by groups of 32 values as the step kernel does (step.cu), and x *
// (the next norm's weights), quantized, for the product behind it, as gemv.cuh's ADD does. add_branch_tokens: of the
// tokens of a chunk.
//
// Bound: latency for one token, else bytes. Grid: add_branch a thread a value, 256 a block, each of which sums up all
// squares; add_branch_tokens a block of whole warps a token, best with a thread for 4 values.
#include "token_tiles.cuh"

namespace {

constexpr int AT_ONCE = 12;            // groups of 32 values that a warp of add_branch loads together
constexpr int GROUPS_TOGETHER = 1024;  // whose sums are in shared memory at a time, a multiple of 32

// The sum of the squares of `groups` groups of 32 values: of each group by itself, then lane i adds those of groups i,
// i + 32, ..., as the step kernel does. By a whole block.
__device__ __forceinline__ float squares_by_groups(const float *x, int groups) {
    __shared__ float of_group[GROUPS_TOGETHER];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    float sum = 0.f;
    for (int begin = 0; begin < groups; begin += GROUPS_TOGETHER) {
        const int end = min(begin + GROUPS_TOGETHER, groups);
        // All loads of a batch are on their way before the first one is needed.
        for (int first = begin + warp; first < end; first += AT_ONCE * warps) {
            float value[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                const int group = first + i * warps;
                value[i] = group < end ? x[group * ACTIVATION_GROUP + lane] : 0.f;
            }
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                const float squares = warp_sum(value[i] * value[i]);
                const int group = first + i * warps;
                if (lane == 0 && group < end) of_group[group - begin] = squares;
            }
        }
        __syncthreads();
        for (int group = begin + lane; group < end; group += WARP) sum += of_group[group - begin];
        __syncthreads();
    }
    return warp_sum(sum);
}

template <bool ALIGNED>
__device__ __forceinline__ void add_tokens(const AddBranchTokensParams &p) {
    launch_dependents();
    wait_for_predecessor();
    const int columns = p.columns, first = threadIdx.x * 4, stride = blockDim.x * 4;
    const float *branch = p.branch + size_t(blockIdx.x) * columns;
    float *x = p.x + size_t(blockIdx.x) * columns;
    const auto value = [&](int c) {
        const float4 v = load4<ALIGNED>(branch, c, columns);
        return float4{v.x * p.factor, v.y * p.factor, v.z * p.factor, v.w * p.factor};
    };
    float factor = 1.f;
    if (p.norm) {
        float squares = 0.f;
        for (int c = first; c < columns; c += stride) squares += squares_of(value(c));
        factor = 1.f / sqrtf(block_sum(squares) / columns + p.epsilon);
    }
    for (int c = first; c < columns; c += stride) {
        const float4 v = value(c), old = load4<ALIGNED>(x, c, columns);
        const float4 w = p.norm ? load4<ALIGNED>(p.norm, c, columns) : float4{1.f, 1.f, 1.f, 1.f};
        const float sum[4] = {(old.x + v.x * factor * w.x) * p.scale, (old.y + v.y * factor * w.y) * p.scale,
                              (old.z + v.z * factor * w.z) * p.scale, (old.w + v.w * factor * w.w) * p.scale};
        for (int i = 0; i < 4 && c + i < columns; i++) x[c + i] = sum[i];
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(256) add_branch(const __grid_constant__ AddBranchParams p) {
    const int column = blockIdx.x * blockDim.x + threadIdx.x;
    const bool exists = column < p.columns;
    // No kernel writes them.
    const float weight = p.norm && exists ? p.norm[column] : 1.f;
    const float next = p.next_norm && exists ? p.next_norm[column] : 1.f;
    launch_dependents();
    wait_for_predecessor();
    float x = exists ? p.x[column] : 0.f;
    if (p.branch) {
        const float own = exists ? p.branch[column] : 0.f;
        float factor = 1.f;
        if (p.norm) {
            factor = 1.f / sqrtf(squares_by_groups(p.branch, p.columns / ACTIVATION_GROUP) / p.columns + p.epsilon);
        }
        if (exists) x = fmaf(own * factor, weight, x) * p.scale;
    }
    if (!exists) return;
    p.x[column] = x;
    const int group = column / ACTIVATION_GROUP;
    store_group(p.next, group, x * next);
    const float squares = warp_sum(x * x);
    if (threadIdx.x % WARP == 0) p.next_squares[group] = squares;
}
extern "C" __global__ void __launch_bounds__(1024) add_branch_tokens(const __grid_constant__ AddBranchTokensParams p) {
    if (p.columns % 4 == 0) {
        add_tokens<true>(p);
    } else {
        add_tokens<false>(p);
    }
}
