// The first half of an MLP for up to TOKENS tokens. Macros: FORMAT, TOKENS; a warp computes ROWS rows.
#include "gemv.cuh"

// `act(W h + b)`, h = norm(x) -> [tokens, rows].
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) gemv_activated(
    SOURCE, Matrix m, const float *bias, i64 act, float *out) {
    DYNAMIC_SHARED(staged);
    i64 n0 = ((i64)blockIdx.x * WARPS + WARP) * ROWS;
    const uint4 *row[ROWS];
    const u8 *factors[ROWS];
    find_rows<ROWS>(m, n0, row, factors);
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
