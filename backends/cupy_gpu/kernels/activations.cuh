// Activations by number (npllm.backends.cupy_gpu.base.ACTIVATIONS), as npllm.blocks.ffn defines them.
#include "common.cuh"

#define SILU 0
#define GELU_TANH 1
#define GELU 2
#define RELU 3

__device__ __forceinline__ float activate(int act, float x) {
    if (act == SILU) return x / (1.0f + expf(-x));
    if (act == GELU_TANH) return 0.5f * x * (1.0f + tanhf(0.7978845608028654f * x * (1.0f + 0.044715f * x * x)));
    if (act == GELU) return 0.5f * x * erfcf(x * -0.70710678118654752f);
    return isnan(x) ? x : fmaxf(x, 0.0f);
}
