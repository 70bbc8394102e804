// New keys or values into their places in a cache. Macros: STORED (F32 or BF16).
#include "keys.cuh"

// x [tokens, heads, width] -> storage [slots, heads, size, width]. Of a row that brings more than `size`, the last ones stay.
extern "C" __global__ void append(
    const i64 *plan, i64 rows, i64 tokens, const float *x, i64 heads, i64 width, void *storage, i64 size) {
    wait_for_inputs();
    release_dependents();
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= tokens * heads * width) return;
    i64 token = i / (heads * width), head = i / width % heads, n = i % width, r = 0;
    while (r < rows && token >= row_of_plan(plan, r).end) r++;
    Row row = row_of_plan(plan, r);
    if (r == rows || row.slot < 0 || row.end - token > size) return;
    i64 at = ((row.slot * heads + head) * size + (row.place + token - row.query) % size) * width + n;
#if STORED == BF16
    ((u16 *)storage)[at] = (u16)float_to_bf16(x[i]);
#else
    ((float *)storage)[at] = x[i];
#endif
}
