// What follows a read-out, or stands between two projections, a row of channels at a time: a share of the values, a norm, a weight, a gate.
//
//   y = read + skip x, with a number skip a head               only where there is such a share
//   u = y a, if the gate comes first, else y                   a = sigma(gate), or gate sigma(gate)
//   n = (u - mean(u)) / sqrt(mean((u - mean(u))^2) + eps)      over groups of channels; the mean is left in unless centred; or n = u
//   out = weight n, if the gate comes first, else weight n a   the weights times a number for all; without a gate a = 1
//
// Backward, with dn = weight dout (times a, if the gate comes last):  du = (dn - mean(dn) - n mean(n dn)) / sqrt(...), or dn;
// dweight = sum over rows of n dout (a);  da = y du, or weight n dout;  dy = a du, or du;  dx = skip dy,  dskip = sum of x dy. Nothing is
// saved: n is formed again. Runs of rows are tasks of their own, each with its own sums for the weight, which are added up in order.
#include <algorithm>

#include "rows.h"

namespace fw {

constexpr int ROWS = 64;  // a task

enum Activation : int64_t { NO_GATE = 0, SIGMOID = 1, SWISH = 2 };

struct GatedNorm {
    int64_t B, T, channels, size;  // size: of a group that is normalised, or 0
    int64_t weights, skips;        // how many there are: weights repeat, skips are each for as many channels; 0 if there are none
    Activation activation;
    int64_t gate_first, centred, threads;
    double epsilon, scale;
    const float *weight, *skip;
    float* sums;             // backward pass: [task][weights, then skips]
    Tensor y, gate, x, out;  // (B, T, 1, channels) with heads = 1
    Tensor dy, dgate, dx;    // backward pass: out holds the gradient of out
};

// Room for a row of each tensor, where it cannot be read or written in place, and of what is made of them.
struct Line {
    const GatedNorm& c;
    const int C, group;
    float *y, *gate, *x, *out, *u, *sigma, *dn, *dy, *dgate, *dx;

    static int64_t size(const GatedNorm& c) { return 10 * round_up(c.channels, 16) + 64; }

    Line(const GatedNorm& norm, Scratch& memory)
        : c(norm), C(static_cast<int>(norm.channels)), group(norm.size ? static_cast<int>(norm.size) : C) {
        for (float** p : {&y, &gate, &x, &out, &u, &sigma, &dn, &dy, &dgate, &dx}) *p = memory.take(C);
    }

    // the row where it lies, or a copy of it
    const float* from(const Tensor& t, int64_t b, int64_t r, float* copy) const {
        const int64_t of = t.offset(b, r, 0, 1);
        if (in_place(t)) return reinterpret_cast<const float*>(t.data) + of;
        load_row(copy, t, of, C, C, 1.0f);
        return copy;
    }
    static float* to(const Tensor& t, int64_t b, int64_t r, float* copy) {
        return in_place(t) ? reinterpret_cast<float*>(t.data) + t.offset(b, r, 0, 1) : copy;
    }
    void put(const Tensor& t, int64_t b, int64_t r, const float* row) const {
        if (!in_place(t)) store_row(t, t.offset(b, r, 0, 1), row, C, 1.0f, false);
    }

    INLINE vec act(vec z, vec s) const { return c.activation == SWISH ? z * s : s; }
    INLINE vec slope(vec z, vec s) const { return c.activation == SWISH ? s * (1.0f + z * (1.0f - s)) : s * (1.0f - s); }
    INLINE vec weight(int i, int n, int first) const {
        const vec scale = broadcast(static_cast<float>(c.scale));
        return c.weight ? some(c.weight + first % c.weights + i - first, n) * scale : scale;
    }

    // What is taken away from u, and what it is multiplied by.
    void moments(const float* z, int first, int end, float& mean, float& by) const {
        mean = 0, by = 1;
        if (!c.size) return;
        vec sum = {}, squares = {};
        if (c.centred) {
            vectors(first, end, [&](int i, int n) { sum += some(z + i, n); });
            mean = total(sum) / group;
        }
        const ivec lanes = lane_numbers(std::make_integer_sequence<int, L>{});
        vectors(first, end, [&](int i, int n) {
            const vec x = n == L ? load(z + i) - mean : select(lanes < n, some(z + i, n) - mean, vec{});
            squares += x * x;
        });
        by = 1.0f / std::sqrt(total(squares) / group + static_cast<float>(c.epsilon));
    }

    // y with its share of x, and the row of x
    const float* given(int64_t b, int64_t r, const float*& x_row) const {
        const float* y_row = from(c.y, b, r, y);
        if (!c.skips) return y_row;
        x_row = from(c.x, b, r, x);
        const int head = C / static_cast<int>(c.skips);
        for (int h = 0; h < static_cast<int>(c.skips); h++)
            vectors(h * head, (h + 1) * head, [&](int i, int n) { put_some(y + i, some(y_row + i, n) + c.skip[h] * some(x_row + i, n), n); });
        return y;
    }

    void forward(int64_t b, int64_t r) const {
        const float *x_row = nullptr, *y_row = given(b, r, x_row), *gate_row = c.activation ? from(c.gate, b, r, gate) : nullptr;
        float* to_row = to(c.out, b, r, out);
        for (int first = 0; first < C; first += group) {
            const int end = first + group;
            const float* z = y_row;
            if (c.gate_first) {
                vectors(first, end, [&](int i, int n) {
                    const vec g = some(gate_row + i, n);
                    put_some(u + i, some(y_row + i, n) * act(g, fw::sigmoid(g)), n);
                });
                z = u;
            }
            float mean, by;
            moments(z, first, end, mean, by);
            vectors(first, end, [&](int i, int n) {
                vec x = (some(z + i, n) - mean) * by * weight(i, n, first);
                if (c.activation && !c.gate_first) {
                    const vec g = some(gate_row + i, n);
                    x *= act(g, fw::sigmoid(g));
                }
                put_some(to_row + i, x, n);
            });
        }
        put(c.out, b, r, to_row);
    }

    void backward(int64_t b, int64_t r, float* sums) const {
        const float *x_row = nullptr, *y_row = given(b, r, x_row), *gate_row = c.activation ? from(c.gate, b, r, gate) : nullptr;
        const float* dout = from(c.out, b, r, out);
        float *dy_row = to(c.dy, b, r, dy), *dgate_row = c.activation ? to(c.dgate, b, r, dgate) : nullptr;
        for (int first = 0; first < C; first += group) {
            const int end = first + group;
            if (c.activation)
                vectors(first, end, [&](int i, int n) {
                    const vec g = some(gate_row + i, n), s = fw::sigmoid(g);
                    put_some(sigma + i, s, n);
                    if (c.gate_first) put_some(u + i, some(y_row + i, n) * act(g, s), n);
                });
            const float* z = c.gate_first ? u : y_row;
            float mean, by;
            moments(z, first, end, mean, by);
            vec along = {}, whole = {};
            vectors(first, end, [&](int i, int n) {
                const vec normal = (some(z + i, n) - mean) * by, w = weight(i, n, first);
                vec d = some(dout + i, n);
                if (c.activation && !c.gate_first) {
                    const vec g = some(gate_row + i, n), s = some(sigma + i, n);
                    put_some(dgate_row + i, d * w * normal * slope(g, s), n);
                    d *= act(g, s);
                }
                if (c.weight) {
                    float* sum = sums + first % c.weights + i - first;
                    put_some(sum, some(sum, n) + d * normal * static_cast<float>(c.scale), n);
                }
                d *= w;
                put_some(dn + i, d, n);
                along += d * normal, whole += d;
            });
            const float a = c.size ? total(along) / group : 0, m = c.size && c.centred ? total(whole) / group : 0;
            vectors(first, end, [&](int i, int n) {
                vec d = some(dn + i, n);
                if (c.size) d = (d - m - (some(z + i, n) - mean) * by * a) * by;
                if (c.gate_first) {
                    const vec g = some(gate_row + i, n), s = some(sigma + i, n);
                    put_some(dgate_row + i, d * some(y_row + i, n) * slope(g, s), n);
                    d *= act(g, s);
                }
                put_some(dy_row + i, d, n);
            });
        }
        put(c.dy, b, r, dy_row);
        if (c.activation) put(c.dgate, b, r, dgate_row);
        if (c.skips) share(b, r, x_row, dy_row, sums + c.weights);
    }

    void share(int64_t b, int64_t r, const float* x_row, const float* dy_row, float* sums) const {
        float* dx_row = to(c.dx, b, r, dx);
        const int head = C / static_cast<int>(c.skips);
        for (int h = 0; h < static_cast<int>(c.skips); h++) {
            vec sum = {};
            vectors(h * head, (h + 1) * head, [&](int i, int n) {
                const vec d = some(dy_row + i, n);
                sum += d * some(x_row + i, n);
                put_some(dx_row + i, c.skip[h] * d, n);
            });
            sums[h] += total(sum);
        }
        put(c.dx, b, r, dx_row);
    }
};

static void run(GatedNorm* c, bool backward) {
    struct Task {
        const GatedNorm& c;
        bool backward;
    } task{*c, backward};
    parallel(
        (c->B * c->T + ROWS - 1) / ROWS, c->threads,
        [](void* context, int64_t i) {
            const Task& task = *static_cast<Task*>(context);
            const GatedNorm& c = task.c;
            Scratch memory{scratch(Line::size(c))};
            const Line line(c, memory);
            const int64_t numbers = c.weights + c.skips;
            float* sums = task.backward && numbers ? c.sums + i * numbers : nullptr;
            if (sums) std::memset(sums, 0, sizeof(float) * numbers);
            for (int64_t r = i * ROWS; r < std::min((i + 1) * ROWS, c.B * c.T); r++)
                if (task.backward) line.backward(r / c.T, r % c.T, sums);
                else line.forward(r / c.T, r % c.T);
        },
        &task);
}

}  // namespace fw

extern "C" __attribute__((visibility("default"))) void fastweights_gated_norm(fw::GatedNorm* c) { fw::run(c, false); }

extern "C" __attribute__((visibility("default"))) void fastweights_gated_norm_backward(fw::GatedNorm* c) { fw::run(c, true); }

extern "C" __attribute__((visibility("default"))) int64_t fastweights_gated_norm_rows() { return fw::ROWS; }
