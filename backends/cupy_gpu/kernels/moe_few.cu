// moe, few tokens: gated experts straight from their choices, without sorting. Macros: FORMAT, TOKENS (1); a warp computes
// ROWS rows. Choices lie as [M, C]: choice i is of token i / C. Numbers that are no expert's take part in nothing.
#include "gemv.cuh"

// Hidden features `act(gate x) * up x` of each choice -> [M C, F]; with `weights`, of x times the choice's weight. Blocks of
// a choice after the other read the same rows of gate and up: tokens of the same expert find them in the second cache.
extern "C" __global__ void __launch_bounds__(THREADS) moe_hidden_few(
    const float *x, i64 width, i64 choices, i64 experts, const i64 *index, const float *weights, Matrix gate, Matrix up,
    i64 act, float *hidden) {
    DYNAMIC_SHARED(staged);
    const int HALF = ROWS / 2;
    wait_for_inputs();
    i64 choice = blockIdx.x, expert = index[choice], n0 = ((i64)blockIdx.y * WARPS + WARP) * HALF;
    bool known = 0 <= expert && expert < experts;
    Matrix gates = stack_entry(gate, known ? expert : 0), ups = stack_entry(up, known ? expert : 0);
    const uint4 *row[ROWS];
    const u8 *factors[ROWS];
    find_rows<HALF>(gates, n0, row, factors);
    find_rows<HALF>(ups, n0, row + HALF, factors + HALF);
    Sums<ROWS> sums;
    products<ROWS>(
        x + choice / choices * width, 1, width, width, NO_NORM, nullptr, nullptr, 0.0f, 0.0f, gates, row, factors,
        (float4 *)staged, sums);
    if (LANE) return;
    float weight = weights ? weights[choice] : 1.0f;
#pragma unroll
    for (int r = 0; r < HALF; r++)
        if (n0 + r < gate.rows)
            hidden[choice * gate.rows + n0 + r] =
                known ? activate((int)act, sums.of[r][0] * weight) * (sums.of[HALF + r][0] * weight) : 0.0f;
}

// Numbers of a row of `count` that meet a vector of weights; those beyond its end are zero.
__device__ __forceinline__ void read(const float *x, int begin, int count, float values[PER]) {
    if (count % 4 == 0) {
#pragma unroll
        for (int p = 0; p < PLANES; p++) {
            bool inside = begin + 4 * p < count;
            float4 four = inside ? *(const float4 *)(x + begin + 4 * p) : make_float4(0, 0, 0, 0);
            values[4 * p] = four.x, values[4 * p + 1] = four.y, values[4 * p + 2] = four.z, values[4 * p + 3] = four.w;
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < PER; i++) values[i] = begin + i < count ? x[begin + i] : 0.0f;
}

// `row[n] x` for ROWS rows of one matrix, in every lane; x is read where it lies, by all warps of all blocks.
__device__ __forceinline__ void dots(const Matrix &m, i64 n0, const float *x, float sums[ROWS]) {
    int vectors = vectors_of(m);
    const uint4 *row[ROWS];
    const u8 *factors[ROWS];
    find_rows<ROWS>(m, n0, row, factors);
#pragma unroll
    for (int r = 0; r < ROWS; r++) sums[r] = 0;
    for (int first = 0; first < vectors; first += AHEAD * 32) {
        uint4 ahead[ROWS][AHEAD];
        fetch<ROWS>(row, first, vectors, ahead);
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            int v = first + a * 32 + LANE;
            if (v >= vectors) continue;
            float inputs[PER];
            read(x, v * PER, (int)m.columns, inputs);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                float w[PER], sum = 0;
                widen(ahead[r][a], w);
#pragma unroll
                for (int i = 0; i < PER; i++) sum = fmaf(w[i], inputs[i], sum);
                sums[r] = fmaf(factor(m, factors[r], v), sum, sums[r]);
            }
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) sums[r] = warp_sum(sums[r]);
}

// `residual` plus what the experts say, weighted -> [M, D]. A block has ROWS numbers of a token, a warp every fourth choice;
// choices are added in their order. Without `weights` each counts 1.
extern "C" __global__ void __launch_bounds__(THREADS) moe_say_few(
    const float *hidden, i64 choices, i64 experts, const i64 *index, const float *weights, Matrix down, const float *residual,
    float *out) {
    DYNAMIC_SHARED(room);
    float *said = (float *)room;
    i64 token = blockIdx.x, n0 = (i64)blockIdx.y * ROWS;
    wait_for_inputs();
    release_dependents();
    for (i64 c = WARP; c < choices; c += WARPS) {
        i64 choice = token * choices + c, expert = index[choice];
        bool known = 0 <= expert && expert < experts;
        float sums[ROWS], weight = weights ? weights[choice] : 1.0f;
        if (known) dots(stack_entry(down, expert), n0, hidden + choice * down.columns, sums);
        if (LANE == 0)
            for (int r = 0; r < ROWS; r++) said[c * ROWS + r] = known ? sums[r] * weight : 0.0f;
    }
    __syncthreads();
    if (threadIdx.x < ROWS && n0 + threadIdx.x < down.rows) {
        float sum = 0;
        for (i64 c = 0; c < choices; c++) sum += said[c * ROWS + threadIdx.x];
        i64 at = token * down.rows + n0 + threadIdx.x;
        out[at] = residual ? residual[at] + sum : sum;
    }
}
