// Latents (npllm.blocks.mla): the keys and values of all heads made of them.
#include "common.cuh"

// Keys `[W_k c | k_rope]` and values `W_v c` of all heads, from products [S, H, nope + value] and latents `latent_step`
// numbers apart, whose last `turning` are k_rope; a thread a number.
extern "C" __global__ void place_keys(
    const float *up, i64 keys, i64 heads, i64 nope, i64 value, const float *shared, i64 latent_step, i64 turning, float *k_out,
    float *v_out) {
    wait_for_inputs();
    release_dependents();
    i64 width = nope + value + turning, i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= keys * heads * width) return;
    i64 n = i % width, which = i / width;
    const float *from = up + which * (nope + value);
    if (n < nope) k_out[which * (nope + turning) + n] = from[n];
    else if (n < nope + turning) k_out[which * (nope + turning) + n] = shared[which / heads * latent_step + n - nope];
    else v_out[which * value + n - nope - turning] = from[n - turning];
}
