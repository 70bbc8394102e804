// Products of rows of a stored matrix with few tokens, whose activations go through a norm into shared memory.
#include "activations.cuh"
#include "matrix.cuh"
#include "source.cuh"

#define WARPS 4
#define THREADS (WARPS * 32)

// Blocks that a multiprocessor shall have room for. Told of three, the compiler for sm_100 spills where products are most,
// with registers to spare.
#if PER * TOKENS >= 128 && __CUDA_ARCH__ >= 1000
#define BLOCKS 2
#else
#define BLOCKS 3
#endif

// Numbers of a token that are staged at a time, and those that lie in 16 bytes of weights as PLANES groups of 4: group p of
// vector v is a float4, so that the lanes of a warp, which take a vector each, read 16 bytes side by side.
#define STAGED (8192 / TOKENS)
#define PLANES (PER / 4)
#define STAGED_VECTORS (STAGED / PER)

// Vectors of each row that a lane fetches before it multiplies, and before it waits for the activations: fewer where each
// means more products, which are unrolled.
#if PER * TOKENS <= 16
#define AHEAD 4
#elif PER * TOKENS <= 64
#define AHEAD 2
#else
#define AHEAD 1
#endif

// What the norm takes from a token, and multiplies it with.
struct Statistics { float mean, scale; };

__device__ __forceinline__ void measure(SOURCE, Statistics *statistics) {
    __shared__ float room[WARPS];
#pragma unroll 1
    for (int t = 0; t < tokens; t++) {
        if (norm == NO_NORM) break;
        Statistics s = {0, 1};
        const float *row = x + t * stride;
        if (norm == LAYER) {
            float sum = 0;
            for (int k = threadIdx.x; k < width; k += THREADS) sum += row[k];
            s.mean = block_sum(sum, room) / (float)width;
        }
        float squares = 0;
        for (int k = threadIdx.x; k < width; k += THREADS) squares = fmaf(row[k] - s.mean, row[k] - s.mean, squares);
        s.scale = 1.0f / sqrtf(block_sum(squares, room) / (float)width + eps);
        if (threadIdx.x == 0) statistics[t] = s;
    }
}

// Numbers begin .. begin + STAGED of each token, normed, zero beyond their end.
__device__ __forceinline__ void stage(SOURCE, const Statistics *statistics, int begin, float4 *staged) {
    float *to = (float *)staged;
    int count = min((int)width - begin, STAGED);
    int filled = (count + PER - 1) / PER * PER;
#pragma unroll 1
    for (int t = 0; t < TOKENS; t++) {
        Statistics s = {0, 1};
        if (norm != NO_NORM && t < tokens) s = statistics[t];
        for (int i = threadIdx.x; i < filled; i += THREADS) {
            int k = begin + i;
            float value = 0;
            if (t < tokens && i < count) {
                value = (x[t * stride + k] - s.mean) * s.scale;
                if (norm != NO_NORM && gain) value *= offset + gain[k];
                if (norm == LAYER) value += shift[k];
            }
            to[(((t * PLANES) + i % PER / 4) * STAGED_VECTORS + i / PER) * 4 + i % 4] = value;
        }
    }
}

// Sums over a lane's vectors of N rows with each token.
template <int N> struct Sums { float of[N][TOKENS]; };

template <int N> __device__ __forceinline__ void fetch(const uint4 *const row[N], int first, int vectors, uint4 ahead[N][AHEAD]) {
#pragma unroll
    for (int a = 0; a < AHEAD; a++) {
        int v = first + a * 32 + LANE;
#pragma unroll
        for (int n = 0; n < N; n++) ahead[n][a] = v < vectors ? load_once(row[n] + v) : make_uint4(0, 0, 0, 0);
    }
}

template <int N>
__device__ __forceinline__ void multiply(
    const Matrix &m, const u8 *const factors[N], const uint4 ahead[N][AHEAD], int first, int begin, int vectors,
    const float4 *staged, Sums<N> &sums) {
#pragma unroll
    for (int a = 0; a < AHEAD; a++) {
        int v = first + a * 32 + LANE;
        if (v >= vectors) continue;
#pragma unroll
        for (int n = 0; n < N; n++) {
            float w[PER];
            widen(ahead[n][a], w);
#if FORMAT >= F8
            float scale = factor(m, factors[n], v);
#endif
#pragma unroll
            for (int t = 0; t < TOKENS; t++) {
#if FORMAT >= F8
                float sum = 0;
#else
                float sum = sums.of[n][t];
#endif
#pragma unroll
                for (int p = 0; p < PLANES; p++) {
                    float4 x = staged[(t * PLANES + p) * STAGED_VECTORS + v - begin];
                    sum = fmaf(w[4 * p], x.x, sum);
                    sum = fmaf(w[4 * p + 1], x.y, sum);
                    sum = fmaf(w[4 * p + 2], x.z, sum);
                    sum = fmaf(w[4 * p + 3], x.w, sum);
                }
#if FORMAT >= F8
                sums.of[n][t] = fmaf(scale, sum, sums.of[n][t]);
#else
                sums.of[n][t] = sum;
#endif
            }
        }
    }
}

// Where rows n0, n0 + 1, ... of a matrix and their factors lie; those behind the last are the last.
template <int N>
__device__ __forceinline__ void find_rows(const Matrix &m, i64 n0, const uint4 **row, const u8 **factors) {
#pragma unroll
    for (int r = 0; r < N; r++) {
        i64 n = min(n0 + r, m.rows - 1);
        row[r] = row_of(m, n);
        factors[r] = factors_of(m, n);
    }
}

// N rows of matrices of one layout, a warp's own, times all tokens: in every lane, the sums of the whole warp.
template <int N>
__device__ __forceinline__ void products(
    SOURCE, const Matrix &m, const uint4 *const row[N], const u8 *const factors[N], float4 *staged, Sums<N> &sums) {
    int vectors = vectors_of(m);
    uint4 ahead[N][AHEAD];
    fetch<N>(row, 0, vectors, ahead);
    wait_for_inputs();
    release_dependents();
    __shared__ Statistics statistics[TOKENS];
    measure(SOURCE_GIVEN, statistics);
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int t = 0; t < TOKENS; t++) sums.of[n][t] = 0;
#pragma unroll 1
    for (int begin = 0; begin < vectors; begin += STAGED_VECTORS) {
        int end = min(vectors, begin + STAGED_VECTORS);
        __syncthreads();
        stage(SOURCE_GIVEN, statistics, begin * PER, staged);
        __syncthreads();
#pragma unroll 1
        for (int first = begin; first < end; first += AHEAD * 32) {
            if (first) fetch<N>(row, first, end, ahead);
            multiply<N>(m, factors, ahead, first, begin, end, staged, sums);
        }
    }
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int t = 0; t < TOKENS; t++) sums.of[n][t] = warp_sum(sums.of[n][t]);
}
