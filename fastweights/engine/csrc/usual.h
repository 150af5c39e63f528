// The forward pass of most programs: a token is one micro-step, and its query reads what it leaves. A block is a few tokens, as many
// as let all its readers (x and q) be the rows of one tile; i and e number its tokens, P and D are those of forward.cpp:
//
//   val_i = u_i + S_0^T (P_i x_i)     + sum over e <  i of (x_i . D(e -> i) y_e) val_e
//   o_i   =       S_0^T (P_{i+1} q_i) + sum over e <= i of (q_i . D(e -> i + 1) y_e) val_e
//   S     = diag(P_N) S_0 + sum over e of (D(e -> N) y_e) val_e^T
//
// A panel of S is read once for all readers and written once for all events, and what is between, a triangle of N numbers a side,
// stays in registers: the shorter the block, the less there is of it, and nothing is left to do where keys decay each at their own pace
// but to decay them step by step.
#pragma once
#include "chunk.h"

namespace fw {

template <Decay DECAY, Erase ERASE, int NV>
struct Usual {
    static constexpr int KINDS = ERASE == NO_ERASE ? 1 : 2, SETS = ERASE == FREE ? 2 : 1, N = MR / KINDS, EVENTS = SETS * N;
    static constexpr int X = 0, Q = KINDS - 1, GROUP = KINDS * 2 * N;  // scores of two tokens: [kind][token][event]
    static constexpr int STEP = L < 8 ? 8 : L, ROWS = MR / 2;         // rows of S between two fetches, and written at once
    static_assert(N % 2 == 0 && GROUP % L == 0, "scores fill vectors");
    const Problem& p;
    Layout at;
    Scratch memory;
    Head of_head;
    Ahead next;
    int64_t token = 0;
    int count = 0;
    float *S, *readers, *keys, *decay, *total;   // [KINDS][N][Kp]; [SETS][N][Kp], in the end as decayed as they will be; [N][Kp]; [Kp]
    float *u, *val, *out;                        // [N][Vp]
    float *factor, *score;                       // [N / 2][GROUP]; [SETS][N / 2][GROUP], zero where a reader does not see the event
    float by[MR], to_end[N];                     // what multiplies a reader's row of S, and a value in the end
    const bool x_is_key;                         // readers and keys are the same rows

    static int64_t size(const Problem& p) {
        Layout at(p);
        return at.state() + (MR + EVENTS + N + 1) * at.Kp + 3 * N * at.Vp + (1 + SETS) * N / 2 * GROUP + 256;
    }
    static int64_t most_tokens(const Problem&) { return N; }
    Head& head() { return of_head; }

    explicit Usual(const Problem& problem) : p(problem), at(p), memory{scratch(size(p))},
          x_is_key(DECAY != PER_KEY && ERASE != NO_ERASE && p.micro[0].x_is_y) {
        S = memory.take(at.state()), readers = memory.take(MR * at.Kp), keys = memory.take(EVENTS * at.Kp);
        decay = memory.take(N * at.Kp), total = memory.take(at.Kp);
        u = memory.take(N * at.Vp), val = memory.take(N * at.Vp), out = memory.take(N * at.Vp);
        factor = memory.take(N / 2 * GROUP), score = memory.take(SETS * N / 2 * GROUP);
        std::memset(factor, 0, sizeof(float) * N / 2 * GROUP);
        for (int i = 0; i < N; i++) {
            by[Q * N + i] = 1;
            for (int e = 0; e <= i; e++) factor_of(Q, i, e) = 1;
        }
    }

    static bool serves(const Problem& p) {
        return p.n == 1 && p.reads == 1 && p.read[0].version == 1 && !p.backward_reads && (ERASE == NO_ERASE || !p.micro[0].lag);
    }

    void run(int64_t first, int tokens, int64_t row) {
        token = first, count = tokens;
        next.clear();
        take_in();
        scores(std::make_integer_sequence<int, N / 2>{});
        for (int n = 0; n < at.panels; n++) panel(n);
        store_rows(of_head.read[0].out, token * of_head.read[0].out.time, out, at.Vp, count, at.V, nullptr, 0);
        if (p.values && ERASE != NO_ERASE) std::memcpy(p.values + (row * p.T + token) * at.Vp, val, sizeof(float) * count * at.Vp);
    }

    INLINE const float* events(int set) const { return set == 0 && x_is_key ? readers : keys + set * N * at.Kp; }
    INLINE float& factor_of(int kind, int i, int e) const { return factor[(i / 2 * KINDS + kind) * 2 * N + i % 2 * N + e]; }
    INLINE const float* scores_of(int set, int kind, int i) const {
        return score + ((set * (N / 2) + i / 2) * KINDS + kind) * 2 * N + i % 2 * N;
    }

    void rows(float* to, const Tensor& t, int width, int padded, const float* scales = nullptr) {
        load_rows(to, padded, t, token * t.time, count, width, padded, scales, 1);
        if (count < N) std::memset(to + count * padded, 0, sizeof(float) * (N - count) * padded);
        if (t)
            for (int i = 0; i < N; i++) next.add(t, (token + N + i) * t.time, width);
    }

    void take_in() {
        const Micro& m = of_head.micro[0];
        float cx[N] = {}, cu[N] = {}, g[L] = {};
        if (ERASE == NO_ERASE) {
            rows(keys, m.w, at.K, at.Kp);
        } else {
            rows(x_is_key ? readers : keys, m.y, at.K, at.Kp);
            if (ERASE == FREE) rows(keys + N * at.Kp, m.w, at.K, at.Kp);
            if (!m.x_is_y) rows(readers, m.x, at.K, at.Kp);
            else if (!x_is_key) std::memcpy(readers, keys, sizeof(float) * N * at.Kp);
            load_numbers(cx, m.cx, token * m.cx.time, count, static_cast<float>(m.sx), 1);
        }
        rows(readers + Q * N * at.Kp, of_head.read[0].q, at.K, at.Kp);
        load_numbers(cu, m.cu, token * m.cu.time, count, static_cast<float>(m.su), 1);
        rows(u, m.u, at.V, at.Vp, cu);
        const Tensor& o = of_head.read[0].out;
        for (int i = 0; i < N; i++) next.add(o, (token + N + i) * o.time, at.V);
        bool positive = false;
        if (DECAY == PER_KEY) {
            rows(decay, m.g, at.K, at.Kp);
            ivec above = {};
            for (int k = 0; k < N * at.Kp; k += L) {
                const vec log = load(decay + k);
                above |= log > 0.0f;
                store(decay + k, exponential(log));
            }
            for (int j = 0; j < L; j++) positive |= above[j] != 0;
        }
        if (DECAY == PER_HEAD) {
            load_numbers(g, m.g, token * m.g.time, count, 1, 0);
            for (int i = 0; i < count; i++) positive |= g[i] > 0;
            store(g, exponential(load(g)));
        }
        if (positive) *p.positive = 1;
        numbers(cx, g);
    }

    // The numbers that multiply scores and what readers read of S_0; a is the decay per head.
    INLINE void numbers(const float* cx, const float* a) {
        if (DECAY != PER_HEAD) {
            for (int i = 0; i < N && ERASE != NO_ERASE; i++) {
                by[i] = cx[i];
                for (int e = 0; e < i; e++) factor_of(X, i, e) = cx[i];
            }
            return;
        }
        float left = 1, between[N];  // P_i and D(e -> i)
        for (int i = 0; i < N; i++) {
            if (ERASE != NO_ERASE) {
                const float c = of_head.micro[0].decayed ? cx[i] * a[i] : cx[i];
                for (int e = 0; e < i; e++) factor_of(X, i, e) = between[e] * c;
                by[i] = left * c;
            }
            left *= a[i], between[i] = 1;
            for (int e = 0; e < i; e++) between[e] *= a[i];
            for (int e = 0; e <= i; e++) factor_of(Q, i, e) = between[e];
            by[Q * N + i] = left;
        }
        std::memcpy(to_end, between, sizeof to_end);
        *total = left;
    }

    template <int... PAIR>
    INLINE void scores(std::integer_sequence<int, PAIR...>) {
        if (SETS == 2) (pair<PAIR, false>(0), ...);
        (pair<PAIR, true>(SETS - 1), ...);
    }

    // What the readers of tokens 2 PAIR and 2 PAIR + 1 see of the events before them, which decay up to them as they are seen. `LAST`: of
    // all sets, so that readers per key can take over what is left of S_0.
    template <int PAIR, bool LAST>
    INLINE void pair(int set) {
        constexpr int FIRST = 2 * PAIR;
        float* event = const_cast<float*>(events(set));
        const bool decayed = DECAY == PER_KEY && of_head.micro[0].decayed;
        vec sum[GROUP];
#pragma GCC unroll 16
        for (int i = 0; i < GROUP; i++) sum[i] = vec{};
        for (int k = 0; k < at.Kp; k += L) {
            vec seen[N], left = DECAY == PER_KEY && FIRST > 0 ? load(total + k) : broadcast(1);
#pragma GCC unroll 8
            for (int e = 0; e < FIRST; e++) seen[e] = load(event + e * at.Kp + k);
#pragma GCC unroll 2
            for (int j = 0; j < 2; j++) {
                const int i = FIRST + j;
                const vec a = DECAY == PER_KEY ? load(decay + i * at.Kp + k) : vec{};
                float *x = readers + i * at.Kp + k, *q = readers + (Q * N + i) * at.Kp + k;
                if (ERASE != NO_ERASE) {
                    vec row = load(x);
                    if (decayed) row *= a;
#pragma GCC unroll 8
                    for (int e = 0; e < i; e++) sum[(X * 2 + j) * N + e] += row * seen[e];
                    if (DECAY == PER_KEY && LAST) store(x, row * left);
                }
                seen[i] = load(event + i * at.Kp + k);
                if (DECAY == PER_KEY) {
                    left *= a;
#pragma GCC unroll 8
                    for (int e = 0; e < i; e++) seen[e] *= a;
                }
                const vec row = load(q);
#pragma GCC unroll 8
                for (int e = 0; e <= i; e++) sum[(Q * 2 + j) * N + e] += row * seen[e];
                if (DECAY == PER_KEY && LAST) store(q, row * left);
            }
            if (DECAY == PER_KEY) {
#pragma GCC unroll 8
                for (int e = 0; e < FIRST + 2; e++) store(event + e * at.Kp + k, seen[e]);
                if (LAST) store(total + k, left);
            }
        }
        const float* times = factor + PAIR * GROUP;
        float* to = score + (set * (N / 2) + PAIR) * GROUP;
#pragma GCC unroll 4
        for (int i = 0; i < GROUP; i += L) store(to + i, sums(sum + i) * load(times + i));
    }

    INLINE void panel(int n) {
        constexpr int W = NV * L;
        const int64_t K = at.Kp;  // here, for S may lie anywhere as far as the compiler knows
        const float* rows = readers;
        float* s = S + n * K * W;
        const int c = n * W;
        vec acc[MR][NV];
#pragma GCC unroll 8
        for (int m = 0; m < MR; m++)
#pragma GCC unroll 2
            for (int v = 0; v < NV; v++) acc[m][v] = vec{};
        for (int k = 0; k < K; k += STEP) {
            next.fetch();
#pragma GCC unroll 2
            for (int d = k; d < k + STEP; d++) {
                vec row[NV];
#pragma GCC unroll 2
                for (int v = 0; v < NV; v++) row[v] = load(s + d * W + v * L);
#pragma GCC unroll 8
                for (int m = 0; m < MR; m++)
#pragma GCC unroll 2
                    for (int v = 0; v < NV; v++) acc[m][v] += rows[m * K + d] * row[v];
            }
        }
        vec value[EVENTS][NV];
#pragma GCC unroll 8
        for (int i = 0; i < N; i++)
#pragma GCC unroll 2
            for (int v = 0; v < NV; v++) {
                value[EVENTS - N + i][v] = load(u + i * at.Vp + c + v * L);
                if (ERASE == TIED) value[i][v] += acc[i][v] * by[i];
                if (ERASE == FREE) value[i][v] = acc[i][v] * by[i];
#pragma GCC unroll 8
                for (int e = 0; ERASE != NO_ERASE && e < i; e++) {
                    value[i][v] += scores_of(0, X, i)[e] * value[e][v];
                    if (ERASE == FREE) value[i][v] += scores_of(1, X, i)[e] * value[N + e][v];
                }
                if (ERASE != NO_ERASE) store(val + i * at.Vp + c + v * L, value[i][v]);
            }
#pragma GCC unroll 8
        for (int i = 0; i < N; i++)
#pragma GCC unroll 2
            for (int v = 0; v < NV; v++) {
                vec read = acc[Q * N + i][v] * by[Q * N + i];
#pragma GCC unroll 8
                for (int e = 0; e <= i; e++) {
                    read += scores_of(0, Q, i)[e] * value[e][v];
                    if (ERASE == FREE) read += scores_of(1, Q, i)[e] * value[N + e][v];
                }
                store(out + i * at.Vp + c + v * L, read);
            }
        write(s, value);
    }

    // S at the end of the block
    INLINE void write(float* s, vec (&value)[EVENTS][NV]) {
        constexpr int W = NV * L;
#pragma GCC unroll 16
        for (int e = 0; e < EVENTS; e++)
#pragma GCC unroll 2
            for (int v = 0; v < NV; v++) {
                if (DECAY == PER_HEAD) value[e][v] *= to_end[e % N];
                if (e % N >= count) value[e][v] = vec{};  // there is no such token
            }
        const int64_t K = at.Kp;
        const float *first = events(0), *second = events(SETS - 1), *left = total;
        const vec one_for_all = broadcast(*left);
        for (int k = 0; k < K; k += ROWS, s += ROWS * W) {
            if (k % STEP == 0) next.fetch();
            vec row[ROWS][NV];
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
                for (int v = 0; v < NV; v++) {
                    row[r][v] = load(s + r * W + v * L);
                    if (DECAY != NO_DECAY) row[r][v] *= DECAY == PER_KEY ? broadcast(left[k + r]) : one_for_all;
                }
#pragma GCC unroll 16
            for (int e = 0; e < EVENTS; e++) {
                const float* key = (e < N ? first + e * K : second + (e - N) * K) + k;
#pragma GCC unroll 4
                for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
                    for (int v = 0; v < NV; v++) row[r][v] += key[r] * value[e][v];
            }
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
                for (int v = 0; v < NV; v++) store(s + r * W + v * L, row[r][v]);
        }
    }
};

}  // namespace fw
