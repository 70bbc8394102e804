// `residual + X W^T + b` for many tokens (tiles.cuh).
#include "tiles.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) gemm(
    const float *x, i64 tokens, i64 width, Matrix m, const float *bias, const float *residual, float *out) {
    __shared__ __align__(16) Shared shared;
    i64 row0 = (i64)blockIdx.x * TILE, token0 = (i64)blockIdx.y * TILE;
    wait_for_inputs();
    release_dependents();
    Sums sums;
    auto x_row = [&](int i) { return token0 + i < tokens ? x + (token0 + i) * width : nullptr; };
    auto w_row = [&](int i, const uint4 *&row, const u8 *&factors) {
        if (row0 + i >= m.rows) return false;
        row = row_of(m, row0 + i);
        factors = factors_of(m, row0 + i);
        return true;
    };
    multiply_tile(x_row, width, m, w_row, shared, sums);
    each_pair(sums, [&](int t, int n, float y, float next) {
        i64 token = token0 + t;
        float both[2] = {y, next};
#pragma unroll
        for (int i = 0; i < 2; i++) {
            i64 row = row0 + n + i, at = token * m.rows + row;
            if (token < tokens && row < m.rows) out[at] = both[i] + (bias ? bias[row] : 0.0f) + (residual ? residual[at] : 0.0f);
        }
    });
}
