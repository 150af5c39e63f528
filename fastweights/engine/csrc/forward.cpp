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

#include "usual.h"

namespace fw {

template <Decay DECAY, Erase ERASE>
struct Forward {
    using Part = Chunk<DECAY, ERASE>;
    static constexpr bool OUTSIDE = DECAY != PER_KEY;  // see Chunk
    const Problem& p;
    Layout at;
    Scratch memory;
    Part chunk;
    float *S, *out, *turned, *back;

    static int64_t size(const Problem& p) {
        Layout at(p);
        return Part::size(at) + at.state() + 2 * C * at.Vp + 2 * C * (at.Vp + at.Kp) + 1024;
    }

    Forward(const Problem& problem, float* room) : p(problem), at(p), memory{room}, chunk(p, at, memory, OUTSIDE) {
        S = memory.take(at.state()), out = memory.take(2 * C * at.Vp);
        turned = memory.take(C * at.Vp), back = memory.take(C * at.Kp);
    }

    static int64_t most_tokens(const Problem& p) { return Part::most_tokens(p); }
    Head& head() { return chunk.head; }
    void clear() { std::memset(S, 0, sizeof(float) * at.state()); }
    void keep(float* checkpoint) const { std::memcpy(checkpoint, S, sizeof(float) * at.state()); }
    void finish() const {}

    void run(int64_t token, int count, int64_t row) {
        chunk.load_keys(token, count, true);
        if (ERASE != NO_ERASE || !p.backward_reads) chunk.scores();
        chunk.load_u(chunk.values + (ERASE == FREE ? C * at.Vp : 0));
        float* saved = p.values && ERASE != NO_ERASE ? p.values + (row * p.T + chunk.token) * p.n * at.Vp : nullptr;
        if (ERASE != NO_ERASE) read_rows(chunk.next, at, out, chunk.x_rows(), S, chunk.steps);
        if (!p.backward_reads) read_rows(chunk.next, at, out + C * at.Vp, chunk.q_rows(), S, chunk.reads);
        if (ERASE != NO_ERASE) solve(saved);
        if (p.backward_reads) read_back_queries();
        else read_queries();
        decay_values();
        chunk.write(S, S, chunk.ends_rows());
    }

    // A vector of columns at a time, the values of the chunk in registers
    void solve(float* saved) {
        for (int c = 0; c < at.Vp; c += L) {
            const float* u = chunk.values + C * at.Vp + c;
            vec val[C];
#pragma GCC unroll 16
            for (int i = 0; i < C; i++) {
                const float* score = chunk.score + i * Part::EVENTS;
                float* value = chunk.values + i * at.Vp + c;
                val[i] = ERASE == FREE ? vec{} : load(value);
                val[i] += OUTSIDE ? load(out + i * at.Vp + c) * chunk.by[i] : load(out + i * at.Vp + c);
                for (int e = 0; ERASE == FREE && e < i; e++) val[i] += score[C + e] * load(u + e * at.Vp);
#pragma GCC unroll 16
                for (int e = 0; e < i; e++) val[i] += score[e] * val[e];
                store(value, val[i]);
                if (saved && i < chunk.steps) store(saved + i * at.Vp + c, val[i]);
            }
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
        for (int r = 0; r < chunk.reads; r++) {
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

// Heads from h on, from their first token to their last
template <class Pass>
static void heads(Problem& p, int64_t b, int64_t h, int count) {
    Abreast<Pass> passes(p, count);
    for (int i = 0; i < count; i++) {
        passes[i].head().enter(p, p.micro, p.read, b, h + i);
        load_state(passes[i].at, passes[i].S, p.first, b, h + i);
    }
    const int64_t row = b * p.H + h, segments = (p.T + p.segment - 1) / p.segment, size = passes[0].at.state();
    for (int64_t t = 0; t < p.T;) {
        const bool anew = starts_anew(p, b, t);
        const int64_t end = (t / p.segment + 1) * p.segment;
        const int tokens = next_chunk(p, Pass::most_tokens(p), b, t, end < p.T ? end : p.T);
        for (int i = 0; i < count; i++) {
            if (anew) passes[i].clear();
            if (p.checkpoints && t % p.segment == 0) passes[i].keep(p.checkpoints + ((row + i) * segments + t / p.segment) * size);
            passes[i].run(t, tokens, row + i);
        }
        t += tokens;
    }
    for (int i = 0; i < count; i++) {
        passes[i].finish();
        store_state(passes[i].at, passes[i].S, p.last, b, h + i);
    }
}

template <class Pass>
static void forward(Problem& p) {
    parallel(
        p.B * p.H / abreast(p.B, p.H, p.threads), p.threads,
        [](void* context, int64_t i) {
            Problem& p = *static_cast<Problem*>(context);
            const int count = abreast(p.B, p.H, p.threads);
            heads<Pass>(p, i * count / p.H, i * count % p.H, count);
            settle();
        },
        &p);
}

template <Decay DECAY, Erase ERASE>
static void forward_of(Problem& p) {
    if (!usual(p)) forward<Forward<DECAY, ERASE>>(p);
    else if (Layout(p).panel == L) forward<Usual<DECAY, ERASE, 1>>(p);
    else forward<Usual<DECAY, ERASE, 2>>(p);
}

}  // namespace fw

// Whether a log decay was > 0.
extern "C" __attribute__((visibility("default"))) int fastweights_forward(fw::Problem* p, char* const* address, int threads) {
    fw::Call call(*p, address, threads);
    fw::dispatch(*p, [&](auto decay, auto erase) { fw::forward_of<decay.value, erase.value>(*p); });
    return call.positive;
}

// The tokens that the forward pass takes together.
extern "C" __attribute__((visibility("default"))) int64_t fastweights_tokens(fw::Problem* p) {
    int64_t tokens = 0;
    fw::dispatch(*p, [&](auto decay, auto erase) {
        tokens = fw::usual(*p) ? fw::Usual<decay.value, erase.value, 2>::N : fw::Chunk<decay.value, erase.value>::most_tokens(*p);
    });
    return tokens;
}
