// One token: the state is W itself, (values x keys), and every row of it lives on its own:
//
//   w <- a * w;  w <- w + (u + w_before . x) y     for each micro-step;      out = w . q     at the version that a query reads
//
// A block of rows, small enough for the first cache, is taken through all micro-steps and reads on its way to where the new state
// belongs, which may be where it came from. Where a caller keeps W with its values side by side, as (keys x values), a block is a few
// columns instead. There is nothing to save: a step that needs a gradient is a scan of one token.
#include <type_traits>

#include "rows.h"

namespace fw {

constexpr int ROWS = L;                            // rows a block: their inner products fill a vector
constexpr int LINE = Ahead::LINE / sizeof(float);  // numbers of a line

// Whether the rows of the block after next are asked for, line by line, while a block is written. In a model, where other states and
// weights go by between two tokens, that takes a fifth off on Intel's processors. On AMD's, asking for a whole block at once took nothing off.
#if defined(__x86_64__)
static const bool FETCHES = __builtin_cpu_is("intel");
#else
constexpr bool FETCHES = false;
#endif

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
    float* decayed_q = nullptr;     // a q, where the one query reads after the one micro-step
    float y_of_q = 0, w_of_q = 0;   // y . q of a step that erases, w . q of a w of its own

    static int64_t size(const Problem& p) { return (4 * C + C + 1 + 2 * ROWS) * round_up(p.K, L) + 1024; }

    Step(const Problem& problem, int64_t i) : p(problem), b(i / p.H), h(i % p.H), Kp(static_cast<int>(round_up(p.K, L))) {
        Scratch memory{scratch(size(p))};
        for (int m = 0; m < p.n; m++) {
            const Micro& from = p.micro[m];
            micro[m] = {row(memory, from.x_is_y ? from.y : from.x), row(memory, from.y), row(memory, from.w), row(memory, from.g), 1, 1};
            micro[m].cx = number(from.cx, from.sx), micro[m].cu = number(from.cu, from.su);
            if (micro[m].a) decay(micro[m], from.decayed);
        }
        for (int r = 0; r < p.reads; r++) q[r] = row(memory, p.read[r].q);
        block = memory.take(2 * ROWS * Kp);
        if (p.n == 1 && p.reads == 1 && p.read[0].version == 1) prepare_usual(memory);
    }

    void decay(StepMicro& m, bool x_too) {
        for (int k = 0; k < Kp; k += L) {
            store(m.a + k, exponential(load(m.a + k)));
            if (x_too) store(m.x + k, load(m.x + k) * load(m.a + k));
        }
    }

    void prepare_usual(Scratch& memory) {
        const StepMicro& m = micro[0];
        decayed_q = memory.take(Kp);
        if (p.erase != NO_ERASE && m.y) y_of_q = dot(m.y, q[0], Kp);
        if (p.erase != TIED && m.w) w_of_q = dot(m.w, q[0], Kp);
        for (int k = 0; k < Kp; k += L) store(decayed_q + k, m.a ? load(q[0] + k) * load(m.a + k) : load(q[0] + k));
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
        vec acc[ROWS];
        clear(acc);
        for (int i = 0; i < ROWS; i += 4)
            for (int k = 0; k < Kp; k += L) {
                vec xk = load(x + k);
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) acc[i + j] += load(rows + (i + j) * stride + k) * xk;
            }
        return sums(acc);
    }

    INLINE vec values(const Tensor& u, int v, int rows, float scale) const {
        if (u && u.channel == 1 && u.type == F32 && rows == ROWS)
            return load(reinterpret_cast<const float*>(u.data) + u.offset(b, 0, h, p.H) + v) * scale;
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

    // to_i = decay from_i + first_i y + second_i w, for as many keys at a time as registers hold; `ahead`, if given, are rows to fetch
    template <bool DECAY, bool Y, bool W, int N>
    INLINE void write_keys(float* to, int64_t to_stride, const float* from, int64_t stride, const StepMicro& m, const float* first,
                           const float* second, int k, const float* ahead) const {
        vec a[N], y[N], w[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) {
            if (DECAY) a[n] = load(m.a + k + n * L);
            if (Y) y[n] = load(m.y + k + n * L);
            if (W) w[n] = load(m.w + k + n * L);
        }
        auto go = [&](auto fetches) {
            for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
                for (int n = 0; n < N; n++) {
                    if (fetches.value && n * L % LINE == 0) __builtin_prefetch(ahead + i * stride + k + n * L);
                    vec x = load(from + i * stride + k + n * L);
                    if (DECAY) x *= a[n];
                    if (Y) x += first[i] * y[n];
                    if (W) x += second[i] * w[n];
                    store(to + i * to_stride + k + n * L, x);
                }
        };
        if (ahead) go(std::true_type{});
        else go(std::false_type{});
    }

    template <bool DECAY, bool Y, bool W>
    INLINE void write(float* to, int64_t to_stride, const float* from, int64_t stride, const StepMicro& m, vec first, vec second,
                      const float* ahead) const {
        constexpr int N = L == 16 ? 8 : 4;
        float f[ROWS], s[ROWS];
        store(f, first), store(s, second);
        int k = 0;
        for (; k + N * L <= Kp; k += N * L) write_keys<DECAY, Y, W, N>(to, to_stride, from, stride, m, f, s, k, ahead);
        for (; k < Kp; k += L) write_keys<DECAY, Y, W, 1>(to, to_stride, from, stride, m, f, s, k, ahead);
    }

    // One micro-step, given w . x
    INLINE void advance(float* to, int64_t to_stride, const float* from, int64_t stride, int i, vec val, vec u,
                        const float* ahead = nullptr) const {
        const StepMicro& m = micro[i];
        const bool y = p.erase != NO_ERASE && m.y, w = p.erase != TIED && m.w;
        auto go = [&](auto has_y, auto has_w) {
            if (m.a) write<true, has_y.value, has_w.value>(to, to_stride, from, stride, m, val, u, ahead);
            else write<false, has_y.value, has_w.value>(to, to_stride, from, stride, m, val, u, ahead);
        };
        if (y && w) go(std::true_type{}, std::true_type{});
        else if (y) go(std::true_type{}, std::false_type{});
        else if (w) go(std::false_type{}, std::true_type{});
        else go(std::false_type{}, std::false_type{});
    }

    // w . x and w . (a q) of a block of rows
    struct Seen {
        vec of_x, of_q;
    };
    INLINE Seen look(const float* from, int64_t stride) const {
        const float* x = micro[0].x ? micro[0].x : decayed_q;
        const vec above = products_with(x, decayed_q, from, stride, Kp);
        const vec below = products_with(x, decayed_q, from + L / 2 * stride, stride, Kp);
        return {first_halves(above, below), second_halves(above, below)};
    }

    // Where the one query reads after the one micro-step, a second look at the rows is spared:
    //   w_after . q = w . (a q) + (u + w . x) (y . q)
    INLINE void usual_rows(float* to, int64_t to_stride, const float* from, int64_t stride, int v, int count, Seen seen,
                           const float* ahead = nullptr) const {
        float out[ROWS];
        vec u = values(p.micro[0].u, v, count, micro[0].cu), val = {};
        if (p.erase != NO_ERASE && micro[0].x) val = seen.of_x * micro[0].cx;
        if (p.erase == TIED) val += u;
        store(out, seen.of_q + val * y_of_q + u * w_of_q);
        const Tensor& t = p.read[0].out;
        store_row(t, t.offset(b, 0, h, p.H) + v * t.channel, out, count, 1, false);
        advance(to, to_stride, from, stride, 0, val, u, ahead);
    }

    // All micro-steps and reads of a block of rows, from where they are to where the new ones belong.
    INLINE void rows(float* to, int64_t to_stride, const float* from, int64_t stride, int v, int count) const {
        if (decayed_q) return usual_rows(to, to_stride, from, stride, v, count, look(from, stride));
        for (int i = 0; i < p.n; i++) {
            read(i, from, stride, v, count);
            vec u = values(p.micro[i].u, v, count, micro[i].cu), val = {};
            if (p.erase != NO_ERASE && micro[i].x) val = inner(from, stride, micro[i].x) * micro[i].cx;
            if (p.erase == TIED) val += u;
            advance(to, to_stride, from, stride, i, val, u);
            from = to, stride = to_stride;
        }
        read(static_cast<int>(p.n), from, stride, v, count);
    }

    // ---- values side by side: key k of the block is at from + k stride, WIDE values each ---------------------------------

    static constexpr int N = 2, WIDE = N * L;
    struct Values {
        vec of[N];
    };

    // the sum over keys of x_k from_k, and the same with q
    INLINE void sums_over_keys(const float* from, int64_t stride, const float* x, const float* q_row, Values& seen, Values& read) const {
        Values a = {}, b = {};
        for (int64_t k = 0; k < p.K; k++)
#pragma GCC unroll 4
            for (int j = 0; j < N; j++) {
                const vec w = load(from + k * stride + j * L);
                if (x) a.of[j] += w * x[k];
                if (q_row) b.of[j] += w * q_row[k];
            }
        seen = a, read = b;
    }

    INLINE Values values_beside(const Tensor& u, int v, int count, float scale) const {
        float out[WIDE] = {};
        if (u) load_row(out, u, u.offset(b, 0, h, p.H) + v * u.channel, count, WIDE, scale);
        Values x;
        for (int j = 0; j < N; j++) x.of[j] = load(out + j * L);
        return x;
    }

    INLINE void give(int r, const Values& x, int v, int count) const {
        float out[WIDE];
        for (int j = 0; j < N; j++) store(out + j * L, x.of[j]);
        const Tensor& t = p.read[r].out;
        store_row(t, t.offset(b, 0, h, p.H) + v * t.channel, out, count, 1, false);
    }

    INLINE void advance_beside(float* to, int64_t to_stride, const float* from, int64_t stride, int i, const Values& val, const Values& u) const {
        const StepMicro& m = micro[i];
        const bool y = p.erase != NO_ERASE && m.y, w = p.erase != TIED && m.w;
        for (int64_t k = 0; k < p.K; k++)
#pragma GCC unroll 4
            for (int j = 0; j < N; j++) {
                vec x = load(from + k * stride + j * L);
                if (m.a) x *= m.a[k];
                if (y) x += m.y[k] * val.of[j];
                if (w) x += m.w[k] * u.of[j];
                store(to + k * to_stride + j * L, x);
            }
    }

    INLINE void beside(float* to, int64_t to_stride, const float* from, int64_t stride, int v, int count) const {
        for (int i = 0; i <= p.n; i++) {
            for (int r = 0; r < p.reads && !decayed_q; r++) {
                Values nothing, read;
                if (p.read[r].version != i) continue;
                sums_over_keys(from, stride, nullptr, q[r], nothing, read);
                give(r, read, v, count);
            }
            if (i == p.n) break;
            Values seen, read, u = values_beside(p.micro[i].u, v, count, micro[i].cu), val;
            const bool erases = p.erase != NO_ERASE && micro[i].x;
            sums_over_keys(from, stride, erases ? micro[i].x : nullptr, decayed_q, seen, read);
            for (int j = 0; j < N; j++) {
                val.of[j] = erases ? seen.of[j] * micro[i].cx : vec{};
                if (p.erase == TIED) val.of[j] += u.of[j];
                read.of[j] += val.of[j] * y_of_q + u.of[j] * w_of_q;
            }
            if (decayed_q) give(0, read, v, count);
            advance_beside(to, to_stride, from, stride, i, val, u);
            from = to, stride = to_stride;
        }
    }

    void run_beside(const float* from, float* to) const {
        for (int v = 0; v < p.V; v += WIDE) {
            if (v + WIDE <= p.V) {
                beside(to + v, p.last.channel, from + v, p.first.channel, v, WIDE);
                continue;
            }
            const int count = static_cast<int>(p.V) - v;
            for (int64_t k = 0; k < p.K; k++)
                for (int j = 0; j < WIDE; j++) block[k * WIDE + j] = j < count ? from[v + k * p.first.channel + j] : 0;
            beside(block, WIDE, block, WIDE, v, count);
            for (int64_t k = 0; k < p.K; k++) std::memcpy(to + v + k * p.last.channel, block + k * WIDE, sizeof(float) * count);
        }
    }

    void run() const {
        const float* from = reinterpret_cast<const float*>(p.first.data) + b * p.first.batch + h * p.first.head;
        float* to = reinterpret_cast<float*>(p.last.data) + b * p.last.batch + h * p.last.head;
        if (p.first.channel != 1 && p.first.time == 1 && p.last.time == 1) return run_beside(from, to);
        const int whole = Kp == p.K ? static_cast<int>(p.V) / ROWS * ROWS : 0;
        run_blocks(to, from, whole);
        for (int v = whole; v < p.V; v += ROWS) {  // what does not fill vectors goes through a block
            const float* at = from + v * p.first.time;
            float* there = to + v * p.last.time;
            const int count = p.V - v < ROWS ? static_cast<int>(p.V) - v : ROWS;
            for (int i = 0; i < ROWS; i++)
                for (int k = 0; k < Kp; k++) block[i * Kp + k] = i < count && k < p.K ? at[i * p.first.time + k] : 0;
            rows(block, Kp, block, Kp, v, count);
            for (int i = 0; i < count; i++) std::memcpy(there + i * p.last.time, block + i * Kp, sizeof(float) * p.K);
        }
    }

    // The next block is looked at before this one is written: its sums are ready when they are needed.
    void run_blocks(float* to, const float* from, int whole) const {
        const int64_t stride = p.first.time, to_stride = p.last.time;
        Seen next = decayed_q && whole ? look(from, stride) : Seen{};
        for (int v = 0; v < whole; v += ROWS) {
            const float* at = from + v * stride;
            float* there = to + v * to_stride;
            if (!decayed_q) {
                rows(there, to_stride, at, stride, v, ROWS);
                continue;
            }
            const Seen seen = next;
            if (v + ROWS < whole) next = look(at + ROWS * stride, stride);
            const bool fetches = FETCHES && v + 2 * ROWS < whole;
            usual_rows(there, to_stride, at, stride, v, ROWS, seen, fetches ? at + 2 * ROWS * stride : nullptr);
        }
    }
};

static bool has_positive_decay(const Problem& p) {
    for (int m = 0; m < p.n; m++) {
        const Tensor& g = p.micro[m].g;
        for (int64_t b = 0; g && b < p.B; b++)
            for (int64_t h = 0; h < g.heads; h++)
                for (int64_t k = 0; k < (g.channel ? p.K : 1); k++)
                    if (load_one(g.data, b * g.batch + h * g.head + k * g.channel, static_cast<Type>(g.type)) > 0) return true;
    }
    return false;
}

}  // namespace fw

// Whether a log decay is > 0, which is seen before anything is written.
extern "C" __attribute__((visibility("default"))) int fastweights_step(fw::Problem* p, char* const* address, int threads) {
    fw::Call call(*p, address, threads);
    if (fw::has_positive_decay(*p)) return 1;
    fw::parallel(
        p->B * p->H, p->threads, [](void* context, int64_t i) { fw::Step(*static_cast<fw::Problem*>(context), i).run(); }, p, true);
    return 0;
}
