// Rates that one core reaches at most: what a kernel's speed is a share of.

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <ctime>
#include <vector>

#ifdef __AVX512F__
typedef float V __attribute__((vector_size(64)));
#else
typedef float V __attribute__((vector_size(32)));
#endif

namespace {

// Seconds of this thread alone, without those that others had its core.
double now() {
    timespec time;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return time.tv_sec + 1e-9 * time.tv_nsec;
}

}  // namespace

// Floating-point operations a second of multiply-adds in registers, which do not wait for each
// other. The best of several runs: others share the machine.
extern "C" double flops() {
    constexpr int CHAINS = 12, TURNS = 200000;
    double best = 0;
    for (int run = 0; run < 20; ++run) {
        V sums[CHAINS] = {}, factor = V{} + .999f;
        // Otherwise the compiler finds that all sums are the same one.
        asm volatile("" : "+x"(factor));
        for (V &sum : sums) asm volatile("" : "+x"(sum));
        const double start = now();
        for (int turn = 0; turn < TURNS; ++turn) {
#pragma GCC unroll 12
            for (int i = 0; i < CHAINS; ++i) sums[i] = sums[i] * factor + factor;
        }
        const double seconds = now() - start;
        for (V &sum : sums) asm volatile("" : : "x"(sum));
        best = std::max(best, 2. * CHAINS * TURNS * (sizeof(V) / sizeof(float)) / seconds);
    }
    return best;
}

// Bytes a second, read and written, of a copy that no cache holds.
extern "C" double bytes() {
    constexpr size_t SIZE = size_t(128) << 20;
    std::vector<char> from(SIZE, 1), to(SIZE, 2);
    double best = 0;
    for (int run = 0; run < 16; ++run) {
        const double start = now();
        std::memcpy(to.data(), from.data(), SIZE);
        asm volatile("" : : "r"(to.data()) : "memory");
        best = std::max(best, 2. * SIZE / (now() - start));
    }
    return best;
}
