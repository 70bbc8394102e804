// Stored matrices: rows of 16-byte vectors, FORMAT of their numbers, PER numbers to a vector, and factors of f8, q8 and q4.
#include "common.cuh"

#if FORMAT == F32
#define PER 4
#elif FORMAT == F16 || FORMAT == BF16
#define PER 8
#elif FORMAT == F8 || FORMAT == Q8
#define PER 16
#elif FORMAT == Q4
#define PER 32
#endif

// As npllm.backends.cupy_gpu.matrix packs it. Of a stack, the first matrix, with the bytes between two.
struct Matrix {
    const u8 *data;
    i64 rows, columns, pitch, stack_pitch;
    const u8 *factors;
    i64 factor_pitch, factor_stack_pitch, block_rows, origin_row, vectors_per_factor_log2;
};

__device__ __forceinline__ Matrix stack_entry(Matrix m, i64 index) {
    m.data += index * m.stack_pitch;
    m.factors += index * m.factor_stack_pitch;
    return m;
}

__device__ __forceinline__ int vectors_of(const Matrix &m) { return (int)((m.columns + PER - 1) / PER); }

__device__ __forceinline__ const uint4 *row_of(const Matrix &m, i64 row) { return (const uint4 *)(m.data + row * m.pitch); }

// The factors of a row; `factor` of its vectors.
__device__ __forceinline__ const u8 *factors_of(const Matrix &m, i64 row) {
#if FORMAT == F8
    return m.factors + (row + m.origin_row) / m.block_rows * m.factor_pitch;
#else
    return m.factors + row * m.factor_pitch;
#endif
}
__device__ __forceinline__ float factor(const Matrix &m, const u8 *factors, int vector) {
#if FORMAT == F8
    return ((const float *)factors)[vector >> m.vectors_per_factor_log2];
#elif FORMAT == Q8 || FORMAT == Q4
    return f16_to_float(((const u16 *)factors)[vector >> m.vectors_per_factor_log2]);
#else
    return 1.0f;
#endif
}

// The numbers of a vector, without their factor.
__device__ __forceinline__ void widen(uint4 v, float w[PER]) {
    u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 bits = words[i];
#if FORMAT == F32
        w[i] = __uint_as_float(bits);
#elif FORMAT == F16
        w[2 * i] = f16_to_float(bits & 0xffffu);
        w[2 * i + 1] = f16_to_float(bits >> 16);
#elif FORMAT == BF16
        w[2 * i] = bf16_low(bits);
        w[2 * i + 1] = bf16_high(bits);
#elif FORMAT == F8
#pragma unroll
        for (int j = 0; j < 4; j++) w[4 * i + j] = f8_to_float(bits >> 8 * j & 0xffu);
#elif FORMAT == Q8
#pragma unroll
        for (int j = 0; j < 4; j++) w[4 * i + j] = (float)(signed char)(bits >> 8 * j & 0xffu);
#elif FORMAT == Q4
#pragma unroll
        for (int j = 0; j < 8; j++) w[8 * i + j] = (float)((int)(bits >> 4 * j & 15u) - 8);
#endif
    }
}
