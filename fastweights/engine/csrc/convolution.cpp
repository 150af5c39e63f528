// The short causal convolution in front of a scan, with what usually follows it, a block of channels at a time:
//
//   z_t = bias + sum over j < W of weight_j x_{t - W + 1 + j}        each channel with its own weights
//   s_t = silu(z_t) = z_t / (1 + exp(-z_t)), or z_t
//   y_t = s_t / sqrt(|s_t|^2 + 1e-6) over a group of channels, or s_t
//
// Backward:  ds = (dy - y (y . dy)) / sqrt(|s|^2 + 1e-6),   dz = ds (sigma + s (1 - sigma)),   dx_t = sum over j of weight_j dz_{t + W - 1 - j},
// dweight_j = sum over t of dz_t x_{t - W + 1 + j}. Nothing is saved: z is formed again from x. Runs of tokens are tasks of their own, each
// with its own sums for the weights, which are added up in order.
#include <algorithm>

#include "rows.h"

namespace fw {

constexpr int MOST_WIDTH = 8, RUN = 64, BLOCK = 256;  // tokens a task, channels a block: few enough for the first cache forward, for the second backward
constexpr float EPSILON = 1e-6f;

// Channels up to `end` (from where the last part ended): through silu or not, normalised in groups or not (0).
struct Part {
    int64_t end, silu, group;
};

struct Convolution {
    int64_t B, T, channels, width, parts;
    const Part* part;
    const float* weight;  // [width][channels]
    const float* bias;    // [channels], or missing
    Tensor x, y, before;  // (B, T, 1, channels) with heads = 1; before: the width - 1 rows before x, missing if they are zero
    Tensor dy, dx, dbefore;
    float* sums;          // [task][width + 1][channels]
    int64_t threads;
};

// Some channels of a run of tokens.
template <int W>
struct Block {
    static constexpr int MOST = RUN + W - 1;  // backward pass: rows of dz that dx needs
    const Convolution& c;
    const Part& part;
    const int64_t b, first;
    const int from, C, stride;
    Scratch& memory;
    const float* x[MOST + W - 1];  // x[i] is x_{first - W + 1 + i}

    static int64_t size(int64_t widest) { return (3 * (MOST + W) + 3) * (round_up(widest, 16) + 16); }

    Block(const Convolution& conv, const Part& p, int64_t batch, int64_t start, int64_t begin, int64_t end, Scratch& m)
        : c(conv), part(p), b(batch), first(start), from(static_cast<int>(begin)), C(static_cast<int>(end - begin)),
          stride(static_cast<int>(round_up(C, 16)) + 16), memory(m) {}

    // `count` rows from token t on: where they lie, or copies of them; where tokens lie side by side a square is read at a time.
    void rows(const float** row, const Tensor& of, int64_t t, int count, bool copied) const {
        float* copy = in_place(of) && !copied ? nullptr : memory.take(static_cast<int64_t>(count) * stride);
        int done = 0;
        for (; of.time == 1 && of.channel != 1 && done + L <= count; done += L) squares(copy + done * stride, of, t + done);
        for (int i = 0; i < count; i++) {
            const int64_t at = of.offset(b, t + i, 0, 1) + from * of.channel;
            row[i] = copy ? copy + i * stride : reinterpret_cast<const float*>(of.data) + at;
            if (copy && i >= done) load_row(copy + i * stride, of, at, C, C, 1.0f);
        }
    }
    void squares(float* out, const Tensor& of, int64_t t) const {
        const int64_t at = of.offset(b, t, 0, 1) + from * of.channel;
        const Type type = static_cast<Type>(of.type);
        float square[L * L];
        int i = 0;
        for (; i + L <= C; i += L) {
            for (int j = 0; j < L; j++) {
                const int64_t line = at + (i + j) * of.channel;
                store(square + j * L, type == F32 ? load(reinterpret_cast<const float*>(of.data) + line)
                                                  : load16(reinterpret_cast<const uint16_t*>(of.data) + line, type));
            }
            transpose(out + i, stride, square, L, L, L);
        }
        for (; i < C; i++)
            for (int j = 0; j < L; j++) out[j * stride + i] = load_one(of.data, at + i * of.channel + j, type);
    }
    void put(const Tensor& to, int64_t t, const float* row) const {
        store_row(to, to.offset(b, t, 0, 1) + from * to.channel, row, C, 1.0f, false);
    }

    // The rows of x that `count` tokens from the first on see.
    void enter(int count, bool copied) {
        const int before = static_cast<int>(std::max<int64_t>(0, W - 1 - first));
        if (before && c.before) {
            rows(x, c.before, W - 1 - before, before, copied);
        } else if (before) {
            const float* zeros = static_cast<const float*>(std::memset(memory.take(C), 0, sizeof(float) * C));
            std::fill(x, x + before, zeros);
        }
        rows(x + before, c.x, first - W + 1 + before, count + W - 1 - before, copied);
    }

    INLINE vec weight(int j, int i, int n) const { return some(c.weight + j * c.channels + from + i, n); }

    void convolve(float* z, const float* const* seen) const {
        vectors(0, C, [&](int i, int n) {
            vec sum = c.bias ? some(c.bias + from + i, n) : vec{};
#pragma GCC unroll 8
            for (int j = 0; j < W; j++) sum += weight(j, i, n) * some(seen[j] + i, n);
            put_some(z + i, sum, n);
        });
    }

    static float inverse_norm(const float* s, int begin, int end) {
        vec squares = {};
        vectors(begin, end, [&](int i, int n) { squares += some(s + i, n) * some(s + i, n); });
        return 1.0f / std::sqrt(total(squares) + EPSILON);
    }

    // y from z, in its place
    void finish(float* z) const {
        if (part.silu) vectors(0, C, [&](int i, int n) { put_some(z + i, some(z + i, n) * sigmoid(some(z + i, n)), n); });
        const int group = static_cast<int>(part.group);
        for (int g = 0; group && g < C; g += group) {
            const float by = inverse_norm(z, g, g + group);
            vectors(g, g + group, [&](int i, int n) { put_some(z + i, some(z + i, n) * by, n); });
        }
    }

    // dz from z and dy, in the place of z; `slope` has room for that of the silu
    void turn(float* z, const float* dy, float* slope) const {
        if (part.silu)
            vectors(0, C, [&](int i, int n) {
                const vec gate = sigmoid(some(z + i, n)), s = some(z + i, n) * gate;
                put_some(slope + i, gate + s * (1.0f - gate), n);
                put_some(z + i, s, n);
            });
        const int group = part.group ? static_cast<int>(part.group) : C;
        for (int g = 0; g < C; g += group) {
            float by = 1, along = 0;
            if (part.group) {
                vec inner = {};
                vectors(g, g + group, [&](int i, int n) { inner += some(z + i, n) * some(dy + i, n); });
                by = inverse_norm(z, g, g + group), along = total(inner) * by * by;
            }
            vectors(g, g + group, [&](int i, int n) {
                const vec ds = (some(dy + i, n) - some(z + i, n) * along) * by;
                put_some(z + i, part.silu ? ds * some(slope + i, n) : ds, n);
            });
        }
    }

    void forward(int count) {
        enter(count, false);
        float* copy = memory.take(C);
        for (int i = 0; i < count; i++) {
            const int64_t at = c.y.offset(b, first + i, 0, 1) + from;
            float* z = in_place(c.y) ? reinterpret_cast<float*>(c.y.data) + at : copy;
            convolve(z, x + i);
            finish(z);
            if (z == copy) put(c.y, first + i, z);
        }
    }

    // dx_t needs dz up to t + W - 1: those beyond the run are formed here too, and count for the weights of their own run.
    void backward(int count, float* sums) {
        const int known = static_cast<int>(std::min<int64_t>(count + W - 1, c.T - first));
        const float* dy[MOST];
        enter(known, true);  // `columns` reads a few channels of all tokens: where they lie, each would be on a page of its own
        rows(dy, c.dy, first, known, false);
        float *dz = memory.take(static_cast<int64_t>(MOST) * stride), *slope = memory.take(C);
        for (int i = 0; i < known; i++) {
            convolve(dz + i * stride, x + i);
            turn(dz + i * stride, dy[i], slope);
        }
        std::memset(dz + known * stride, 0, sizeof(float) * (MOST - known) * stride);
        if (first == 0 && c.dbefore) before(dz, slope);
        vectors(0, C, [&](int i, int n) { columns(dz, count, sums, i, n); });
        for (int i = 0; i < count; i++) put(c.dx, first + i, dz + i * stride);
    }

    // The gradient of the rows before the sequence.
    void before(const float* dz, float* row) const {
        for (int t = 1 - W; t < 0; t++) {
            vectors(0, C, [&](int i, int n) {
                vec sum = {};
                for (int j = 0; j < W && t + W - 1 - j >= 0; j++) sum += weight(j, i, n) * some(dz + (t + W - 1 - j) * stride + i, n);
                put_some(row + i, sum, n);
            });
            put(c.dbefore, t + W - 1, row);
        }
    }

    // The sums for the weights, and dx, in the place of dz.
    INLINE void columns(float* dz, int count, float* sums, int i, int n) const {
        vec by[W], sum[W + 1] = {};
#pragma GCC unroll 8
        for (int j = 0; j < W; j++) by[j] = weight(j, i, n);
        for (int t = 0; t < count; t++) {
            const vec d = some(dz + t * stride + i, n);
            vec dx = by[W - 1] * d;
            sum[W] += d;
#pragma GCC unroll 8
            for (int j = 0; j < W; j++) sum[j] += d * some(x[t + j] + i, n);
#pragma GCC unroll 8
            for (int j = 0; j < W - 1; j++) dx += by[j] * some(dz + (t + W - 1 - j) * stride + i, n);
            put_some(dz + t * stride + i, dx, n);
        }
#pragma GCC unroll 9
        for (int j = 0; j <= W; j++) put_some(sums + j * c.channels + from + i, sum[j], n);
    }
};

// One task: a run of tokens, block by block; groups are not torn apart.
template <int W>
static void run(const Convolution& c, int64_t task, bool backward) {
    int64_t widest = 0;
    auto step = [](const Part& part) { return part.group ? std::max<int64_t>(part.group, BLOCK / part.group * part.group) : BLOCK; };
    for (int64_t n = 0; n < c.parts; n++) widest = std::max(widest, step(c.part[n]));
    const int64_t runs = (c.T + RUN - 1) / RUN, b = task / runs, first = task % runs * RUN;
    const int count = static_cast<int>(std::min<int64_t>(RUN, c.T - first));
    float* numbers = scratch(Block<W>::size(std::min(widest, c.channels)));
    for (int64_t n = 0, from = 0; n < c.parts; n++)
        for (int64_t end; from < c.part[n].end; from = end) {
            end = std::min(from + step(c.part[n]), c.part[n].end);
            Scratch memory{numbers};
            Block<W> block(c, c.part[n], b, first, from, end, memory);
            if (backward) block.backward(count, c.sums + task * (W + 1) * c.channels);
            else block.forward(count);
        }
}

template <bool BACKWARD>
static void each_run(Convolution* c) {
    parallel(
        c->B * ((c->T + RUN - 1) / RUN), c->threads,
        [](void* context, int64_t task) {
            const Convolution& c = *static_cast<Convolution*>(context);
            constexpr void (*of_width[])(const Convolution&, int64_t, bool) = {run<2>, run<3>, run<4>, run<5>, run<6>, run<7>, run<MOST_WIDTH>};
            of_width[c.width - 2](c, task, BACKWARD);
        },
        c);
}

}  // namespace fw

extern "C" __attribute__((visibility("default"))) void fastweights_convolve(fw::Convolution* c) { fw::each_run<false>(c); }

extern "C" __attribute__((visibility("default"))) void fastweights_convolve_backward(fw::Convolution* c) { fw::each_run<true>(c); }

extern "C" __attribute__((visibility("default"))) int64_t fastweights_convolution_run() { return fw::RUN; }
