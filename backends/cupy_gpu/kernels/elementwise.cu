// What treats every number of its result alike.
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

// Of each token `x[n] + sum over j of mixing[n, j] x[j]`, over its streams.
extern "C" __global__ void mix_streams(const float *x, const float *mixing, i64 tokens, i64 streams, i64 width, float *out) {
    wait_for_inputs();
    release_dependents();
    i64 token = streams * width, count = tokens * token;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (i64)gridDim.x * blockDim.x) {
        const float *from = x + i / token * token + i % width, *row = mixing + i / width * streams;
        float sum = 0.0f;
        for (i64 j = 0; j < streams; j++) sum += row[j] * from[j * width];
        out[i] = sum + x[i];
    }
}
