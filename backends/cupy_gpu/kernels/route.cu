// route: the experts of each token and their weights (npllm.blocks.moe.route), from logits [M, E]; a warp a token.
//
// Macros: EXPERTS, CHOICES; SIGMOID scores, else softmax; ranks are BY_LOGITS, else by scores; with a CORRECTION; of GROUPS
// only the KEPT best, judged by their best expert, or the two best of a PAIR; NORMALISE.
#include "common.cuh"

// Keys are in the order of their floats, -0 with that of 0; NaN is below all numbers, and below it is what has been taken.
#define TAKEN 0u
__device__ __forceinline__ u32 key_of(float x) {
    u32 bits = __float_as_uint(x);
    if (isnan(x)) return 1u;
    return bits & 0x80000000u ? 0u - bits : bits | 0x80000000u;
}

// The place of the largest key, the lowest of equal ones, in every lane; it is taken.
__device__ int take_best(u32 *keys, int count) {
    u32 key = TAKEN;
    int place = count;
    for (int i = LANE; i < count; i += 32)
        if (keys[i] > key) key = keys[i], place = i;
    for (int step = 16; step; step >>= 1) {
        u32 other = __shfl_xor_sync(FULL, key, step);
        int there = __shfl_xor_sync(FULL, place, step);
        if (other > key || (other == key && there < place)) key = other, place = there;
    }
    if (LANE == 0) keys[place] = TAKEN;
    __syncwarp();
    return place;
}

__device__ __forceinline__ void score(const float *logits, float *scores) {
#if SIGMOID
    // NaN stays one.
    for (int e = LANE; e < EXPERTS; e += 32) scores[e] = 1.0f / (1.0f + expf(logits[e] < -88.0f ? 88.0f : -logits[e]));
#else
    float top = -INFINITE, sum = 0;
    for (int e = LANE; e < EXPERTS; e += 32) top = fmaxf(top, logits[e]);
    top = warp_max(top);
    for (int e = LANE; e < EXPERTS; e += 32) sum += scores[e] = expf(logits[e] - top);
    sum = warp_sum(sum);
    for (int e = LANE; e < EXPERTS; e += 32) scores[e] /= sum;
#endif
    __syncwarp();
}

#if GROUPS != KEPT
// Experts of all but the best groups rank -inf.
__device__ __forceinline__ void close_groups(const float *ranks, u32 *keys, u32 *worth) {
    const int size = EXPERTS / GROUPS;
    for (int g = LANE; g < GROUPS; g += 32) {
        const float *group = ranks + g * size;
        int best = 0, second = -1;
        for (int i = 1; i < size; i++) {
            if (key_of(group[i]) > key_of(group[best])) second = best, best = i;
            else if (second < 0 || key_of(group[i]) > key_of(group[second])) second = i;
        }
        worth[g] = key_of(PAIR && second >= 0 ? group[best] + group[second] : group[best]);
    }
    __syncwarp();
    for (int i = 0; i < KEPT; i++) take_best(worth, GROUPS);
    for (int e = LANE; e < EXPERTS; e += 32)
        if (worth[e / size] != TAKEN) keys[e] = key_of(-INFINITE);
    __syncwarp();
}
#endif

extern "C" __global__ void __launch_bounds__(32)
route(const float *logits_ME, const float *correction_E, i64 *index_MC, float *weight_MC, float floor, float scale) {
    __shared__ float scores[EXPERTS], ranks[EXPERTS];
    __shared__ u32 keys[EXPERTS];
#if GROUPS != KEPT
    __shared__ u32 worth[GROUPS];
#endif
    wait_for_inputs();
    i64 m = blockIdx.x;
    const float *logits = logits_ME + m * EXPERTS;
    score(logits, scores);
    for (int e = LANE; e < EXPERTS; e += 32) {
        ranks[e] = (BY_LOGITS ? logits[e] : scores[e]) + (CORRECTION ? correction_E[e] : 0.0f);
        keys[e] = key_of(ranks[e]);
    }
    __syncwarp();
#if GROUPS != KEPT
    close_groups(ranks, keys, worth);
#endif
    float sum = 0;
    for (int c = 0; c < CHOICES; c++) {
        int e = take_best(keys, EXPERTS);
        sum += scores[e];
        if (LANE == 0) index_MC[m * CHOICES + c] = e, weight_MC[m * CHOICES + c] = scores[e];
    }
    __syncwarp();
    for (int c = LANE; c < CHOICES; c += 32) {
        float weight = weight_MC[m * CHOICES + c];
        weight_MC[m * CHOICES + c] = (NORMALISE ? weight / (sum + floor) : weight) * scale;
    }
}
