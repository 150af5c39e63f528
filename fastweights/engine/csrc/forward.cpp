// The forward pass. In a chunk, with P_p = a_0 ... a_{p-1} and D(e -> p) = a_{e+1} ... a_{p-1}:
//
//   val_i = u_i + S_0^T (P x_i) + sum over e < i of (x_i . D(e -> i) y_e) val_e        what a tied erase writes at y_i
//   o_r   =       S_0^T (P q_r) + sum over e < p_r of (q_r . D(e -> p_r) y_e) val_e    what query r reads
//   S_C   = diag(P_C) S_0 + sum over e of (D(e -> C) y_e) val_e^T
//
// The sums over S_0 are one matrix product for all readers of the chunk, the val follow each other by forward substitution. Where the
// erase is free, val = S^T x has no u, and w u^T is a second set of events. A program on rows reads S q: keys weighted by val . q.
// Every head is a task of its own; each column of S only ever meets itself, so results do not depend on threads or batch.
#include <type_traits>

#include "chunk.h"

namespace fw {

template <Decay DECAY, Erase ERASE>
struct Forward {
    using Part = Chunk<DECAY, ERASE>;
    static constexpr bool OUTSIDE = DECAY != PER_KEY;  // see Chunk
    const Problem& p;
    Layout at;
    Scratch memory;
    Part chunk;
    const bool usual;  // one micro-step a token, and its query reads after it
    float *S, *out, *turned, *back;

    static int64_t size(const Problem& p) {
        Layout at(p);
        return Part::size(at) + at.state() + 2 * C * at.Vp + 2 * C * (at.Vp + at.Kp) + 1024;
    }

    explicit Forward(const Problem& problem) : p(problem), at(p), memory{scratch(size(p))}, chunk(p, at, memory, OUTSIDE),
          usual(p.n == 1 && p.reads == 1 && p.read[0].version == 1 && !p.backward_reads) {
        S = memory.take(at.state()), out = memory.take(2 * C * at.Vp);
        turned = memory.take(C * at.Vp), back = memory.take(C * at.Kp);
    }

    void head(int64_t b, int64_t h) {
        chunk.head.enter(p, p.micro, p.read, b, h);
        load_state(at, S, p.first, b, h);
        const int64_t row = b * p.H + h, segments = (p.T + p.segment - 1) / p.segment;
        for (int64_t t = 0; t < p.T;) {
            if (starts_anew(p, b, t)) std::memset(S, 0, sizeof(float) * at.state());
            if (p.checkpoints && t % p.segment == 0)
                std::memcpy(p.checkpoints + (row * segments + t / p.segment) * at.state(), S, sizeof(float) * at.state());
            int64_t end = (t / p.segment + 1) * p.segment;
            int count = next_chunk(p, b, t, end < p.T ? end : p.T);
            chunk.load_keys(t, count, true);
            run(row);
            t += count;
        }
        store_state(at, S, p.last, b, h);
    }

    void run(int64_t row) {
        if (ERASE != NO_ERASE || !p.backward_reads) chunk.scores();
        chunk.load_u(chunk.values + (ERASE == FREE ? C * at.Vp : 0));
        float* saved = p.values && ERASE != NO_ERASE ? p.values + (row * p.T + chunk.token) * p.n * at.Vp : nullptr;
        if (!usual) return run_any(saved);
        for (int n = 0; n < at.panels; n++) {  // all that is done with a panel of S, while it is in the first cache
            read({n, n + 1});
            solve<true>({n, n + 1}, saved);
            write({n, n + 1});
        }
        read_queries();
    }

    void run_any(float* saved) {
        read(all(at));
        if (ERASE != NO_ERASE) solve<false>(all(at), saved);
        if (p.backward_reads) read_back_queries();
        else read_queries();
        decay_values();
        write(all(at));
    }

    void read(Panels of) {
        if (ERASE != NO_ERASE) read_rows(chunk.next, at, of, out, chunk.x_rows(), S, chunk.steps);
        if (!p.backward_reads) read_rows(chunk.next, at, of, out + C * at.Vp, chunk.q_rows(), S, chunk.reads);
    }

    void write(Panels of) { chunk.write(of, S, S, chunk.ends_rows()); }

    // A vector of columns at a time, the values of the chunk in registers; `READ`: query r sees the events up to r, and the values
    // are left as much decayed as they will be at the end of the chunk.
    template <bool READ>
    void solve(Panels of, float* saved) {
        for (int c = of.first * at.panel; c < of.last * at.panel; c += L) {
            const float* u = chunk.values + C * at.Vp + c;
            vec val[C];
#pragma GCC unroll 16
            for (int i = 0; i < C; i++) {
                const float* score = chunk.score + i * Part::EVENTS;
                float* value = chunk.values + i * at.Vp + c;
                val[i] = ERASE == FREE ? vec{} : load(value);
                if (ERASE == NO_ERASE) continue;
                val[i] += OUTSIDE ? load(out + i * at.Vp + c) * chunk.by[i] : load(out + i * at.Vp + c);
                for (int e = 0; ERASE == FREE && e < i; e++) val[i] += score[C + e] * load(u + e * at.Vp);
#pragma GCC unroll 16
                for (int e = 0; e < i; e++) val[i] += score[e] * val[e];
                if (!READ) store(value, val[i]);
                if (saved && i < chunk.steps) store(saved + i * at.Vp + c, val[i]);
            }
            if (!READ) continue;
#pragma GCC unroll 16
            for (int r = 0; r < C; r++) {
                const float* score = chunk.score + (C + r) * Part::EVENTS;
                float* to = out + (C + r) * at.Vp + c;
                vec read = OUTSIDE ? load(to) * chunk.by[C + r] : load(to);
                for (int e = 0; ERASE == FREE && e <= r; e++) read += score[C + e] * load(u + e * at.Vp);
#pragma GCC unroll 16
                for (int e = 0; e <= r; e++) read += score[e] * val[e];
                store(to, read);
            }
#pragma GCC unroll 16
            for (int i = 0; i < C; i++)
                if (ERASE != NO_ERASE || DECAY == PER_HEAD) store(chunk.values + i * at.Vp + c, val[i] * end(i));
            for (int i = 0; ERASE == FREE && DECAY == PER_HEAD && i < C; i++) scale(chunk.values + (C + i) * at.Vp + c, end(i), L);
        }
    }

    INLINE float end(int i) const { return OUTSIDE ? chunk.to_end(i) : 1.0f; }

    INLINE static void scale(float* row, float by, int width) {
        for (int c = 0; c < width; c += L) store(row + c, load(row + c) * by);
    }

    void decay_values() {
        for (int s = 0; s < Part::SETS && DECAY == PER_HEAD; s++)
            for (int i = 0; i < chunk.steps; i++) scale(chunk.values + (s * C + i) * at.Vp, end(i), at.Vp);
    }

    void read_queries() {
        for (int r = 0; r < chunk.reads && !usual; r++) {
            float* read = out + (C + r) * at.Vp;
            if (OUTSIDE) scale(read, chunk.by[C + r], at.Vp);
            for (int s = 0; s < Part::SETS; s++)
                combine(read, chunk.score + (C + r) * Part::EVENTS + s * C, 1, chunk.values + s * C * at.Vp, at.Vp, chunk.versions.of[C + r], at.Vp);
        }
        for (int j = 0; j < p.reads; j++) chunk.put(chunk.head.read[j].out, j, chunk.per_token, out + C * at.Vp, at.V, at.Vp);
    }

    // S q at every query: rows of values times keys
    void read_back_queries() {
        float* q = out + C * at.Vp;
        std::memset(q, 0, sizeof(float) * C * at.Vp);
        for (int j = 0; j < p.reads; j++) chunk.vectors(q, chunk.head.read[j].q, j, chunk.per_token, at.V, at.Vp);
        transpose(turned, C, q, at.Vp, C, at.Vp);
        read_back(chunk.next, at, back, S, turned, C);
        float* rows = chunk.scaled + C * at.Kp;
        transpose(rows, at.Kp, back, C, at.Kp, C);
        float* weight = chunk.score + C * Part::EVENTS;
        for (int v = 0; v <= chunk.steps; v++) chunk.products(v, out, chunk.values, at.Vp, chunk.score);
        add_keys(rows, weight);
        for (int j = 0; j < p.reads; j++) chunk.put(chunk.head.read[j].out, j, chunk.per_token, rows, at.K, at.Kp);
    }

    // rows_r = P rows_r + sum over e < p_r of weight_re D(e -> p_r) key_e
    void add_keys(float* rows, const float* weight) {
        for (int r = 0; r < chunk.reads; r++) {
            const int seen = chunk.versions.of[C + r];
            for (int k = 0; k < at.Kp; k += L) {
                const float* keys = chunk.keys + k;
                vec sum = {}, a = broadcast(1);
                for (int e = seen - 1; e >= 0; e--) {
                    for (int s = 0; s < Part::SETS; s++)
                        sum += a * weight[r * Part::EVENTS + s * C + e] * load(keys + (s * C + e) * at.Kp);
                    if (DECAY == PER_KEY) a *= load(chunk.decay + e * at.Kp + k);
                    if (DECAY == PER_HEAD) a *= chunk.decay[e];
                }
                store(rows + r * at.Kp + k, load(rows + r * at.Kp + k) * a + sum);
            }
        }
    }
};

template <Decay DECAY, Erase ERASE>
static void forward(Problem& p) {
    parallel(
        p.B * p.H, p.threads,
        [](void* context, int64_t i) {
            Problem& p = *static_cast<Problem*>(context);
            Forward<DECAY, ERASE>(p).head(i / p.H, i % p.H);
        },
        &p);
}

}  // namespace fw

extern "C" __attribute__((visibility("default"))) void fastweights_forward(fw::Problem* p) {
    fw::dispatch(*p, [&](auto decay, auto erase) { fw::forward<decay.value, erase.value>(*p); });
}
