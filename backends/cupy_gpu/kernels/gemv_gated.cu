// The first half of a gated FFN for up to TOKENS tokens. Macros: FORMAT, TOKENS; a warp computes ROWS rows.
#include "gemv.cuh"

// Hidden features `act(gate h + b) * (up h + b)`, h = norm(x) -> [tokens, rows]: a warp computes the same ROWS / 2 of both.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) gemv_gated(
    SOURCE, Matrix gate, const float *gate_bias, Matrix up, const float *up_bias, i64 act, float *out) {
    DYNAMIC_SHARED(staged);
    const int HALF = ROWS / 2;
    i64 n0 = ((i64)blockIdx.x * WARPS + WARP) * HALF;
    const uint4 *row[ROWS];
    const u8 *factors[ROWS];
    find_rows<HALF>(gate, n0, row, factors);
    find_rows<HALF>(up, n0, row + HALF, factors + HALF);
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
