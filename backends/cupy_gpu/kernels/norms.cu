// Norms of rows: RMS, and LayerNorm where there is a shift (npllm.blocks.norms). Macros: WIDE, a block per row instead of a warp.
#include "common.cuh"

#define THREADS 128

#if WIDE
#define EACH THREADS
#define SUM(x) block_sum(x, room)
#else
#define EACH 32
#define SUM(x) warp_sum(x)
#endif

extern "C" __global__ void __launch_bounds__(THREADS) norm_rows(
    const float *x, i64 rows, i64 width, i64 layer, const float *gain, const float *shift, float eps, float offset, float *out) {
    wait_for_inputs();
    release_dependents();
#if WIDE
    __shared__ float room[THREADS / 32];
    i64 row = blockIdx.x;
    int first = threadIdx.x;
#else
    i64 row = (i64)blockIdx.x * (THREADS / 32) + WARP;
    int first = LANE;
    if (row >= rows) return;
#endif
    const float *from = x + row * width;
    float mean = 0, squares = 0;
    if (layer) {
        for (int k = first; k < width; k += EACH) mean += from[k];
        mean = SUM(mean) / (float)width;
    }
    for (int k = first; k < width; k += EACH) squares = fmaf(from[k] - mean, from[k] - mean, squares);
    float scale = 1.0f / sqrtf(SUM(squares) / (float)width + eps);
    for (int k = first; k < width; k += EACH) {
        float y = (from[k] - mean) * scale;
        if (gain) y *= offset + gain[k];
        if (layer) y += shift[k];
        out[row * width + k] = y;
    }
}
