/* Loops that do one thing as fast as this CPU can: what bench/limits.py measures. Built for the host, -O3 -march=native.
 *
 * Each loop of arithmetic runs n rounds of 12 independent chains in registers, enough to hide the latency, and returns what
 * depends on all of them. Its `_work` is the number of operations of a round (a product and a sum are two), 0 where the CPU
 * lacks the instruction. */

#include <stddef.h>
#include <stdint.h>

#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define CHAINS(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)
#define COUNT 12

typedef uint64_t words __attribute__((vector_size(BYTES), aligned(BYTES)));
typedef float floats __attribute__((vector_size(BYTES)));

#define STREAMS 4

/* Read every byte once, from one place or from STREAMS at a time: memory gives more to several streams than to one, until
   they are in each other's way. The start is aligned, the size a multiple of 8 STREAMS vectors. */
uint64_t read_bytes(const words *at, size_t size, int streams) {
    words sums[8] = {0};
    size_t part = size / BYTES / streams;
    if (streams == STREAMS) {
        for (size_t k = 0; k < part; k += 2) {
            for (int i = 0; i < 8; i++) sums[i] ^= at[i / 2 * part + k + i % 2];
        }
    } else {
        for (size_t k = 0; k < part; k += 8) {
            for (int i = 0; i < 8; i++) sums[i] ^= at[k + i];
        }
    }
    uint64_t all = 0;
    for (int i = 0; i < 8; i++) {
        for (size_t lane = 0; lane < BYTES / 8; lane++) all ^= sums[i][lane];
    }
    return all;
}

double float32_work(void) { return 2.0 * COUNT * (BYTES / sizeof(float)); }

double float32(long n, float factor, float term) {
#define DECLARE(i) floats c##i = {term, i};
    CHAINS(DECLARE)
#undef DECLARE
    floats a = {0}, b = {0};
    a += factor;
    b += term;
    for (long round = 0; round < n; round++) {
#define STEP(i) c##i = c##i * a + b;
        CHAINS(STEP)
#undef STEP
/* Without this, the compiler may run several rounds' worth of one chain before the next. */
#define KEEP(i) __asm__ volatile("" : "+x"(c##i));
#if defined(__x86_64__)
        CHAINS(KEEP)
#endif
#undef KEEP
    }
    floats all = {0};
#define ADD(i) all += c##i;
    CHAINS(ADD)
#undef ADD
    return all[0] + all[1];
}

#if defined(__AVX512BF16__)
double bfloat16_work(void) { return 4.0 * COUNT * 16; }

double bfloat16(long n, float factor, float term) {
#define DECLARE(i) __m512 c##i = _mm512_set1_ps(term + i);
    CHAINS(DECLARE)
#undef DECLARE
    __m512bh a = _mm512_cvtne2ps_pbh(_mm512_set1_ps(factor), _mm512_set1_ps(factor));
    __m512bh b = _mm512_cvtne2ps_pbh(_mm512_set1_ps(term), _mm512_set1_ps(-term));
    for (long round = 0; round < n; round++) {
#define STEP(i) c##i = _mm512_dpbf16_ps(c##i, a, b);
        CHAINS(STEP)
#undef STEP
#define KEEP(i) __asm__ volatile("" : "+v"(c##i));
        CHAINS(KEEP)
#undef KEEP
    }
    __m512 all = _mm512_setzero_ps();
#define ADD(i) all = _mm512_add_ps(all, c##i);
    CHAINS(ADD)
#undef ADD
    return _mm512_reduce_add_ps(all);
}
#else
double bfloat16_work(void) { return 0; }
double bfloat16(long n, float factor, float term) { return n * factor * term; }
#endif

#if defined(__AVX512VNNI__)
#define INT8 __m512i
#define DOT _mm512_dpbusd_epi32
#define FILL _mm512_set1_epi32
#elif defined(__AVXVNNI__)
#define INT8 __m256i
#define DOT _mm256_dpbusd_avx_epi32
#define FILL _mm256_set1_epi32
#endif

#if defined(INT8)
double int8_work(void) { return 2.0 * COUNT * sizeof(INT8); }

double int8(long n, float factor, float term) {
#define DECLARE(i) INT8 c##i = FILL(i);
    CHAINS(DECLARE)
#undef DECLARE
    INT8 a = FILL((int)factor), b = FILL((int)term);
    for (long round = 0; round < n; round++) {
#define STEP(i) c##i = DOT(c##i, a, b);
        CHAINS(STEP)
#undef STEP
#define KEEP(i) __asm__ volatile("" : "+x"(c##i));
        CHAINS(KEEP)
#undef KEEP
    }
    int32_t all = 0;
#define ADD(i) all ^= ((const int32_t *)&c##i)[0];
    CHAINS(ADD)
#undef ADD
    return all;
}
#else
double int8_work(void) { return 0; }
double int8(long n, float factor, float term) { return n * factor * term; }
#endif
