// route of up to TOKENS tokens, with the product that their logits are. Macros: FORMAT, TOKENS; a warp computes ROWS logits.
#include "gemv.cuh"
#include "route.cuh"

// Logits `W h + b` [TOKENS, E] in global memory; the block that is done last chooses by all of them, a warp a token.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) route_few(
    SOURCE, Matrix m, const float *bias, const float *correction_E, Rule rule, float floor, float scale, float *logits,
    u32 *ticket, i64 *index_MC, float *weight_MC) {
    DYNAMIC_SHARED(staged);
    i64 n0 = ((i64)blockIdx.x * WARPS + WARP) * ROWS;
    const uint4 *row[ROWS];
    const u8 *factors[ROWS];
    find_rows<ROWS>(m, n0, row, factors);
    Sums<ROWS> sums;
    products<ROWS>(SOURCE_GIVEN, m, row, factors, (float4 *)staged, sums);
    if (LANE == 0)
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
            for (int t = 0; t < TOKENS; t++)
                if (n0 + r < m.rows && t < tokens) logits[t * m.rows + n0 + r] = sums.of[r][t] + (bias ? bias[n0 + r] : 0.0f);
    if (!is_last(ticket, gridDim.x, (u32 *)staged)) return;
    float *mine = (float *)staged + WARP * (room_of(rule) + rule.experts), *own = mine + room_of(rule);
    for (int t = WARP; t < tokens; t += WARPS) {
        for (int e = LANE; e < rule.experts; e += 32) own[e] = load_shared_by_blocks(logits + t * rule.experts + e);
        choose(own, correction_E, rule, floor, scale, mine, index_MC + t * rule.choices, weight_MC + t * rule.choices);
    }
}
