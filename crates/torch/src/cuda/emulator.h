// Runs kernels on a processor: the threads of a block are fibers of one thread, which run in turn from one barrier to the
// next. Blocks run one after the other. What a GPU leaves open is not left open here: a barrier that not all threads
// reach, or that they reach at different lines, is an error.

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <ucontext.h>

#include <utility>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
// What registers are rationed by.
#define __launch_bounds__(...)

struct Place {
    unsigned x, y, z;
};
static Place threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

const int WARP_LANES = 32;
const size_t STACK_BYTES = 1 << 16;

// What a fiber waits for.
enum Wait { RUNS, WARP_BARRIER, BLOCK_BARRIER, ENDED };

// Where a fiber or the scheduler continues, as `__builtin_setjmp` notes it. `swapcontext` also has the system exchange the signal
// masks, which took most of the time of kernels with many barriers.
typedef void* Jump[5];

struct Fiber {
    // Its beginning, on a stack of its own.
    ucontext_t context;
    bool has_begun;
    Jump paused;
    std::vector<char> stack;
    Wait wait;
    int line;
    // Two slots, so that a thread may write to the next exchange while others still read the last one.
    uint64_t slots[2];
    unsigned exchanges;
};

static std::vector<Fiber> fibers;
static Jump scheduler;
static int current;
static char problem[256];
static void (*body)(void*);
static void* body_arguments;

// Between a jump away and the one back, everything in memory may have changed.
inline void others_ran() { asm volatile("" ::: "memory"); }

// Jumps are made by functions of their own, since none may lead into the function that makes it. `noipa`: their callers must not
// conclude from what they see of such a function which registers it leaves alone.
#define JUMPS __attribute__((noinline, noipa))

JUMPS __attribute__((noreturn)) static void to_scheduler() { __builtin_longjmp(scheduler, 1); }

JUMPS __attribute__((noreturn)) static void to_fiber(Fiber& fiber) {
    if (fiber.has_begun) __builtin_longjmp(fiber.paused, 1);
    fiber.has_begun = true;
    setcontext(&fiber.context);
    __builtin_trap();
}

// Lets the current thread run up to its next barrier.
JUMPS static void run_current() {
    if (__builtin_setjmp(scheduler) == 0) to_fiber(fibers[current]);
    others_ran();
}

JUMPS static void wait(Wait kind, int line) {
    Fiber& fiber = fibers[current];
    fiber.wait = kind, fiber.line = line;
    if (__builtin_setjmp(fiber.paused) == 0) to_scheduler();
    others_ran();
}

static void enter() {
    body(body_arguments);
    wait(ENDED, 0);
}

// Lets the threads of [first, end) go on if all of them wait at one barrier.
inline bool release(int first, int end, Wait kind) {
    for (int i = first; i < end; ++i) {
        if (fibers[i].wait != kind || fibers[i].line != fibers[first].line) return false;
    }
    for (int i = first; i < end; ++i) fibers[i].wait = RUNS;
    return true;
}

// Runs one block; `backwards`: threads take their turns from the last to the first.
inline bool run_block(bool backwards) {
    const int threads = (int)fibers.size();
    for (int i = 0; i < threads; ++i) {
        Fiber& fiber = fibers[i];
        getcontext(&fiber.context);
        fiber.stack.resize(STACK_BYTES);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = STACK_BYTES;
        fiber.context.uc_link = nullptr;
        fiber.wait = RUNS, fiber.exchanges = 0, fiber.has_begun = false;
        makecontext(&fiber.context, enter, 0);
    }
    for (;;) {
        int ended = 0;
        for (int turn = 0; turn < threads; ++turn) {
            current = backwards ? threads - 1 - turn : turn;
            if (fibers[current].wait == RUNS) {
                threadIdx.x = current;
                run_current();
            }
        }
        for (const Fiber& fiber : fibers) ended += fiber.wait == ENDED;
        if (ended == threads) return true;
        bool released = release(0, threads, BLOCK_BARRIER);
        for (int first = 0; first < threads; first += WARP_LANES) {
            released |= release(first, first + WARP_LANES, WARP_BARRIER);
        }
        if (!released) {
            int at = 0;
            while (fibers[at].wait == ENDED) ++at;
            snprintf(problem, sizeof problem, "thread %d of block (%u, %u, %u) waits at line %d for threads that never come",
                     at, blockIdx.x, blockIdx.y, blockIdx.z, fibers[at].line);
            return false;
        }
    }
}

inline uint64_t exchange(uint64_t bits, int source, int line) {
    const int mine = current;
    Fiber& fiber = fibers[mine];
    const unsigned slot = fiber.exchanges++ % 2;
    fiber.slots[slot] = bits;
    wait(WARP_BARRIER, line);
    return fibers[mine / WARP_LANES * WARP_LANES + source].slots[slot];
}

inline int lane() { return current % WARP_LANES; }

template <class T>
T shuffle(T value, int source, int line) {
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    bits = exchange(bits, source, line);
    memcpy(&value, &bits, sizeof value);
    return value;
}

template <class T>
T shuffle_up(T value, int distance, int line) {
    const int source = lane() - distance;
    return shuffle(value, source < 0 ? lane() : source, line);
}

inline unsigned ballot(bool vote, int line) {
    const int mine = current, first = mine / WARP_LANES * WARP_LANES;
    const unsigned slot = fibers[mine].exchanges % 2;
    exchange(vote, 0, line);
    unsigned votes = 0;
    for (int i = 0; i < WARP_LANES; ++i) votes |= (unsigned)fibers[first + i].slots[slot] << i;
    return votes;
}

template <class... A, size_t... I>
void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(*(std::remove_const_t<A>*)arguments[I]...);
}

// Runs a kernel on a grid; null, or what went wrong.
template <class... A>
const char* launch(void (*kernel)(A...), void** arguments, const unsigned* grid, unsigned threads, int backwards) {
    struct Bound {
        void (*kernel)(A...);
        void** arguments;
    };
    // No static variable: those of templates are one for all libraries of a process.
    Bound bound = {kernel, arguments};
    body = [](void* b) { call(((Bound*)b)->kernel, ((Bound*)b)->arguments, std::index_sequence_for<A...>()); };
    body_arguments = &bound;
    if (threads == 0 || threads > 1024 || threads % WARP_LANES != 0) return "blocks are of whole warps, up to 1024 threads";
    fibers.resize(threads);
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {threads, 1, 1};
    const uint64_t blocks = (uint64_t)grid[0] * grid[1] * grid[2];
    for (uint64_t i = 0; i < blocks; ++i) {
        const uint64_t b = backwards ? blocks - 1 - i : i;
        blockIdx = {(unsigned)(b % grid[0]), (unsigned)(b / grid[0] % grid[1]), (unsigned)(b / grid[0] / grid[1])};
        if (!run_block(backwards)) return problem;
    }
    return nullptr;
}

}  // namespace emulator

#define __syncthreads() emulator::wait(emulator::BLOCK_BARRIER, __LINE__)
#define __syncwarp() emulator::wait(emulator::WARP_BARRIER, __LINE__)
#define __shfl_sync(mask, value, source) emulator::shuffle(value, source, __LINE__)
#define __shfl_xor_sync(mask, value, other) emulator::shuffle(value, emulator::lane() ^ (other), __LINE__)
#define __shfl_up_sync(mask, value, distance) emulator::shuffle_up(value, distance, __LINE__)
#define __ballot_sync(mask, vote) emulator::ballot(vote, __LINE__)

static inline float __uint_as_float(unsigned bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
static inline unsigned __float_as_uint(float value) {
    unsigned bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline int __ffs(unsigned x) { return __builtin_ffs((int)x); }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
template <class T>
static inline T atomicAdd(T* at, T value) {
    const T before = *at;
    *at += value;
    return before;
}
