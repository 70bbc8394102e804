// adjust: logits as biases and penalties make them (npllm.sampling.adjusted); steps are rounded as there, one by one.
#include "history.cuh"

#define THREADS 256

// Logits of a block, and the bit of a token's uses that says that the prompt has it; the others count.
#define PART 1024
#define PROMPT 0x80000000u

// logits [W, width] -> adjusted [W, width]. A block takes PART logits of a row, and looks through all of the row's entries
// for those that are about them. Logits that are not finite stay, for who draws to find.
extern "C" __global__ void __launch_bounds__(THREADS) adjust(
    const float *logits_WN, i64 width, const double *settings_W, const Entry *entries, i64 room, float *adjusted_WN) {
    __shared__ u32 uses[PART];
    __shared__ float biases[PART];
    wait_for_inputs();
    release_dependents();
    const double *settings = settings_W + blockIdx.y * SETTINGS;
    const Entry *mine = entries + blockIdx.y * room;
    i64 begin = (i64)blockIdx.x * PART, count = min((i64)PART, width - begin), row = blockIdx.y * width + begin;
    int biased = (int)settings[BIASED], prompted = biased + (int)settings[PROMPTED], said = prompted + (int)settings[SAID];
    for (int i = threadIdx.x; i < PART; i += THREADS) uses[i] = 0, biases[i] = 0;
    __syncthreads();
    for (int e = threadIdx.x; e < said; e += THREADS) {
        i64 i = mine[e].token - begin;
        if (i < 0 || i >= count) continue;
        if (e < biased) biases[i] = mine[e].bias;
        else if (e < prompted) atomicOr(&uses[i], PROMPT);
        else atomicAdd(&uses[i], 1u);
    }
    __syncthreads();
    float penalty = (float)settings[REPETITION], presence = (float)settings[PRESENCE], frequency = (float)settings[FREQUENCY];
    for (int i = threadIdx.x; i < count; i += THREADS) {
        float x = logits_WN[row + i];
        u32 times = uses[i] & ~PROMPT;
        if (isfinite(x)) {
            x = __fadd_rn(x, biases[i]);
            if (uses[i] && penalty != 1.0f) x = x > 0.0f ? __fdiv_rn(x, penalty) : __fmul_rn(x, penalty);
            if (times) x = __fsub_rn(x, __fadd_rn(presence, __fmul_rn(frequency, (float)times)));
            x = fminf(fmaxf(x, -LARGEST), LARGEST);
        }
        adjusted_WN[row + i] = x;
    }
}
