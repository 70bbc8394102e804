// A stored matrix as float32, or as bf16 (rounded), [rows, columns]. Macros: FORMAT.
#include "matrix.cuh"

extern "C" __global__ void widen_matrix(Matrix m, i64 first_row, i64 rows, i64 to_bf16, void *out) {
    wait_for_inputs();
    release_dependents();
    i64 vectors = vectors_of(m), total = rows * vectors;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < total; i += (i64)gridDim.x * blockDim.x) {
        i64 row = i / vectors;
        int vector = (int)(i % vectors);
        float w[PER];
        widen(load_once(row_of(m, first_row + row) + vector), w);
        float scale = factor(m, factors_of(m, first_row + row), vector);
        for (int j = 0; j < PER; j++) {
            i64 column = (i64)vector * PER + j;
            if (column >= m.columns) break;
            if (to_bf16)
                ((u16 *)out)[row * m.columns + column] = (u16)float_to_bf16(w[j] * scale);
            else
                ((float *)out)[row * m.columns + column] = w[j] * scale;
        }
    }
}
