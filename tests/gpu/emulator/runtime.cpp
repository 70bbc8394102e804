// Runs the blocks of a launch one by one, in a shuffled order, each thread of a block as a fiber that gives way at barriers.
// What a GPU would leave undefined ends the launch with a number: a barrier that some threads never reach.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>
#define EMU_RUNTIME
#include "cuda_on_cpu.h"

namespace {
enum State { RUNNING, AT_BLOCK, AT_WARP, DONE };
enum Outcome { FINISHED = 0, DIVERGENT_BARRIER = 1, COPY_NOT_AWAITED = 2, MISALIGNED = 3, REPORTED = 4 };
constexpr size_t STACK = 1 << 16;
constexpr unsigned ROOMS = 4, WORDS = 32 * 8;

#if defined(__x86_64__)
extern "C" void emu_switch(void **from, void *to);
asm(R"(
.text
.globl emu_switch
emu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
#else
#error "fibers are written for x86-64"
#endif

struct Fiber {
    void *top = nullptr;
    unsigned char *stack = nullptr;
    Index3 index;
    State state;
    unsigned exchanges, barriers, warp_barriers;
    bool waited;
    EmuCopies copies;
};

std::vector<Fiber> fibers;
std::vector<unsigned> rooms, order;
std::vector<unsigned char> dynamic_shared;
unsigned running, threads;
size_t dynamic_size;
void *scheduler;
void (*body)(void **);
void **arguments;
// What the checker has to say; nothing runs after it.
char report[200];

void give_way(State state) {
    fibers[running].state = state;
    emu_switch(&fibers[running].top, scheduler);
}

void enter() {
    body(arguments);
    give_way(DONE);
    abort();
}

void prepare(Fiber &fiber) {
    if (!fiber.stack) fiber.stack = static_cast<unsigned char *>(aligned_alloc(64, STACK));
    void **top = reinterpret_cast<void **>(fiber.stack + STACK) - 2;
    *top = reinterpret_cast<void *>(enter);
    fiber.top = top - 6;
    fiber.state = RUNNING;
    fiber.exchanges = fiber.barriers = fiber.warp_barriers = 0;
    fiber.waited = false;
    fiber.copies.count = fiber.copies.groups = 0;
}

void resume(unsigned thread) {
    running = emu.number = thread;
    emu.thread = fibers[thread].index;
    emu_switch(&scheduler, fibers[thread].top);
}

// Lets those go on that wait where all that live of their warp, or of the block, wait -> whether there were any.
bool released() {
    unsigned alive = 0, at_block = 0;
    bool any = false;
    for (unsigned i = 0; i < threads; i++) alive += fibers[i].state != DONE, at_block += fibers[i].state == AT_BLOCK;
    if (at_block && at_block == alive) {
        for (unsigned i = 0; i < threads; i++) if (fibers[i].state == AT_BLOCK) fibers[i].state = RUNNING;
        return true;
    }
    for (unsigned warp = 0; warp < threads; warp += 32) {
        unsigned end = std::min(threads, warp + 32), alive_here = 0, waiting = 0;
        for (unsigned i = warp; i < end; i++) alive_here += fibers[i].state != DONE, waiting += fibers[i].state == AT_WARP;
        if (!waiting || waiting != alive_here) continue;
        for (unsigned i = warp; i < end; i++) if (fibers[i].state == AT_WARP) fibers[i].state = RUNNING;
        any = true;
    }
    return any;
}

int run_block() {
    for (;;) {
        bool ran = false;
        for (unsigned i : order) {
            if (fibers[i].state == RUNNING) resume(i), ran = true;
            if (report[0]) return REPORTED;
        }
        unsigned alive = 0;
        for (unsigned i = 0; i < threads; i++) alive += fibers[i].state != DONE;
        if (!alive) break;
        if (!released() && !ran) return DIVERGENT_BARRIER;
    }
    for (unsigned i = 0; i < threads; i++) if (fibers[i].copies.count) return COPY_NOT_AWAITED;
    return FINISHED;
}
}  // namespace

extern "C" Running emu;
Running emu;

#ifdef EMU_CHECKED
#include "checker.cpp"
#else
namespace {
void begin_checking(const unsigned char *, const unsigned char *) {}
void begin_block() {}
}  // namespace
#endif

extern "C" {
void emu_block_barrier() {
    give_way(AT_BLOCK);
    fibers[running].barriers++, fibers[running].warp_barriers++;
}
void emu_warp_barrier() { give_way(AT_WARP); }
void emu_warp_order() {
    give_way(AT_WARP);
    fibers[running].warp_barriers++;
}
EmuCopies *emu_copies() { return &fibers[running].copies; }

// A lane may be one exchange ahead of the others of its warp, never two: between two there is a barrier.
unsigned *emu_exchange(unsigned words) {
    if (words * 32 > WORDS) abort();
    return rooms.data() + ((running >> 5) * ROOMS + fibers[running].exchanges++ % ROOMS) * WORDS;
}

int emu_run(const Index3 *grid, const Index3 *block, unsigned shared, unsigned seed, void (*kernel)(void **), void **args,
            unsigned char *begin, unsigned char *end) {
    std::mt19937 dice(seed);
    emu.misaligned = 0;
    emu.blocks = *grid, emu.threads = *block, body = kernel, arguments = args;
    threads = block->x * block->y * block->z;
    if (fibers.size() < threads) fibers.resize(threads);
    rooms.assign((threads + 31) / 32 * ROOMS * WORDS, ~0u);
    dynamic_shared.resize(shared + 32), dynamic_size = shared;
    emu.shared = reinterpret_cast<unsigned char *>((reinterpret_cast<size_t>(dynamic_shared.data()) + 15) / 16 * 16);
    for (unsigned i = 0; i < threads; i++)
        fibers[i].index = {i % block->x, i / block->x % block->y, i / block->x / block->y};
    order.resize(threads);
    for (unsigned i = 0; i < threads; i++) order[i] = i;
    std::vector<unsigned> blocks(grid->x * grid->y * grid->z);
    for (unsigned i = 0; i < blocks.size(); i++) blocks[i] = i;
    std::shuffle(blocks.begin(), blocks.end(), dice);
    begin_checking(begin, end);
    for (unsigned number : blocks) {
        emu.block = {number % grid->x, number / grid->x % grid->y, number / grid->x / grid->y};
        std::shuffle(order.begin(), order.end(), dice);
        if (begin) memset(begin, 0xff, end - begin);
        memset(emu.shared, 0xff, shared);
        begin_block();
        for (unsigned i = 0; i < threads; i++) prepare(fibers[i]);
        if (int outcome = run_block()) return outcome;
    }
    return emu.misaligned ? MISALIGNED : FINISHED;
}
}
