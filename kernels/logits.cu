// What becomes of logits behind their product: logit = softcap * tanh(logit / softcap), and one value for all tokens
// that the model never gives.
//
// Bound: bytes; each logit is read and written once. Grid: a thread a logit, 256 a block along x; tokens along y.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(256) finish_logits(const __grid_constant__ FinishLogitsParams p) {
    launch_dependents();
    wait_for_predecessor();
    const int token = blockIdx.x * blockDim.x + threadIdx.x;
    if (token >= p.vocabulary) return;
    float &logit = p.logits[size_t(blockIdx.y) * p.vocabulary + token];
    float value = logit;
    if (p.softcap != 0.f) value = p.softcap * tanhf(value / p.softcap);
    for (int i = 0; i < p.suppressed_count; i++) {
        if (p.suppressed[i] == token) value = p.suppressed_logit;
    }
    logit = value;
}
