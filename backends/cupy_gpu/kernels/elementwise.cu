// What stands between products of many tokens.
#include "activations.cuh"

// `act(gate) * up`, or `act(gate)` without `up`.
extern "C" __global__ void gated(const float *gate, const float *up, i64 act, i64 count, float *out) {
    wait_for_inputs();
    release_dependents();
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (i64)gridDim.x * blockDim.x)
        out[i] = activate((int)act, gate[i]) * (up ? up[i] : 1.0f);
}
