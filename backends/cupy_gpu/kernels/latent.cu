// Latents (npllm.blocks.mla): what is cached of a token, and the keys of all heads made of it.
#include "common.cuh"

#define THREADS 128

// `[norm(c) | rope(k)]` from rows `[c | k]` of `latent` and `turning` numbers; a block a token.
extern "C" __global__ void __launch_bounds__(THREADS) norm_and_turn(
    const float *down, i64 latent, i64 turning, const float *gain, float eps, const float *cosines, const float *sines,
    i64 pairs, i64 interleaved, float *out) {
    __shared__ float room[THREADS / 32];
    wait_for_inputs();
    release_dependents();
    i64 m = blockIdx.x, width = latent + turning;
    const float *c = down + m * width, *k = c + latent;
    float *y = out + m * width, squares = 0;
    for (int l = threadIdx.x; l < latent; l += THREADS) squares = fmaf(c[l], c[l], squares);
    float scale = 1.0f / sqrtf(block_sum(squares, room) / (float)latent + eps);
    for (int l = threadIdx.x; l < latent; l += THREADS) y[l] = c[l] * scale * gain[l];
    for (int i = threadIdx.x; i < turning; i += THREADS) {
        if (i >= 2 * pairs) {
            y[latent + i] = k[i];
            continue;
        }
        bool second = interleaved ? i & 1 : i >= pairs;
        int pair = (int)(interleaved ? i >> 1 : i - (second ? pairs : 0)), step = (int)(interleaved ? 1 : pairs);
        float cosine = cosines[m * pairs + pair], sine = sines[m * pairs + pair], other = k[second ? i - step : i + step];
        y[latent + i] = second ? k[i] * cosine + other * sine : k[i] * cosine - other * sine;
    }
}

// Keys `[W_k c | k_rope]` and values `W_v c` of all heads, from products [S, H, nope + value] and latents `latent_step` numbers
// apart, whose last `turning` are k_rope; a thread a number.
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
