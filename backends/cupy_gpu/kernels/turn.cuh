// Rotary embeddings of one head (npllm.blocks.rope).
#include "common.cuh"

// Number k of a head that is turned by the angles of its token; `x(i)` is number i before. Those behind the pairs stay.
template <class X>
__device__ __forceinline__ float turned(
    X x, int k, const float *cosines, const float *sines, int pairs, bool interleaved) {
    float y = x(k);
    if (k >= 2 * pairs) return y;
    bool second = interleaved ? k & 1 : k >= pairs;
    int pair = interleaved ? k >> 1 : k - (second ? pairs : 0), step = interleaved ? 1 : pairs;
    float cosine = cosines[pair], sine = sines[pair], other = x(second ? k - step : k + step);
    return second ? y * cosine + other * sine : y * cosine - other * sine;
}
