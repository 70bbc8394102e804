// New queries and keys from their projections to where attention reads them: norms, RoPE, and the places of keys and values
// in a cache. Macros: STORED (F32 or BF16: what the cache holds).
#include "keys.cuh"
#include "turn.cuh"

#define THREADS 128
#define WARPS (THREADS / 32)

// Heads [tokens, count, width], tokens and heads so many numbers apart, and the RMS norm over each; without a gain it is 1.
struct Heads {
    const float *x;
    i64 token_step, head_step, count, width, normed;
    const float *gain;
    float eps, offset;
};
#define HEADS(x)                                                                                                       \
    const float *x, i64 x##_token_step, i64 x##_head_step, i64 x##_count, i64 x##_width, i64 x##_normed, const float *x##_gain, \
        float x##_eps, float x##_offset
#define HEADS_GIVEN(x) {x, x##_token_step, x##_head_step, x##_count, x##_width, x##_normed, x##_gain, x##_eps, x##_offset}

__device__ __forceinline__ void store(void *storage, i64 at, float x) {
#if STORED == BF16
    ((u16 *)storage)[at] = (u16)float_to_bf16(x);
#else
    ((float *)storage)[at] = x;
#endif
}

// A block takes a token and WARPS heads of queries, of keys or of values; a warp a head. `whole`: the norms of queries and
// of keys run over all heads of a token; `late`: they stand after RoPE. Queries go to [tokens, heads, width], times `scale`
// of their token; keys and values to storage [slots, heads, size, width]. Shared memory: the numbers of WARPS heads.
extern "C" __global__ void __launch_bounds__(THREADS) place_heads(
    const i64 *plan, i64 rows, HEADS(q), HEADS(k), HEADS(v), i64 whole, i64 late, const float *cosines, const float *sines,
    i64 pairs, i64 interleaved, const float *scale, i64 size, float *q_out, void *k_storage, void *v_storage) {
    DYNAMIC_SHARED(room);
    __shared__ float sums[WARPS];
    wait_for_inputs();
    release_dependents();
    i64 token = blockIdx.x, block = blockIdx.y, q_blocks = (q_count + WARPS - 1) / WARPS, k_blocks = (k_count + WARPS - 1) / WARPS;
    bool queries = block < q_blocks, values = block >= q_blocks + k_blocks;
    Heads of = HEADS_GIVEN(v);
    if (queries) of = HEADS_GIVEN(q);
    else if (!values) of = HEADS_GIVEN(k);
    i64 head = (block - (queries ? 0 : values ? q_blocks + k_blocks : q_blocks)) * WARPS + WARP;
    bool present = head < of.count;
    int width = (int)of.width, turning = values ? 0 : (int)pairs;
    const float *first = of.x + token * of.token_step, *cosine = cosines + token * pairs, *sine = sines + token * pairs;
    float *mine = (float *)room + WARP * width, squares = 0;
    for (int n = LANE; present && n < width; n += 32) {
        float x = first[head * of.head_step + n];
        mine[n] = x;
        squares = fmaf(x, x, squares);
    }
    __syncwarp();
    auto raw = [=](int n) { return mine[n]; };
    const bool before = of.normed && (values || !late), after = of.normed && !before;
    float inverse = 1;
    const float *gain = of.gain;
    if (before && whole && !values) {
        squares = 0;
        for (i64 i = threadIdx.x; i < of.count * width; i += THREADS) {
            float x = first[i / width * of.head_step + i % width];
            squares = fmaf(x, x, squares);
        }
        inverse = 1.0f / sqrtf(block_sum(squares, sums) / (float)(of.count * width) + of.eps);
        gain += gain ? head * width : 0;
    } else if (of.normed) {
        if (after) {
            squares = 0;
            for (int n = LANE; present && n < width; n += 32) {
                float x = turned(raw, n, cosine, sine, turning, interleaved);
                squares = fmaf(x, x, squares);
            }
        }
        inverse = 1.0f / sqrtf(warp_sum(squares) / (float)width + of.eps);
    }
    if (!present) return;
    i64 place = queries ? (token * of.count + head) : place_of_new(plan, rows, token, size, of.count, head);
    if (place < 0) return;
    float times = queries && scale ? scale[token] : 1.0f;
    auto normed = [=](int n) {
        float x = mine[n];
        if (before) x = gain ? x * inverse * (of.offset + gain[n]) : x * inverse;
        return x;
    };
    for (int n = LANE; n < width; n += 32) {
        float y = turned(normed, n, cosine, sine, turning, interleaved);
        if (after) y = gain ? y * inverse * (of.offset + gain[n]) : y * inverse;
        if (queries) q_out[place * width + n] = y * times;
        else store(values ? v_storage : k_storage, place * width + n, y);
    }
}

// Latents (npllm.blocks.mla): `[norm(c) | rope(k)]` of rows `[c | k]` of `latent` and `turning` numbers, `down_step` apart,
// go to storage [slots, 1, size, width], without a plan to [tokens, width]. Queries [tokens, heads, width] turn in their
// place, the last `turning` numbers of each head, and are multiplied with `scale` of their token. A block takes a token and
// its latent, or WARPS heads of it.
extern "C" __global__ void __launch_bounds__(THREADS) place_latents(
    const i64 *plan, i64 rows, const float *down, i64 down_step, i64 latent, i64 turning, const float *gain, float eps,
    float *q, i64 heads, i64 width, const float *cosines, const float *sines, i64 pairs, i64 interleaved, const float *scale,
    i64 size, void *storage) {
    __shared__ float sums[WARPS];
    wait_for_inputs();
    release_dependents();
    i64 token = blockIdx.x, head = ((i64)blockIdx.y - 1) * WARPS + WARP;
    const float *cosine = cosines + token * pairs, *sine = sines + token * pairs;
    if (blockIdx.y == 0) {
        const float *c = down + token * down_step, *k = c + latent;
        float squares = 0;
        for (int l = threadIdx.x; l < latent; l += THREADS) squares = fmaf(c[l], c[l], squares);
        float inverse = 1.0f / sqrtf(block_sum(squares, sums) / (float)latent + eps);
        i64 place = plan ? place_of_new(plan, rows, token, size, 1, 0) : token;
        if (place < 0) return;
        i64 at = place * (latent + turning);
        for (int l = threadIdx.x; l < latent; l += THREADS) store(storage, at + l, c[l] * inverse * gain[l]);
        for (int j = threadIdx.x; j < turning; j += THREADS)
            store(storage, at + latent + j, turned([=](int i) { return k[i]; }, j, cosine, sine, (int)pairs, interleaved));
        return;
    }
    if (head >= heads) return;
    float *x = q + (token * heads + head) * width, times = scale ? scale[token] : 1.0f;
    if (scale)
        for (int n = LANE; n < width - 2 * pairs; n += 32) x[n] *= times;
    float *turns = x + width - 2 * pairs;
    for (int pair = LANE; pair < pairs; pair += 32) {
        int one = interleaved ? 2 * pair : pair, other = interleaved ? one + 1 : one + (int)pairs;
        float a = turns[one], b = turns[other];
        auto both = [=](int i) { return i == one ? a : b; };
        turns[one] = turned(both, one, cosine, sine, (int)pairs, interleaved) * times;
        turns[other] = turned(both, other, cosine, sine, (int)pairs, interleaved) * times;
    }
}
