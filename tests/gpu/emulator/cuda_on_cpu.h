// What a .cu file of the backend sees in the place of CUDA when g++ compiles it: one fiber per thread, blocks one by one.
#pragma once
#define NPLLM_EMULATED 1
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
#define __align__(n) __attribute__((aligned(n)))
// Blocks run one by one, so one copy serves. A kernel's library holds no other variables: all are poisoned before each block.
#define __shared__ static __attribute__((aligned(16)))

struct Index3 { unsigned x, y, z; };
struct uint2 { unsigned x, y; };
struct __align__(16) uint4 { unsigned x, y, z, w; };
struct float2 { float x, y; };
struct __align__(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// -- the runtime (runtime.cpp) ----------------------------------------------------------------------------------------
extern "C" {
// The running thread and its number in its block, dynamic shared memory, and whether a vector was read at an address that is
// no multiple of its size.
extern struct Running {
    Index3 thread, block, threads, blocks;
    unsigned number;
    unsigned char *shared;
    int misaligned;
} emu;
#define threadIdx emu.thread
#define blockIdx emu.block
#define blockDim emu.threads
#define gridDim emu.blocks
void emu_block_barrier();
void emu_warp_barrier();
void emu_warp_order();                   // what lanes did before, others of their warp see after it
unsigned *emu_exchange(unsigned words);  // room of the running warp for 32 lanes x words; another one at each call
int emu_run(const Index3 *grid, const Index3 *block, unsigned shared, unsigned seed, void (*kernel)(void **), void **args,
            unsigned char *begin, unsigned char *end);

#ifndef EMU_RUNTIME
float expf(float); float exp2f(float); float logf(float); float log2f(float); float tanhf(float); float erff(float); float erfcf(float);
float sinf(float); float cosf(float); float sqrtf(float); float fmaf(float, float, float); float fmaxf(float, float);
float fminf(float, float); float fabsf(float); float floorf(float); float powf(float, float); float log1pf(float);
double floor(double); double ceil(double);
void *memcpy(void *, const void *, unsigned long);
#endif
}

// Accesses in these are not what a kernel does.
#define EMU_UNCHECKED __attribute__((no_sanitize("thread")))

// Told to the checker (checker.cpp), where there is one: a copy's access, a read that no cache keeps in order with writes,
// that the kernels ahead were waited for, a fence, and an atomic.
#ifdef EMU_CHECKED
extern "C" {
void emu_touch(const void *, unsigned size, int write);
void emu_fixed(const void *);
void emu_waited();
void emu_fence();
void emu_atomic(const void *, unsigned size);
}
#else
inline void emu_touch(const void *, unsigned, int) {}
inline void emu_fixed(const void *) {}
inline void emu_waited() {}
inline void emu_fence() {}
inline void emu_atomic(const void *, unsigned) {}
#endif

inline void __syncthreads() { emu_block_barrier(); }
inline void __syncwarp(unsigned = ~0u) { emu_warp_order(); }
inline void __threadfence() { emu_fence(); }
inline float __uint_as_float(unsigned u) { float f; memcpy(&f, &u, 4); return f; }
inline unsigned __float_as_uint(float f) { unsigned u; memcpy(&u, &f, 4); return u; }
inline int __float_as_int(float f) { return (int)__float_as_uint(f); }
inline float __int_as_float(int i) { return __uint_as_float((unsigned)i); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline bool isnan(float x) { return x != x; }
inline bool isinf(float x) { return fabsf(x) == __builtin_inff(); }
inline bool isfinite(float x) { return fabsf(x) < __builtin_inff(); }
template <class T> inline T min(T a, T b) { return b < a ? b : a; }
template <class T> inline T max(T a, T b) { return a < b ? b : a; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
inline int __ffs(unsigned x) { return __builtin_ffs((int)x); }

template <class T> inline T emu_shuffle(T value, unsigned source) {
    static_assert(sizeof(T) == 4, "shuffles move 4 bytes");
    unsigned lane = emu.number & 31, *room = emu_exchange(1);
    memcpy(room + lane, &value, 4);
    emu_warp_barrier();
    memcpy(&value, room + (source & 31), 4);
    return value;
}
template <class T> inline T __shfl_sync(unsigned, T value, int source) { return emu_shuffle(value, source); }
template <class T> inline T __shfl_xor_sync(unsigned, T value, int mask) {
    return emu_shuffle(value, (emu.number & 31) ^ mask);
}
template <class T> inline T __shfl_down_sync(unsigned, T value, unsigned delta) {
    unsigned lane = emu.number & 31;
    return emu_shuffle(value, lane + delta < 32 ? lane + delta : lane);
}
template <class T> inline T __shfl_up_sync(unsigned, T value, unsigned delta) {
    unsigned lane = emu.number & 31;
    return emu_shuffle(value, lane >= delta ? lane - delta : lane);
}
inline unsigned __ballot_sync(unsigned, int predicate) {
    unsigned *room = emu_exchange(1), result = 0;
    room[emu.number & 31] = predicate != 0;
    emu_warp_barrier();
    for (int i = 0; i < 32; i++) result |= (room[i] & 1) << i;
    return result;
}

template <class T, class F> EMU_UNCHECKED T emu_updated(T *place, F made) {
    T old = *place;
    *place = made(old);
    return old;
}
template <class T, class F> __attribute__((always_inline)) inline T emu_update(T *place, F made) {
    emu_atomic(place, sizeof(T));
    return emu_updated(place, made);
}
#define EMU_ATOMIC template <class T> __attribute__((always_inline)) inline T
EMU_ATOMIC atomicAdd(T *place, T value) { return emu_update(place, [=](T old) { return (T)(old + value); }); }
EMU_ATOMIC atomicOr(T *place, T value) { return emu_update(place, [=](T old) { return (T)(old | value); }); }
EMU_ATOMIC atomicInc(T *place, T last) {
    return emu_update(place, [=](T old) { return old >= last ? 0 : old + 1; });
}

// -- twins of what common.cuh writes in PTX ---------------------------------------------------------------------------
#define DYNAMIC_SHARED(name) unsigned char *name = emu.shared
inline void wait_for_inputs() { emu_waited(); }
inline void release_dependents() {}
// Vectors begin at multiples of 16 bytes: noted, and told when the launch ends.
inline void emu_vector_at(const void *p) { if ((unsigned long)p % 16) emu.misaligned = 1; }
template <class T> inline T load_once(const T *p) {
    if (sizeof(T) == 16) emu_vector_at(p);
    emu_fixed(p);
    return *p;
}
template <class T> inline T load_shared_by_blocks(const T *p) { return *p; }
inline float f16_to_float(unsigned bits) {
    unsigned sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31, mantissa = bits & 1023;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | mantissa << 13);
    if (exponent) return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
    float tiny = (float)mantissa * 5.9604644775390625e-8f;
    return sign ? -tiny : tiny;
}

inline float power_of_two(float x) { return x < -126.0f ? 0.0f : exp2f(x); }
inline unsigned float_to_bf16(float x) {
    unsigned bits = __float_as_uint(x);
    return isnan(x) ? bits >> 16 | 0x40u : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
}
inline unsigned bf16_pair(float low, float high) { return float_to_bf16(low) | float_to_bf16(high) << 16; }

// Copies to shared memory are done when they are waited for, and no sooner: a wait that is missing shows as poison.
struct EmuCopy { void *to; const void *from; bool zero; };
struct EmuCopies { EmuCopy queue[64]; int group[64]; int count, groups; };
extern "C" EmuCopies *emu_copies();
inline void copy_async16(void *shared, const void *global, bool valid = true) {
    EmuCopies *c = emu_copies();
    if (c->count == 64) __builtin_trap();
    emu_vector_at(shared), emu_vector_at(global);
    c->group[c->count] = c->groups;
    c->queue[c->count++] = {shared, global, !valid};
    emu_touch(shared, 16, 1);
}
inline void copy_async_commit() { emu_copies()->groups++; }
template <int LEFT> inline void copy_async_wait() {
    EmuCopies *c = emu_copies();
    int kept = 0;
    for (int i = 0; i < c->count; i++) {
        if (c->group[i] >= c->groups - LEFT) { c->queue[kept] = c->queue[i]; c->group[kept++] = c->group[i]; continue; }
        emu_touch(c->queue[i].to, 16, 1);
        if (!c->queue[i].zero) emu_touch(c->queue[i].from, 16, 0);
        if (c->queue[i].zero) __builtin_memset(c->queue[i].to, 0, 16); else memcpy(c->queue[i].to, c->queue[i].from, 16);
    }
    c->count = kept;
}

// ldmatrix.x4.trans: matrices are [8 rows][8 numbers of 2 bytes].
inline void load_turned(unsigned pairs[4], const void *row) {
    unsigned *room = emu_exchange(2), lane = emu.number & 31;
    if ((unsigned long)row % 16) __builtin_trap();
    memcpy(room + 2 * lane, &row, 8);
    emu_warp_barrier();
    for (int matrix = 0; matrix < 4; matrix++) {
        unsigned short both[2];
        for (int i = 0; i < 2; i++) {
            const unsigned short *numbers;
            memcpy(&numbers, room + 2 * (matrix * 8 + lane % 4 * 2 + i), 8);
            both[i] = numbers[lane / 4];
        }
        pairs[matrix] = both[0] | (unsigned)both[1] << 16;
    }
}

// ldmatrix.x4.
inline void load_matrices(unsigned pairs[4], const void *row) {
    unsigned *room = emu_exchange(2), lane = emu.number & 31;
    if ((unsigned long)row % 16) __builtin_trap();
    memcpy(room + 2 * lane, &row, 8);
    emu_warp_barrier();
    for (int matrix = 0; matrix < 4; matrix++) {
        const unsigned char *numbers;
        memcpy(&numbers, room + 2 * (matrix * 8 + lane / 4), 8);
        memcpy(pairs + matrix, numbers + lane % 4 * 4, 4);
    }
}

// mma.sync.m16n8k16, bf16 pairs, float32 sums: fragments as in the PTX ISA, "Matrix fragments for mma.m16n8k16".
inline void mma_bf16(float d[4], const unsigned a[4], const unsigned b[2]) {
    unsigned *room = emu_exchange(6), lane = emu.number & 31, group = lane >> 2, pair = lane & 3;
    for (int i = 0; i < 4; i++) room[lane * 6 + i] = a[i];
    for (int i = 0; i < 2; i++) room[lane * 6 + 4 + i] = b[i];
    emu_warp_barrier();
    for (int i = 0; i < 4; i++) {
        unsigned row = group + (i >> 1) * 8, column = pair * 2 + (i & 1);
        float sum = 0;
        for (int k = 0; k < 16; k++) {
            unsigned half = k >> 3, within = k & 7;
            unsigned x = room[((row & 7) * 4 + (within >> 1)) * 6 + (row >> 3) + half * 2];
            unsigned y = room[(column * 4 + (within >> 1)) * 6 + 4 + half];
            float left = __uint_as_float(k & 1 ? x & 0xffff0000u : x << 16);
            float right = __uint_as_float(k & 1 ? y & 0xffff0000u : y << 16);
            sum = fmaf(left, right, sum);
        }
        d[i] += sum;
    }
}

// -- calling a kernel with an array of pointers to its arguments, as the driver does ------------------------------------
template <int...> struct EmuIndices {};
template <int N, int... I> struct EmuCount : EmuCount<N - 1, N - 1, I...> {};
template <int... I> struct EmuCount<0, I...> { typedef EmuIndices<I...> type; };
template <class T> struct EmuPlain { typedef T type; };
template <class T> struct EmuPlain<const T> { typedef T type; };
template <class... A, int... I> EMU_UNCHECKED void emu_apply(void (*kernel)(A...), void **args, EmuIndices<I...>) {
    kernel(*(typename EmuPlain<A>::type *)args[I]...);
}
template <class... A> EMU_UNCHECKED void emu_call(void (*kernel)(A...), void **args) {
    emu_apply(kernel, args, typename EmuCount<sizeof...(A)>::type());
}
// What the linker calls the beginning and the end of a library's variables.
extern unsigned char __bss_start[] __attribute__((visibility("hidden")));
extern unsigned char _end[] __attribute__((visibility("hidden")));
extern "C" inline __attribute__((used)) unsigned emu_static_shared() { return _end - __bss_start; }
#define EMU_ENTRY(kernel)                                                                                              \
    EMU_UNCHECKED static void emu_entry_##kernel(void **args) { emu_call(kernel, args); }                              \
    extern "C" int emu_launch_##kernel(const Index3 *grid, const Index3 *block, unsigned shared, unsigned seed, void **args) { \
        return emu_run(grid, block, shared, seed, emu_entry_##kernel, args, __bss_start, _end);                         \
    }
