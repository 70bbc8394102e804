// Norms of rows (npllm.blocks.norms), `residual + norm(x)` where there is one. Macros: WIDE, a block a row, not a warp.
#include "source.cuh"

#if WIDE
#define THREADS 512
#define EACH THREADS
#define SUM(x) block_sum(x, room)
#else
#define THREADS 128
#define EACH 32
#define SUM(x) warp_sum(x)
#endif

extern "C" __global__ void __launch_bounds__(THREADS) norm_rows(SOURCE, const float *residual, float *out) {
    wait_for_inputs();
    release_dependents();
#if WIDE
    __shared__ float room[THREADS / 32];
    i64 row = blockIdx.x;
    int first = threadIdx.x;
#else
    i64 row = (i64)blockIdx.x * (THREADS / 32) + WARP;
    int first = LANE;
    if (row >= tokens) return;
#endif
    const float *from = x + row * stride;
    float mean = 0, squares = 0;
    if (norm == LAYER) {
        for (int k = first; k < width; k += EACH) mean += from[k];
        mean = SUM(mean) / (float)width;
    }
    for (int k = first; k < width; k += EACH) squares = fmaf(from[k] - mean, from[k] - mean, squares);
    float scale = 1.0f / sqrtf(SUM(squares) / (float)width + eps);
    for (int k = first; k < width; k += EACH) {
        float y = (from[k] - mean) * scale;
        if (gain) y *= offset + gain[k];
        if (norm == LAYER) y += shift[k];
        if (residual) y += residual[row * width + k];
        out[row * width + k] = y;
    }
}
