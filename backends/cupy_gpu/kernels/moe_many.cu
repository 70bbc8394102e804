// moe, many tokens: products in tiles of one expert each (tiles.cuh, moe_plan.cu); blocks of tiles without one do nothing.
#include "tiles.cuh"

// Hidden features `act(gate x) * up x` of each place -> [places, F]; with `weights`, of x times the choice's weight. Rows of
// gate and up take turns in a tile.
extern "C" __global__ void __launch_bounds__(THREADS) moe_hidden_many(
    const float *x, i64 width, i64 choices, const i64 *order, const i64 *owners, const float *weights, Matrix gate, Matrix up,
    i64 act, float *hidden) {
    __shared__ __align__(16) Shared shared;
    __shared__ const float *rows[TILE];
    __shared__ float weight[TILE];
    wait_for_inputs();
    release_dependents();
    i64 expert = owners[blockIdx.y], place0 = (i64)blockIdx.y * TILE, row0 = (i64)blockIdx.x * (TILE / 2);
    if (expert < 0) return;
    for (int i = threadIdx.x; i < TILE; i += THREADS) {
        i64 choice = order[place0 + i];
        rows[i] = choice < 0 ? nullptr : x + choice / choices * width;
        weight[i] = choice < 0 || !weights ? 1.0f : weights[choice];
    }
    __syncthreads();
    Matrix gates = stack_entry(gate, expert), ups = stack_entry(up, expert);
    Sums sums;
    auto w_row = [&](int i, const uint4 *&row, const u8 *&factors) {
        if (row0 + i / 2 >= gate.rows) return false;
        const Matrix &m = i % 2 ? ups : gates;
        row = row_of(m, row0 + i / 2);
        factors = factors_of(m, row0 + i / 2);
        return true;
    };
    multiply_tile([&](int i) { return rows[i]; }, width, gates, w_row, shared, sums);
    each_pair(sums, [&](int t, int n, float g, float u) {
        if (!rows[t] || row0 + n / 2 >= gate.rows) return;
        hidden[(place0 + t) * gate.rows + row0 + n / 2] = activate((int)act, g * weight[t]) * (u * weight[t]);
    });
}

// What the experts say of each choice -> [M C, D].
extern "C" __global__ void __launch_bounds__(THREADS) moe_say_many(
    const float *hidden, const i64 *order, const i64 *owners, Matrix down, float *said) {
    __shared__ __align__(16) Shared shared;
    __shared__ i64 choice[TILE];
    wait_for_inputs();
    release_dependents();
    i64 expert = owners[blockIdx.y], place0 = (i64)blockIdx.y * TILE, row0 = (i64)blockIdx.x * TILE;
    if (expert < 0) return;
    for (int i = threadIdx.x; i < TILE; i += THREADS) choice[i] = order[place0 + i];
    __syncthreads();
    Matrix m = stack_entry(down, expert);
    Sums sums;
    auto x_row = [&](int i) { return choice[i] < 0 ? nullptr : hidden + (place0 + i) * m.columns; };
    auto w_row = [&](int i, const uint4 *&row, const u8 *&factors) {
        if (row0 + i >= m.rows) return false;
        row = row_of(m, row0 + i);
        factors = factors_of(m, row0 + i);
        return true;
    };
    multiply_tile(x_row, m.columns, m, w_row, shared, sums);
    each_pair(sums, [&](int t, int n, float y, float next) {
        if (choice[t] < 0) return;
        if (row0 + n < m.rows) said[choice[t] * m.rows + row0 + n] = y;
        if (row0 + n + 1 < m.rows) said[choice[t] * m.rows + row0 + n + 1] = next;
    });
}
