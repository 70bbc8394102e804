// What a GPU leaves undefined although a run on the CPU looks right, told at the access that does it. g++ calls what stands
// here at every access to memory (-fsanitize=thread); the twins of CUDA's functions call it where accesses are put in order.
//
// Two accesses to one place, one of them a write, need an order: a thread's own; that of __syncthreads within a block and of
// __syncwarp within a warp (shuffles order nothing); between blocks that of a fence and an atomic in one thread, then an
// atomic on the same place and a fence in another (PTX ISA, "Memory Consistency Model": release and acquire patterns).
#include <cstdint>
#include <cstdio>
#include <dlfcn.h>
#include <unordered_map>

namespace {
enum Role { READS = 1, WRITES = 2, FIXED = 4 };

// An array of a launch, and what kernels may do with it.
struct Span { uintptr_t begin, end; unsigned role; };

// A moment of a thread: its block, the barriers of block and warp that it has passed, itself, and accesses so far.
struct Moment { unsigned block, barriers, warp_barriers, thread, time; };

// In the place of one warp or thread.
constexpr unsigned SEVERAL = ~0u;

// Two bytes, as no kernel writes single ones: who wrote them last; who read them since, as the last reader's moment, its warp
// and which lanes of that did at this moment.
constexpr size_t CELL = 2;
struct Cell {
    Moment write, read;
    unsigned warp, lanes;
    bool written, atomic, read_by_blocks;
};

// A fence before an atomic, and the fence of a later block's thread behind its own: what came before the one, those see who
// come after the other. Until that fence it is pending.
struct Acquired { Moment released, from; };
struct Pending { Moment released; unsigned thread; };

std::vector<Span> spans;
std::unordered_map<uintptr_t, std::vector<Cell>> cells_of_results;  // by where their array begins
std::vector<Cell> cells_of_shared;
std::unordered_map<uintptr_t, std::vector<Moment>> fences_at;       // by where the atomic behind them was
std::vector<Acquired> acquired;
std::vector<Pending> pending;
std::vector<Moment> fences;                                         // the last one of each thread of the block
uintptr_t static_begin;
size_t static_size;
unsigned block_number, accesses;

Moment now() {
    const Fiber &fiber = fibers[running];
    return {block_number, fiber.barriers, fiber.warp_barriers, running, accesses};
}

bool within_block(const Moment &a, const Moment &b) {
    if (a.thread == b.thread) return a.time <= b.time;
    return a.barriers < b.barriers || (a.thread / 32 == b.thread / 32 && a.warp_barriers < b.warp_barriers);
}

bool before(const Moment &a, const Moment &b) {
    if (a.block == b.block) return within_block(a, b);
    for (const Acquired &each : acquired)
        if (each.released.block == a.block && within_block(a, each.released) && within_block(each.from, b)) return true;
    return false;
}

// What is wrong, who did it, and where in the kernel's library. The thread does not return: it may be about to follow a pointer
// that nobody wrote.
[[noreturn]] void tell(const char *what, void *returns, const Moment *other = nullptr) {
    const char *with = !other ? "" : other->block == block_number ? " and another one of its block" : " and one of another block";
    Dl_info library;
    dladdr(returns, &library);
    long offset = static_cast<char *>(returns) - static_cast<char *>(library.dli_fbase) - 1;
    snprintf(report, sizeof report, "%s (thread %u%s)\n%ld", what, running, with, offset);
    give_way(DONE);
    abort();
}

bool is_within(uintptr_t at, const void *begin, size_t size) { return at - reinterpret_cast<uintptr_t>(begin) < size; }

// On a GPU these are registers: fibers' stacks, what shuffles exchange, and what the runtime says of threads.
bool is_register(uintptr_t at) {
    return is_within(at, &emu, sizeof emu) || is_within(at, fibers[running].stack, STACK) ||
           is_within(at, rooms.data(), rooms.size() * sizeof rooms[0]) || is_within(at, fibers.data(), fibers.size() * sizeof fibers[0]);
}

struct Access { Moment moment; bool write, atomic; void *returns; };

void read_cell(Cell &cell, const Access &by) {
    if (cell.written && !(by.atomic && cell.atomic) && !before(cell.write, by.moment))
        tell("a read races with a write", by.returns, &cell.write);
    unsigned warp = by.moment.thread / 32, lane = 1u << by.moment.thread % 32;
    bool other_block = cell.lanes && cell.read.block != by.moment.block;
    cell.read_by_blocks |= other_block;
    if (!cell.lanes || other_block || cell.read.barriers != by.moment.barriers) cell.warp = warp, cell.lanes = lane;
    else if (cell.warp != warp) cell.warp = SEVERAL;
    else if (cell.read.warp_barriers != by.moment.warp_barriers) cell.lanes = lane;
    else cell.lanes |= lane;
    cell.read = by.moment;
}

bool all_read_before(const Cell &cell, const Moment &moment) {
    if (!cell.lanes) return true;
    if (cell.read_by_blocks) return false;
    if (cell.read.block != moment.block) return cell.warp != SEVERAL && before(cell.read, moment);
    if (cell.read.barriers < moment.barriers) return true;
    if (cell.warp != moment.thread / 32) return false;
    return cell.read.warp_barriers < moment.warp_barriers || cell.lanes == 1u << moment.thread % 32;
}

void write_cell(Cell &cell, const Access &by) {
    bool ordered = !cell.written || before(cell.write, by.moment), both_atomic = by.atomic && cell.atomic;
    if (!ordered && !both_atomic) tell("two writes race", by.returns, &cell.write);
    if (!both_atomic && !all_read_before(cell, by.moment)) tell("a write races with a read", by.returns, &cell.read);
    cell = {by.moment, {}, 0, 0, true, by.atomic, false};
    if (!ordered) cell.write.thread = SEVERAL;
}

void access_cells(Cell *cells, uintptr_t offset, size_t size, const Access &by, const char *unwritten) {
    for (Cell *cell = cells + offset / CELL; cell <= cells + (offset + size - 1) / CELL; cell++) {
        if (unwritten && !cell->written && (!by.write || by.atomic)) tell(unwritten, by.returns);
        by.write ? write_cell(*cell, by) : read_cell(*cell, by);
    }
}

void access_shared(uintptr_t offset, size_t size, const Access &by) {
    // What is known of a block before is nothing to this one.
    for (size_t i = offset / CELL; i <= (offset + size - 1) / CELL; i++)
        if (std::max(cells_of_shared[i].write.block, cells_of_shared[i].read.block) != block_number) cells_of_shared[i] = {};
    access_cells(cells_of_shared.data(), offset, size, by, "a read of shared memory that nobody wrote");
}

void access_global(uintptr_t at, size_t size, const Access &by) {
    unsigned role = 0;
    const Span *result = nullptr;
    for (const Span &span : spans)
        if (span.begin <= at && at + size <= span.end) {
            role |= span.role;
            if (span.role & WRITES) result = &span;
        }
    if (!role) tell(by.write ? "a write outside of every array" : "a read outside of every array", by.returns);
    if (by.write && !result) tell("a write to an array that is read", by.returns);
    if (!(role & FIXED) && !fibers[running].waited) tell("an access before the kernels ahead were waited for", by.returns);
    const char *unwritten = role & READS ? nullptr : "a read of a result that nobody wrote";
    if (result) access_cells(cells_of_results[result->begin].data(), at - result->begin, size, by, unwritten);
}

void access(const void *p, size_t size, bool write, void *returns, bool atomic = false) {
    uintptr_t at = reinterpret_cast<uintptr_t>(p);
    if (is_register(at)) return;
    accesses++;
    const Access by = {now(), write, atomic, returns};
    if (at - static_begin < static_size) return access_shared(at - static_begin, size, by);
    if (is_within(at, emu.shared, dynamic_size)) return access_shared(at - reinterpret_cast<uintptr_t>(emu.shared) + static_size, size, by);
    access_global(at, size, by);
}

void begin_checking(const unsigned char *begin, const unsigned char *end) {
    static_begin = reinterpret_cast<uintptr_t>(begin), static_size = end - begin;
    cells_of_shared.resize(std::max(cells_of_shared.size(), (static_size + dynamic_size) / CELL + 1));
    cells_of_results.clear();
    for (const Span &span : spans) {
        if (!(span.role & WRITES)) continue;
        std::vector<Cell> &cells = cells_of_results[span.begin];
        cells.resize(std::max(cells.size(), (span.end - span.begin) / CELL + 1));
    }
    fences_at.clear();
    accesses = 0, report[0] = 0;
}

void begin_block() {
    block_number++;
    acquired.clear(), pending.clear();
    fences.assign(threads, Moment{});
}
}  // namespace

extern "C" {
// Three numbers of each array: where it begins and ends, and its role.
void emu_spans(const uint64_t *numbers, unsigned count) {
    spans.clear();
    for (unsigned i = 0; i < count; i++, numbers += 3) spans.push_back({numbers[0], numbers[1], static_cast<unsigned>(numbers[2])});
}
const char *emu_report() { return report; }

void emu_touch(const void *p, unsigned size, int write) { access(p, size, write, __builtin_return_address(0)); }
void emu_fixed(const void *p) {
    uintptr_t at = reinterpret_cast<uintptr_t>(p);
    for (const Span &span : spans)
        if (span.begin <= at && at < span.end && span.role & FIXED) return;
    tell("a read by the path of constants, of what may change", __builtin_return_address(0));
}
void emu_waited() { fibers[running].waited = true; }
void emu_fence() {
    accesses++;
    fences[running] = now();
    for (const Pending &each : pending)
        if (each.thread == running) acquired.push_back({each.released, fences[running]});
}
void emu_atomic(const void *p, unsigned size) {
    access(p, size, true, __builtin_return_address(0), true);
    std::vector<Moment> &here = fences_at[reinterpret_cast<uintptr_t>(p)];
    for (const Moment &each : here)
        if (each.block != block_number) pending.push_back({each, running});
    if (fences[running].block) here.push_back(fences[running]);
}

#define ACCESS(name, size, write)                                                                                      \
    void __tsan_##name(void *p) { access(p, size, write, __builtin_return_address(0)); }
#define ACCESSES(size)                                                                                                 \
    ACCESS(read##size, size, false) ACCESS(unaligned_read##size, size, false)                                          \
    ACCESS(write##size, size, true) ACCESS(unaligned_write##size, size, true)
ACCESSES(1) ACCESSES(2) ACCESSES(4) ACCESSES(8) ACCESSES(16)
void __tsan_read_range(void *p, unsigned long size) { access(p, size, false, __builtin_return_address(0)); }
void __tsan_write_range(void *p, unsigned long size) { access(p, size, true, __builtin_return_address(0)); }
void __tsan_init() {}
void __tsan_func_entry(void *) {}
void __tsan_func_exit() {}
}
