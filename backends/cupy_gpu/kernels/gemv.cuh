// Products of rows of a stored matrix with few tokens, whose activations go through a norm into shared memory.
#include "activations.cuh"
#include "matrix.cuh"
#include "source.cuh"

#define WARPS 4
#define THREADS (WARPS * 32)

// Whether products are of bf16 on tensor cores (gemv_tensor.cuh), for 8 tokens.
#ifndef TENSOR
#define TENSOR 0
#endif

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

// Whether activations, and what the norm has, can be read in fours.
__device__ __forceinline__ bool in_fours(SOURCE) {
    return ((u64)x | (u64)gain | (u64)shift) % 16 == 0 && stride % 4 == 0 && width % 4 == 0;
}

// Four numbers from p on, where `left` > 0 are; zeros behind their end.
__device__ __forceinline__ void read_four(float numbers[4], const float *p, int left, bool fours) {
    if (fours) {
        float4 four = *(const float4 *)p;
        numbers[0] = four.x, numbers[1] = four.y, numbers[2] = four.z, numbers[3] = four.w;
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) numbers[i] = i < left ? p[i] : 0.0f;
}

// Sums over all threads of a block, in each of them; `room` holds one of each per warp. Two barriers.
__device__ __forceinline__ void add_up(float sums[TOKENS], float room[WARPS][TOKENS]) {
    __syncthreads();
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        float sum = warp_sum(sums[t]);
        if (LANE == 0) room[WARP][t] = sum;
    }
    __syncthreads();
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        sums[t] = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sums[t] += room[w][t];
    }
}

// `each(i, numbers)` for each four numbers of all tokens behind begin, i = 0, 4, .., zero beyond their end. All are asked
// for before any is waited for.
template <class Each> __device__ __forceinline__ void each_four(SOURCE, int begin, int filled, Each each) {
    const bool fours = in_fours(SOURCE_GIVEN);
    constexpr int AT_ONCE = TOKENS < 4 ? 4 / TOKENS : 1;
#pragma unroll AT_ONCE
    for (int i = threadIdx.x * 4; i < filled; i += THREADS * 4) {
        float numbers[TOKENS][4];
        const int left = (int)width - begin - i;
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
#pragma unroll
            for (int j = 0; j < 4; j++) numbers[t][j] = 0;
            if (t < tokens && left > 0) read_four(numbers[t], x + t * stride + begin + i, left, fours);
        }
        each(i, numbers);
    }
}

// What a layer norm takes from each token, and multiplies it with.
__device__ __forceinline__ void measure(SOURCE, float mean[TOKENS], float scale[TOKENS], float room[WARPS][TOKENS]) {
#pragma unroll
    for (int t = 0; t < TOKENS; t++) mean[t] = scale[t] = 0;
    each_four(SOURCE_GIVEN, 0, (int)width, [&](int, const float(*x)[4]) {
#pragma unroll
        for (int t = 0; t < TOKENS; t++) mean[t] += (x[t][0] + x[t][1]) + (x[t][2] + x[t][3]);
    });
    add_up(mean, room);
#pragma unroll
    for (int t = 0; t < TOKENS; t++) mean[t] /= (float)width;
    each_four(SOURCE_GIVEN, 0, (int)width, [&](int i, const float(*x)[4]) {
#pragma unroll
        for (int t = 0; t < TOKENS; t++)
#pragma unroll
            for (int j = 0; j < 4; j++)
                if (i + j < width) scale[t] = fmaf(x[t][j] - mean[t], x[t][j] - mean[t], scale[t]);
    });
    add_up(scale, room);
#pragma unroll
    for (int t = 0; t < TOKENS; t++) scale[t] = 1.0f / sqrtf(scale[t] / (float)width + eps);
}

// What tokens are read through: ((x - mean) * scale) * gain + shift. An RMS norm's scale is known when all of a token has
// been staged, and sums of products can wait for it.
struct Through { float mean[TOKENS], scale[TOKENS], squares[TOKENS]; };

__device__ __forceinline__ void begin_through(SOURCE, Through &through, float room[WARPS][TOKENS]) {
#pragma unroll
    for (int t = 0; t < TOKENS; t++) through.mean[t] = through.squares[t] = 0, through.scale[t] = 1;
    if (norm == LAYER) measure(SOURCE_GIVEN, through.mean, through.scale, room);
}
// What sums of products are still to be multiplied with.
__device__ __forceinline__ void end_through(SOURCE, Through &through, float room[WARPS][TOKENS]) {
    if (norm == RMS) add_up(through.squares, room);
#pragma unroll
    for (int t = 0; t < TOKENS; t++) through.scale[t] = norm == RMS ? 1.0f / sqrtf(through.squares[t] / (float)width + eps) : 1.0f;
}

// `put(token, i, numbers)` for each four numbers of each token behind begin, i = 0, 4, .., as they are multiplied.
template <class Put>
__device__ __forceinline__ void each_normed(SOURCE, int begin, int filled, Through &through, Put put) {
    const bool fours = in_fours(SOURCE_GIVEN);
    each_four(SOURCE_GIVEN, begin, filled, [&](int i, float(*x)[4]) {
        const int k = begin + i, left = (int)width - k;
        float gains[4] = {1, 1, 1, 1}, shifts[4] = {0, 0, 0, 0};
        if (gain && left > 0) read_four(gains, gain + k, left, fours);
        if (shift && left > 0) read_four(shifts, shift + k, left, fours);
        // Behind the last number, neither means nor shifts.
#pragma unroll
        for (int j = 0; j < 4; j++) gains[j] = j < left ? gains[j] + (gain ? offset : 0.0f) : 0.0f;
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                through.squares[t] = fmaf(x[t][j], x[t][j], through.squares[t]);
                x[t][j] = fmaf((x[t][j] - through.mean[t]) * through.scale[t], gains[j], shifts[j]);
            }
            put(t, i, x[t]);
        }
    });
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

// Sums over a lane's vectors of N rows with each token.
template <int N> struct Sums { float of[N][TOKENS]; };

// Puts numbers begin .. begin + STAGED of each token into shared memory.
__device__ __forceinline__ void stage(SOURCE, int begin, Through &through, float4 *staged);

// `use(begin, end)` for each part of a row's vectors, when what meets them has been staged.
template <class Use>
__device__ __forceinline__ void each_part(SOURCE, int vectors, Through &through, float4 *staged, Use use) {
#pragma unroll 1
    for (int begin = 0; begin < vectors; begin += STAGED_VECTORS) {
        __syncthreads();
        stage(SOURCE_GIVEN, begin * PER, through, staged);
        __syncthreads();
        use(begin, min(vectors, begin + STAGED_VECTORS));
    }
}

#if TENSOR
#include "gemv_tensor.cuh"
#else
// Numbers begin .. begin + STAGED of each token, normed, zero beyond their end.
__device__ __forceinline__ void stage(SOURCE, int begin, Through &through, float4 *staged) {
    int count = min((int)width - begin, STAGED);
    each_normed(SOURCE_GIVEN, begin, (count + PER - 1) / PER * PER, through, [=](int t, int i, const float *x) {
        staged[(t * PLANES + i / 4 % PLANES) * STAGED_VECTORS + i / PER] = make_float4(x[0], x[1], x[2], x[3]);
    });
}

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

// N rows of matrices of one layout, a warp's own, times all tokens: in every lane, the sums of the whole warp.
template <int N>
__device__ __forceinline__ void products(
    SOURCE, const Matrix &m, const uint4 *const row[N], const u8 *const factors[N], float4 *staged, Sums<N> &sums) {
    int vectors = vectors_of(m);
    uint4 ahead[N][AHEAD];
    fetch<N>(row, 0, vectors, ahead);
    wait_for_inputs();
    release_dependents();
    __shared__ float room[WARPS][TOKENS];
    Through through;
    begin_through(SOURCE_GIVEN, through, room);
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int t = 0; t < TOKENS; t++) sums.of[n][t] = 0;
    each_part(SOURCE_GIVEN, vectors, through, staged, [&](int begin, int end) {
#pragma unroll 1
        for (int first = begin; first < end; first += AHEAD * 32) {
            if (first) fetch<N>(row, first, end, ahead);
            multiply<N>(m, factors, ahead, first, begin, end, staged, sums);
        }
    });
    end_through(SOURCE_GIVEN, through, room);
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int t = 0; t < TOKENS; t++) sums.of[n][t] = warp_sum(sums.of[n][t]) * through.scale[t];
}
#endif
