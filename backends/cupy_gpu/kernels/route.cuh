// The experts of a token and their weights (npllm.blocks.moe.route), by a warp.
#include "common.cuh"

// npllm.blocks.moe.Router: scores are sigmoids, else a softmax; logits are ranked, else scores; of `groups` only the `kept`
// best take part, judged by their best expert, or the two best of a pair; weights are normalised.
struct Rule {
    i64 experts, choices, sigmoid, by_logits, groups, kept, pair, normalise;
};

// Keys are in the order of their floats, -0 with that of 0; NaN is below all numbers, and below it is what has been taken.
#define TAKEN 0u
__device__ __forceinline__ u32 key_of(float x) {
    u32 bits = __float_as_uint(x);
    if (isnan(x)) return 1u;
    return bits & 0x80000000u ? 0u - bits : bits | 0x80000000u;
}

// The place of the largest key, the lowest of equal ones, in every lane; it is taken. A lane touches every 32nd key only.
__device__ __forceinline__ int take_best(u32 *keys, int count) {
    u32 key = TAKEN;
    int place = count;
    for (int i = LANE; i < count; i += 32)
        if (keys[i] > key) key = keys[i], place = i;
    for (int step = 16; step; step >>= 1) {
        u32 other = __shfl_xor_sync(FULL, key, step);
        int there = __shfl_xor_sync(FULL, place, step);
        if (other > key || (other == key && there < place)) key = other, place = there;
    }
    if (LANE == place % 32) keys[place] = TAKEN;
    return place;
}

__device__ __forceinline__ void score(const float *logits, int experts, bool sigmoid, float *scores) {
    if (sigmoid) {
        // NaN stays one.
        for (int e = LANE; e < experts; e += 32) scores[e] = 1.0f / (1.0f + expf(logits[e] < -88.0f ? 88.0f : -logits[e]));
        return;
    }
    float top = -INFINITE, sum = 0;
    for (int e = LANE; e < experts; e += 32) top = fmaxf(top, logits[e]);
    top = warp_max(top);
    for (int e = LANE; e < experts; e += 32) sum += scores[e] = expf(logits[e] - top);
    sum = warp_sum(sum);
    for (int e = LANE; e < experts; e += 32) scores[e] /= sum;
}

// The key of what a group is worth.
__device__ __forceinline__ u32 worth_of(const float *group, int size, bool pair) {
    int best = 0, second = -1;
    for (int i = 1; i < size; i++) {
        if (key_of(group[i]) > key_of(group[best])) second = best, best = i;
        else if (second < 0 || key_of(group[i]) > key_of(group[second])) second = i;
    }
    return key_of(pair && second >= 0 ? group[best] + group[second] : group[best]);
}

// Experts of all but the best groups rank -inf.
__device__ __forceinline__ void close_groups(const Rule &rule, const float *ranks, u32 *keys, u32 *worth) {
    int size = (int)(rule.experts / rule.groups);
    for (int g = LANE; g < rule.groups; g += 32) worth[g] = worth_of(ranks + g * size, size, rule.pair);
    for (int i = 0; i < rule.kept; i++) take_best(worth, (int)rule.groups);
    __syncwarp();
    for (int e = LANE; e < rule.experts; e += 32)
        if (worth[e / size] != TAKEN) keys[e] = key_of(-INFINITE);
}

// Numbers of shared memory that a warp works in: scores, ranks and keys of all experts, and what groups are worth.
__device__ __forceinline__ i64 room_of(const Rule &rule) { return 3 * rule.experts + rule.groups; }

// From a token's logits, its experts and their weights. A lane reads and writes what is of every 32nd expert, but for what
// groups are worth and the scores of experts that were chosen.
__device__ __forceinline__ void choose(
    const float *logits, const float *correction, const Rule &rule, float floor, float scale, float *room, i64 *index,
    float *weight) {
    int E = (int)rule.experts, C = (int)rule.choices;
    float *scores = room, *ranks = scores + E;
    u32 *keys = (u32 *)(ranks + E), *worth = keys + E;
    score(logits, E, rule.sigmoid, scores);
    for (int e = LANE; e < E; e += 32) {
        ranks[e] = (rule.by_logits ? logits[e] : scores[e]) + (correction ? correction[e] : 0.0f);
        keys[e] = key_of(ranks[e]);
    }
    __syncwarp();
    if (rule.groups != rule.kept) close_groups(rule, ranks, keys, worth);
    float sum = 0;
    for (int c = 0; c < C; c++) {
        int e = take_best(keys, E);
        sum += scores[e];
        if (LANE == 0) index[c] = e, ranks[c] = scores[e];
    }
    __syncwarp();
    for (int c = LANE; c < C; c += 32) weight[c] = (rule.normalise ? ranks[c] / (sum + floor) : ranks[c]) * scale;
}
