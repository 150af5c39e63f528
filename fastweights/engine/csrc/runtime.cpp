// Threads and scratch memory. The threads are those of the OpenMP runtime that torch has loaded: its entry is handed in, for two
// pools of threads on the same cores would slow both down several times.
#include <atomic>
#include <cstdlib>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "problem.h"

namespace fw {

namespace {
using Fork = void (*)(void (*)(void*), void*, unsigned, unsigned);  // GOMP_parallel
std::atomic<Fork> fork_threads{nullptr};
std::atomic<int (*)()> thread_number{nullptr};  // omp_get_thread_num

struct Owned {
    float* data = nullptr;
    int64_t numbers = 0;
    ~Owned() { std::free(data); }
};
thread_local Owned owned;

struct Share {
    std::atomic<int64_t> next;
    int64_t tasks;
    void (*work)(void*, int64_t);
    void* context;
    int64_t team;
};

// Numbers below the normal ones are zeros while kernels run: a product of decays comes by there, and a processor takes a hundred times as
// long for a number of that kind. What the thread had set returns afterwards.
class TinyAsZero {
#if defined(__SSE2__)
    const unsigned before = _mm_getcsr();

public:
    TinyAsZero() { _mm_setcsr(before | 0x8040); }  // flush to zero, denormals are zeros
    ~TinyAsZero() { _mm_setcsr(before); }
#elif defined(__aarch64__)
    uint64_t before;

public:
    TinyAsZero() {
        asm volatile("mrs %0, fpcr" : "=r"(before));
        asm volatile("msr fpcr, %0" ::"r"(before | uint64_t{1} << 24));
    }
    ~TinyAsZero() { asm volatile("msr fpcr, %0" ::"r"(before)); }
#endif
};

// Work that touches the same memory in every call goes to the same thread every time, whose cache may still hold it.
void own_tasks(void* data) {
    Share& share = *static_cast<Share*>(data);
    const TinyAsZero tiny;
    int64_t me = thread_number.load()();
    for (int64_t i = share.tasks * me / share.team; i < share.tasks * (me + 1) / share.team; i++) share.work(share.context, i);
}

void take_tasks(void* data) {
    Share& share = *static_cast<Share*>(data);
    const TinyAsZero tiny;
    for (int64_t i; (i = share.next.fetch_add(1)) < share.tasks;) share.work(share.context, i);
}
}  // namespace

float* scratch(int64_t numbers) {
    if (numbers > owned.numbers) {
        std::free(owned.data);
        owned.data = static_cast<float*>(std::aligned_alloc(64, round_up(numbers * 4, 64)));
        owned.numbers = owned.data ? numbers : 0;
        if (!owned.data) std::abort();
        std::memset(owned.data, 0, numbers * 4);
    }
    return owned.data;
}

void parallel(int64_t tasks, int64_t threads, void (*work)(void*, int64_t), void* context, bool same_thread) {
    int64_t team = threads < tasks ? threads : tasks;
    Share share{{0}, tasks, work, context, team};
    Fork fork = fork_threads.load();
    if (fork && team > 1) fork(same_thread ? own_tasks : take_tasks, &share, static_cast<unsigned>(team), 0);
    else take_tasks(&share);
}

}  // namespace fw

extern "C" __attribute__((visibility("default"))) void fastweights_use_threads(void* entry, void* number) {
    fw::thread_number.store(reinterpret_cast<int (*)()>(number));
    fw::fork_threads.store(reinterpret_cast<fw::Fork>(entry));
}
extern "C" __attribute__((visibility("default"))) int64_t fastweights_abi() { return 7; }
// Numbers a row of saved values and a checkpoint have.
extern "C" __attribute__((visibility("default"))) void fastweights_sizes(fw::Problem* p, int64_t* row, int64_t* state) {
    fw::Layout at(*p);
    *row = at.Vp;
    *state = at.state();
}

// Multiply-adds on registers alone, for benchmarks, about as fast as the processor can; how many operations that was.
extern "C" __attribute__((visibility("default"))) int64_t fastweights_multiply_add(int64_t rounds, int64_t threads) {
    static constexpr int SUMS = fw::L == 8 ? 12 : 16;  // enough that none is waited for, and no more than stay in registers
    fw::parallel(
        threads, threads,
        [](void* context, int64_t) {
            const int64_t rounds = *static_cast<int64_t*>(context);
            fw::vec acc[SUMS], a = fw::broadcast(0.999f), b = fw::broadcast(0.001f);
            for (int j = 0; j < SUMS; j++) acc[j] = fw::broadcast(static_cast<float>(j));
            for (int64_t i = 0; i < rounds; i++)
#pragma GCC unroll 16
                for (int j = 0; j < SUMS; j++) acc[j] = acc[j] * a + b;
            float* out = fw::scratch(fw::L);
            for (int j = 1; j < SUMS; j++) acc[0] += acc[j];
            fw::store(out, acc[0]);
        },
        &rounds, true);
    return threads * rounds * 2 * SUMS * fw::L;
}

// Asks the system for large pages behind fresh memory: a long output otherwise costs one page fault for every 4 KiB of it.
extern "C" __attribute__((visibility("default"))) void fastweights_large_pages(char* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    constexpr int64_t PAGE = 1 << 21;
    int64_t skip = -reinterpret_cast<int64_t>(data) & (PAGE - 1);
    if (bytes - skip >= PAGE) madvise(data + skip, (bytes - skip) / PAGE * PAGE, MADV_HUGEPAGE);
#endif
}
