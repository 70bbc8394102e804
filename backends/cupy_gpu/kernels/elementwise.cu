// What stands between products of many tokens.
#include "activations.cuh"

// Numbers as bf16.
extern "C" __global__ void halve(const float *x, i64 count, u16 *out) {
    wait_for_inputs();
    release_dependents();
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (i64)gridDim.x * blockDim.x)
        out[i] = (u16)float_to_bf16(x[i]);
}

// `act(gate) * up`, or `act(gate)` without `up`.
extern "C" __global__ void gated(const float *gate, const float *up, i64 act, i64 count, float *out) {
    wait_for_inputs();
    release_dependents();
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (i64)gridDim.x * blockDim.x)
        out[i] = activate((int)act, gate[i]) * (up ? up[i] : 1.0f);
}
