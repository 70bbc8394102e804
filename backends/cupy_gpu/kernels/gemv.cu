// Products of stored matrices with up to TOKENS tokens. Macros: FORMAT, TOKENS; a warp computes ROWS rows.
#include "gemv.cuh"

// `residual + W h + b` for up to three matrices that read the same h = norm(x); their rows are dealt out to blocks one matrix
// after the other. Only the first has a residual. Results are [tokens, rows].
extern "C" __global__ void __launch_bounds__(THREADS) gemv(
    SOURCE, Matrix a, const float *a_bias, float *a_out, Matrix b, const float *b_bias, float *b_out, Matrix c,
    const float *c_bias, float *c_out, const float *residual) {
    DYNAMIC_SHARED(staged);
    const int each = WARPS * ROWS;
    i64 block = blockIdx.x, a_blocks = (a.rows + each - 1) / each, b_blocks = (b.rows + each - 1) / each;
    Matrix m = a;
    const float *bias = a_bias;
    float *out = a_out;
    if (block >= a_blocks) {
        block -= a_blocks;
        residual = nullptr;
        m = block < b_blocks ? b : c;
        bias = block < b_blocks ? b_bias : c_bias;
        out = block < b_blocks ? b_out : c_out;
        block -= block < b_blocks ? 0 : b_blocks;
    }
    i64 n0 = (block * WARPS + WARP) * ROWS;
    const uint4 *row[ROWS];
    const u8 *factors[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        i64 n = min(n0 + r, m.rows - 1);
        row[r] = row_of(m, n);
        factors[r] = factors_of(m, n);
    }
    Sums<ROWS> sums;
    products<ROWS>(SOURCE_GIVEN, m, row, factors, (float4 *)staged, sums);
    if (LANE) return;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        i64 n = n0 + r;
        if (n >= m.rows) continue;
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            if (t >= tokens) continue;
            float y = sums.of[r][t];
            if (bias) y += bias[n];
            if (residual) y += residual[t * m.rows + n];
            out[t * m.rows + n] = y;
        }
    }
}

// Hidden features `act(gate h + b) * (up h + b)`, h = norm(x) -> [tokens, rows]: a warp computes the same ROWS / 2 of both.
extern "C" __global__ void __launch_bounds__(THREADS) gemv_gated(
    SOURCE, Matrix gate, const float *gate_bias, Matrix up, const float *up_bias, i64 act, float *out) {
    DYNAMIC_SHARED(staged);
    const int HALF = ROWS / 2;
    i64 n0 = ((i64)blockIdx.x * WARPS + WARP) * HALF;
    const uint4 *row[ROWS];
    const u8 *factors[ROWS];
#pragma unroll
    for (int r = 0; r < HALF; r++) {
        i64 n = min(n0 + r, gate.rows - 1);
        row[r] = row_of(gate, n);
        factors[r] = factors_of(gate, n);
        row[HALF + r] = row_of(up, n);
        factors[HALF + r] = factors_of(up, n);
    }
    Sums<ROWS> sums;
    products<ROWS>(SOURCE_GIVEN, gate, row, factors, (float4 *)staged, sums);
    if (LANE) return;
#pragma unroll
    for (int r = 0; r < HALF; r++) {
        i64 n = n0 + r;
        if (n >= gate.rows) continue;
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            if (t >= tokens) continue;
            float g = sums.of[r][t] + (gate_bias ? gate_bias[n] : 0.0f), u = sums.of[HALF + r][t] + (up_bias ? up_bias[n] : 0.0f);
            out[t * gate.rows + n] = activate((int)act, g) * u;
        }
    }
}

// `act(W h + b)`, h = norm(x) -> [tokens, rows].
extern "C" __global__ void __launch_bounds__(THREADS) gemv_activated(
    SOURCE, Matrix m, const float *bias, i64 act, float *out) {
    DYNAMIC_SHARED(staged);
    i64 n0 = ((i64)blockIdx.x * WARPS + WARP) * ROWS;
    const uint4 *row[ROWS];
    const u8 *factors[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        i64 n = min(n0 + r, m.rows - 1);
        row[r] = row_of(m, n);
        factors[r] = factors_of(m, n);
    }
    Sums<ROWS> sums;
    products<ROWS>(SOURCE_GIVEN, m, row, factors, (float4 *)staged, sums);
    if (LANE) return;
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int t = 0; t < TOKENS; t++)
            if (n0 + r < m.rows && t < tokens)
                out[t * m.rows + n0 + r] = activate((int)act, sums.of[r][t] + (bias ? bias[n0 + r] : 0.0f));
}
