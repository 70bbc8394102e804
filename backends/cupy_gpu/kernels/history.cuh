// What a row's token is drawn by (npllm.backends.cupy_gpu.sampling), and what its penalties and biases go by (history.py).
#include "common.cuh"

#define LARGEST 3.402823466e38f

// Numbers of a row's settings: 1 / temperature (0: the largest logit is taken), top_k, top_p, log(min_p), and what chance
// says, in [0, 1); the three penalties, how many entries are biases, tokens of the prompt and of the answer, and whether the
// token that is drawn becomes one more of them.
enum {
    SHARPNESS, TOP_K, TOP_P, LOG_MIN_P, CHANCE, REPETITION, PRESENCE, FREQUENCY, BIASED, PROMPTED, SAID, RECALLED, SETTINGS
};

// A token that has a bias, stands in the prompt or was said: entries of a row in this order, those said in theirs.
struct Entry { int token; float bias; };
