// Steps of the random walk along a stencil of affinities (paper 4.1.6; spec 6).
//
// Maps are flat rows with zeros around and between them, so that the neighbour at an offset is a
// fixed distance away for every pixel, and no step needs an index or a bound.

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace {

// Powers of small affinities, and what arrives far from a CAM, are too small to matter and, as
// subnormal numbers, many times slower on some processors: they count as zero in here.
struct WithoutSubnormals {
#if defined(__SSE__)
    const unsigned before = _mm_getcsr();
    WithoutSubnormals() { _mm_setcsr(before | 0x8040); }
    ~WithoutSubnormals() { _mm_setcsr(before); }
#endif
};

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kLanes = kBytes / sizeof(double);
typedef double Vector __attribute__((vector_size(kBytes)));
typedef float Half __attribute__((vector_size(kBytes / 2)));

struct Map {
    const float* weights;    // (count, length) affinity of each pixel and its neighbour
    const double* scale;     // (length) 1 / column sums
    const int64_t* offsets;  // (count) distances of the neighbours
    int64_t count, length, begin, end;
};

Vector load(const float* from) {
    Half value;
    std::memcpy(&value, from, kBytes / 2);
    return __builtin_convertvector(value, Vector);
}

Vector load(const double* from) {
    Vector value;
    std::memcpy(&value, from, kBytes);
    return value;
}

// One step of kPlanes planes together, which share the loads of the weights. Eight sums at once
// hide the latency of an addition and fit into the registers.
template <int kPlanes>
void step(const Map& map, const double* in, double* out) {
    constexpr int kVectors = 8 / kPlanes;
    for (int64_t i = map.begin; i < map.end; i += kVectors * kLanes) {
        Vector sums[kPlanes][kVectors];
        for (int m = 0; m < kPlanes; ++m)
            for (int v = 0; v < kVectors; ++v)
                sums[m][v] = load(in + m * map.length + i + v * kLanes);
        for (int64_t p = 0; p < map.count; ++p) {
            const int64_t offset = map.offsets[p];
            const float* weight = map.weights + p * map.length + i;
            for (int v = 0; v < kVectors; ++v) {
                // Each pair counts from both of its ends.
                const Vector after = load(weight + v * kLanes);
                const Vector before = load(weight + v * kLanes - offset);
                for (int m = 0; m < kPlanes; ++m) {
                    const double* value = in + m * map.length + i + v * kLanes;
                    sums[m][v] += after * load(value + offset);
                    sums[m][v] += before * load(value - offset);
                }
            }
        }
        for (int v = 0; v < kVectors; ++v) {
            const Vector scale = load(map.scale + i + v * kLanes);
            for (int m = 0; m < kPlanes; ++m) {
                const Vector value = sums[m][v] * scale;
                std::memcpy(out + m * map.length + i + v * kLanes, &value, kBytes);
            }
        }
    }
}

template <int kPlanes>
void steps(const Map& map, int64_t count, double* planes, double* other) {
    double *in = planes, *out = other;
    for (int64_t n = 0; n < count; ++n, std::swap(in, out)) step<kPlanes>(map, in, out);
    if (in != planes) std::memcpy(planes, in, kPlanes * map.length * sizeof(double));
}

}  // namespace

// `planes` (planes, length) takes `step_count` steps in place; `other` is as large as four of them
// and zero. From `begin` to `end` are the pixels; before and behind them is room for the largest
// offset, and behind it for eight vectors more.
extern "C" __attribute__((visibility("default"))) void walk(
    const float* weights, const double* scale, const int64_t* offsets, int64_t count,
    int64_t length, int64_t begin, int64_t end, int64_t step_count, int64_t plane_count,
    double* planes, double* other) {
    const WithoutSubnormals inside_this_call;
    const Map map{weights, scale, offsets, count, length, begin, end};
    while (plane_count > 0) {
        // Never three, which leaves registers unused: two and one.
        const int64_t together = plane_count >= 4 ? 4 : plane_count >= 2 ? 2 : 1;
        if (together == 4)
            steps<4>(map, step_count, planes, other);
        else if (together == 2)
            steps<2>(map, step_count, planes, other);
        else
            steps<1>(map, step_count, planes, other);
        planes += together * length;
        plane_count -= together;
    }
}
