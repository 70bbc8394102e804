// Rows of a stored table as float32. Macros: FORMAT. A token that the table does not have gives NaN.
#include "matrix.cuh"

extern "C" __global__ void embed(const i64 *tokens, i64 count, Matrix table, float *out) {
    wait_for_inputs();
    release_dependents();
    int vectors = vectors_of(table);
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count * vectors) return;
    i64 token = tokens[i / vectors], at = i / vectors * table.columns;
    int vector = (int)(i % vectors);
    bool known = token >= 0 && token < table.rows;
    float w[PER];
    widen(known ? load_once(row_of(table, token) + vector) : make_uint4(0, 0, 0, 0), w);
    float scale = known ? factor(table, factors_of(table, token), vector) : NOT_A_NUMBER;
    for (int j = 0; j < PER && vector * PER + j < table.columns; j++) out[at + vector * PER + j] = w[j] * scale;
}
