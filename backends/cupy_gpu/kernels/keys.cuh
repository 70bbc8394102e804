// Where a step's keys lie (npllm.cache.Keys), and which of them a query sees (npllm.blocks.masks).
#include "common.cuh"

// A plan has PLAN numbers of each row: its slot, how many keys it sees, the position of the first and where it lies; its
// first query among the packed ones and the last one's successor, the first one's position and where its key is stored.
#define PLAN 8
struct Row { i64 slot, count, first, begin, query, end, start, place; };
__device__ __forceinline__ Row row_of_plan(const i64 *plan, i64 r) {
    const i64 *p = plan + r * PLAN;
    return {p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]};
}

// Storage [slots or pages, size, heads, width], as strides in numbers.
#define STORAGE(x) const void *x, i64 x##_slot, i64 x##_entry, i64 x##_head

// Where the keys of a row are counted from in a storage, in numbers, and key s from there.
__device__ __forceinline__ i64 first_of(const Row &row, const i64 *pages, i64 x_slot) { return pages ? 0 : row.slot * x_slot; }
__device__ __forceinline__ i64 way_to(
    const Row &row, i64 r, i64 s, i64 size, const i64 *pages, i64 pages_per_row, i64 x_slot, i64 x_entry) {
    // No storage has 2^32 entries. A division takes longer than all else of an address, and a ring is passed once at most.
    u32 i = (u32)(row.begin + s), entries = (u32)size;
    if (pages) return pages[r * pages_per_row + i / entries] * x_slot + i % entries * x_entry;
    return (i >= entries ? i - entries : i) * x_entry;
}

// The first position that a query sees. Positions have 31 bits; dividing numbers of 64 takes a hundred instructions.
__device__ __forceinline__ i64 reach(i64 query, i64 window, i64 chunk) {
    i64 low = 0;
    if (window) low = max(low, query - window + 1);
    if (chunk) low = max(low, (i64)((u32)query / (u32)chunk * (u32)chunk));
    return low;
}

// Where a new token is kept of a row, counted in tokens from the beginning of storage [slots, size, ..] of one head; -1
// where it is not: nobody's row, or one that brings more than `size`, of which the last ones stay.
__device__ __forceinline__ i64 place_of_new(const i64 *plan, i64 rows, i64 token, i64 size, i64 heads, i64 head) {
    i64 r = 0;
    while (r < rows && token >= row_of_plan(plan, r).end) r++;
    if (r == rows) return -1;
    Row row = row_of_plan(plan, r);
    if (row.slot < 0 || row.end - token > size) return -1;
    return (row.slot * heads + head) * size + (row.place + token - row.query) % size;
}
