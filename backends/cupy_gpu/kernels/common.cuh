// What all kernels stand on. CUDA C++ without headers; the CPU twins of what is written in PTX are in the tests' emulator.
typedef long long i64;
typedef unsigned long long u64;
typedef unsigned u32;
typedef unsigned short u16;
typedef unsigned char u8;

#define FULL 0xffffffffu
#define LANE ((int)(threadIdx.x & 31))
#define WARP ((int)(threadIdx.x >> 5))

// Formats of stored numbers (npllm.backends.cupy_gpu.matrix).
#define F32 0
#define F16 1
#define BF16 2
#define F8 3
#define Q8 4
#define Q4 5

#ifndef NPLLM_EMULATED
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

// Every kernel waits for its inputs, and so for the kernels before it, ahead of its first look at what one of them wrote and
// of its first write. What is Fixed may be read before (programmatic dependent launch; nothing where it is not in use).
__device__ __forceinline__ void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void release_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// 16 bytes that are read once: weights pass by the first cache.
__device__ __forceinline__ uint4 load_once(const uint4 *p) {
    uint4 v;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}
// Read what another block of this launch wrote before its ticket.
__device__ __forceinline__ float load_shared_by_blocks(const float *p) {
    float v;
    asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory");
    return v;
}

__device__ __forceinline__ float f16_to_float(u32 bits) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"((u16)bits));
    return f;
}

// 2^x to 2^-22 of itself; 0 below the smallest normal number, where exp2f takes four instructions more.
__device__ __forceinline__ float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Rounded to nearest even; a NaN stays a NaN.
__device__ __forceinline__ u32 bf16_pair(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
__device__ __forceinline__ u32 float_to_bf16(float x) { return bf16_pair(x, 0.0f); }

__device__ __forceinline__ void copy_async16(void *shared, const void *global, bool valid = true) {
    u32 to = (u32)__cvta_generic_to_shared(shared);
    int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT> __device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// Four 8 x 8 matrices of 2-byte numbers in shared memory, turned: lane i says where row i % 8 of matrix i / 8 begins, and
// gets of each the pair in rows 2 (i % 4) and the next, column i / 4: mma_bf16's right side of rows that lie along its sums.
__device__ __forceinline__ void load_turned(u32 pairs[4], const void *row) {
    u32 from = (u32)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
        : "=r"(pairs[0]), "=r"(pairs[1]), "=r"(pairs[2]), "=r"(pairs[3]) : "r"(from) : "memory");
}

// The same as they lie: of each, the pair in row i / 4, columns 2 (i % 4) and the next, as mma_bf16 takes both its sides.
__device__ __forceinline__ void load_matrices(u32 r[4], const void *row) {
    u32 from = (u32)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(from) : "memory");
}

__device__ __forceinline__ void mma_bf16(float d[4], const u32 a[4], const u32 b[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

#define NOT_A_NUMBER __uint_as_float(0x7fc00000u)
#define INFINITE __uint_as_float(0x7f800000u)

__device__ __forceinline__ float bf16_low(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float bf16_high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ __forceinline__ float bf16_to_float(u16 bits) { return __uint_as_float((u32)bits << 16); }

// e4m3 has the exponent of float16 less 8, and no infinity.
__device__ __forceinline__ float f8_to_float(u32 code) {
    float size = f16_to_float((code & 0x80u) << 8 | (code & 0x7fu) << 7) * 256.0f;
    return (code & 0x7fu) == 0x7fu ? NOT_A_NUMBER : size;
}

__device__ __forceinline__ float warp_sum(float x) {
    for (int step = 16; step; step >>= 1) x += __shfl_xor_sync(FULL, x, step);
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
    for (int step = 16; step; step >>= 1) x = fmaxf(x, __shfl_xor_sync(FULL, x, step));
    return x;
}
// Whether this block is the last of `blocks` that draw this ticket, which lies at zero before and after: then it sees what
// the others wrote before they drew. `room` is a number in shared memory. Three barriers.
__device__ __forceinline__ bool is_last(u32 *ticket, u32 blocks, u32 *room) {
    __syncthreads();
    if (threadIdx.x == 0) {
        // The fences of the thread that draws speak for all whom it has met at the barrier before, or meets at the next one.
        __threadfence();
        *room = atomicInc(ticket, blocks - 1);
        __threadfence();
    }
    __syncthreads();
    bool last = *room == blocks - 1;
    __syncthreads();
    return last;
}
// The sum over all threads of a block, in each of them; `room` holds a number per warp. Two barriers.
__device__ __forceinline__ float block_sum(float x, float *room) {
    x = warp_sum(x);
    __syncthreads();
    if (LANE == 0) room[WARP] = x;
    __syncthreads();
    float sum = 0;
    for (int w = 0; w < (int)(blockDim.x >> 5); w++) sum += room[w];
    return sum;
}
