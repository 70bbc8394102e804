// Rotary embeddings (npllm.blocks.rope).
#include "turn.cuh"

// Cosines and sines [tokens, pairs] of position * frequency, times `scale`.
extern "C" __global__ void angles(
    const i64 *positions, i64 tokens, const float *frequencies, i64 pairs, float scale, float *cosines, float *sines) {
    wait_for_inputs();
    release_dependents();
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= tokens * pairs) return;
    float phase = (float)positions[i / pairs] * frequencies[i % pairs];
    cosines[i] = cosf(phase) * scale;
    sines[i] = sinf(phase) * scale;
}

// Heads of `width` numbers, `token_step` and `head_step` numbers apart, turned -> [tokens, heads, width]. A thread a number.
extern "C" __global__ void rotate(
    const float *x, i64 token_step, i64 head_step, i64 tokens, i64 heads, i64 width, const float *cosines, const float *sines,
    i64 pairs, i64 interleaved, float *out) {
    wait_for_inputs();
    release_dependents();
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= tokens * heads * width) return;
    i64 token = i / (heads * width), head = i / width % heads;
    const float *from = x + token * token_step + head * head_step;
    out[i] = turned([=](int k) { return from[k]; }, (int)(i % width), cosines + token * pairs, sines + token * pairs, (int)pairs,
                    interleaved);
}
