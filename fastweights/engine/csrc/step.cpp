// One token: the state is W itself, (values x keys), and every row of it lives on its own:
//
//   w <- a * w;  w <- w + (u + w_before . x) y     for each micro-step;      out = w . q     at the version that a query reads
//
// A block of rows, small enough for the first cache, is taken through all micro-steps and reads on its way to where the new state
// belongs, which may be where it came from. There is nothing to save: a step that needs a gradient is a scan of one token.
#include <type_traits>

#include "chunk.h"

namespace fw {

constexpr int ROWS = L;  // rows a block: their inner products fill a vector

struct StepMicro {
    float *x, *y, *w, *a;       // [Kp], `a` missing if nothing decays
    float cx, cu;
};

struct Step {
    const Problem& p;
    const int64_t b, h;
    const int Kp;
    StepMicro micro[C];
    float* q[C];
    float* block;

    static int64_t size(const Problem& p) { return (4 * C + C + ROWS) * round_up(p.K, L) + 1024; }

    Step(const Problem& problem, int64_t i) : p(problem), b(i / p.H), h(i % p.H), Kp(static_cast<int>(round_up(p.K, L))) {
        Scratch memory{scratch(size(p))};
        for (int m = 0; m < p.n; m++) {
            const Micro& from = p.micro[m];
            micro[m] = {row(memory, from.x_is_y ? from.y : from.x), row(memory, from.y), row(memory, from.w), row(memory, from.g), 1, 1};
            micro[m].cx = number(from.cx, from.sx), micro[m].cu = number(from.cu, from.su);
            if (micro[m].a)
                for (int k = 0; k < Kp; k += L) {
                    vec g = load(micro[m].a + k);
                    ivec positive = g > 0.0f;
                    for (int j = 0; j < L; j++)
                        if (positive[j]) *p.positive = 1;
                    store(micro[m].a + k, exponential(g));
                    if (from.decayed) store(micro[m].x + k, load(micro[m].x + k) * load(micro[m].a + k));
                }
        }
        for (int r = 0; r < p.reads; r++) q[r] = row(memory, p.read[r].q);
        block = memory.take(ROWS * Kp);
    }

    float* row(Scratch& memory, const Tensor& t) const {
        if (!t) return nullptr;
        float* out = memory.take(Kp);
        load_row(out, t, t.offset(b, 0, h, p.H), static_cast<int>(p.K), Kp, 1);
        return out;
    }
    float number(const Tensor& t, double scale) const {
        return static_cast<float>(t ? scale * load_one(t.data, t.offset(b, 0, h, p.H), static_cast<Type>(t.type)) : scale);
    }

    // out[i] = row i . x
    INLINE vec inner(const float* rows, int64_t stride, const float* x) const {
        vec acc[ROWS] = {};
        for (int i = 0; i < ROWS; i += 4)
            for (int k = 0; k < Kp; k += L) {
                vec xk = load(x + k);
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) acc[i + j] += load(rows + (i + j) * stride + k) * xk;
            }
        return sums(acc);
    }

    INLINE vec values(const Tensor& u, int v, int rows, float scale) const {
        float out[ROWS] = {};
        for (int i = 0; i < rows && u; i++)
            out[i] = load_one(u.data, u.offset(b, 0, h, p.H) + (v + i) * u.channel, static_cast<Type>(u.type)) * scale;
        return load(out);
    }

    INLINE void read(int version, const float* from, int64_t stride, int v, int rows) const {
        for (int r = 0; r < p.reads; r++) {
            if (p.read[r].version != version) continue;
            float out[ROWS];
            store(out, inner(from, stride, q[r]));
            const Tensor& t = p.read[r].out;
            store_row(t, t.offset(b, 0, h, p.H) + v * t.channel, out, rows, 1, false);
        }
    }

    // to_i = decay from_i + first_i y + second_i w
    template <bool DECAY, bool Y, bool W>
    INLINE void write(float* to, int64_t to_stride, const float* from, int64_t stride, const StepMicro& m, vec first, vec second) const {
        float f[ROWS], s[ROWS];
        store(f, first), store(s, second);
        for (int i = 0; i < ROWS; i++)
            for (int k = 0; k < Kp; k += L) {
                vec x = load(from + i * stride + k);
                if (DECAY) x *= load(m.a + k);
                if (Y) x += f[i] * load(m.y + k);
                if (W) x += s[i] * load(m.w + k);
                store(to + i * to_stride + k, x);
            }
    }

    INLINE void advance(float* to, int64_t to_stride, const float* from, int64_t stride, int i, int v, int rows) const {
        const StepMicro& m = micro[i];
        vec u = values(p.micro[i].u, v, rows, m.cu), val = {};
        if (p.erase != NO_ERASE && m.x) val = inner(from, stride, m.x) * m.cx;
        if (p.erase == TIED) val += u;
        const bool y = p.erase != NO_ERASE && m.y, w = p.erase != TIED && m.w;
        auto go = [&](auto has_y, auto has_w) {
            if (m.a) write<true, has_y.value, has_w.value>(to, to_stride, from, stride, m, val, u);
            else write<false, has_y.value, has_w.value>(to, to_stride, from, stride, m, val, u);
        };
        if (y && w) go(std::true_type{}, std::true_type{});
        else if (y) go(std::true_type{}, std::false_type{});
        else if (w) go(std::false_type{}, std::true_type{});
        else go(std::false_type{}, std::false_type{});
    }

    // All micro-steps and reads of a block of rows, from where they are to where the new ones belong.
    INLINE void rows(float* to, int64_t to_stride, const float* from, int64_t stride, int v, int count) const {
        for (int i = 0; i < p.n; i++) {
            read(i, from, stride, v, count);
            advance(to, to_stride, from, stride, i, v, count);
            from = to, stride = to_stride;
        }
        read(static_cast<int>(p.n), from, stride, v, count);
    }

    void run() const {
        const float* from = reinterpret_cast<const float*>(p.first.data) + b * p.first.batch + h * p.first.head;
        float* to = reinterpret_cast<float*>(p.last.data) + b * p.last.batch + h * p.last.head;
        for (int v = 0; v < p.V; v += ROWS) {
            const float* at = from + v * p.first.time;
            float* there = to + v * p.last.time;
            if (Kp == p.K && v + ROWS <= p.V) {
                rows(there, p.last.time, at, p.first.time, v, ROWS);
                continue;
            }
            const int count = p.V - v < ROWS ? static_cast<int>(p.V) - v : ROWS;  // what does not fill vectors goes through a block
            for (int i = 0; i < ROWS; i++)
                for (int k = 0; k < Kp; k++) block[i * Kp + k] = i < count && k < p.K ? at[i * p.first.time + k] : 0;
            rows(block, Kp, block, Kp, v, count);
            for (int i = 0; i < count; i++) std::memcpy(there + i * p.last.time, block + i * Kp, sizeof(float) * p.K);
        }
    }
};

}  // namespace fw

extern "C" __attribute__((visibility("default"))) void fastweights_step(fw::Problem* p) {
    fw::parallel(
        p->B * p->H, p->threads, [](void* context, int64_t i) { fw::Step(*static_cast<fw::Problem*>(context), i).run(); }, p, true);
}
