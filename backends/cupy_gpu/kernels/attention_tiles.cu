// Softmax attention of many queries, in products of bf16 with float32 sums (FlashAttention-2; Dao 2023, arXiv 2307.08691).
//
// A block takes 64 queries of one head, 16 a warp, and passes over the keys that any of them sees, 64 at a time; values
// travel while scores are computed, the next keys while values are summed. Scores are scaled, capped and masked in float32.
// Macros: STORED (F32 or BF16), HEAD and VALUES: the widths of keys and values, rounded up to a multiple of 16; CAPPED:
// whether scores are capped.
#include "keys.cuh"

#define THREADS 128
#define QUERIES 64
#define KEYS 64

// Of a multiprocessor: for fewer, compilers spill rather than take the registers that are left; more find none to take.
#define BLOCKS (HEAD > 128 ? 2 : HEAD > 64 ? 3 : 4)

#define LOG2_E 1.4426950408889634f
#define NOTHING (-INFINITE)

// Bytes between rows in shared memory: an odd number of vectors, so that eight rows of a matrix lie in different banks.
#define HEAD_ROW ((HEAD + 8) * 2)
#define VALUE_ROW ((VALUES + 8) * 2)

// 64 keys or values from s on, those before `end`; zeros after it and behind their width.
template <int WIDE>
__device__ __forceinline__ void load_tile(
    const Row &row, i64 r, int s, int end, STORAGE(x), i64 head, i64 width, i64 size, i64 aligned, const i64 *pages,
    i64 pages_per_row, u8 *tile) {
    const int whole = WIDE / 8;
    const i64 first = first_of(row, pages, x_slot) + head * x_head;
    for (int i = threadIdx.x; i < KEYS * whole; i += THREADS) {
        int key = i / whole, vector = i % whole;
        bool valid = s + key < end;
        i64 at = first + vector * 8;
        if (valid) at += way_to(row, r, s + key, size, pages, pages_per_row, x_slot, x_entry);
        u8 *to = tile + key * (WIDE + 8) * 2 + vector * 16;
#if STORED == BF16
        if (aligned) {
            bool inside = valid && vector * 8 < width;
            copy_async16(to, (const u16 *)x + (inside ? at : 0), inside);
            continue;
        }
#endif
#pragma unroll
        for (int j = 0; j < 8; j++) {
            bool inside = valid && vector * 8 + j < width;
#if STORED == BF16
            ((u16 *)to)[j] = inside ? ((const u16 *)x)[at + j] : (u16)0;
#else
            ((u16 *)to)[j] = (u16)float_to_bf16(inside ? ((const float *)x)[at + j] : 0.0f);
#endif
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) attend_tiles(
    const i64 *plan, const i64 *pages, i64 pages_per_row, i64 few, const float *q, i64 heads, i64 key_heads, i64 key_width,
    i64 value_width, STORAGE(k), STORAGE(v), i64 size, i64 aligned, i64 window, i64 chunk, float scale, float softcap,
    const float *sinks, float *out) {
    DYNAMIC_SHARED(room);
    u8 *q_tile = room, *k_tile = q_tile + QUERIES * HEAD_ROW, *v_tile = k_tile + KEYS * HEAD_ROW;
    wait_for_inputs();
    release_dependents();
    const i64 r = blockIdx.z, h = blockIdx.y, head = h / (heads / key_heads), first = (i64)blockIdx.x * QUERIES;
    const Row row = row_of_plan(plan, r);
    const i64 count = row.end - row.query;
    if (count <= few || first >= count) return;
    const i64 first_query = row.start + first, last_query = row.start + min(first + QUERIES, count) - 1;
    // Registers are short where heads are wide: what counts keys has 32 bits.
    const int begin = (int)max((i64)0, reach(first_query, window, chunk) - row.first) / KEYS * KEYS;
    const int end = (int)min(row.count, last_query + 1 - row.first);
    // Those that all of the queries see, so that none need be masked.
    const int seen = (int)(reach(last_query, window, chunk) - row.first);
    const int seen_end = min(end, (int)(first_query + 1 - row.first));

    if (begin < end)
        load_tile<HEAD>(row, r, begin, end, k, k_slot, k_entry, k_head, head, key_width, size, aligned, pages, pages_per_row, k_tile);
    copy_async_commit();
    if (begin < end)
        load_tile<VALUES>(row, r, begin, end, v, v_slot, v_entry, v_head, head, value_width, size, aligned, pages, pages_per_row, v_tile);
    copy_async_commit();
    for (int i = threadIdx.x; i < QUERIES * HEAD; i += THREADS) {
        i64 t = first + i / HEAD, n = i % HEAD;
        float value = t < count && n < key_width ? q[((row.query + t) * heads + h) * key_width + n] : 0.0f;
        ((u16 *)(q_tile + i / HEAD * HEAD_ROW))[n] = (u16)float_to_bf16(value);
    }

    const int group = LANE >> 2, pair = LANE & 3;
    float sums[VALUES / 8][4], top[2] = {NOTHING, NOTHING}, total[2] = {0, 0};
#pragma unroll
    for (int d = 0; d < VALUES / 8; d++)
#pragma unroll
        for (int i = 0; i < 4; i++) sums[d][i] = 0;
    // Of its two queries, a lane knows the keys that they see, counted as `s` is: low .. high.
    int low[2], high[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        i64 t = first + WARP * 16 + group + i * 8, position = row.start + t;
        low[i] = (int)(reach(position, window, chunk) - row.first);
        high[i] = t < count ? min(end, (int)(position + 1 - row.first)) : 0;
    }
    // A lane gives the address of one row of four 8 x 8 matrices.
    const u8 *q_rows = q_tile + (WARP * 16 + (LANE & 15)) * HEAD_ROW + (LANE >> 4) * 16;
    const u8 *k_rows = k_tile + ((LANE >> 4) * 8 + (LANE & 7)) * HEAD_ROW + (LANE >> 3 & 1) * 16;
    const u8 *v_rows = v_tile + (LANE & 15) * VALUE_ROW + (LANE >> 4) * 16;

#pragma unroll 1
    for (int s = begin; s < end; s += KEYS) {
        copy_async_wait<1>();
        __syncthreads();
        float scores[KEYS / 8][4];
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) scores[n][i] = 0;
#pragma unroll
        for (int d = 0; d < HEAD / 16; d++) {
            u32 left[4];
            load_matrices(left, q_rows + d * 32);
#pragma unroll
            for (int n = 0; n < KEYS / 16; n++) {
                u32 right[4];
                load_matrices(right, k_rows + n * 16 * HEAD_ROW + d * 32);
                mma_bf16(scores[2 * n], left, right);
                mma_bf16(scores[2 * n + 1], left, right + 2);
            }
        }
        __syncthreads();
        if (s + KEYS < end)
            load_tile<HEAD>(row, r, s + KEYS, end, k, k_slot, k_entry, k_head, head, key_width, size, aligned, pages,
                            pages_per_row, k_tile);
        copy_async_commit();

        bool plain = seen <= s && s + KEYS <= seen_end;
        float most[2] = {top[0], top[1]};
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float score = scores[n][i] * scale;
#if CAPPED
                score = softcap * tanhf(score / softcap);
#endif
                scores[n][i] = score;
            }
        if (!plain)
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    int key = s + n * 8 + pair * 2 + (i & 1);
                    if (key < low[i >> 1] || key >= high[i >> 1]) scores[n][i] = NOTHING;
                }
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) most[i >> 1] = fmaxf(most[i >> 1], scores[n][i]);
        float shrink[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            most[i] = fmaxf(most[i], __shfl_xor_sync(FULL, most[i], 1));
            most[i] = fmaxf(most[i], __shfl_xor_sync(FULL, most[i], 2));
            float base = most[i] == NOTHING ? 0.0f : most[i];
            shrink[i] = power_of_two((top[i] - base) * LOG2_E);
            top[i] = most[i];
            most[i] = base;
            total[i] *= shrink[i];
        }
        u32 weights[KEYS / 16][4];
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                scores[n][i] = power_of_two((scores[n][i] - most[i >> 1]) * LOG2_E);
                total[i >> 1] += scores[n][i];
            }
            weights[n / 2][n % 2 * 2] = bf16_pair(scores[n][0], scores[n][1]);
            weights[n / 2][n % 2 * 2 + 1] = bf16_pair(scores[n][2], scores[n][3]);
        }
#pragma unroll
        for (int d = 0; d < VALUES / 8; d++)
#pragma unroll
            for (int i = 0; i < 4; i++) sums[d][i] *= shrink[i >> 1];
        copy_async_wait<1>();
        __syncthreads();
#pragma unroll
        for (int n = 0; n < KEYS / 16; n++)
#pragma unroll
            for (int d = 0; d < VALUES / 16; d++) {
                u32 right[4];
                load_turned(right, v_rows + n * 16 * VALUE_ROW + d * 32);
                mma_bf16(sums[2 * d], weights[n], right);
                mma_bf16(sums[2 * d + 1], weights[n], right + 2);
            }
        __syncthreads();
        if (s + KEYS < end)
            load_tile<VALUES>(row, r, s + KEYS, end, v, v_slot, v_entry, v_head, head, value_width, size, aligned, pages,
                              pages_per_row, v_tile);
        copy_async_commit();
    }

#pragma unroll
    for (int i = 0; i < 2; i++) {
        total[i] += __shfl_xor_sync(FULL, total[i], 1);
        total[i] += __shfl_xor_sync(FULL, total[i], 2);
        float sink = sinks ? sinks[h] : NOTHING, most = fmaxf(top[i], sink), part = 1;
        if (sinks) {
            part = power_of_two((top[i] - most) * LOG2_E);
            total[i] = total[i] * part + power_of_two((sink - most) * LOG2_E);
        }
        float inverse = total[i] == 0.0f ? 0.0f : part / total[i];
        i64 t = first + WARP * 16 + group + i * 8;
        if (t >= count) continue;
#pragma unroll
        for (int d = 0; d < VALUES / 8; d++)
#pragma unroll
            for (int j = 0; j < 2; j++)
                if (d * 8 + pair * 2 + j < value_width)
                    out[((row.query + t) * heads + h) * value_width + d * 8 + pair * 2 + j] = sums[d][2 * i + j] * inverse;
    }
}
