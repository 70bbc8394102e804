// Attention of absorbed queries over latents, few to a row, on tensor cores (npllm.blocks.mla): all heads meet the same keys
// [c | k_rope], whose first LATENT numbers are the values. Macros: STORED (F32 or BF16: latents), WIDTH, LATENT, HEAD_TILES.
//
// A block takes HEAD_TILES x 16 queries (tokens x heads of a row) and a part of the keys, which pass through shared memory
// once for scores and values, the next KEYS on their way meanwhile. Four warps work for 16 queries: each has a quarter of a
// query in its registers and makes a quarter of the scores' sums, then a quarter of the values' columns. What a part gives
// is merged by those who read it (latent.cu), in the order of the parts.
#include "keys.cuh"

#define KEYS 32
#define LANES (16 * HEAD_TILES)
#define THREADS (128 * HEAD_TILES)
#define LOG2_E 1.4426950408889634f
#define NOTHING (-INFINITE)

// Numbers of a key in shared memory: whole steps of 16 for each quarter, and 8 more, so that fragments meet different banks.
#define STEPS ((WIDTH + 63) / 64)
#define STRIDE (STEPS * 64 + 8)
#define COLUMNS ((LATENT + 63) / 64 * 16)
#define VECTORS (STRIDE / 8)
#define P_STRIDE (KEYS + 8)

struct Shared {
    u16 keys[2][KEYS * STRIDE];
    float scores[HEAD_TILES][4][16][KEYS + 4];
    u16 p[LANES * P_STRIDE];
    // Of each query: what its sums are to shrink by, and the keys that it sees.
    float shrink[LANES];
    int first_seen[LANES], last_seen[LANES];
};

// Keys s .. s + KEYS of a row as bf16, those before `end`, zeros after it and behind their width.
__device__ __forceinline__ void load_tile(
    const Row &row, i64 r, int s, int end, STORAGE(x), i64 size, i64 aligned, const i64 *pages, i64 pages_per_row, u16 *tile) {
    const i64 first = first_of(row, pages, x_slot);
    // Addresses of several vectors at a time would cost the registers of the sums.
#pragma unroll 1
    for (int i = threadIdx.x; i < KEYS * VECTORS; i += THREADS) {
        int key = i / VECTORS, n = i % VECTORS * 8;
        bool valid = s + key < end && n < WIDTH;
        i64 from = first + n;
        if (valid) from += way_to(row, r, s + key, size, pages, pages_per_row, x_slot, x_entry);
        u16 *to = tile + key * STRIDE + n;
#if STORED == BF16
        if (aligned) {
            copy_async16(to, (const u16 *)x + (valid ? from : 0), valid);
            continue;
        }
        for (int j = 0; j < 8; j++) to[j] = valid && n + j < WIDTH ? ((const u16 *)x)[from + j] : (u16)0;
#else
        if (aligned) {
            const float4 *numbers = (const float4 *)((const float *)x + from);
            float4 a = valid ? numbers[0] : make_float4(0, 0, 0, 0);
            float4 b = valid && n + 4 < WIDTH ? numbers[1] : make_float4(0, 0, 0, 0);
            *(uint4 *)to = make_uint4(bf16_pair(a.x, a.y), bf16_pair(a.z, a.w), bf16_pair(b.x, b.y), bf16_pair(b.z, b.w));
            continue;
        }
#pragma unroll 1
        for (int j = 0; j < 8; j++)
            to[j] = valid && n + j < WIDTH ? (u16)float_to_bf16(((const float *)x)[from + j]) : (u16)0;
#endif
    }
    copy_async_commit();
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) attend_latents(
    const i64 *plan, const i64 *pages, i64 pages_per_row, const float *q, i64 heads, STORAGE(x), i64 size, i64 aligned,
    i64 window, i64 chunk, float scale, float *partial) {
    DYNAMIC_SHARED(room);
    Shared &shared = *(Shared *)room;
    wait_for_inputs();
    release_dependents();

    const i64 splits = gridDim.x, split = blockIdx.x, r = blockIdx.z;
    const u32 first_lane = blockIdx.y * LANES, per = (u32)heads;
    const Row row = row_of_plan(plan, r);
    const u32 lanes = (u32)(row.end - row.query) * per;
    if (first_lane >= lanes) return;
    const int used = (int)min((u32)LANES, lanes - first_lane);
    i64 first_query = row.start + first_lane / per, last_query = row.start + (first_lane + used - 1) / per;
    i64 low = max((i64)0, reach(first_query, window, chunk) - row.first), high = min(row.count, last_query + 1 - row.first);
    const int each = (int)(((u32)max((i64)0, high - low) + gridDim.x - 1) / gridDim.x + KEYS - 1) / KEYS * KEYS;
    const int begin = (int)(low + split * each), end = (int)min(high, (i64)begin + each);

    const int tile = WARP / 4, quarter = WARP % 4, group = LANE >> 2, pair = LANE & 3;
    u32 queries[STEPS][4];
#pragma unroll
    for (int step = 0; step < STEPS; step++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int lane = tile * 16 + group + (i & 1) * 8, n = (quarter * STEPS + step) * 16 + (i >> 1) * 8 + pair * 2;
            const float *from = q + (row.query * heads + first_lane + lane) * WIDTH + n;
            bool inside = lane < used;
            queries[step][i] = bf16_pair(inside && n < WIDTH ? from[0] : 0.0f, inside && n + 1 < WIDTH ? from[1] : 0.0f);
        }
    float sums[COLUMNS / 8][4];
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) sums[j][i] = 0;

    // Eight threads have a query's scores, and each of them their maximum and total so far.
    const int lane = threadIdx.x / 8, first_key = threadIdx.x % 8 * (KEYS / 8);
    float top = NOTHING, total = 0;
    for (int i = threadIdx.x; i < LANES; i += THREADS) {
        i64 position = row.start + (first_lane + i) / per;
        shared.first_seen[i] = i < used ? (int)max((i64)0, reach(position, window, chunk) - row.first) : end;
        shared.last_seen[i] = (int)min((i64)end, position + 1 - row.first) - 1;
    }

    if (begin < end) load_tile(row, r, begin, end, x, x_slot, x_entry, x_head, size, aligned, pages, pages_per_row, shared.keys[0]);
    int turn = 0;
    for (int s = begin; s < end; s += KEYS, turn ^= 1) {
        copy_async_wait<0>();
        __syncthreads();
        const u16 *keys = shared.keys[turn];
        if (s + KEYS < end)
            load_tile(row, r, s + KEYS, end, x, x_slot, x_entry, x_head, size, aligned, pages, pages_per_row, shared.keys[turn ^ 1]);

#pragma unroll 1
        for (int eight = 0; eight < KEYS / 8; eight++) {
            float dots[4] = {0, 0, 0, 0};
            const u16 *from = keys + (eight * 8 + group) * STRIDE + quarter * STEPS * 16 + pair * 2;
#pragma unroll
            for (int step = 0; step < STEPS; step++) {
                u32 right[2] = {*(const u32 *)(from + step * 16), *(const u32 *)(from + step * 16 + 8)};
                mma_bf16(dots, queries[step], right);
            }
#pragma unroll
            for (int i = 0; i < 4; i++)
                shared.scores[tile][quarter][group + (i >> 1) * 8][eight * 8 + pair * 2 + (i & 1)] = dots[i];
        }
        __syncthreads();

        float scores[KEYS / 8], most = top, sum = 0;
        int first_seen = shared.first_seen[lane], last_seen = shared.last_seen[lane];
#pragma unroll
        for (int i = 0; i < KEYS / 8; i++) {
            int key = first_key + i;
            float score = 0;
#pragma unroll
            for (int w = 0; w < 4; w++) score += shared.scores[lane / 16][w][lane % 16][key];
            bool seen = first_seen <= s + key && s + key <= last_seen;
            scores[i] = seen ? score * scale : NOTHING;
            most = fmaxf(most, scores[i]);
        }
        for (int step = 4; step; step >>= 1) most = fmaxf(most, __shfl_xor_sync(FULL, most, step));
        float base = most == NOTHING ? 0.0f : most, shrink = power_of_two((top - base) * LOG2_E);
#pragma unroll
        for (int i = 0; i < KEYS / 8; i += 2) {
            float a = power_of_two((scores[i] - base) * LOG2_E), b = power_of_two((scores[i + 1] - base) * LOG2_E);
            sum += a + b;
            *(u32 *)(shared.p + lane * P_STRIDE + first_key + i) = bf16_pair(a, b);
        }
        for (int step = 4; step; step >>= 1) sum += __shfl_xor_sync(FULL, sum, step);
        if (threadIdx.x % 8 == 0) shared.shrink[lane] = shrink;
        total = total * shrink + sum;
        top = most;
        __syncthreads();

        float upper = shared.shrink[tile * 16 + group], lower = shared.shrink[tile * 16 + group + 8];
#pragma unroll
        for (int j = 0; j < COLUMNS / 8; j++) sums[j][0] *= upper, sums[j][1] *= upper, sums[j][2] *= lower, sums[j][3] *= lower;
#pragma unroll 1
        for (int step = 0; step < KEYS / 16; step++) {
            const u16 *from = shared.p + (tile * 16 + group) * P_STRIDE + step * 16 + pair * 2;
            u32 left[4] = {*(const u32 *)from, *(const u32 *)(from + 8 * P_STRIDE), *(const u32 *)(from + 8),
                           *(const u32 *)(from + 8 * P_STRIDE + 8)};
            const u16 *values = keys + (step * 16 + LANE % 16) * STRIDE + quarter * COLUMNS + LANE / 16 * 8;
#pragma unroll
            for (int j = 0; j < COLUMNS / 8; j += 2) {
                u32 right[4];
                load_turned(right, values + j * 8);
                mma_bf16(sums[j], left, right);
                mma_bf16(sums[j + 1], left, right + 2);
            }
        }
    }

    // A query's part: its maximum, its total, then its sums. The plan is read anew: registers are few meanwhile.
    const i64 first_record = row_of_plan(plan, r).query * heads + first_lane;
    if (threadIdx.x % 8 == 0 && lane < used) {
        float *record = partial + ((first_record + lane) * splits + split) * (LATENT + 2);
        record[0] = top;
        record[1] = total;
    }
    if (begin >= end) return;
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int mine = tile * 16 + group + (i >> 1) * 8, n = quarter * COLUMNS + j * 8 + pair * 2 + (i & 1);
            if (mine < used && n < LATENT)
                partial[((first_record + mine) * splits + split) * (LATENT + 2) + 2 + n] = sums[j][i];
        }
}
