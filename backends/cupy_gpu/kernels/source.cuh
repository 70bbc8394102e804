// What a kernel reads through a norm (npllm.backends.cupy_gpu.base.Source).
#include "common.cuh"

// Kinds of norms.
#define NO_NORM 0
#define RMS 1
#define LAYER 2

// Activations [tokens, width], rows `stride` numbers apart, and the norm that they are read through.
#define SOURCE                                                                                                         \
    const float *x, i64 tokens, i64 width, i64 stride, i64 norm, const float *gain, const float *shift, float eps, float offset
#define SOURCE_GIVEN x, tokens, width, stride, norm, gain, shift, eps, offset
