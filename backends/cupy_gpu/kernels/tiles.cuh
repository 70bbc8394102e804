// Products of many tokens in tiles of TILE tokens x TILE rows of stored matrices, 32 numbers of both at a time.
// Macros: FORMAT, TILE (64 or 128), TENSOR: products of bf16 on tensor cores, or of float32 on the others (TILE 64 then).
#include "activations.cuh"
#include "matrix.cuh"

#define THREADS (TILE * 2)
#define STEP 32

// What a thread brings of a tile: fours of activations, and vectors of weights.
#define FOURS_OF_ROW (STEP / 4)
#define FOURS (TILE * FOURS_OF_ROW / THREADS)
#define VECTORS_OF_ROW (STEP / PER)
#define VECTORS ((TILE * VECTORS_OF_ROW + THREADS - 1) / THREADS)

struct Brought { float4 x[FOURS]; uint4 w[VECTORS]; float factor[VECTORS]; };

// `x_row(i)` is the tile's token i, `w_row(i, row, factors)` its row of a matrix laid out as `m`; nullptr and false: none.
template <class X, class W>
__device__ __forceinline__ void bring(X x_row, i64 width, const Matrix &m, W w_row, int k0, Brought &b) {
#pragma unroll
    for (int i = 0; i < FOURS; i++) {
        int at = i * THREADS + threadIdx.x, k = k0 + at % FOURS_OF_ROW * 4;
        const float *x = x_row(at / FOURS_OF_ROW);
        float4 four = make_float4(0, 0, 0, 0);
        if (x && width % 4 == 0 && k < width) four = *(const float4 *)(x + k);
        else if (x && k < width)
            four = make_float4(x[k], k + 1 < width ? x[k + 1] : 0.0f, k + 2 < width ? x[k + 2] : 0.0f,
                               k + 3 < width ? x[k + 3] : 0.0f);
        b.x[i] = four;
    }
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
        int at = i * THREADS + threadIdx.x, vector = k0 / PER + at % VECTORS_OF_ROW;
        const uint4 *row;
        const u8 *factors;
        bool inside = at < TILE * VECTORS_OF_ROW && vector < vectors_of(m) && w_row(at / VECTORS_OF_ROW, row, factors);
        b.w[i] = inside ? row[vector] : make_uint4(0, 0, 0, 0);
        b.factor[i] = inside ? factor(m, factors, vector) : 0.0f;
    }
}

#if TENSOR
// Rows of 16 pairs of bf16 and 4 words more, so that the lanes of a fragment meet different banks.
#define ROW_WORDS (STEP / 2 + 4)
struct Shared { u32 x[TILE * ROW_WORDS], w[TILE * ROW_WORDS]; };

__device__ __forceinline__ void put(const Brought &b, Shared &s) {
#pragma unroll
    for (int i = 0; i < FOURS; i++) {
        int at = i * THREADS + threadIdx.x;
        u32 *to = s.x + at / FOURS_OF_ROW * ROW_WORDS + at % FOURS_OF_ROW * 2;
        *(uint2 *)to = make_uint2(bf16_pair(b.x[i].x, b.x[i].y), bf16_pair(b.x[i].z, b.x[i].w));
    }
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
        int at = i * THREADS + threadIdx.x;
        if (at >= TILE * VECTORS_OF_ROW) continue;
        u32 *to = s.w + at / VECTORS_OF_ROW * ROW_WORDS + at % VECTORS_OF_ROW * (PER / 2);
#if FORMAT == BF16
        *(uint4 *)to = b.w[i];
#else
        float w[PER];
        widen(b.w[i], w);
#pragma unroll
        for (int j = 0; j < PER / 2; j++) to[j] = bf16_pair(w[2 * j] * b.factor[i], w[2 * j + 1] * b.factor[i]);
#endif
    }
}

// A warp has half of the tile's tokens and 32 of its rows: ACROSS fragments of 16 tokens and DOWN of 8 rows.
#define ACROSS (TILE / 32)
#define DOWN 4
struct Sums { float of[ACROSS][DOWN][4]; };

__device__ __forceinline__ void clear(Sums &sums) {
#pragma unroll
    for (int a = 0; a < ACROSS; a++)
#pragma unroll
        for (int d = 0; d < DOWN; d++)
#pragma unroll
            for (int i = 0; i < 4; i++) sums.of[a][d][i] = 0;
}

__device__ __forceinline__ void multiply(const Shared &s, Sums &sums) {
    int group = LANE >> 2, pair = LANE & 3;
    const u32 *x = s.x + (WARP & 1) * (TILE / 2) * ROW_WORDS, *w = s.w + (WARP >> 1) * 32 * ROW_WORDS;
#pragma unroll
    for (int k = 0; k < STEP / 2; k += 8) {
        u32 left[ACROSS][4];
#pragma unroll
        for (int a = 0; a < ACROSS; a++) {
            const u32 *from = x + (a * 16 + group) * ROW_WORDS + k + pair;
            left[a][0] = from[0];
            left[a][1] = from[8 * ROW_WORDS];
            left[a][2] = from[4];
            left[a][3] = from[8 * ROW_WORDS + 4];
        }
#pragma unroll
        for (int d = 0; d < DOWN; d++) {
            const u32 *from = w + (d * 8 + group) * ROW_WORDS + k + pair;
            u32 right[2] = {from[0], from[4]};
#pragma unroll
            for (int a = 0; a < ACROSS; a++) mma_bf16(sums.of[a][d], left[a], right);
        }
    }
}

// Calls `store(token, row, sum, next)` for each two sums of this thread, of a token with two rows, the first an even one;
// counted from the tile's first ones.
template <class F> __device__ __forceinline__ void each_pair(const Sums &sums, F store) {
    int group = LANE >> 2, pair = LANE & 3;
#pragma unroll
    for (int a = 0; a < ACROSS; a++)
#pragma unroll
        for (int d = 0; d < DOWN; d++)
#pragma unroll
            for (int i = 0; i < 4; i += 2)
                store((WARP & 1) * (TILE / 2) + a * 16 + group + i * 4, (WARP >> 1) * 32 + d * 8 + pair * 2,
                      sums.of[a][d][i], sums.of[a][d][i + 1]);
}
#else
// Turned, [STEP][TILE]: a thread reads 4 tokens and 8 rows of a step side by side.
#define COLUMN (TILE + 4)
struct Shared { float x[STEP * COLUMN], w[STEP * COLUMN]; };

__device__ __forceinline__ void put(const Brought &b, Shared &s) {
#pragma unroll
    for (int i = 0; i < FOURS; i++) {
        int at = i * THREADS + threadIdx.x;
        float *to = s.x + at % FOURS_OF_ROW * 4 * COLUMN + at / FOURS_OF_ROW;
        to[0] = b.x[i].x, to[COLUMN] = b.x[i].y, to[2 * COLUMN] = b.x[i].z, to[3 * COLUMN] = b.x[i].w;
    }
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
        int at = i * THREADS + threadIdx.x;
        if (at >= TILE * VECTORS_OF_ROW) continue;
        float w[PER];
        widen(b.w[i], w);
#pragma unroll
        for (int j = 0; j < PER; j++)
            s.w[(at % VECTORS_OF_ROW * PER + j) * COLUMN + at / VECTORS_OF_ROW] = w[j] * b.factor[i];
    }
}

struct Sums { float of[4][8]; };

__device__ __forceinline__ void clear(Sums &sums) {
#pragma unroll
    for (int t = 0; t < 4; t++)
#pragma unroll
        for (int n = 0; n < 8; n++) sums.of[t][n] = 0;
}

__device__ __forceinline__ void multiply(const Shared &s, Sums &sums) {
    int token = threadIdx.x % 16 * 4, row = threadIdx.x / 16 * 8;
#pragma unroll 8
    for (int k = 0; k < STEP; k++) {
        float4 x = *(const float4 *)(s.x + k * COLUMN + token);
        float4 low = *(const float4 *)(s.w + k * COLUMN + row), high = *(const float4 *)(s.w + k * COLUMN + row + 4);
        float left[4] = {x.x, x.y, x.z, x.w}, right[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int t = 0; t < 4; t++)
#pragma unroll
            for (int n = 0; n < 8; n++) sums.of[t][n] = fmaf(left[t], right[n], sums.of[t][n]);
    }
}

template <class F> __device__ __forceinline__ void each_pair(const Sums &sums, F store) {
#pragma unroll
    for (int t = 0; t < 4; t++)
#pragma unroll
        for (int n = 0; n < 8; n += 2)
            store(threadIdx.x % 16 * 4 + t, threadIdx.x / 16 * 8 + n, sums.of[t][n], sums.of[t][n + 1]);
}
#endif

// The sums of a tile over all of `width`.
template <class X, class W>
__device__ __forceinline__ void multiply_tile(X x_row, i64 width, const Matrix &m, W w_row, Shared &shared, Sums &sums) {
    clear(sums);
    Brought b;
    bring(x_row, width, m, w_row, 0, b);
    for (int k = 0; k < width; k += STEP) {
        __syncthreads();
        put(b, shared);
        __syncthreads();
        if (k + STEP < width) bring(x_row, width, m, w_row, k + STEP, b);
        multiply(shared, sums);
    }
}
