// The same products of bf16 with 8 tokens on tensor cores: each number of a token as the sum of two of bf16, which is itself
// to 2^-17. A block has GROUPS x 8 rows, its warps take turns with UNIT numbers of all of them: an mma has both parts of the
// tokens on its left side, 8 numbers of 8 rows a lane's 16 bytes on its right; what stands where in a sum is the same there.
#if FORMAT != BF16 || TOKENS != 8
#error "tensor cores take 8 tokens of bf16"
#endif
#define GROUPS (WARPS * ROWS / 8)

// Numbers of a row that a warp takes at a time, and how many times it fetches them before it multiplies.
#define UNIT 32
#define UNITS (8 / GROUPS)

// Where four numbers of a token are staged, as the left side of an mma has them: both parts of two, then of the next two.
// Neighbours change places in every second token, so that the lanes of a read meet different banks.
__device__ __forceinline__ int place_of_four(int token, int four) { return token * (STAGED / 4) + (four ^ (token & 1)); }

__device__ __forceinline__ void stage(SOURCE, int begin, Through &through, float4 *staged) {
    int count = min((int)width - begin, STAGED);
    each_normed(SOURCE_GIVEN, begin, (count + UNIT - 1) / UNIT * UNIT, through, [=](int t, int i, const float *x) {
        u32 two = bf16_pair(x[0], x[1]), next = bf16_pair(x[2], x[3]);
        ((uint4 *)staged)[place_of_four(t, i / 4)] = make_uint4(
            two, bf16_pair(x[0] - bf16_low(two), x[1] - bf16_high(two)), next,
            bf16_pair(x[2] - bf16_low(next), x[3] - bf16_high(next)));
    });
}

// The vector that a lane has of its row in one of a warp's units.
__device__ __forceinline__ int lanes_vector(int first, int unit) {
    return first + (unit * WARPS + WARP) * (UNIT / PER) + (LANE & 3);
}

__device__ __forceinline__ void fetch(const uint4 *const row[GROUPS], int first, int vectors, uint4 ahead[UNITS][GROUPS]) {
#pragma unroll
    for (int i = 0; i < UNITS; i++) {
        int v = lanes_vector(first, i);
#pragma unroll
        for (int g = 0; g < GROUPS; g++) ahead[i][g] = v < vectors ? load_once(row[g] + v) : make_uint4(0, 0, 0, 0);
    }
}

// N rows of matrices of one layout, a warp's own, times all tokens: in every lane, the sums of the whole block.
template <int N>
__device__ __forceinline__ void products(
    SOURCE, const Matrix &m, const uint4 *const row[N], const u8 *const factors[N], float4 *staged, Sums<N> &sums) {
    static_assert(N == ROWS && WARPS * N % 8 == 0, "an mma has 8 rows");
    __shared__ const uint4 *rows[GROUPS * 8];
    __shared__ float parts[WARPS][GROUPS * 8][TOKENS];
    __shared__ float room[WARPS][TOKENS];
#pragma unroll
    for (int n = 0; n < N; n++)
        if (LANE == 0) rows[WARP * N + n] = row[n];
    __syncthreads();
    const int group = LANE >> 2, pair = LANE & 3, vectors = vectors_of(m);
    const uint4 *mine[GROUPS];
#pragma unroll
    for (int g = 0; g < GROUPS; g++) mine[g] = rows[g * 8 + group];
    uint4 ahead[UNITS][GROUPS];
    fetch(mine, 0, vectors, ahead);
    wait_for_inputs();
    release_dependents();
    Through through;
    begin_through(SOURCE_GIVEN, through, room);
    float d[GROUPS][4];
#pragma unroll
    for (int g = 0; g < GROUPS; g++) d[g][0] = d[g][1] = d[g][2] = d[g][3] = 0;
    each_part(SOURCE_GIVEN, vectors, through, staged, [&](int begin, int end) {
#pragma unroll 1
        for (int first = begin; first < end; first += UNITS * WARPS * (UNIT / PER)) {
            if (first) fetch(mine, first, end, ahead);
#pragma unroll
            for (int i = 0; i < UNITS; i++) {
                int v = lanes_vector(first, i);
                if (v - pair >= end) continue;
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    uint4 four = ((const uint4 *)staged)[place_of_four(group, (v - begin) * 2 + half)];
                    u32 left[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
                    for (int g = 0; g < GROUPS; g++) {
                        u32 right[2] = {half ? ahead[i][g].z : ahead[i][g].x, half ? ahead[i][g].w : ahead[i][g].y};
                        mma_bf16(d[g], left, right);
                    }
                }
            }
        }
    });
#pragma unroll
    for (int g = 0; g < GROUPS; g++) {
        parts[WARP][g * 8 + 2 * pair][group] = d[g][0] + d[g][2];
        parts[WARP][g * 8 + 2 * pair + 1][group] = d[g][1] + d[g][3];
    }
    end_through(SOURCE_GIVEN, through, room);
    __syncthreads();
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            float sum = 0;
#pragma unroll
            for (int w = 0; w < WARPS; w++) sum += parts[w][WARP * N + n][t];
            sums.of[n][t] = sum * through.scale[t];
        }
}
