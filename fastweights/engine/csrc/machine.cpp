// The machine that runs any rule: one token after the other, the rule's body as a list of loops (engine/machine.py).
//
//   for every token t:      S_t = f(S_{t-1}, signals_t),  y_t = g(S_{t-1}, signals_t)          by the forward loops
//   backward, from the last: (dS_{t-1}, dsignals_t) += the transposed derivative of (f, g) at t, applied to (dS_t, dy_t), by the backward loops
//
// A number of the body is a vector here: of as many (batch, head) pairs as a vector has lanes, which do not mix. So every loop is at full
// width whatever its shape, and what a pair computes does not depend on its neighbours. Every run of pairs is a task for a thread.
// Forward keeps the states of every `segment`-th token; backward runs a segment again, keeps all of its numbers, and goes back through it.
#include <algorithm>
#include <cmath>

#include "problem.h"

namespace fw {
namespace machine {

enum Op : int32_t {
    COPY, NEG, PLUS, MINUS, TIMES, OVER, ADD_PRODUCT, SUB_PRODUCT, MAXIMUM, MINIMUM, GREATER, EQUAL, GREATER_EQUAL, SELECT,
    EXP, LOG, SQRT, TANH, SIGMOID, SOFTPLUS, RELU, ABS, SIGN, SIN, COS, ERF, EXPM1, LOG1P, FLOOR, POW,
    TANH_SLOPE, SIGMOID_SLOPE, OVER_OR_ZERO, NEGATIVE_PRODUCT, ZERO, OPS
};
enum Mode : int32_t { SET, ADD, TOP };

struct Operand {
    int64_t buffer, offset, stride[3];
};

struct Loop {
    int64_t op, mode, reduced, size[3];
    Operand operand[4];
};

// A signal, a slow weight, a state, or the gradient of one: `size` numbers at `offset` of a buffer. Strides are in numbers; those of a
// slow weight or a state along time are 0. `heads` divides the number of heads.
struct Port {
    void* data;
    int64_t batch, time, head, heads, size, offset;
};

struct Program {
    int64_t B, T, H, lanes, wide, threads, segment;  // wide: numbers of 64 bits
    int64_t sizes[9];                                // of the buffers
    int64_t forwards, backwards, signals, fixed, states, constants;
    const Loop *forward, *backward;
    const Port *signal, *slow, *first, *last;
    const double* constant;  // behind the slow weights
    Port y;
    const uint8_t* reset;
    int64_t reset_batch, reset_time;
    void* checkpoints;  // [task][segment][state][lane]; missing if nothing is to be kept
    const Port *dsignal, *dslow, *dfirst, *dlast;  // dslow has no head or batch in common with others
    Port dy;
};

template <class S, int W>
struct Vector {
    typedef S type __attribute__((vector_size(sizeof(S) * W)));
};

// ---- functions of one number -------------------------------------------------------------------------------------------

template <class V, class S, int W, class F>
INLINE V each(V x, F f) {
    for (int i = 0; i < W; i++) x[i] = f(x[i]);
    return x;
}

template <class S, int W>
struct Functions {
    typedef typename Vector<S, W>::type V;

    static INLINE V exponential_of(V x) {
        if constexpr (sizeof(S) == 8 || W < L) {
            if constexpr (sizeof(S) == 8) return each<V, S, W>(x, [](S a) { return std::exp(a); });
            vec wide{};
            for (int i = 0; i < W; i++) wide[i] = x[i];
            wide = exponential(wide);
            for (int i = 0; i < W; i++) x[i] = wide[i];
            return x;
        } else {
            V out;
            for (int i = 0; i < W; i += L) {
                vec part;
                std::memcpy(&part, reinterpret_cast<const char*>(&x) + i * sizeof(S), sizeof part);
                part = exponential(part);
                std::memcpy(reinterpret_cast<char*>(&out) + i * sizeof(S), &part, sizeof part);
            }
            return out;
        }
    }
    static INLINE V sigmoid(V x) { return 1 / (1 + exponential_of(-x)); }
    static INLINE V absolute(V x) { return x < 0 ? -x : x; }
    static INLINE V tangent(V x) {
        if constexpr (sizeof(S) == 8) return each<V, S, W>(x, [](S a) { return std::tanh(a); });
        V z = x * x;  // Cephes' polynomial where the formula below cancels
        V small = ((((z * S(-5.70498872745e-3) + S(2.06390887954e-2)) * z - S(5.37397155531e-2)) * z + S(1.33314422036e-1)) * z
                   - S(3.33332819422e-1)) * z * x + x;
        V size = absolute(x), large = 1 - 2 / (exponential_of(2 * size) + 1);
        return size < S(0.625) ? small : (x < 0 ? -large : x != x ? x : large);
    }

    // One number of a loop; a, b and c are read only where the function needs them.
    template <int OP>
    static INLINE V apply(V a, V b, V c) {
        V zero{}, one = zero + 1;
        if constexpr (OP == COPY) return a;
        if constexpr (OP == NEG) return -a;
        if constexpr (OP == PLUS) return a + b;
        if constexpr (OP == MINUS) return a - b;
        if constexpr (OP == TIMES) return a * b;
        if constexpr (OP == OVER) return a / b;
        if constexpr (OP == ADD_PRODUCT) return a + b * c;
        if constexpr (OP == SUB_PRODUCT) return a - b * c;
        if constexpr (OP == NEGATIVE_PRODUCT) return -(a * b);
        if constexpr (OP == MAXIMUM) return a != a ? a : b != b ? b : (a > b ? a : b);
        if constexpr (OP == MINIMUM) return a != a ? a : b != b ? b : (a < b ? a : b);
        if constexpr (OP == GREATER) return a > b ? one : zero;
        if constexpr (OP == EQUAL) return a == b ? one : zero;
        if constexpr (OP == GREATER_EQUAL) return a >= b ? one : zero;
        if constexpr (OP == SELECT) return a != zero ? b : c;
        if constexpr (OP == EXP) return exponential_of(a);
        if constexpr (OP == SIGMOID) return sigmoid(a);
        if constexpr (OP == TANH) return tangent(a);
        if constexpr (OP == RELU) return a > zero ? a : (a != a ? a : zero);
        if constexpr (OP == ABS) return absolute(a);
        if constexpr (OP == SIGN) return a > zero ? one : (a < zero ? -one : zero);
        if constexpr (OP == TANH_SLOPE) return a * (1 - b * b);
        if constexpr (OP == SIGMOID_SLOPE) return a * (b * (1 - b));
        if constexpr (OP == OVER_OR_ZERO) return b != zero ? a / b : zero;
        if constexpr (OP == ZERO) return zero;
        if constexpr (OP == SQRT) return each<V, S, W>(a, [](S x) { return std::sqrt(x); });
        if constexpr (OP == LOG) return each<V, S, W>(a, [](S x) { return std::log(x); });
        if constexpr (OP == SIN) return each<V, S, W>(a, [](S x) { return std::sin(x); });
        if constexpr (OP == COS) return each<V, S, W>(a, [](S x) { return std::cos(x); });
        if constexpr (OP == ERF) return each<V, S, W>(a, [](S x) { return std::erf(x); });
        if constexpr (OP == EXPM1) return each<V, S, W>(a, [](S x) { return std::expm1(x); });
        if constexpr (OP == LOG1P) return each<V, S, W>(a, [](S x) { return std::log1p(x); });
        if constexpr (OP == FLOOR) return each<V, S, W>(a, [](S x) { return std::floor(x); });
        if constexpr (OP == SOFTPLUS)
            return each<V, S, W>(a, [](S x) { return (x > 0 ? x : S(0)) + std::log1p(std::exp(x > 0 ? -x : x)); });
        if constexpr (OP == POW) {
            for (int i = 0; i < W; i++) a[i] = std::pow(a[i], b[i]);
            return a;
        }
    }
};

constexpr int inputs(int op) {
    switch (op) {
        case ZERO: return 0;
        case ADD_PRODUCT: case SUB_PRODUCT: case SELECT: return 3;
        case PLUS: case MINUS: case TIMES: case OVER: case MAXIMUM: case MINIMUM: case GREATER: case EQUAL: case GREATER_EQUAL: case POW:
        case TANH_SLOPE: case SIGMOID_SLOPE: case OVER_OR_ZERO: case NEGATIVE_PRODUCT: return 2;
        default: return 1;
    }
}

// ---- loops ---------------------------------------------------------------------------------------------------------------

template <class S, int W>
struct Runner {
    typedef typename Vector<S, W>::type V;
    typedef void (*Entry)(const Loop&, V* const*);

    template <int OP>
    static INLINE V one(const V* a, const V* b, const V* c) {
        constexpr int n = inputs(OP);
        V none{};
        return Functions<S, W>::template apply<OP>(n > 0 ? *a : none, n > 1 ? *b : none, n > 2 ? *c : none);
    }

    // No axis along which out stands still.
    template <int OP, int MODE>
    static void plain(const Loop& l, V* const* buffers) {
        const Operand *o = l.operand, *a = o + 1, *b = o + 2, *c = o + 3;
        V* out0 = buffers[o->buffer] + o->offset;
        const V *a0 = buffers[a->buffer] + a->offset, *b0 = buffers[b->buffer] + b->offset, *c0 = buffers[c->buffer] + c->offset;
        for (int64_t i = 0; i < l.size[0]; i++)
            for (int64_t j = 0; j < l.size[1]; j++) {
                V* out = out0 + i * o->stride[0] + j * o->stride[1];
                const V* x = a0 + i * a->stride[0] + j * a->stride[1];
                const V* y = b0 + i * b->stride[0] + j * b->stride[1];
                const V* z = c0 + i * c->stride[0] + j * c->stride[1];
                const int64_t os = o->stride[2], as = a->stride[2], bs = b->stride[2], cs = c->stride[2], n = l.size[2];
                for (int64_t k = 0; k < n; k++) {
                    V made = one<OP>(x + k * as, y + k * bs, z + k * cs);
                    if constexpr (MODE == SET) out[k * os] = made;
                    else out[k * os] += made;
                }
            }
    }

    // The innermost axes are summed over (or their largest is kept); TILE neighbours of the axis around them share a pass.
    template <int OP, int MODE>
    static void summed(const Loop& l, V* const* buffers) {
        constexpr int TILE = 8;
        const Operand *o = l.operand, *a = o + 1, *b = o + 2, *c = o + 3;
        const int64_t free = 3 - l.reduced, rows = free >= 1 ? l.size[free - 1] : 1, outer = free >= 2 ? l.size[0] : 1;
        const int row = static_cast<int>(free - 1);
        const int64_t mid = l.reduced >= 2 ? l.size[3 - std::min<int64_t>(l.reduced, 2)] : 1, deep = l.reduced == 3 ? l.size[0] : 1;
        for (int64_t i = 0; i < outer; i++)
            for (int64_t r = 0; r < rows; r += TILE) {
                const int64_t n = std::min<int64_t>(TILE, rows - r);
                auto at = [&](const Operand* p) {
                    return buffers[p->buffer] + p->offset + (free >= 2 ? i * p->stride[0] : 0) + (free >= 1 ? r * p->stride[row] : 0);
                };
                V* out = at(o);
                const V *x = at(a), *y = at(b), *z = at(c);
                const int64_t ar = free >= 1 ? a->stride[row] : 0, br = free >= 1 ? b->stride[row] : 0, cr = free >= 1 ? c->stride[row] : 0;
                const int64_t orow = free >= 1 ? o->stride[row] : 0;
                V acc[TILE];
                for (int64_t u = 0; u < n; u++) acc[u] = MODE == TOP ? V{} - S(INFINITY) : V{};
                for (int64_t d = 0; d < deep; d++)
                    for (int64_t m = 0; m < mid; m++) {
                        const int64_t am = d * a->stride[0] + m * a->stride[1], bm = d * b->stride[0] + m * b->stride[1],
                                      cm = d * c->stride[0] + m * c->stride[1];
                        const bool two = l.reduced >= 2;
                        const V *p = x + (two ? am : 0), *q = y + (two ? bm : 0), *w = z + (two ? cm : 0);
                        if (n == TILE)
                            for (int64_t k = 0; k < l.size[2]; k++)
#pragma GCC unroll 8
                                for (int u = 0; u < TILE; u++) take<OP, MODE>(acc[u], p + k * a->stride[2] + u * ar, q + k * b->stride[2] + u * br, w + k * c->stride[2] + u * cr);
                        else
                            for (int64_t k = 0; k < l.size[2]; k++)
                                for (int u = 0; u < n; u++) take<OP, MODE>(acc[u], p + k * a->stride[2] + u * ar, q + k * b->stride[2] + u * br, w + k * c->stride[2] + u * cr);
                    }
                for (int64_t u = 0; u < n; u++) {
                    if constexpr (MODE == ADD) out[u * orow] += acc[u];
                    else out[u * orow] = acc[u];
                }
            }
    }
    template <int OP, int MODE>
    static INLINE void take(V& acc, const V* a, const V* b, const V* c) {
        V x = one<OP>(a, b, c);
        if constexpr (MODE == TOP) acc = x != x ? x : acc != acc ? acc : (x > acc ? x : acc);
        else acc += x;
    }

    // Only gradients are added up, and only copies and products summed over (engine/machine.py keeps to that): few loops to compile.
    template <int... OP>
    static INLINE Entry set(int64_t op, std::integer_sequence<int, OP...>) {
        static const Entry known[] = {plain<OP, SET>...};
        return known[op];
    }
    static Entry find(int64_t op, int64_t mode, bool reduced) {
        if (mode == TOP) return summed<COPY, TOP>;
        if (reduced) {
            if (op == TIMES) return mode == SET ? summed<TIMES, SET> : summed<TIMES, ADD>;
            if (op == NEGATIVE_PRODUCT) return mode == SET ? summed<NEGATIVE_PRODUCT, SET> : summed<NEGATIVE_PRODUCT, ADD>;
            return mode == SET ? summed<COPY, SET> : summed<COPY, ADD>;
        }
        if (mode == SET) return set(op, std::make_integer_sequence<int, OPS>{});
        switch (op) {
            case NEG: return plain<NEG, ADD>;
            case TIMES: return plain<TIMES, ADD>;
            case OVER: return plain<OVER, ADD>;
            case SELECT: return plain<SELECT, ADD>;
            case TANH_SLOPE: return plain<TANH_SLOPE, ADD>;
            case SIGMOID_SLOPE: return plain<SIGMOID_SLOPE, ADD>;
            case NEGATIVE_PRODUCT: return plain<NEGATIVE_PRODUCT, ADD>;
            default: return plain<COPY, ADD>;
        }
    }
    static void run(const Loop* loops, int64_t n, V* const* buffers) {
        for (int64_t i = 0; i < n; i++) {
            const Loop& l = loops[i];
            find(l.op, l.mode, l.reduced > 0)(l, buffers);
        }
    }
};

// ---- a run of pairs of batch and head ------------------------------------------------------------------------------------

template <class S, int W>
struct Task {
    typedef typename Vector<S, W>::type V;
    const Program& p;
    const int64_t task, pair, n;  // pairs from `pair`, n of them
    const int64_t state, work, fixed;

    Task(const Program& program, int64_t i)
        : p(program), task(i), pair(i * W), n(std::min<int64_t>(W, program.B * program.H - i * W)), state(program.sizes[0]),
          work(program.sizes[1]), fixed(program.sizes[3]) {}

    S* place(const Port& port, int64_t lane, int64_t t) const {
        const int64_t b = (pair + lane) / p.H, h = (pair + lane) % p.H;
        return static_cast<S*>(port.data) + b * port.batch + t * port.time + h / (p.H / port.heads) * port.head;
    }
    void in(const Port& port, V* to, int64_t t) const {
        for (int64_t lane = 0; lane < W; lane++) {
            const S* from = port.data && lane < n ? place(port, lane, t) : nullptr;
            S* out = reinterpret_cast<S*>(to + port.offset) + lane;
            for (int64_t i = 0; i < port.size; i++) out[i * W] = from ? from[i] : S(0);
        }
    }
    void out(const Port& port, const V* from, int64_t t) const {
        if (!port.data) return;
        for (int64_t lane = 0; lane < n; lane++) {
            S* to = place(port, lane, t);
            const S* x = reinterpret_cast<const S*>(from + port.offset) + lane;
            for (int64_t i = 0; i < port.size; i++) to[i] = x[i * W];
        }
    }
    // Where a sequence begins, what came before counts for nothing; also on the way back.
    void forget(V* states, int64_t t) const {
        if (!p.reset) return;
        for (int64_t lane = 0; lane < n; lane++)
            if (p.reset[(pair + lane) / p.H * p.reset_batch + t * p.reset_time])
                for (int64_t i = 0; i < state; i++) states[i][lane] = 0;
    }
    void set_fixed(V* to) const {
        for (int64_t i = 0; i < p.fixed; i++) in(p.slow[i], to, 0);
        for (int64_t i = 0; i < p.constants; i++) to[fixed - p.constants + i] = V{} + static_cast<S>(p.constant[i]);
    }
    void token(V* before, V* numbers, V* after, V* same, int64_t t) const {
        forget(before, t);
        for (int64_t i = 0; i < p.signals; i++) in(p.signal[i], numbers, t);
        V* buffers[9] = {before, numbers, after, same};
        Runner<S, W>::run(p.forward, p.forwards, buffers);
    }
    V* checkpoint(int64_t segment) const {
        const int64_t segments = (p.T + p.segment - 1) / p.segment;
        return static_cast<V*>(p.checkpoints) + (task * segments + segment) * state;
    }

    static int64_t forward_size(const Program& p) { return p.sizes[1] + p.sizes[3] + 2 * p.sizes[0] + 4; }
    void forward(V* memory) const {
        V *same = memory, *numbers = same + fixed, *before = numbers + work, *after = before + state;
        set_fixed(same);
        for (int64_t i = 0; i < p.states; i++) in(p.first[i], before, 0);
        for (int64_t t = 0; t < p.T; t++) {
            if (p.checkpoints && t % p.segment == 0) std::memcpy(checkpoint(t / p.segment), before, sizeof(V) * state);
            token(before, numbers, after, same, t);
            out(p.y, numbers, t);
            std::swap(before, after);
        }
        for (int64_t i = 0; i < p.states; i++) out(p.last[i], before, 0);
    }

    static int64_t backward_size(const Program& p) {
        return p.segment * p.sizes[1] + (2 * p.segment + 1) * p.sizes[0] + 2 * p.sizes[3] + p.sizes[1] + 2 * p.sizes[0] + p.sizes[8] + 4;
    }
    void backward(V* memory) const {
        V *same = memory, *dsame = same + fixed, *states = dsame + fixed, *numbers = states + (2 * p.segment + 1) * state;
        V *dnumbers = numbers + p.segment * work, *dbefore = dnumbers + work, *dafter = dbefore + state, *scratch_numbers = dafter + state;
        set_fixed(same);
        std::memset(dsame, 0, sizeof(V) * fixed);
        for (int64_t i = 0; i < p.states; i++) in(p.dlast[i], dafter, 0);
        for (int64_t segment = (p.T + p.segment - 1) / p.segment - 1; segment >= 0; segment--) {
            const int64_t first = segment * p.segment, last = std::min(first + p.segment, p.T);
            // what a token begins with is what the last one ended with, but where it is forgotten, and both are needed
            const int64_t step = p.reset ? 2 * state : state;
            std::memcpy(states, checkpoint(segment), sizeof(V) * state);
            for (int64_t t = first; t < last; t++) {
                V* before = states + (t - first) * step;
                if (p.reset && t > first) std::memcpy(before, before - state, sizeof(V) * state);
                token(before, numbers + (t - first) * work, before + state, same, t);
            }
            for (int64_t t = last - 1; t >= first; t--) {
                const int64_t i = t - first;
                in(p.dy, dnumbers, t);
                V* buffers[9] = {states + i * step, numbers + i * work, states + i * step + state, same, dbefore, dnumbers, dafter, dsame, scratch_numbers};
                Runner<S, W>::run(p.backward, p.backwards, buffers);
                for (int64_t j = 0; j < p.signals; j++) out(p.dsignal[j], dnumbers, t);
                forget(dbefore, t);
                std::swap(dbefore, dafter);
            }
        }
        for (int64_t i = 0; i < p.states; i++) out(p.dfirst[i], dafter, 0);
        for (int64_t i = 0; i < p.fixed; i++) out(p.dslow[i], dsame, 0);
    }

    static void run_forward(void* program, int64_t i) {
        const Program& p = *static_cast<const Program*>(program);
        Task(p, i).forward(reinterpret_cast<V*>(scratch(forward_size(p) * sizeof(V) / 4)));
    }
    static void run_backward(void* program, int64_t i) {
        const Program& p = *static_cast<const Program*>(program);
        Task(p, i).backward(reinterpret_cast<V*>(scratch(backward_size(p) * sizeof(V) / 4)));
    }
};

template <class S, int W>
void start(Program* p, bool back) {
    const int64_t tasks = (p->B * p->H + W - 1) / W;
    parallel(tasks, p->threads, back ? Task<S, W>::run_backward : Task<S, W>::run_forward, p, false);
}

template <class S>
void start(Program* p, bool back) {
    if (p->lanes == 16) start<S, 16>(p, back);
    else start<S, 4>(p, back);
}

}  // namespace machine
}  // namespace fw

extern "C" __attribute__((visibility("default"))) void fastweights_machine(fw::machine::Program* p, int64_t back) {
    if (p->wide) fw::machine::start<double>(p, back);
    else fw::machine::start<float>(p, back);
}
extern "C" __attribute__((visibility("default"))) int64_t fastweights_machine_ops() { return fw::machine::OPS; }
