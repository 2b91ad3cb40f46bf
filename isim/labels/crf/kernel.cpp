// Mean-field inference in a fully connected CRF with two Gaussian kernels (Kraehenbuehl and
// Koltun, 2011) over permutohedral lattices (Adams, Baek and Davis, 2010): spec 5.
//
//   Q <- softmax(-U + sum_m w_m n_m K_m (n_m Q)),  n = 1 / sqrt(K 1 + 1e-20)
//
// with K = slice . blur . splat. What makes it fast, all exact:
// - n, w and the lattice's output factor are folded into one weight a pixel and vertex, the square
//   root of each on either side of the blur.
// - The labels sum to one, and so do their messages to that of a plane of ones: with two labels
//   the difference of both is filtered, one number a pixel; with more, one label is left out
//   where that saves a vector.
// - Slice, softmax and splat of a block of pixels are one pass over its weights.
// - A vertex's key and number share one word of the hash table: a look-up costs one cache miss,
//   and that one is prefetched.
// - Buffers live as long as the thread, and with them the spatial lattice of the last size.
//
// One image a call, on the calling thread.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <cstdlib>
#include <new>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// Pixels of a block: each vertex's numbers fill one of the processor's vectors. Wider ones, which
// the compiler would have to make of several, take 1.3 to 1.5 times as long.
#ifdef __AVX512F__
constexpr int B = 16;
#else
constexpr int B = 8;
#endif
typedef float Block __attribute__((vector_size(4 * B)));
typedef int32_t BlockInts __attribute__((vector_size(4 * B)));
typedef float V8 __attribute__((vector_size(32)));
typedef float V4 __attribute__((vector_size(16)));

constexpr float TINY = 1e-20f;

// Aligned memory that is kept and only grows; new contents are undefined.
template <class T> class Buffer {
  public:
    Buffer() = default;
    Buffer(const Buffer &) = delete;
    Buffer &operator=(const Buffer &) = delete;
    ~Buffer() { std::free(data_); }
    T *need(size_t count) {
        if (count > size_) {
            std::free(data_);
            size_ = 0;
            // A tenth more: the next image is often a little larger.
            size_t bytes = (count + count / 10) * sizeof(T);
            data_ = static_cast<T *>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
            if (!data_) throw std::bad_alloc();
            size_ = count + count / 10;
        }
        return data_;
    }
    T *get() const { return data_; }

  private:
    T *data_ = nullptr;
    size_t size_ = 0;
};

Block gather(const float *values, const int32_t *ids) {
#ifdef __AVX512F__
    return (Block)_mm512_i32gather_ps(_mm512_load_si512(ids), values, 4);
#else
    Block found;
    for (int l = 0; l < B; ++l) found[l] = values[ids[l]];
    return found;
#endif
}

// exp to two units in the last place, of numbers in -60 .. 60 and at these bounds beyond. Nothing
// above rounding is lost, and products with it are no denormal numbers, which are slow.
template <class V> inline V exp_of(V x) {
    using I = decltype(x < x);
    x = x < -60.f ? V{} - 60.f : x;
    x = x > 60.f ? V{} + 60.f : x;
    // To the nearest integer, which is then in the low bits.
    V shifted = x * 1.44269504f + 12582912.f;
    V n = shifted - 12582912.f;
    V r = x - n * 0.693359375f + n * 2.12194440e-4f;
    V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.f;
    return p * (V)(((I)shifted << 23) + (127 << 23));
}

inline float sum_of(V4 x) { return (x[0] + x[1]) + (x[2] + x[3]); }
inline float max_of(V4 x) { return std::max(std::max(x[0], x[1]), std::max(x[2], x[3])); }
template <class Half, class V> inline Half half_of(V x, int which) {
    Half found;
    std::memcpy(&found, (const char *)&x + which * sizeof found, sizeof found);
    return found;
}
inline float sum_of(V8 x) { return sum_of(half_of<V4>(x, 0) + half_of<V4>(x, 1)); }
template <class V> inline V larger(V a, V b) { return a > b ? a : b; }
inline float max_of(V8 x) { return max_of(larger(half_of<V4>(x, 0), half_of<V4>(x, 1))); }
#ifdef __AVX512F__
inline float sum_of(Block x) { return sum_of(half_of<V8>(x, 0) + half_of<V8>(x, 1)); }
inline float max_of(Block x) { return max_of(larger(half_of<V8>(x, 0), half_of<V8>(x, 1))); }
#endif

// C numbers of one pixel or vertex, in registers: `most` vectors of type V, and one of four.
template <class V, int MOST, bool FOUR> struct Numbers {
    static constexpr int LANES = sizeof(V) / sizeof(float);
    static constexpr int C = MOST * LANES + (FOUR ? 4 : 0);
    V wide[MOST];
    V4 four;

    static Numbers load(const float *from) {
        Numbers x;
        for (int i = 0; i < MOST; ++i) std::memcpy(&x.wide[i], from + i * LANES, sizeof(V));
        if (FOUR) std::memcpy(&x.four, from + MOST * LANES, sizeof(V4));
        return x;
    }
    static Numbers zero() {
        Numbers x;
        for (int i = 0; i < MOST; ++i) x.wide[i] = V{};
        x.four = V4{};
        return x;
    }
    void store(float *to) const {
        for (int i = 0; i < MOST; ++i) std::memcpy(to + i * LANES, &wide[i], sizeof(V));
        if (FOUR) std::memcpy(to + MOST * LANES, &four, sizeof(V4));
    }
    // This plus `factor` times `x`.
    Numbers plus(float factor, const Numbers &x) const {
        Numbers found;
        for (int i = 0; i < MOST; ++i) found.wide[i] = wide[i] + factor * x.wide[i];
        if (FOUR) found.four = four + factor * x.four;
        return found;
    }
    float sum() const {
        float total = FOUR ? sum_of(four) : 0;
        for (int i = 0; i < MOST; ++i) total += sum_of(wide[i]);
        return total;
    }
    float max() const {
        float most = max_of(wide[0]);
        for (int i = 1; i < MOST; ++i) most = std::max(most, max_of(wide[i]));
        return FOUR ? std::max(most, max_of(four)) : most;
    }
    Numbers exp(float less) const {
        Numbers found;
        for (int i = 0; i < MOST; ++i) found.wide[i] = exp_of(wide[i] - less);
        if (FOUR) found.four = exp_of(four - less);
        return found;
    }
};

// A permutohedral lattice with D features, of one image.
template <int D> class Lattice {
  public:
    // How often each of the D + 1 vertices of a pixel's simplex is needed: [block][D + 1][B].
    int32_t *ids = nullptr;
    float *weights = nullptr;
    // Vertices 1 .. count; 0 stands for one that is not there.
    int32_t count = 0;
    int64_t blocks = 0;

    // Builds it from features f[D][pixels], of which f[i] lies in 0 .. limits[i]. False: the keys
    // would not fit into 64 bits.
    template <class Feature>
    bool build(int64_t pixels, const float *limits, Feature feature) {
        blocks = (pixels + B - 1) / B;
        float lower[D + 1], upper[D + 1];
        bounds(limits, lower, upper);
        int bits = 3;
        for (int i = 0; i < D; ++i) {
            // Beyond, single precision would no longer tell a simplex from the next.
            if (!(upper[i] - lower[i] < 65536.f * (D + 1))) return false;
            // Three more on either side: rounding, and neighbours.
            int64_t least = (int64_t)std::floor(lower[i] / (D + 1)) - 3;
            int64_t most = (int64_t)std::ceil(upper[i] / (D + 1)) + 3;
            shift_[i] = bits;
            offset_[i] = -least;
            while ((int64_t(1) << (bits - shift_[i])) <= most - least) ++bits;
        }
        if (bits > 64) return false;
        int id_bits = 1;
        while ((int64_t(1) << id_bits) <= (D + 1) * blocks * B) ++id_bits;
        if (id_bits > 31) return false;
        ids_.need(blocks * (D + 1) * B);
        weights_.need(blocks * (D + 1) * B);
        ids = ids_.get();
        weights = weights_.get();
        if (bits + id_bits <= 64)
            fill<uint64_t>(pixels, feature, id_bits);
        else
            fill<unsigned __int128>(pixels, feature, 32);
        return true;
    }

    // Blurs N a vertex, [count + 1], vertex 0 being zeros and its own neighbour; the result is in
    // one of the two, which is returned.
    template <class N> float *blur(float *from, float *to) const {
        for (int axis = 0; axis <= D; ++axis) {
            const int32_t *before = before_.get() + axis * pitch_;
            const int32_t *after = after_.get() + axis * pitch_;
            for (int64_t i = 0; i <= count; ++i) {
                // Neighbours lie anywhere, and a row of many numbers is not in the cache.
                for (const float *ahead : {from + (int64_t)before[i + AHEAD] * N::C,
                                           from + (int64_t)after[i + AHEAD] * N::C}) {
                    __builtin_prefetch(ahead);
                    if (N::C > 4) __builtin_prefetch(ahead + N::C - 1);
                }
                const N one = N::load(from + (int64_t)before[i] * N::C);
                const N two = N::load(from + (int64_t)after[i] * N::C);
                const N own = N::load(from + i * N::C);
                own.plus(.5f, one.plus(1.f, two)).store(to + i * N::C);
            }
            std::swap(from, to);
        }
        return from;
    }

    // The same for one number a vertex. Arrays are as long as whole blocks need.
    float *blur(float *from, float *to) const {
        for (int axis = 0; axis <= D; ++axis) {
            const int32_t *before = before_.get() + axis * pitch_;
            const int32_t *after = after_.get() + axis * pitch_;
            for (int64_t i = 0; i <= count; i += B) {
                Block both = gather(from, before + i) + gather(from, after + i), own;
                std::memcpy(&own, from + i, sizeof own);
                own += .5f * both;
                std::memcpy(to + i, &own, sizeof own);
            }
            std::swap(from, to);
        }
        return from;
    }

    // Folds the normalisation and sqrt(compat * output factor) into the weights, given K 1.
    // `ones` gets the message of a plane of ones: what is folded in, twice, of K n.
    void normalise(float compat, Buffer<float> &first, Buffer<float> &second) {
        const float out = 1.f / (1.f + std::pow(2.f, -D));
        float *sums = filter_ones(first, second);
        const float factor = std::sqrt(compat * out);
        for (int64_t b = 0; b < blocks; ++b) {
            Block total = slice(sums, b);
            Block scale;
            for (int l = 0; l < B; ++l) scale[l] = factor / std::sqrt(total[l] * out + TINY);
            Block *w = (Block *)weights + b * (D + 1);
            for (int v = 0; v <= D; ++v) w[v] *= scale;
        }
    }

    // Values of a vertex for which every pixel gives 1; in one of the buffers.
    float *filter_ones(Buffer<float> &first, Buffer<float> &second) const {
        float *from = first.need(count + 1 + B), *to = second.need(count + 1 + B);
        std::memset(from, 0, (count + 1 + B) * sizeof(float));
        const Block one = Block{} + 1.f;
        for (int64_t b = 0; b < blocks; ++b) splat(from, b, one);
        return blur(from, to);
    }

    Block slice(const float *values, int64_t block) const {
        const int32_t *id = ids + block * (D + 1) * B;
        const Block *w = (const Block *)weights + block * (D + 1);
        Block sum = w[0] * gather(values, id);
        for (int v = 1; v <= D; ++v) sum += w[v] * gather(values, id + v * B);
        return sum;
    }

    void splat(float *values, int64_t block, Block what) const {
        const int32_t *id = ids + block * (D + 1) * B;
        const Block *w = (const Block *)weights + block * (D + 1);
        Block parts[D + 1];
        for (int v = 0; v <= D; ++v) parts[v] = w[v] * what;
        const float *part = (const float *)parts;
        for (int l = 0; l < B; ++l)
            for (int v = 0; v <= D; ++v) values[id[v * B + l]] += part[v * B + l];
    }

    // The same for one pixel of a block, N a vertex.
    template <class N> N slice(const float *values, int64_t block, int lane, N sum) const {
        const int32_t *id = ids + block * (D + 1) * B + lane;
        const float *w = weights + block * (D + 1) * B + lane;
        for (int v = 0; v <= D; ++v)
            sum = sum.plus(w[v * B], N::load(values + (int64_t)id[v * B] * N::C));
        return sum;
    }

    template <class N> void splat(float *values, int64_t block, int lane, const N &what) const {
        const int32_t *id = ids + block * (D + 1) * B + lane;
        const float *w = weights + block * (D + 1) * B + lane;
        for (int v = 0; v <= D; ++v) {
            float *at = values + (int64_t)id[v * B] * N::C;
            N::load(at).plus(w[v * B], what).store(at);
        }
    }

  private:
    // By how many vertices the blur fetches neighbours before it needs them.
    static constexpr int AHEAD = 16;
    Buffer<int32_t> ids_, before_, after_;
    Buffer<float> weights_;
    Buffer<uint64_t> keys_;
    Buffer<unsigned char> table_;
    int64_t pitch_ = 0;
    int shift_[D];
    int64_t offset_[D];
    int table_bits_ = 0, id_bits_ = 0;

    static void scales(float *scale) {
        const float deviation = std::sqrt(2. / 3.) * (D + 1);
        for (int i = 0; i < D; ++i) scale[i] = 1. / std::sqrt((i + 2.) * (i + 1.)) * deviation;
    }

    static void bounds(const float *limits, float *lower, float *upper) {
        float scale[D];
        scales(scale);
        float sum = 0;
        for (int i = D; i > 0; --i) {
            float most = limits[i - 1] * scale[i - 1];
            lower[i] = -i * most;
            upper[i] = sum;
            sum += most;
        }
        lower[0] = 0;
        upper[0] = sum;
    }

    size_t slot(uint64_t key) const {
        return (key * 0x9E3779B97F4A7C15ull) >> (64 - table_bits_);
    }

    template <class Entry> Entry *table() const { return (Entry *)table_.get(); }

    template <class Entry> void resize_table(int bits) {
        table_bits_ = bits;
        table_.need(sizeof(Entry) << bits);
        std::memset(table_.get(), 0, sizeof(Entry) << bits);
        for (int32_t id = 1; id <= count; ++id) {
            size_t at = slot(keys_.get()[id]);
            while (table<Entry>()[at]) at = (at + 1) & ((size_t(1) << bits) - 1);
            table<Entry>()[at] = ((Entry)keys_.get()[id] << id_bits_) | (Entry)id;
        }
    }

    // Number of a vertex, a new one if there was none.
    template <class Entry> int32_t number(uint64_t key) {
        const size_t mask = (size_t(1) << table_bits_) - 1;
        const Entry id_mask = ((Entry)1 << id_bits_) - 1;
        Entry *entries = table<Entry>();
        size_t at = slot(key);
        while (Entry entry = entries[at]) {
            if ((uint64_t)(entry >> id_bits_) == key) return (int32_t)(entry & id_mask);
            at = (at + 1) & mask;
        }
        int32_t id = ++count;
        keys_.get()[id] = key;
        entries[at] = ((Entry)key << id_bits_) | (Entry)id;
        if (((size_t)count << 1) > mask) resize_table<Entry>(table_bits_ + 1);
        return id;
    }

    template <class Entry> int32_t find(uint64_t key) const {
        const size_t mask = (size_t(1) << table_bits_) - 1;
        const Entry id_mask = ((Entry)1 << id_bits_) - 1;
        const Entry *entries = table<Entry>();
        size_t at = slot(key);
        while (Entry entry = entries[at]) {
            if ((uint64_t)(entry >> id_bits_) == key) return (int32_t)(entry & id_mask);
            at = (at + 1) & mask;
        }
        return 0;
    }

    template <class Entry, class Feature>
    void fill(int64_t pixels, Feature feature, int id_bits) {
        id_bits_ = id_bits;
        count = 0;
        keys_.need((D + 1) * blocks * B + 1);
        int bits = 12;
        while ((int64_t(1) << bits) < pixels) ++bits;
        resize_table<Entry>(bits);
        // A block's keys wait while those of the next are computed and their slots prefetched.
        alignas(64) uint64_t keys[2][(D + 1) * B];
        for (int64_t b = 0; b <= blocks; ++b) {
            if (b < blocks) {
                uint64_t *current = keys[b & 1];
                simplices(b, pixels, feature, current);
                for (int k = 0; k < (D + 1) * B; ++k)
                    __builtin_prefetch(&table<Entry>()[slot(current[k])]);
            }
            if (b > 0) insert<Entry>(keys[(b - 1) & 1], b - 1, pixels);
        }
        connect<Entry>();
    }

    template <class Entry> void insert(const uint64_t *keys, int64_t block, int64_t pixels) {
        int32_t *id = ids + block * (D + 1) * B;
        const int lanes = (int)std::min<int64_t>(B, pixels - block * B);
        for (int v = 0; v <= D; ++v) id[v * B] = number<Entry>(keys[v * B]);
        // Neighbours in a row often share vertices.
        for (int l = 1; l < lanes; ++l)
            for (int v = 0; v <= D; ++v) {
                int at = v * B + l;
                id[at] = keys[at] == keys[at - 1] ? id[at - 1] : number<Entry>(keys[at]);
            }
        // pydensecrf fills up to a multiple of four with points at the origin. They weigh nothing,
        // but the blur passes through their vertices.
        if (lanes % 4)
            for (int v = 0; v <= D; ++v) number<Entry>(keys[v * B + lanes]);
        for (int l = lanes; l < B; ++l)
            for (int v = 0; v <= D; ++v) id[v * B + l] = 0;
    }

    // Keys of the vertices of a block's pixels, and their barycentric weights.
    //
    // In the very operations of pydensecrf: of a pixel on a border between simplices they decide
    // which vertices there are, and with them what the blur carries on.
    template <class Feature>
    __attribute__((optimize("fp-contract=off")))
    void simplices(int64_t block, int64_t pixels, Feature feature, uint64_t *keys) {
        float scale[D];
        scales(scale);
        Block elevated[D + 1], features[D];
        feature(block, features);
        const int64_t rest = pixels - block * B;
        for (int l = (int)std::min<int64_t>(rest, B); l < B; ++l)
            for (int i = 0; i < D; ++i) features[i][l] = 0;
        Block sum = {};
        for (int i = D; i > 0; --i) {
            Block own = features[i - 1] * scale[i - 1];
            elevated[i] = sum - (float)i * own;
            sum += own;
        }
        elevated[0] = sum;

        // The closest point whose coordinates are multiples of D + 1: `multiple` times D + 1.
        BlockInts multiple[D + 1], rank[D + 1], excess = {};
        Block delta[D + 1];
        for (int i = 0; i <= D; ++i) {
            Block near = elevated[i] * (1.f / (D + 1));
            for (int l = 0; l < B; ++l) near[l] = __builtin_rintf(near[l]);
            multiple[i] = __builtin_convertvector(near, BlockInts);
            delta[i] = elevated[i] - near * (float)(D + 1);
            excess += multiple[i];
            rank[i] = BlockInts{};
        }
        for (int i = 0; i < D; ++i)
            for (int j = i + 1; j <= D; ++j) {
                BlockInts less = delta[i] < delta[j];  // -1 where true
                rank[i] -= less;
                rank[j] += less + 1;
            }
        // Its coordinates must sum to zero.
        for (int i = 0; i <= D; ++i) {
            rank[i] += excess;
            BlockInts low = rank[i] < 0, high = rank[i] > D;
            multiple[i] += high - low;
            delta[i] -= __builtin_convertvector(high - low, Block) * (float)(D + 1);
            rank[i] += (high - low) * (D + 1);
        }
        Block sorted[D + 1];
        for (int r = 0; r <= D; ++r) {
            BlockInts bits = {};
            for (int i = 0; i <= D; ++i) bits |= (rank[i] == r) & (BlockInts)delta[i];
            sorted[r] = (Block)bits * (1.f / (D + 1));
        }
        Block *w = (Block *)weights + block * (D + 1);
        w[0] = sorted[D] + 1.f - sorted[0];
        for (int k = 1; k <= D; ++k) w[k] = sorted[D - k] - sorted[D + 1 - k];
        for (int l = (int)std::min<int64_t>(rest, B); l < B; ++l)
            for (int k = 0; k <= D; ++k) w[k][l] = 0;

        for (int l = 0; l < B; ++l) {
            uint64_t base = 0, step[D + 1];
            for (int i = 0; i < D; ++i) {
                base += (uint64_t)(multiple[i][l] + offset_[i]) << shift_[i];
                step[rank[i][l]] = uint64_t(1) << shift_[i];
            }
            step[rank[D][l]] = 0;
            // Vertex k: one multiple less where the rank is above D - k; its remainder is k.
            keys[l] = base;
            for (int k = 1; k <= D; ++k) keys[k * B + l] = base = base - step[D + 1 - k] + 1;
        }
    }

    // Neighbours of every vertex along every axis.
    template <class Entry> void connect() {
        pitch_ = (count + AHEAD + 1 + B - 1) / B * B;
        int32_t *before = before_.need((D + 1) * pitch_), *after = after_.need((D + 1) * pitch_);
        std::memset(before, 0, (D + 1) * pitch_ * sizeof(int32_t));
        std::memset(after, 0, (D + 1) * pitch_ * sizeof(int32_t));
        uint64_t ones = 0;
        for (int i = 0; i < D; ++i) ones += uint64_t(1) << shift_[i];
        constexpr int GROUP = 8;
        uint64_t wanted[2][GROUP][D + 1];
        for (int32_t first = 1; first <= count + GROUP; first += GROUP) {
            const int turn = (first / GROUP) & 1;
            for (int32_t g = 0; g < GROUP && first + g <= count; ++g) {
                // All coordinates one less, that of the axis D more.
                uint64_t key = keys_.get()[first + g];
                key = (key & 7) ? key - 1 : key + D - ones;
                for (int axis = 0; axis <= D; ++axis) {
                    uint64_t near = axis < D ? key + (uint64_t(1) << shift_[axis]) : key;
                    wanted[turn][g][axis] = near;
                    __builtin_prefetch(&table<Entry>()[slot(near)]);
                }
            }
            const int32_t last = first - GROUP;
            if (last < 1) continue;
            for (int32_t g = 0; g < GROUP && last + g <= count; ++g)
                for (int axis = 0; axis <= D; ++axis)
                    if (int32_t id = find<Entry>(wanted[turn ^ 1][g][axis])) {
                        before[axis * pitch_ + last + g] = id;
                        after[axis * pitch_ + id] = last + g;
                    }
        }
    }
};

// What one thread needs for an image.
struct Workspace {
    Lattice<2> space;
    Lattice<5> colour;
    Buffer<float> values[4], unary, ones, rests;
    // Of the spatial lattice that is there, with its weights folded in.
    int height = 0, width = 0;
    float sxy = 0, compat = -1;
};

struct Problem {
    int height, width, labels, steps;
    const uint8_t *image;   // (H, W, 3)
    const uint8_t *seed;    // (H, W) in 0 .. labels - 1, or null
    float own;              // energy of the seed's label, less than the others by this much
    const float *energies;  // (labels, H * W) if there is no seed
    uint8_t *best;          // (H, W), or null
    float *marginals;       // (labels, H * W), or null
};

bool prepare(Workspace &work, const Problem &problem, float gaussian_sxy, float gaussian_compat,
             float sxy, float srgb, float compat) {
    const int64_t pixels = (int64_t)problem.height * problem.width;
    const int width = problem.width;
    auto place = [width](int64_t block, float sxy, Block *x, Block *y) {
        int64_t p = block * B;
        int row = (int)(p / width), column = (int)(p % width);
        for (int l = 0; l < B; ++l) {
            (*x)[l] = column / sxy;
            (*y)[l] = row / sxy;
            if (++column == width) column = 0, ++row;
        }
    };
    if (work.height != problem.height || work.width != width || work.sxy != gaussian_sxy ||
        work.compat != gaussian_compat) {
        work.height = 0;
        const float scale = 1 / gaussian_sxy;
        const float limits[2] = {width * scale, problem.height * scale};
        auto feature = [&](int64_t block, Block *f) { place(block, gaussian_sxy, &f[0], &f[1]); };
        if (!work.space.build(pixels, limits, feature)) return false;
        work.space.normalise(gaussian_compat, work.values[0], work.values[1]);
        work.height = problem.height;
        work.width = width;
        work.sxy = gaussian_sxy;
        work.compat = gaussian_compat;
    }
    const float scale = 1 / sxy, colour = 1 / srgb;
    const float most = 255 * colour;
    const float limits[5] = {width * scale, problem.height * scale, most, most, most};
    const uint8_t *image = problem.image;
    auto feature = [&](int64_t block, Block *f) {
        place(block, sxy, &f[0], &f[1]);
        const int64_t p = block * B;
        const int lanes = (int)std::min<int64_t>(B, pixels - p);
        alignas(64) float channel[3][B] = {};
        for (int l = 0; l < lanes; ++l)
            for (int c = 0; c < 3; ++c) channel[c][l] = image[3 * (p + l) + c] / srgb;
        for (int c = 0; c < 3; ++c) f[2 + c] = *(Block *)channel[c];
    };
    if (!work.colour.build(pixels, limits, feature)) return false;
    work.colour.normalise(compat, work.values[0], work.values[1]);
    return true;
}

// Two labels: P = Q_0 - Q_1 is filtered alone.
void infer_two(Workspace &work, const Problem &problem) {
    const int64_t pixels = (int64_t)problem.height * problem.width, blocks = work.space.blocks;
    const size_t size_s = work.space.count + 1 + B, size_c = work.colour.count + 1 + B;
    float *s = work.values[0].need(size_s), *s2 = work.values[1].need(size_s);
    float *c = work.values[2].need(size_c), *c2 = work.values[3].need(size_c);
    // Energy of label 1 minus that of label 0.
    float *unary = work.unary.need(blocks * B);
    for (int64_t p = 0; p < pixels; ++p)
        unary[p] = problem.seed ? (problem.seed[p] ? -problem.own : problem.own)
                                : problem.energies[pixels + p] - problem.energies[p];
    std::fill(unary + pixels, unary + blocks * B, 0.f);
    float *blurred_s = nullptr, *blurred_c = nullptr;
    for (int step = 0; step <= problem.steps; ++step) {
        float *into_s = blurred_s == s ? s2 : s, *into_c = blurred_c == c ? c2 : c;
        const bool last = step == problem.steps;
        if (!last) {
            std::memset(into_s, 0, size_s * sizeof(float));
            std::memset(into_c, 0, size_c * sizeof(float));
        }
        for (int64_t b = 0; b < blocks; ++b) {
            Block d = *(const Block *)(unary + b * B);
            if (step) d += work.space.slice(blurred_s, b) + work.colour.slice(blurred_c, b);
            // tanh(d / 2)
            Block difference = 1.f - 2.f / (exp_of(d) + 1.f);
            if (!last) {
                work.space.splat(into_s, b, difference);
                work.colour.splat(into_c, b, difference);
                continue;
            }
            const int lanes = (int)std::min<int64_t>(B, pixels - b * B);
            for (int l = 0; l < lanes; ++l) {
                const int64_t p = b * B + l;
                if (problem.best) problem.best[p] = difference[l] < 0;
                if (problem.marginals) {
                    problem.marginals[p] = .5f + .5f * difference[l];
                    problem.marginals[pixels + p] = .5f - .5f * difference[l];
                }
            }
        }
        if (last) break;
        blurred_s = work.space.blur(into_s, into_s == s ? s2 : s);
        blurred_c = work.colour.blur(into_c, into_c == c ? c2 : c);
    }
}


// The same of each run of C lanes, in all of them.
template <int C, class F> Block fold(Block x, F f) {
    BlockInts lane;
    for (int l = 0; l < B; ++l) lane[l] = l;
    for (int far = 1; far < C; far *= 2) x = f(x, __builtin_shuffle(x, lane ^ far));
    return x;
}

// Turns N::C energies, negated, of each pixel of a block into probabilities; with them `rest`, of
// one more label, if there is one. Empty planes get next to nothing.
template <class N> void softmax(float *x, float *rest, bool left_out) {
    constexpr int C = N::C;
    if constexpr (B % C != 0) {
        for (int l = 0; l < B; ++l) {
            N q = N::load(x + l * C);
            const float most = left_out ? std::max(rest[l], q.max()) : q.max();
            q = q.exp(most);
            if (left_out) rest[l] = exp_of(V4{} + (rest[l] - most))[0];
            const float scale = 1 / (q.sum() + rest[l]);
            N::zero().plus(scale, q).store(x + l * C);
            rest[l] *= scale;
        }
    } else {
        // As many pixels as a vector holds at once.
        for (int first = 0; first < B; first += B / C) {
            Block q = *(Block *)(x + first * C), other = {};
            Block most = fold<C>(q, larger<Block>), sum = {};
            if (left_out) {
                for (int l = 0; l < B; ++l) other[l] = rest[first + l / C];
                most = larger(most, other);
                other = exp_of(other - most);
                sum = other;
            }
            q = exp_of(q - most);
            sum += fold<C>(q, [](Block a, Block b) { return a + b; });
            *(Block *)(x + first * C) = q / sum;
            if (left_out) {
                other /= sum;
                for (int l = 0; l < B / C; ++l) rest[first + l] = other[l * C];
            }
        }
    }
}

// Three labels or more: N::C planes, one more or one less or more than there are labels. With one
// less, the last label is left out.
template <class N> void infer_many(Workspace &work, const Problem &problem) {
    constexpr int C = N::C;
    const int64_t pixels = (int64_t)problem.height * problem.width, blocks = work.space.blocks;
    const int filtered = std::min(C, problem.labels);
    const bool left_out = filtered < problem.labels;
    const size_t size_s = (size_t)(work.space.count + 1) * C;
    const size_t size_c = (size_t)(work.colour.count + 1) * C;
    // Of the label left out: what a plane of ones is told by both kernels, minus its energy.
    float *rests = work.rests.need(blocks * B), *ones = work.ones.need(blocks * B);
    if (left_out) {
        float *of_s = work.space.filter_ones(work.values[0], work.values[1]);
        for (int64_t b = 0; b < blocks; ++b) *(Block *)(ones + b * B) = work.space.slice(of_s, b);
        float *of_c = work.colour.filter_ones(work.values[0], work.values[1]);
        for (int64_t b = 0; b < blocks; ++b) *(Block *)(ones + b * B) += work.colour.slice(of_c, b);
        for (int64_t p = 0; p < pixels; ++p)
            rests[p] = !problem.seed ? -problem.energies[filtered * pixels + p]
                       : problem.seed[p] == filtered ? problem.own
                                                     : 0;
    }
    float *s = work.values[0].need(size_s), *s2 = work.values[1].need(size_s);
    float *c = work.values[2].need(size_c), *c2 = work.values[3].need(size_c);
    // Negated energies: of a seed, by its label, else by pixel. Planes beyond the labels are empty.
    const int64_t rows = problem.seed ? problem.labels : pixels;
    float *unary = work.unary.need(rows * C);
    std::fill(unary, unary + rows * C, -1e30f);
    if (problem.seed)
        for (int row = 0; row < rows; ++row)
            for (int k = 0; k < filtered; ++k) unary[row * C + k] = k == row ? problem.own : 0;
    else
        // By tiles of pixels, since planes are read and pixels written.
        for (int64_t first = 0; first < pixels; first += 64)
            for (int k = 0; k < filtered; ++k)
                for (int64_t p = first; p < std::min(pixels, first + 64); ++p)
                    unary[p * C + k] = -problem.energies[k * pixels + p];
    float *blurred_s = nullptr, *blurred_c = nullptr;
    for (int step = 0; step <= problem.steps; ++step) {
        float *into_s = blurred_s == s ? s2 : s, *into_c = blurred_c == c ? c2 : c;
        const bool last = step == problem.steps;
        if (!last) {
            std::memset(into_s, 0, size_s * sizeof(float));
            std::memset(into_c, 0, size_c * sizeof(float));
        }
        for (int64_t b = 0; b < blocks; ++b) {
            const int lanes = (int)std::min<int64_t>(B, pixels - b * B);
            alignas(64) float found[B * C] = {}, rest[B] = {};
            for (int l = 0; l < lanes; ++l) {
                N q = N::zero();
                if (step) {
                    q = work.space.slice(blurred_s, b, l, q);
                    q = work.colour.slice(blurred_c, b, l, q);
                }
                const int64_t p = b * B + l;
                if (left_out) rest[l] = (step ? ones[p] - q.sum() : 0) + rests[p];
                q.plus(1.f, N::load(unary + (problem.seed ? problem.seed[p] : p) * C))
                    .store(found + l * C);
            }
            softmax<N>(found, rest, left_out);
            if (!last) {
                for (int l = 0; l < lanes; ++l) {
                    const N q = N::load(found + l * C);
                    work.space.splat(into_s, b, l, q);
                    work.colour.splat(into_c, b, l, q);
                }
                continue;
            }
            for (int l = 0; l < lanes; ++l) {
                const int64_t p = b * B + l;
                float q[C + 1];
                std::memcpy(q, found + l * C, C * sizeof(float));
                if (left_out) q[filtered] = rest[l];
                if (problem.best)
                    problem.best[p] = std::max_element(q, q + problem.labels) - q;
                if (problem.marginals)
                    for (int k = 0; k < problem.labels; ++k) problem.marginals[k * pixels + p] = q[k];
            }
        }
        if (last) break;
        blurred_s = work.space.template blur<N>(into_s, into_s == s ? s2 : s);
        blurred_c = work.colour.template blur<N>(into_c, into_c == c ? c2 : c);
    }
}

}  // namespace

// Mean-field inference for one image, with 2 to 256 labels.
//
// image: (height, width, 3) RGB. Either seed: (height, width) labels, whose energy is `own` less
// than the others'; or energies: (labels, height * width). best: (height, width) most probable
// label, or null. marginals: (labels, height * width), or null.
// Returns 0; 1 if a kernel is too narrow for an image of this size; 2 if there is no memory.
EXPORT int isim_crf(int height, int width, int labels, int steps, const uint8_t *image,
                    const uint8_t *seed, float own, const float *energies, float gaussian_sxy,
                    float gaussian_compat, float bilateral_sxy, float bilateral_srgb,
                    float bilateral_compat, uint8_t *best, float *marginals) {
    static thread_local Workspace work;
    const Problem problem = {height, width, labels, steps,    image,
                             seed,   own,   energies, best, marginals};
    try {
        if (!prepare(work, problem, gaussian_sxy, gaussian_compat, bilateral_sxy, bilateral_srgb,
                     bilateral_compat))
            return 1;
        if (labels == 2) infer_two(work, problem);
        else if (labels <= 5) infer_many<Numbers<V4, 1, false>>(work, problem);
        else if (labels <= 9) infer_many<Numbers<V8, 1, false>>(work, problem);
        else if (labels <= 13) infer_many<Numbers<V8, 1, true>>(work, problem);
        else if (labels <= 17) infer_many<Numbers<Block, 16 / B * 1, false>>(work, problem);
        else if (labels <= 21) infer_many<Numbers<Block, 16 / B * 1, true>>(work, problem);
        else if (labels <= 33) infer_many<Numbers<Block, 16 / B * 2, false>>(work, problem);
        else if (labels <= 65) infer_many<Numbers<Block, 16 / B * 4, false>>(work, problem);
        else if (labels <= 129) infer_many<Numbers<Block, 16 / B * 8, false>>(work, problem);
        else infer_many<Numbers<Block, 16 / B * 16, false>>(work, problem);
    } catch (const std::bad_alloc &) {
        work.height = 0;
        return 2;
    }
    return 0;
}
