// A whole decode step as one kernel: from the token in device memory to its logits, to the same bits as the kernels
// that do the same one by one (embed.cu, gemv*.cu, decode_attention.cu).
//
// Bound: the bytes of all weights and of the cached keys and values, each read once. What the separate kernels lose is
// the time between them, in which the memory idles; here one thread a block streams the weights of all stages in order,
// and so runs ahead of what is being computed.
//
// Grid: one block a multiprocessor, all of them running at once (a cooperative launch), each CONSUMERS warps and one
// that produces. The stages are data, written by the host (src/cuda/step.rs): the kernel is one loop over them. A stage
// waits for the packets of its input, multiplies, and puts its output as packets: no barrier is between blocks.
//
// Dynamic shared memory: the ring; the block's part of the residual stream; then what products take, or attention, as
// StepParams places it.

// Older devices lack what it takes, and are not asked to run it.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

#include "step/run.cuh"

#define ENTRY_POINT(D)                                                                                               \
    extern "C" __global__ void __launch_bounds__(step::THREADS, 1) step_d##D(const __grid_constant__ StepParams p) { \
        step::run<D>(p);                                                                                             \
    }
ENTRY_POINT(64)
ENTRY_POINT(128)
ENTRY_POINT(256)
#endif
