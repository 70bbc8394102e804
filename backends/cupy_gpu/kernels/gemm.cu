// `residual + X W^T + b` for many tokens, in tiles of TILE tokens x TILE rows of W, 32 numbers of both at a time.
// Macros: FORMAT, TILE (64 or 128), TENSOR: products of bf16 on tensor cores, or of float32 on the others (TILE 64 then).
#include "matrix.cuh"

#define THREADS 128
#define STEP 32

// What a thread brings of a tile: numbers of activations, and vectors of weights.
#define NUMBERS (TILE * STEP / THREADS)
#define VECTORS_OF_ROW (STEP / PER)
#define VECTORS ((TILE * VECTORS_OF_ROW + THREADS - 1) / THREADS)

struct Brought { float x[NUMBERS]; uint4 w[VECTORS]; float factor[VECTORS]; };

__device__ __forceinline__ void bring(
    const float *x, i64 tokens, i64 width, const Matrix &m, i64 token0, i64 row0, int k0, Brought &b) {
#pragma unroll
    for (int i = 0; i < NUMBERS; i++) {
        int at = i * THREADS + threadIdx.x;
        i64 token = token0 + at / STEP, k = k0 + at % STEP;
        b.x[i] = token < tokens && k < width ? x[token * width + k] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
        int at = i * THREADS + threadIdx.x, vector = k0 / PER + at % VECTORS_OF_ROW;
        i64 row = row0 + at / VECTORS_OF_ROW;
        bool inside = at < TILE * VECTORS_OF_ROW && row < m.rows && vector < vectors_of(m);
        b.w[i] = inside ? row_of(m, row)[vector] : make_uint4(0, 0, 0, 0);
        b.factor[i] = inside ? factor(m, factors_of(m, row), vector) : 0.0f;
    }
}

#if TENSOR
// Rows of 16 pairs of bf16 and 4 words more, so that the lanes of a fragment meet different banks.
#define ROW_WORDS (STEP / 2 + 4)
struct Shared { u32 x[TILE * ROW_WORDS], w[TILE * ROW_WORDS]; };

__device__ __forceinline__ void put(const Brought &b, Shared &s) {
#pragma unroll
    for (int i = 0; i < NUMBERS; i++) {
        int at = i * THREADS + threadIdx.x;
        ((u16 *)s.x)[at / STEP * ROW_WORDS * 2 + at % STEP] = (u16)float_to_bf16(b.x[i]);
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

// A warp has a quarter of the tile: ACROSS fragments of 16 tokens and DOWN of 8 rows.
#define ACROSS (TILE / 32)
#define DOWN (TILE / 16)
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
    const u32 *x = s.x + (WARP & 1) * (TILE / 2) * ROW_WORDS, *w = s.w + (WARP >> 1) * (TILE / 2) * ROW_WORDS;
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

// Calls `store(token, row, sum)` for each sum of this thread, counted from the tile's first ones.
template <class F> __device__ __forceinline__ void each(const Sums &sums, F store) {
    int group = LANE >> 2, pair = LANE & 3;
#pragma unroll
    for (int a = 0; a < ACROSS; a++)
#pragma unroll
        for (int d = 0; d < DOWN; d++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                store((WARP & 1) * (TILE / 2) + a * 16 + group + (i >> 1) * 8,
                      (WARP >> 1) * (TILE / 2) + d * 8 + pair * 2 + (i & 1), sums.of[a][d][i]);
}
#else
// Turned, [STEP][TILE]: a thread reads 4 tokens and 8 rows of a step side by side.
#define COLUMN (TILE + 4)
struct Shared { float x[STEP * COLUMN], w[STEP * COLUMN]; };

__device__ __forceinline__ void put(const Brought &b, Shared &s) {
#pragma unroll
    for (int i = 0; i < NUMBERS; i++) {
        int at = i * THREADS + threadIdx.x;
        s.x[at % STEP * COLUMN + at / STEP] = b.x[i];
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

template <class F> __device__ __forceinline__ void each(const Sums &sums, F store) {
#pragma unroll
    for (int t = 0; t < 4; t++)
#pragma unroll
        for (int n = 0; n < 8; n++) store(threadIdx.x % 16 * 4 + t, threadIdx.x / 16 * 8 + n, sums.of[t][n]);
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS) gemm(
    const float *x, i64 tokens, i64 width, Matrix m, const float *bias, const float *residual, float *out) {
    __shared__ __align__(16) Shared shared;
    i64 row0 = (i64)blockIdx.x * TILE, token0 = (i64)blockIdx.y * TILE;
    wait_for_inputs();
    release_dependents();
    Sums sums;
    clear(sums);
    Brought b;
    bring(x, tokens, width, m, token0, row0, 0, b);
    for (int k = 0; k < width; k += STEP) {
        __syncthreads();
        put(b, shared);
        __syncthreads();
        if (k + STEP < width) bring(x, tokens, width, m, token0, row0, k + STEP, b);
        multiply(shared, sums);
    }
    each(sums, [&](int t, int n, float y) {
        i64 token = token0 + t, row = row0 + n;
        if (token >= tokens || row >= m.rows) return;
        if (bias) y += bias[row];
        if (residual) y += residual[token * m.rows + row];
        out[token * m.rows + row] = y;
    });
}
