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
    // A lane a number: activations are long, and would stand here for each.
    static_assert(HALF * TOKENS <= 32, "a lane a number");
    float g = 0, u = 0;
#pragma unroll
    for (int r = 0; r < HALF; r++)
#pragma unroll
        for (int t = 0; t < TOKENS; t++)
            if (LANE == r * TOKENS + t) g = sums.of[r][t], u = sums.of[HALF + r][t];
    i64 n = n0 + LANE / TOKENS, t = LANE % TOKENS;
    if (LANE >= HALF * TOKENS || n >= gate.rows || t >= tokens) return;
    g += gate_bias ? gate_bias[n] : 0.0f, u += up_bias ? up_bias[n] : 0.0f;
    out[t * gate.rows + n] = activate((int)act, g) * u;
}
