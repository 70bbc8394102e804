// route: the experts of each token and their weights, from logits [M, E]; a warp a token.
#include "route.cuh"

extern "C" __global__ void __launch_bounds__(32) route(
    const float *logits_ME, const float *correction_E, i64 *index_MC, float *weight_MC, Rule rule, float floor, float scale) {
    DYNAMIC_SHARED(room);
    wait_for_inputs();
    release_dependents();
    i64 m = blockIdx.x;
    choose(logits_ME + m * rule.experts, correction_E, rule, floor, scale, (float *)room, index_MC + m * rule.choices,
           weight_MC + m * rule.choices);
}
