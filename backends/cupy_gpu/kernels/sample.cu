// sample: a token of each row of logits [W, N], by temperature, top-k, top-p and min-p as npllm.sampling has them. Macro: N.
// A row that holds NaN or infinity gives the token -1. Many blocks find the largest logit of a row (`find_tops`), one draws.
//
// Nothing is sorted. A set of likeliest tokens is all above some logit, and of those equal to it the first few (`Kept`). A
// mass is exp((x - max) / temperature) in whole units of 2^-44, so that sums are exact and the same in any order. `crossing`
// finds the logit at which the sum over all larger ones passes a target: in bins of keys, then in the bins of a bin. Three
// times over the logits are enough for all of float32.
#include "history.cuh"

#define THREADS 512
#define BINS_LOG2 11
#define BINS (1 << BINS_LOG2)
#define UNIT 44
#define ALL 0x7fffffffu

// Of a part of a row whose largest logit is found.
#define PART_THREADS 256

struct Kept {
    u32 cut;   // the key of the least logit that is kept
    u32 ties;  // how many of those equal to it are, lowest numbers first
};

struct Crossing {
    u32 key;
    u64 above;  // the sum over all larger ones
};

// Sums of bins, their low words and their high ones.
__shared__ u32 bins[2][BINS];
__shared__ u64 parts[THREADS / 32];
__shared__ u64 found[2];

// Keys are in the order of their floats; -0 has that of 0, and no key lies between two neighbours.
__device__ __forceinline__ u32 key_of(float x) {
    u32 bits = __float_as_uint(x);
    return bits & 0x80000000u ? 0u - bits : bits | 0x80000000u;
}
__device__ __forceinline__ float float_of(u32 key) {
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : 0u - key);
}

// `look(x, n)` at every logit of a row. A thread has several on their way: one block has to read all of them.
template <class Look> __device__ __forceinline__ void each_logit(const float *logits, Look look) {
    const int AHEAD = 4;
#if N % 4 == 0
    const float4 *fours = (const float4 *)logits;
    for (int base = threadIdx.x; base < N / 4; base += AHEAD * THREADS) {
        float4 x[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; j++) x[j] = fours[min(base + j * THREADS, N / 4 - 1)];
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            int n = (base + j * THREADS) * 4;
            if (n < N) look(x[j].x, n), look(x[j].y, n + 1), look(x[j].z, n + 2), look(x[j].w, n + 3);
        }
    }
#else
    for (int base = threadIdx.x; base < N; base += AHEAD * THREADS) {
        float x[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; j++) x[j] = logits[min(base + j * THREADS, N - 1)];
#pragma unroll
        for (int j = 0; j < AHEAD; j++)
            if (base + j * THREADS < N) look(x[j], base + j * THREADS);
    }
#endif
}

__device__ __forceinline__ u64 shuffled(u64 x, int lane) {
    u32 high = __shfl_sync(FULL, (u32)(x >> 32), lane);
    return (u64)high << 32 | __shfl_sync(FULL, (u32)x, lane);
}
__device__ __forceinline__ u64 warp_total(u64 x) {
    for (int step = 16; step; step >>= 1) x += shuffled(x, LANE ^ step);
    return x;
}
// The sum over the lanes of a warp up to each.
__device__ __forceinline__ u64 warp_upto(u64 x) {
    for (int step = 1; step < 32; step <<= 1) {
        u64 before = shuffled(x, LANE - step);
        if (LANE >= step) x += before;
    }
    return x;
}
// The sum over the block, in each thread.
__device__ u64 total_of(u64 x) {
    x = warp_total(x);
    __syncthreads();
    if (LANE == 0) parts[WARP] = x;
    __syncthreads();
    u64 total = 0;
    for (int w = 0; w < THREADS / 32; w++) total += parts[w];
    return total;
}

struct Row {
    const float *logits;
    float top;
    double sharpness;

    __device__ __forceinline__ double scaled(float x) const { return ((double)x - (double)top) * sharpness; }
    __device__ __forceinline__ u64 mass(float x) const {
        double power = scaled(x) * 1.4426950408889634;
        if (!(power > -UNIT)) return 0;
        double whole = floor(power);
        return (u64)((double)exp2f((float)(power - whole)) * (double)(1ull << UNIT)) >> (int)-whole;
    }
};

// Shared memory has no sums of 64 bits, but these, which many threads may ask for at once without trying again and again.
__device__ __forceinline__ void add_to_bin(int bin, u64 amount) {
    u32 low = (u32)amount, high = (u32)(amount >> 32), before = atomicAdd(&bins[0][bin], low);
    high += before + low < before;
    if (high) atomicAdd(&bins[1][bin], high);
}
__device__ __forceinline__ u64 bin_sum(int bin) { return (u64)bins[1][bin] << 32 | bins[0][bin]; }

// The least key in low..high for which `holds`, which holds for all larger ones too; high + 1 where there is none.
template <class Holds> __device__ u32 least_key(u32 low, u32 high, Holds holds) {
    for (high++; low < high;) {
        u32 middle = low + (high - low) / 2;
        if (holds(float_of(middle))) high = middle;
        else low = middle + 1;
    }
    return low;
}

// Among keys low..high, that at which the sum of `measure` over it and all larger ones exceeds `want`.
template <class Measure> __device__ __forceinline__ Crossing crossing(const Row &row, u32 low, u32 high, u64 want, Measure measure) {
    u64 above = 0;
    while (low < high) {
        int bits = max(0, 32 - BINS_LOG2 - __clz((int)(high - low)));
        for (int b = threadIdx.x; b < BINS; b += THREADS) bins[0][b] = bins[1][b] = 0;
        __syncthreads();
        each_logit(row.logits, [=](float x, int) {
            u32 key = key_of(x);
            u64 amount = low <= key && key <= high ? measure(x) : 0;
            if (amount) add_to_bin((key - low) >> bits, amount);
        });
        __syncthreads();
        if (WARP == 0) {
            // The first lane has the largest logits.
            int stop = BINS - LANE * (BINS / 32);
            u64 mine = 0;
            for (int b = stop - BINS / 32; b < stop; b++) mine += bin_sum(b);
            u64 upto = above + warp_upto(mine), before = upto - mine;
            if (before <= want && want < upto) {
                int b = stop - 1;
                for (; before + bin_sum(b) <= want; b--) before += bin_sum(b);
                found[0] = b;
                found[1] = before;
            }
        }
        __syncthreads();
        low += (u32)found[0] << bits;
        high = min(high, low + (1u << bits) - 1);
        above = found[1];
    }
    return {low, above};
}

// The first token at which the sum of `measure` over all up to it exceeds `want`.
template <class Measure> __device__ __forceinline__ int first_beyond(const Row &row, u64 want, Measure measure) {
    const int each = (N + THREADS - 1) / THREADS * 32;
    int begin = WARP * each, end = min(N, begin + each);
    u64 mine = 0;
    for (int n = begin + LANE; n < end; n += 32) mine += measure(row.logits[n]);
    mine = warp_total(mine);
    __syncthreads();
    if (LANE == 0) parts[WARP] = mine;
    __syncthreads();
    u64 before = 0;
    for (int w = 0; w < WARP; w++) before += parts[w];
    if (before <= want && want < before + mine) {
        for (int base = begin; base < end; base += 32) {
            u64 amount = base + LANE < end ? measure(row.logits[base + LANE]) : 0;
            u64 upto = before + warp_upto(amount);
            if (upto - amount <= want && want < upto) found[0] = base + LANE;
            before = shuffled(upto, 31);
        }
    }
    __syncthreads();
    return (int)found[0];
}

__device__ u64 mass_of(const Row &row, Kept kept) {
    u64 mine = 0;
    each_logit(row.logits, [&](float x, int) {
        if (key_of(x) >= kept.cut + (kept.ties != ALL)) mine += row.mass(x);
    });
    u64 total = total_of(mine);
    return kept.ties == ALL ? total : total + kept.ties * row.mass(float_of(kept.cut));
}

// A key that `count` logits reach, or more: so many parts of the row do by their largest one. 0 where parts are fewer.
__device__ __forceinline__ u32 reached_by(const u64 *tops, int parts, i64 count) {
    if (threadIdx.x == 0) found[0] = 0;
    __syncthreads();
    for (int part = threadIdx.x; part < parts; part += THREADS) {
        i64 larger = 0;
        for (int other = 0; other < parts; other++) larger += tops[other] > tops[part];
        if (larger == count - 1) found[0] = tops[part] >> 32;
    }
    __syncthreads();
    return (u32)found[0];
}

__device__ __forceinline__ int draw(const Row &row, const double *settings, const u64 *tops, int parts) {
    double top_p = settings[TOP_P];
    i64 top_k = (i64)settings[TOP_K];
    u32 top = key_of(row.top);
    bool by_likelihood = top_p < 1.0 || (0 < top_k && top_k < N);
    auto mass = [=](float x) { return row.mass(x); };
    Kept kept = {key_of(-LARGEST), ALL};
    if (0 < top_k && top_k < N) {
        u32 low = max(kept.cut, reached_by(tops, parts, top_k));
        Crossing at = crossing(row, low, top, top_k - 1, [](float) { return (u64)1; });
        kept = {at.key, (u32)(top_k - at.above)};
    }
    if (top_p < 1.0) {
        double reached = ceil(top_p * (double)mass_of(row, kept));
        u64 want = reached > 1.0 ? (u64)reached - 1 : 0;
        Crossing at = crossing(row, kept.cut, top, want, mass);
        kept = {at.key, (u32)((want - at.above) / row.mass(float_of(at.key))) + 1};
    }
    u32 likely = least_key(kept.cut, top, [=](float x) { return row.scaled(x) >= settings[LOG_MIN_P]; });
    if (likely > kept.cut) kept = {likely, ALL};
    u64 total = mass_of(row, kept), want = min((u64)(settings[CHANCE] * (double)total), total - 1);
    // Tokens stand in the order in which npllm.sampling has them, so that the same chance draws the same one.
    if (!by_likelihood) return first_beyond(row, want, [=](float x) { return key_of(x) >= kept.cut ? row.mass(x) : 0; });
    Crossing at = crossing(row, kept.cut, top, want, mass);
    u64 tie = (want - at.above) / row.mass(float_of(at.key));
    return first_beyond(row, tie, [=](float x) { return (u64)(key_of(x) == at.key); });
}

// What is not a finite logit, among the largest ones.
#define BROKEN (~(u64)0)

// Of each part of a row, its largest logit's key and the first token that has it, as one number that is larger for a larger
// logit and then for a lower token -> [W, parts].
extern "C" __global__ void __launch_bounds__(PART_THREADS) find_tops(const float *logits_WN, u64 *tops) {
    __shared__ u64 best_of_warps[PART_THREADS / 32];
    wait_for_inputs();
    release_dependents();
    const float *logits = logits_WN + (i64)blockIdx.y * N;
    u64 best = 0;
    for (int n = blockIdx.x * PART_THREADS + threadIdx.x; n < N; n += gridDim.x * PART_THREADS) {
        float x = logits[n];
        best = max(best, fabsf(x) <= LARGEST ? (u64)key_of(x) << 32 | (u32)~n : BROKEN);
    }
    for (int step = 16; step; step >>= 1) best = max(best, shuffled(best, LANE ^ step));
    if (LANE == 0) best_of_warps[WARP] = best;
    __syncthreads();
    for (int w = 0; w < PART_THREADS / 32; w++) best = max(best, best_of_warps[w]);
    if (threadIdx.x == 0) tops[blockIdx.y * gridDim.x + blockIdx.x] = best;
}

// A row that recalls what was said gets the token behind those that it was drawn by, whatever lies there.
extern "C" __global__ void __launch_bounds__(THREADS, 1) sample(
    const float *logits_WN, const u64 *tops, i64 parts, const double *settings_W, Entry *entries, i64 room, i64 *tokens_W) {
    wait_for_inputs();
    release_dependents();
    const double *settings = settings_W + blockIdx.x * SETTINGS;
    u64 best = 0;
    tops += blockIdx.x * parts;
    for (i64 part = 0; part < parts; part++) best = max(best, tops[part]);
    Row row = {logits_WN + (i64)blockIdx.x * N, float_of((u32)(best >> 32)), settings[SHARPNESS]};
    int token = best == BROKEN ? -1 : (int)~(u32)best;
    if (best != BROKEN && row.sharpness > 0.0) token = draw(row, settings, tops, (int)parts);
    if (threadIdx.x) return;
    tokens_W[blockIdx.x] = token;
    i64 known = (i64)(settings[BIASED] + settings[PROMPTED] + settings[SAID]);
    if (entries && settings[RECALLED]) entries[blockIdx.x * room + known] = {token, 0};
}
