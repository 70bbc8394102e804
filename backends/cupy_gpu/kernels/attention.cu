// Softmax attention on the cores for float32: few queries against many keys, and everything that needs float32 products.
//
// A block takes LANES queries (tokens x heads of one key head) and a part of the keys; tiles of KEYS keys and values pass
// through shared memory, the next one on its way while this one is computed. The parts of a row are merged by the block that
// is done last, in their order, so the result does not depend on who that is (FlashDecoding; Dao et al. 2023).
// Macros: STORED (F32 or BF16: keys and values), LANES, KEYS, VALUES (numbers of a value per thread).
#include "keys.cuh"

#define THREADS 128
#define GROUPS (THREADS / KEYS)
// Differences of scores are scaled, not scores: these may be large, and what rounding does to them grows with them.
#define LOG2_E 1.4426950408889634f
#define NOTHING (-INFINITE)

#if STORED == BF16
#define SIZE 2
#define PER 8
#else
#define SIZE 4
#define PER 4
#endif

__device__ __forceinline__ void widen(uint4 v, float w[PER]) {
    u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
#if STORED == BF16
        w[2 * i] = bf16_low(words[i]);
        w[2 * i + 1] = bf16_high(words[i]);
#else
        w[i] = __uint_as_float(words[i]);
#endif
    }
}
__device__ __forceinline__ float number(const u8 *row, i64 i) {
#if STORED == BF16
    return bf16_to_float(((const u16 *)row)[i]);
#else
    return ((const float *)row)[i];
#endif
}

// Vectors of a row in shared memory, an odd number: the rows of neighbouring lanes begin in other banks.
__device__ __forceinline__ int row_vectors(i64 width) { return ((int)width * SIZE + 15) / 16 | 1; }

// Keys s .. s + KEYS of a row, those before `end`, zeros after it and behind their width.
__device__ __forceinline__ void load_tile(
    const Row &row, i64 r, i64 s, i64 end, STORAGE(x), i64 head, i64 width, i64 size, i64 aligned, const i64 *pages,
    i64 pages_per_row, uint4 *tile) {
    int stride = row_vectors(width), whole = ((int)width * SIZE + 15) / 16;
    const u8 *first = (const u8 *)x + (first_of(row, pages, x_slot) + head * x_head) * SIZE;
    // The next one of a thread is so many keys and vectors further.
    const int keys = THREADS / whole, vectors = THREADS % whole;
    for (int key = threadIdx.x / whole, vector = threadIdx.x % whole; key < KEYS; key += keys, vector += vectors) {
        if (vector >= whole) key++, vector -= whole;
        if (key >= KEYS) break;
        bool valid = s + key < end;
        const u8 *from = first;
        if (valid) from += way_to(row, r, s + key, size, pages, pages_per_row, x_slot, x_entry) * SIZE;
        uint4 *to = tile + key * stride + vector;
        if (aligned) {
            copy_async16(to, from + vector * 16, valid);
            continue;
        }
#pragma unroll
        for (int j = 0; j < PER; j++) {
            bool inside = valid && vector * PER + j < width;
#if STORED == BF16
            ((u16 *)to)[j] = inside ? ((const u16 *)from)[vector * PER + j] : (u16)0;
#else
            ((float *)to)[j] = inside ? ((const float *)from)[vector * PER + j] : 0.0f;
#endif
        }
    }
    copy_async_commit();
}

extern "C" __global__ void __launch_bounds__(THREADS, 3) attend(
    const i64 *plan, const i64 *pages, i64 pages_per_row, i64 most, const float *q, i64 heads, i64 key_heads, i64 key_width,
    i64 value_width, STORAGE(k), STORAGE(v), i64 size, i64 aligned, i64 window, i64 chunk, float scale, float softcap,
    const float *sinks, float *partial, u32 *tickets, float *out) {
    DYNAMIC_SHARED(room);
    __shared__ __align__(16) float scores[LANES][KEYS];
    __shared__ int low_of[LANES], high_of[LANES];
    __shared__ float top[LANES], total[LANES], shrink[LANES];
    __shared__ u32 arrived;
    wait_for_inputs();
    release_dependents();

    const i64 splits = gridDim.y, split = blockIdx.y, r = blockIdx.z;
    const u32 per = (u32)heads / (u32)key_heads, head = blockIdx.x % (u32)key_heads, first_lane = blockIdx.x / (u32)key_heads * LANES;
    const Row row = row_of_plan(plan, r);
    const u32 lanes = (u32)(row.end - row.query) * per;
    if (first_lane >= lanes || row.end - row.query > most) return;
    const int used = (int)min((u32)LANES, lanes - first_lane);

    // The keys that any of these queries sees, and this block's part of them.
    i64 first_query = row.start + first_lane / per, last_query = row.start + (first_lane + used - 1) / per;
    i64 low = max((i64)0, reach(first_query, window, chunk) - row.first), high = min(row.count, last_query + 1 - row.first);
    i64 each = ((u32)max((i64)0, high - low) + gridDim.y - 1) / gridDim.y;
    each = (each + KEYS - 1) / KEYS * KEYS;
    i64 begin = low + split * each, end = min(high, begin + each);

    const int k_stride = row_vectors(key_width), v_stride = row_vectors(value_width), q_stride = (int)(key_width + PER - 1) / PER;
    float4 *queries = (float4 *)room;  // [PER / 4 planes][LANES][q_stride]
    uint4 *k_tiles = (uint4 *)(queries + PER / 4 * LANES * q_stride), *v_tiles = k_tiles + 2 * KEYS * k_stride;
    for (int i = threadIdx.x; i < LANES * q_stride * PER; i += THREADS) {
        int lane = i / (q_stride * PER), n = i % (q_stride * PER);
        float value = 0;
        if (lane < used && n < key_width) {
            i64 token = row.query + (first_lane + lane) / per, h = (i64)head * per + (first_lane + lane) % per;
            value = q[(token * heads + h) * key_width + n] * scale;
        }
        ((float *)queries)[((n % PER / 4 * LANES + lane) * q_stride + n / PER) * 4 + n % 4] = value;
    }
    // Of each query, the keys that it sees.
    for (int i = threadIdx.x; i < LANES; i += THREADS) {
        i64 position = row.start + (first_lane + i) / per;
        low_of[i] = (int)(reach(position, window, chunk) - row.first);
        high_of[i] = i < used ? (int)min(end, position + 1 - row.first) : 0;
        top[i] = NOTHING, total[i] = 0;
    }
    float sums[LANES][VALUES];
#pragma unroll
    for (int lane = 0; lane < LANES; lane++)
#pragma unroll
        for (int j = 0; j < VALUES; j++) sums[lane][j] = 0;

    if (begin < end) {
        load_tile(row, r, begin, end, k, k_slot, k_entry, k_head, head, key_width, size, aligned, pages, pages_per_row, k_tiles);
        load_tile(row, r, begin, end, v, v_slot, v_entry, v_head, head, value_width, size, aligned, pages, pages_per_row, v_tiles);
    }
    int turn = 0;
#pragma unroll 1
    for (i64 s = begin; s < end; s += KEYS, turn ^= 1) {
        copy_async_wait<0>();
        __syncthreads();
        const uint4 *k_tile = k_tiles + turn * KEYS * k_stride, *v_tile = v_tiles + turn * KEYS * v_stride;
        if (s + KEYS < end) {
            load_tile(row, r, s + KEYS, end, k, k_slot, k_entry, k_head, head, key_width, size, aligned, pages, pages_per_row,
                      k_tiles + (turn ^ 1) * KEYS * k_stride);
            load_tile(row, r, s + KEYS, end, v, v_slot, v_entry, v_head, head, value_width, size, aligned, pages, pages_per_row,
                      v_tiles + (turn ^ 1) * KEYS * v_stride);
        }
        int key = threadIdx.x % KEYS;
        float dots[(LANES + GROUPS - 1) / GROUPS];
#pragma unroll
        for (int i = 0; i < (LANES + GROUPS - 1) / GROUPS; i++) dots[i] = 0;
#pragma unroll 1
        for (int vector = 0; vector < q_stride; vector++) {
            float w[PER];
            widen(k_tile[key * k_stride + vector], w);
#pragma unroll
            for (int i = 0; i < (LANES + GROUPS - 1) / GROUPS; i++) {
                int lane = min(i * GROUPS + (int)threadIdx.x / KEYS, LANES - 1);
#pragma unroll
                for (int p = 0; p < PER / 4; p++) {
                    float4 x = queries[(p * LANES + lane) * q_stride + vector];
                    dots[i] = fmaf(w[4 * p], x.x, dots[i]);
                    dots[i] = fmaf(w[4 * p + 1], x.y, dots[i]);
                    dots[i] = fmaf(w[4 * p + 2], x.z, dots[i]);
                    dots[i] = fmaf(w[4 * p + 3], x.w, dots[i]);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < (LANES + GROUPS - 1) / GROUPS; i++) {
            int lane = i * GROUPS + threadIdx.x / KEYS;
            if (lane >= LANES) continue;
            float score = softcap != 0.0f ? softcap * tanhf(dots[i] / softcap) : dots[i];
            bool seen = s + key >= low_of[lane] && s + key < high_of[lane];
            scores[lane][key] = seen ? score : NOTHING;
        }
        __syncthreads();
        for (int lane = WARP; lane < LANES; lane += THREADS / 32) {
            float most = top[lane], sum = 0;
            for (int i = LANE; i < KEYS; i += 32) most = fmaxf(most, scores[lane][i]);
            most = warp_max(most);
            float base = most == NOTHING ? 0.0f : most;
            for (int i = LANE; i < KEYS; i += 32) {
                float p = power_of_two((scores[lane][i] - base) * LOG2_E);
                scores[lane][i] = p;
                sum += p;
            }
            sum = warp_sum(sum);
            __syncwarp();
            if (LANE == 0) {
                shrink[lane] = power_of_two((top[lane] - base) * LOG2_E);
                total[lane] = total[lane] * shrink[lane] + sum;
                top[lane] = most;
            }
        }
        __syncthreads();
#pragma unroll
        for (int lane = 0; lane < LANES; lane++)
#pragma unroll
            for (int j = 0; j < VALUES; j++) sums[lane][j] *= shrink[lane];
        // Behind the last key, weights and values are zero.
#pragma unroll 1
        for (int i = 0; i < KEYS; i += 4) {
#pragma unroll
            for (int j = 0; j < VALUES; j++) {
                int n = threadIdx.x + j * THREADS;
                if (n >= value_width) continue;
                float values[4];
#pragma unroll
                for (int a = 0; a < 4; a++) values[a] = number((const u8 *)(v_tile + (i + a) * v_stride), n);
#pragma unroll
                for (int lane = 0; lane < LANES; lane++) {
                    float4 p = *(const float4 *)(scores[lane] + i);
                    sums[lane][j] = fmaf(p.x, values[0], sums[lane][j]);
                    sums[lane][j] = fmaf(p.y, values[1], sums[lane][j]);
                    sums[lane][j] = fmaf(p.z, values[2], sums[lane][j]);
                    sums[lane][j] = fmaf(p.w, values[3], sums[lane][j]);
                }
            }
        }
    }
    __syncthreads();

    if (splits == 1) {
#pragma unroll
        for (int lane = 0; lane < LANES; lane++) {
            if (lane >= used) continue;
            i64 token = row.query + (first_lane + lane) / per, h = (i64)head * per + (first_lane + lane) % per;
            float most = top[lane], all = total[lane], part = 1;
            if (sinks) {
                most = fmaxf(most, sinks[h]);
                part = power_of_two((top[lane] - most) * LOG2_E);
                all = all * part + power_of_two((sinks[h] - most) * LOG2_E);
            }
            float inverse = all == 0.0f ? 0.0f : part / all;
#pragma unroll
            for (int j = 0; j < VALUES; j++)
                if (threadIdx.x + j * THREADS < value_width)
                    out[(token * heads + h) * value_width + threadIdx.x + j * THREADS] = sums[lane][j] * inverse;
        }
        return;
    }

    // What is stored of a lane: its maximum, its total, then its sums.
    const i64 record = value_width + 2, tile = blockIdx.x + (i64)gridDim.x * r;
    float *mine = partial + (tile * splits + split) * LANES * record;
#pragma unroll
    for (int lane = 0; lane < LANES; lane++) {
        if (threadIdx.x == 0) mine[lane * record] = top[lane], mine[lane * record + 1] = total[lane];
#pragma unroll
        for (int j = 0; j < VALUES; j++)
            if (threadIdx.x + j * THREADS < value_width) mine[lane * record + 2 + threadIdx.x + j * THREADS] = sums[lane][j];
    }
    if (!is_last(tickets + tile, (u32)splits, &arrived)) return;
#pragma unroll 1
    for (int lane = 0; lane < used; lane++) {
        i64 token = row.query + (first_lane + lane) / per, h = (i64)head * per + (first_lane + lane) % per;
        const float *records = partial + (tile * splits * LANES + lane) * record;
        float sink = sinks ? sinks[h] : NOTHING, most = sink;
        for (i64 i = 0; i < splits; i++) most = fmaxf(most, load_shared_by_blocks(records + i * LANES * record));
        if (most == NOTHING) most = 0;
        float all = sinks ? power_of_two((sink - most) * LOG2_E) : 0.0f, y[VALUES];
#pragma unroll
        for (int j = 0; j < VALUES; j++) y[j] = 0;
#pragma unroll 1
        for (i64 i = 0; i < splits; i++) {
            const float *from = records + i * LANES * record;
            float height = load_shared_by_blocks(from), part = power_of_two((height - most) * LOG2_E);
            if (height == NOTHING) continue;
            all = fmaf(load_shared_by_blocks(from + 1), part, all);
#pragma unroll
            for (int j = 0; j < VALUES; j++)
                if (threadIdx.x + j * THREADS < value_width)
                    y[j] = fmaf(load_shared_by_blocks(from + 2 + threadIdx.x + j * THREADS), part, y[j]);
        }
        float inverse = all == 0.0f ? 0.0f : 1.0f / all;
#pragma unroll
        for (int j = 0; j < VALUES; j++)
            if (threadIdx.x + j * THREADS < value_width)
                out[(token * heads + h) * value_width + threadIdx.x + j * THREADS] = y[j] * inverse;
    }
}
