// The products by which absorbed queries go to the latent space and values come back (npllm.blocks.mla), for TOKENS tokens
// at a time. Of kv_b [H x (nope + value), L] head h has rows h (nope + value) on: W_k, then W_v. Macros: FORMAT, TOKENS.
#include "gemv.cuh"

// Vectors of a row that a block takes, and the rows that its threads take side by side.
#define ACROSS 8
#define LOG2_E 1.4426950408889634f
#define DOWN (THREADS / ACROSS)

// `[q_nope W_k | q_rope]` -> [tokens, H, L + turning], from queries [tokens, H, nope + turning]; a block takes a head and
// ACROSS vectors of the latent space.
extern "C" __global__ void __launch_bounds__(THREADS) absorb(
    const float *q, i64 tokens, i64 heads, i64 nope, i64 turning, Matrix m, float *out) {
    __shared__ float room[WARPS][TOKENS][ACROSS * PER];
    i64 head = blockIdx.x, first_token = (i64)blockIdx.z * TOKENS, per_head = m.rows / heads;
    int across = threadIdx.x % ACROSS, vector = blockIdx.y * ACROSS + across, vectors = vectors_of(m);
    wait_for_inputs();
    release_dependents();
    q += (first_token * heads + head) * (nope + turning);
    out += (first_token * heads + head) * (m.columns + turning);
    int present = (int)min((i64)TOKENS, tokens - first_token);
    float sums[TOKENS][PER];
#pragma unroll
    for (int t = 0; t < TOKENS; t++)
#pragma unroll
        for (int i = 0; i < PER; i++) sums[t][i] = 0;
#pragma unroll 4
    for (int n = threadIdx.x / ACROSS; n < nope; n += DOWN) {
        if (vector >= vectors) continue;
        i64 row = head * per_head + n;
        float w[PER], scale = factor(m, factors_of(m, row), vector);
        widen(load_once(row_of(m, row) + vector), w);
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            float x = t < present ? q[t * heads * (nope + turning) + n] * scale : 0.0f;
#pragma unroll
            for (int i = 0; i < PER; i++) sums[t][i] = fmaf(x, w[i], sums[t][i]);
        }
    }
#pragma unroll
    for (int t = 0; t < TOKENS; t++)
#pragma unroll
        for (int i = 0; i < PER; i++) {
            float sum = sums[t][i];
            for (int step = ACROSS; step < 32; step <<= 1) sum += __shfl_xor_sync(FULL, sum, step);
            if (LANE < ACROSS) room[WARP][t][across * PER + i] = sum;
        }
    __syncthreads();
    for (int i = threadIdx.x; i < present * ACROSS * PER; i += THREADS) {
        int t = i / (ACROSS * PER), column = i % (ACROSS * PER), l = blockIdx.y * ACROSS * PER + column;
        float sum = 0;
        for (int w = 0; w < WARPS; w++) sum += room[w][t][column];
        if (l < m.columns) out[t * heads * (m.columns + turning) + l] = sum;
    }
    if (blockIdx.y) return;
    for (int i = threadIdx.x; i < present * turning; i += THREADS) {
        i64 t = i / turning, j = i % turning;
        out[t * heads * (m.columns + turning) + m.columns + j] = q[t * heads * (nope + turning) + nope + j];
    }
}

__device__ __forceinline__ float &staged_number(float4 *staged, int t, int l) {
    return ((float *)staged)[((t * PLANES + l % PER / 4) * STAGED_VECTORS + l / PER) * 4 + l % 4];
}

// What attention gave of a head, as `multiply` takes activations: whole where there are no parts, else (latent_attention.cu)
// the parts merged in their order.
__device__ __forceinline__ void merge(const float *partial, int splits, int present, i64 token_step, int latent, float4 *staged) {
    int filled = (latent + PER - 1) / PER * PER;
    for (int t = 0; t < TOKENS; t++) {
        if (!splits) {
            for (int l = threadIdx.x; l < filled; l += THREADS)
                staged_number(staged, t, l) = t < present && l < latent ? partial[t * token_step + l] : 0.0f;
            continue;
        }
        const float *parts = partial + t * token_step;
        float most = -INFINITE, all = 0;
        for (int s = 0; t < present && s < splits; s++) most = fmaxf(most, parts[(i64)s * (latent + 2)]);
        float base = most == -INFINITE ? 0.0f : most;
        for (int s = 0; t < present && s < splits; s++) {
            const float *part = parts + (i64)s * (latent + 2);
            all = fmaf(part[1], power_of_two((part[0] - base) * LOG2_E), all);
        }
        float inverse = all == 0.0f ? 0.0f : 1.0f / all;
        for (int l = threadIdx.x; l < filled; l += THREADS) {
            float sum = 0;
            for (int s = 0; t < present && l < latent && s < splits; s++) {
                const float *part = parts + (i64)s * (latent + 2);
                // Of a part without keys nothing else was written.
                if (part[0] != -INFINITE) sum = fmaf(part[2 + l], power_of_two((part[0] - base) * LOG2_E), sum);
            }
            staged_number(staged, t, l) = sum * inverse;
        }
    }
}

// `W_v o` -> [tokens, H, value], o of `splits` parts, or whole (0); a block takes `rows` rows of a head.
extern "C" __global__ void __launch_bounds__(THREADS) unabsorb(
    const float *partial, i64 splits, i64 tokens, i64 heads, i64 nope, i64 rows, Matrix m, float *out) {
    DYNAMIC_SHARED(room);
    float4 *staged = (float4 *)room;
    i64 head = blockIdx.x, first_token = (i64)blockIdx.z * TOKENS, per_head = m.rows / heads, values = per_head - nope;
    wait_for_inputs();
    release_dependents();
    int present = (int)min((i64)TOKENS, tokens - first_token), vectors = vectors_of(m);
    i64 record = splits ? splits * (m.columns + 2) : m.columns;
    merge(partial + (first_token * heads + head) * record, (int)splits, present, heads * record, (int)m.columns, staged);
    __syncthreads();
    i64 end = min(values, (i64)(blockIdx.y + 1) * rows);
    for (i64 v = (i64)blockIdx.y * rows + WARP; v < end; v += WARPS) {
        const uint4 *row[1] = {row_of(m, head * per_head + nope + v)};
        const u8 *factors[1] = {factors_of(m, head * per_head + nope + v)};
        Sums<1> sums;
#pragma unroll
        for (int t = 0; t < TOKENS; t++) sums.of[0][t] = 0;
        for (int first = 0; first < vectors; first += AHEAD * 32) {
            uint4 ahead[1][AHEAD];
            fetch<1>(row, first, vectors, ahead);
            multiply<1>(m, factors, ahead, first, 0, vectors, staged, sums);
        }
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            float y = warp_sum(sums.of[0][t]);
            if (LANE == 0 && t < present) out[((first_token + t) * heads + head) * values + v] = y;
        }
    }
}
