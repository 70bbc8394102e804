// Products of stored matrices with up to TOKENS tokens. Macros: FORMAT, TOKENS; a warp computes ROWS rows.
#include "gemv.cuh"

// `residual + W h + b` for up to three matrices that read the same h = norm(x); their rows are dealt out to blocks one
// matrix after the other. Only the first has a residual. Results are [tokens, rows].
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) gemv(
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
    find_rows<ROWS>(m, n0, row, factors);
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
