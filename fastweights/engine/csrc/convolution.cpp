// The short causal convolution in front of a scan, with what usually follows it, a row of channels at a time:
//
//   z_t = bias + sum over j < width of weight_j x_{t - width + 1 + j}        each channel with its own weights
//   s_t = silu(z_t) = z_t / (1 + exp(-z_t)), or z_t
//   y_t = s_t / sqrt(|s_t|^2 + 1e-6) over a group of channels, or s_t
//
// Backward:  ds = (dy - y (y . dy)) / sqrt(|s|^2 + 1e-6),   dz = ds (sigma + s (1 - sigma)),   dx_t = sum over j of weight_j dz_{t + width - 1 - j},
// dweight_j = sum over t of dz_t x_{t - width + 1 + j}. Nothing is saved: z is formed again from x. Runs of tokens are tasks of their own, each
// with its own sums for the weights, which are added up in order.
#include <algorithm>

#include "rows.h"

namespace fw {

constexpr int MOST_WIDTH = 8, RUN = 64;  // tokens a task
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

struct Rows {
    const Convolution& c;
    const int64_t b;
    const int C;
    float *z, *x;  // a row of z; the last rows of x, in a ring of MOST_WIDTH

    static int64_t size(const Convolution& c) { return (2 * MOST_WIDTH + 6 + c.width) * round_up(c.channels, 16) + 1024; }

    Rows(const Convolution& conv, int64_t batch, Scratch& memory) : c(conv), b(batch), C(static_cast<int>(conv.channels)) {
        z = memory.take(C), x = memory.take(MOST_WIDTH * round_up(C, 16));
    }
    INLINE float* row(int64_t t) const { return x + (t & (MOST_WIDTH - 1)) * round_up(C, 16); }

    // x_t, which may lie before the sequence, into the ring
    void fetch(int64_t t) const {
        const int64_t back = t + c.width - 1;
        if (t >= 0) copy(row(t), c.x, t);
        else if (c.before) copy(row(t), c.before, back);
        else std::memset(row(t), 0, sizeof(float) * C);
    }
    void copy(float* out, const Tensor& from, int64_t t) const {
        const int64_t of = from.offset(b, t, 0, 1);
        const Type type = static_cast<Type>(from.type);
        int i = 0;
        if (from.channel == 1 && type == F32) {
            std::memcpy(out, reinterpret_cast<const float*>(from.data) + of, sizeof(float) * C);
            return;
        }
        if (from.channel == 1)
            for (; i + L <= C; i += L) store(out + i, load16(reinterpret_cast<const uint16_t*>(from.data) + of + i, type));
        for (; i < C; i++) out[i] = load_one(from.data, of + i * from.channel, type);
    }
    void put(const Tensor& to, int64_t t, const float* from) const {
        const int64_t of = to.offset(b, t, 0, 1);
        const Type type = static_cast<Type>(to.type);
        int i = 0;
        for (; to.channel == 1 && i + L <= C; i += L) {
            if (type == F32) store(reinterpret_cast<float*>(to.data) + of + i, load(from + i));
            else store16(reinterpret_cast<uint16_t*>(to.data) + of + i, load(from + i), type);
        }
        for (; i < C; i++) store_one(to.data, of + i * to.channel, from[i], type);
    }

    // z_t from the ring
    void convolve(int64_t t) const {
        const int width = static_cast<int>(c.width);
        const float* rows[MOST_WIDTH];
        for (int j = 0; j < width; j++) rows[j] = row(t - width + 1 + j);
        int i = 0;
        for (; i + L <= C; i += L) {
            vec sum = c.bias ? load(c.bias + i) : vec{};
            for (int j = 0; j < width; j++) sum += load(c.weight + j * C + i) * load(rows[j] + i);
            store(z + i, sum);
        }
        for (; i < C; i++) {
            z[i] = c.bias ? c.bias[i] : 0;
            for (int j = 0; j < width; j++) z[i] += c.weight[j * C + i] * rows[j][i];
        }
    }

    static float inverse_norm(const float* s, int from, int to) {
        vec squares = {};
        vectors(from, to, [&](int i, int n) { squares += some(s + i, n) * some(s + i, n); });
        return 1.0f / std::sqrt(total(squares) + EPSILON);
    }

    // y from z, in its place
    void finish() const {
        int from = 0;
        for (int64_t n = 0; n < c.parts; n++) {
            const Part& part = c.part[n];
            const int end = static_cast<int>(part.end);
            if (part.silu) vectors(from, end, [&](int i, int n) { put_some(z + i, some(z + i, n) * sigmoid(some(z + i, n)), n); });
            for (int g = from; part.group && g < end; g += part.group) {
                const int to = g + static_cast<int>(part.group);
                const float by = inverse_norm(z, g, to);
                vectors(g, to, [&](int i, int n) { put_some(z + i, some(z + i, n) * by, n); });
            }
            from = end;
        }
    }

    // dz from z and dy, in the place of dy
    void turn(float* dy, float* s) const {
        int from = 0;
        for (int64_t n = 0; n < c.parts; n++) {
            const Part& part = c.part[n];
            const int end = static_cast<int>(part.end);
            vectors(from, end, [&](int i, int n) { put_some(s + i, part.silu ? some(z + i, n) * sigmoid(some(z + i, n)) : some(z + i, n), n); });
            for (int g = from; part.group && g < end; g += part.group) {
                const int to = g + static_cast<int>(part.group);
                const float by = inverse_norm(s, g, to);
                vec inner = {};
                vectors(g, to, [&](int i, int n) { inner += some(s + i, n) * some(dy + i, n); });
                const float along = total(inner) * by * by;
                vectors(g, to, [&](int i, int n) { put_some(dy + i, (some(dy + i, n) - some(s + i, n) * along) * by, n); });
            }
            if (part.silu)
                vectors(from, end, [&](int i, int n) {
                    vec gate = sigmoid(some(z + i, n));
                    put_some(dy + i, some(dy + i, n) * (gate + some(s + i, n) * (1.0f - gate)), n);
                });
            from = end;
        }
    }
};

static void convolve_run(const Convolution& c, int64_t b, int64_t first) {
    Scratch memory{scratch(Rows::size(c))};
    Rows rows(c, b, memory);
    for (int64_t t = first - c.width + 1; t < first; t++) rows.fetch(t);
    for (int64_t t = first; t < std::min(first + RUN, c.T); t++) {
        rows.fetch(t);
        rows.convolve(t);
        rows.finish();
        rows.put(c.y, t, rows.z);
    }
}

// dx_t needs dz up to t + width - 1: those beyond the run are formed here too, and count for the weights of their own run.
static void convolve_run_backward(const Convolution& c, int64_t b, int64_t first, float* sums) {
    Scratch memory{scratch(Rows::size(c))};
    Rows rows(c, b, memory);
    const int C = rows.C, width = static_cast<int>(c.width);
    const int64_t stride = round_up(C, 16), end = std::min(first + RUN, c.T);
    float *s = memory.take(C), *dx = memory.take(C), *dz = memory.take(MOST_WIDTH * stride);
    auto dz_row = [&](int64_t t) { return dz + (t & (MOST_WIDTH - 1)) * stride; };
    std::memset(sums, 0, sizeof(float) * (width + 1) * C);
    std::memset(dz, 0, sizeof(float) * MOST_WIDTH * stride);
    for (int64_t t = first - width + 1; t < first; t++) rows.fetch(t);
    for (int64_t t = first; t < end + width - 1; t++) {
        float* d = dz_row(t);
        if (t < c.T) {
            rows.fetch(t);
            rows.convolve(t);
            rows.copy(d, c.dy, t);
            rows.turn(d, s);
        } else {
            std::memset(d, 0, sizeof(float) * C);
        }
        if (t < end)
            vectors(0, C, [&](int i, int n) {
                vec x = some(d + i, n);
                for (int j = 0; j < width; j++) {
                    float* sum = sums + j * C + i;
                    put_some(sum, some(sum, n) + x * some(rows.row(t - width + 1 + j) + i, n), n);
                }
                put_some(sums + width * C + i, some(sums + width * C + i, n) + x, n);
            });
        // the rows before the sequence are written by its first run
        const int64_t to = t - width + 1;
        if (to >= end || (to < first && first > 0)) continue;
        if (to < 0 && !c.dbefore) continue;
        vectors(0, C, [&](int i, int n) {
            vec x = {};
            for (int j = 0; j < width; j++) {
                int64_t from = to + width - 1 - j;
                if (from >= first) x += some(c.weight + j * C + i, n) * some(dz_row(from) + i, n);
            }
            put_some(dx + i, x, n);
        });
        if (to >= 0) rows.put(c.dx, to, dx);
        else rows.put(c.dbefore, to + width - 1, dx);
    }
}

}  // namespace fw

template <class F>
static void each_run(fw::Convolution* c, F) {
    int64_t runs = (c->T + fw::RUN - 1) / fw::RUN;
    fw::parallel(
        c->B * runs, c->threads,
        [](void* context, int64_t i) {
            const fw::Convolution& c = *static_cast<fw::Convolution*>(context);
            int64_t runs = (c.T + fw::RUN - 1) / fw::RUN;
            F()(c, i, i / runs, i % runs * fw::RUN);
        },
        c);
}

struct RunForward {
    void operator()(const fw::Convolution& c, int64_t, int64_t b, int64_t first) { fw::convolve_run(c, b, first); }
};
struct RunBackward {
    void operator()(const fw::Convolution& c, int64_t i, int64_t b, int64_t first) {
        fw::convolve_run_backward(c, b, first, c.sums + i * (c.width + 1) * c.channels);
    }
};

extern "C" __attribute__((visibility("default"))) void fastweights_convolve(fw::Convolution* c) { each_run(c, RunForward()); }

extern "C" __attribute__((visibility("default"))) void fastweights_convolve_backward(fw::Convolution* c) { each_run(c, RunBackward()); }

extern "C" __attribute__((visibility("default"))) int64_t fastweights_convolution_run() { return fw::RUN; }
