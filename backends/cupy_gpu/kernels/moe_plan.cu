// moe, many tokens: choices sorted by expert, in their order, so that a tile of products has one expert; in the end, sums.
#include "common.cuh"

#define THREADS 256
#define WARPS (THREADS / 32)

// How many choices each expert has; a block an expert.
extern "C" __global__ void __launch_bounds__(THREADS) moe_count(const i64 *index, i64 choices, i64 *counts) {
    __shared__ float room[WARPS];
    wait_for_inputs();
    release_dependents();
    // Below 2^24, numbers are exact in float.
    float mine = 0;
    for (i64 i = threadIdx.x; i < choices; i += THREADS) mine += index[i] == blockIdx.x ? 1.0f : 0.0f;
    float all = block_sum(mine, room);
    if (threadIdx.x == 0) counts[blockIdx.x] = (i64)all;
}

// Where choices go: those of an expert lie side by side in whole tiles of `tile` places, the last one filled up with -1. Of
// each of `tiles` tiles, its expert, or -1 behind the last. A block an expert; its threads take choices in turn, so that
// each keeps the order.
extern "C" __global__ void __launch_bounds__(THREADS, 1) moe_place(
    const i64 *index, i64 choices, const i64 *counts, i64 experts, i64 tile, i64 tiles, i64 *order, i64 *owners) {
    __shared__ int before[WARPS];
    i64 expert = blockIdx.x;
    wait_for_inputs();
    release_dependents();
    i64 first = 0;
    for (i64 e = 0; e < expert; e++) first += (counts[e] + tile - 1) / tile;
    i64 mine = (counts[expert] + tile - 1) / tile, placed = first * tile;
    for (i64 t = threadIdx.x; t < mine; t += THREADS) owners[first + t] = expert;
    if (expert == experts - 1)
        for (i64 t = first + mine + threadIdx.x; t < tiles; t += THREADS) owners[t] = -1;
    for (i64 i = placed + counts[expert] + threadIdx.x; i < (first + mine) * tile; i += THREADS) order[i] = -1;
    for (i64 base = 0; base < choices; base += THREADS) {
        i64 i = base + threadIdx.x;
        bool is = i < choices && index[i] == expert;
        u32 lanes = __ballot_sync(FULL, is);
        if (LANE == 0) before[WARP] = __popc(lanes);
        __syncthreads();
        int ahead = __popc(lanes & ((1u << LANE) - 1)), all = 0;
        for (int w = 0; w < WARPS; w++) {
            if (w < WARP) ahead += before[w];
            all += before[w];
        }
        if (is) order[placed + ahead] = i;
        placed += all;
        __syncthreads();
    }
}

// `residual` plus what was said of each choice [M C, D], weighted -> [M, D]. Choices are added in their order; without
// `weights` each counts 1, and those of no expert have said nothing. A thread a number.
extern "C" __global__ void __launch_bounds__(THREADS) moe_sum(
    const float *said, i64 tokens, i64 choices, i64 width, i64 experts, const i64 *index, const float *weights,
    const float *residual, float *out) {
    wait_for_inputs();
    release_dependents();
    i64 i = (i64)blockIdx.x * THREADS + threadIdx.x;
    if (i >= tokens * width) return;
    i64 token = i / width, n = i % width;
    float sum = 0;
    for (i64 choice = token * choices; choice < (token + 1) * choices; choice++)
        if (0 <= index[choice] && index[choice] < experts)
            sum += said[choice * width + n] * (weights ? weights[choice] : 1.0f);
    out[i] = residual ? residual[i] + sum : sum;
}
