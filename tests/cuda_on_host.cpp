// The CUDA kernels as a library for the host: each thread of a block is a fiber. The fibers of a warp
// take turns until all of them wait at a barrier of the block; then the next warp runs. So a warp runs
// as far ahead of the others as barriers allow, starting with the first or the last one, and a missing
// barrier is detected. Blocks run one after another.

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

struct Dim {
    int x;
};

static thread_local Dim threadIdx, blockIdx, blockDim, gridDim;

#define __global__
#define __device__
#define __shared__ static

static const int kThreads = THREADS, kWarp = 32, kStack = 1 << 16;
static ucontext_t scheduler, fibers[kThreads];
static bool finished[kThreads], waiting[kThreads];
static bool votes[2][kThreads];
static int parity[kThreads];
static std::vector<char> stacks(kThreads * kStack);  // used by one launch at a time

static void let_others_run() { swapcontext(&fibers[threadIdx.x], &scheduler); }

static void __syncthreads() {
    waiting[threadIdx.x] = true;
    let_others_run();
}

static unsigned int __ballot_sync(unsigned int, bool vote) {
    int me = threadIdx.x, slot = parity[me] ^= 1;
    votes[slot][me] = vote;
    let_others_run();
    unsigned int bits = 0;
    for (int lane = 0; lane < kWarp; ++lane)
        bits |= (unsigned int)votes[slot][me / kWarp * kWarp + lane] << lane;
    return bits;
}

template <class T>
static T atomicAdd(T* address, T value) {
    T before = *address;
    *address += value;
    return before;
}

static int __popc(unsigned int bits) { return __builtin_popcount(bits); }

static float __uint_as_float(unsigned int bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

static unsigned int __float_as_uint(float value) {
    unsigned int bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

using std::sqrt;

#include "kernels.cu"

static void (*body)(void*);
static void* payload;

static void enter() {
    body(payload);
    finished[threadIdx.x] = true;
}

template <class... Parameters>
static void run(void (*kernel)(Parameters...), int blocks, void** arguments) {
    std::tuple<Parameters...> values;
    auto read = [&]<std::size_t... index>(std::index_sequence<index...>) {
        (std::memcpy(&std::get<index>(values), arguments[index], 8), ...);
    };
    static_assert(((sizeof(Parameters) == 8) && ...));
    read(std::index_sequence_for<Parameters...>{});
    auto call = [&] { std::apply(kernel, values); };
    body = [](void* bound) { (*static_cast<decltype(call)*>(bound))(); };
    payload = &call;
    static bool backwards = true;
    backwards = !backwards;
    blockDim.x = kThreads;
    gridDim.x = blocks;
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
        for (int thread = 0; thread < kThreads; ++thread) {
            getcontext(&fibers[thread]);
            fibers[thread].uc_stack.ss_sp = &stacks[thread * kStack];
            fibers[thread].uc_stack.ss_size = kStack;
            fibers[thread].uc_link = &scheduler;
            finished[thread] = false;
            makecontext(&fibers[thread], enter, 0);
        }
        for (bool busy = true; busy;) {
            busy = false;
            std::fill(waiting, waiting + kThreads, false);
            for (int offset = 0; offset < kThreads; offset += kWarp) {
                int warp = backwards ? kThreads - kWarp - offset : offset;
                for (bool moving = true; moving; busy |= moving) {
                    moving = false;
                    for (int thread = warp; thread < warp + kWarp; ++thread) {
                        if (finished[thread] || waiting[thread]) continue;
                        threadIdx.x = thread;
                        swapcontext(&scheduler, &fibers[thread]);
                        moving = true;
                    }
                }
            }
        }
    }
}

#define EXPORT(kernel) \
    extern "C" void run_##kernel(int blocks, void** arguments) { run(kernel, blocks, arguments); }

EXPORT(histogram)
EXPORT(choose)
EXPORT(count)
EXPORT(collect)
EXPORT(scatter)
#if VALUE_BITS >= 16
EXPORT(sgd)
EXPORT(adam)
#endif
