// The backward pass of the usual programs, block by block from the last to the first. In the words of block.h, with do_i the gradient of
// what q_i read, dS that of S at the end of the block and S_0 the state at its start (where nothing is erased there are no x, and val is u),
//
//   dval_e = dS^T (D(e -> N) y_e) + sum over i >= e of score(q_i, e) do_i + sum over i > e of score(x_i, e) dval_i
//   dx_i   = P_i (S_0 dval_i)     + sum over e <  i of (dval_i . val_e) D(e -> i) y_e
//   dq_i   = P_{i+1} (S_0 do_i)   + sum over e <= i of (do_i . val_e) D(e -> i + 1) y_e
//   dy_e   = D(e -> N) (dS val_e) + the same pairs, with what read in the place of y_e
//   dS_0   = diag(P_N) dS + sum over i of (P_i x_i) dval_i^T + (P_{i+1} q_i) do_i^T
//
// and the gradient of log a_l is the sum over all paths that a_l decays, as in backward.cpp. S and dS are kept turned, with keys in the
// lanes of vectors: what has a key is then a row of a product, and is done W keys at a time. Only dval has values in its lanes: dS times the
// keys is a product whose columns, events, fill a vector or half of one, and it is turned into rows.
#pragma once
#include "block.h"

namespace fw {

template <Decay DECAY, Erase ERASE, int NK>
struct UsualBackward {
    // As many as let readers fill a vector, or events where there are no x; of those, 16 at a time would be too many for the registers.
    using Part = Block<DECAY, ERASE, ERASE == NO_ERASE && L < 16 ? L : L / 2>;
    static constexpr int N = Part::N, SETS = Part::SETS, EVENTS = Part::EVENTS, READERS = Part::READERS, X = Part::X, Q = Part::Q;
    static constexpr bool ERASES = ERASE != NO_ERASE;
    static constexpr bool PAIRS = EVENTS < L;  // events fill half a vector
    static constexpr int ROWS = N < MR ? N : MR;  // of a product, at once
    static constexpr int W = NK * L, SCORES = N / 2 * Part::GROUP;
    const Problem& p;
    Scratch memory;
    Part block;
    const Layout& at;
    Head to;                        // the gradients of this head
    float *opening, *states;        // [Kp / W][Vp][W] S_0 of the first block of a segment, and of the others; each with its PutOff
    float *zeros, *dS;              // likewise nothing, and the gradient of S
    PutOff kept;                    // that of dS
    float left_of_S[READERS], left_of_dS[N];  // per head: P_i or P_{i+1}, times S_0's, and D(e -> N), times dS's
    float *given, *values, *du;     // [READERS][Vp] dval_i and do_i; [EVENTS][Vp] val_e and u_e; [N][Vp] du_i where they are not dval_i
    float* ends;                    // what is left of the keys in the end, turned: [Kp][L], or in pairs [Kp / 2][L]
    float *decays, *decay;          // per key: [segment][Kp] a_i of the blocks that were rebuilt; [N][Kp] those of another
    float *dx, *dq, *dkeys, *dlog;  // [N][Kp]; dkeys [EVENTS][Kp]
    typename Part::Rows u;          // what was to be written, before its number
    typename Part::Places q_to, key_to[SETS], log_to;  // their rows, or those of tensors
    float *weight, *passed;         // as score: gradient . value; the same times what is left of the event, if that is a number
    vec of_reader[L], of_event[L], of_x[L], whole;  // sums over keys: reader . gradient, key . gradient, x . dx, S_0 . dS
    double log_of_head[N];

    static int64_t slots(const Problem& p) { return p.segment / N + 2; }
    static int64_t size(const Problem& p) {
        Layout at(p);
        return Part::size(at, true) + (slots(p) + 3) * (at.state() + L) + (READERS + EVENTS + N) * at.Vp + (L + 3 * N + EVENTS) * at.Kp +
               decays_size(p, at) + 2 * SETS * SCORES + 512;
    }
    static int64_t decays_size(const Problem& p, const Layout& at) { return DECAY == PER_KEY ? p.segment * at.Kp : 0; }
    static int64_t most_tokens(const Problem&) { return N; }

    UsualBackward(const Problem& problem, float* room) : p(problem), memory{room}, block(p, memory, true), at(block.at) {
        opening = memory.take(at.state() + L), states = memory.take(slots(p) * (at.state() + L));
        zeros = memory.take(at.state() + L), dS = memory.take(at.state()), ends = memory.take(L * at.Kp);
        opening[at.state()] = zeros[at.state()] = 1;
        given = memory.take(READERS * at.Vp), values = memory.take(EVENTS * at.Vp), du = memory.take(N * at.Vp);
        dx = memory.take(N * at.Kp), dq = memory.take(N * at.Kp), dkeys = memory.take(EVENTS * at.Kp), dlog = memory.take(N * at.Kp);
        weight = memory.take(SETS * SCORES), passed = DECAY == PER_HEAD ? memory.take(SETS * SCORES) : weight;
        decays = memory.take(decays_size(p, at)), decay = block.decay;
        std::memset(zeros, 0, sizeof(float) * at.state());
    }
    Head& head() { return block.head; }

    float* slot(int64_t i) const { return states + i * (at.state() + L); }
    // A state as the forward pass lays it out, turned.
    const float* opened(const float* state) {
        for (int v = 0; v < at.Vp; v += at.panel, state += at.Kp * at.panel)
            for (int k = 0; k < at.Kp; k += W) transpose(opening + k * at.Vp + v * W, W, state + k * at.panel, at.panel, W, at.panel);
        return opening;
    }
    void clear_gradient() {
        std::memset(dS, 0, sizeof(float) * at.state());
        kept = {};
    }
    void load_gradient(const Tensor& t, int64_t b, int64_t h) {
        load_state(at.turned(W), dS, t.turned(), b, h);
        kept = {};
    }
    void store_gradient(const Tensor& t, int64_t b, int64_t h) {
        scale_state(at, dS, dS, kept.by);
        store_state(at.turned(W), dS, t.turned(), b, h);
    }

    // A block that is rebuilt leaves its decays for its way back.
    void load(int64_t token, int count, int64_t row, bool kept, bool known) {
        block.begin(token, count);
        if (DECAY == PER_KEY) block.decay = kept ? decays + token % p.segment * at.Kp : decay;
        block.load_events(DECAY != PER_KEY || !known);
        if (ERASE != TIED) block.load_u(values + (SETS - 1) * N * at.Vp);
        if (!ERASES) return;
        const float* saved = p.values + (row * p.T + token) * at.Vp;
        std::memcpy(values, saved, sizeof(float) * count * at.Vp);
        std::memset(values + count * at.Vp, 0, sizeof(float) * (N - count) * at.Vp);
        block.next.add(saved + block.ahead * at.Vp, 4 * N * at.Vp);
    }

    void rebuild(float* slot, const float* from, int64_t token, int count, int64_t row) {
        block.ahead = N;
        load(token, count, row, true, false);
        block.decay_events();
        PutOff state{from[at.state()]};
        const float decay = DECAY == PER_HEAD ? state.decay(*block.total) : 1;
        slot[at.state()] = state.by;
        for (float& left : block.to_end) left /= state.by;
        add<EVENTS>(slot, from, decay, values, [&](int e, int k) { return fw::load(block.ends + e * at.Kp + k) * block.to_end[e % N]; });
    }

    // to = from, decayed, + the sum over E of keys times rows of values
    template <int E, class Keys>
    INLINE void add(float* to, const float* from, float decay, const float* rows, Keys keys) {
        const bool decays = DECAY == PER_KEY || (DECAY == PER_HEAD && decay != 1);
        for (int k = 0; k < at.Kp; k += W, to += at.Vp * W, from += at.Vp * W) {
            vec key[E][NK], left[NK];
#pragma GCC unroll 2
            for (int v = 0; v < NK; v++) {
                left[v] = DECAY == PER_KEY ? fw::load(block.total + k + v * L) : broadcast(decay);
#pragma GCC unroll 16
                for (int e = 0; e < E; e++) key[e][v] = keys(e, k + v * L);
            }
            counted(at.Vp, [&](auto V) INLINE_CALL { add_to_panel(block.next, to, from, rows, V, key, decays ? left : nullptr); });
        }
    }

    void run(const float* S, int64_t token, int count, int64_t row, bool rebuilt) {
        block.ahead = -N;
        load(token, count, row, rebuilt, rebuilt);
        block.load_readers();
        for (int r = 0; r < READERS; r++) left_of_S[r] = block.left[r] * S[at.state()];
        for (int e = 0; e < N; e++) left_of_dS[e] = block.to_end[e] * kept.by;
        block.rows(given + Q * N * at.Vp, to.read[0].out, at.V, at.Vp);
        if (gives_number()) u = block.rows_or_copies(block.u, block.micro().u, at.V, at.Vp);
        q_to = rows_of_keys(dq, to.read[0].q), log_to = rows_of_keys(dlog, to.micro[0].g);
        for (int s = 0; s < SETS; s++) key_to[s] = rows_of_keys(dkeys + s * N * at.Kp, key_gradient(s));
        soon();
        block.scores();
        if (PAIRS) transpose_pairs(ends, block.ends, at.Kp, at.Kp);
        else transpose(ends, L, block.ends, at.Kp, L, at.Kp);
        for (int v = 0; v < at.Vp; v += L) gradient_of_values(v);
        weights();
        for (int i = 0; i < L; i++) of_reader[i] = of_event[i] = of_x[i] = vec{};
        whole = vec{};
        for (int k = 0; k < at.Kp; k += W) keys(S, k);
        if (DECAY == PER_HEAD) log_per_head(static_cast<double>(S[at.state()]) * kept.by);
        advance();
        give();
    }

    // The rows that the block after this one writes
    void soon() {
        const Micro& d = to.micro[0];
        block.soon_written(q_to.past, to.read[0].q, at.K);
        for (int s = 0; s < SETS; s++) block.soon_written(key_to[s].past, key_gradient(s), at.K);
        if (DECAY == PER_KEY) block.soon_written(log_to.past, d.g, at.K);
        if (ERASES) block.soon_written(block.goes_past(d.x, at.K), d.x, at.K);
        block.soon_written(block.goes_past(d.u, at.V), d.u, at.V);
    }

    // They come a vector at a time: where that is half a line they go past the caches by the row, from the room.
    typename Part::Places rows_of_keys(float* room, const Tensor& t) const {
        typename Part::Places out = block.places(room, t, at.K, at.Kp);
        if (out.past && sizeof(vec) < Ahead::LINE) return {room, at.Kp, false, true};
        return out;
    }

    // ---- values ------------------------------------------------------------------------------------------------------

    // L of them, from v on
    APART void gradient_of_values(int v) {
        vec d[EVENTS];
        const float* rows = dS + v * W;
        const int64_t panel = static_cast<int64_t>(at.Vp) * W;
        block.next.fetch(at.Kp);
        if constexpr (PAIRS) narrow_tile(d, rows, W, ends, W, at.Kp / W, panel);
        else square_tile(d, rows, W, ends, W, at.Kp / W, panel);
#pragma GCC unroll 2
        for (int s = 0; s < SETS; s++) from_queries(d + s * N, s, v);
        if (ERASES) from_values(d, v);
        if (ERASE == TIED) return;
#pragma GCC unroll 8
        for (int e = 0; e < N; e++) store(du + e * at.Vp + v, d[EVENTS - N + e]);
    }

    INLINE void from_values(vec* d, int v) {
#pragma GCC unroll 8
        for (int i = N - 1; i > 0; i--)
#pragma GCC unroll 8
            for (int e = 0; e < i; e++) d[e] += block.scores_of(0, X, i)[e] * d[i];
#pragma GCC unroll 8
        for (int e = 0; e < N; e++) store(given + e * at.Vp + v, d[e]);
        if (ERASE != FREE) return;
#pragma GCC unroll 8
        for (int i = 1; i < N; i++)
#pragma GCC unroll 8
            for (int e = 0; e < i; e++) d[EVENTS - N + e] += block.scores_of(1, X, i)[e] * d[i];
    }

    INLINE void from_queries(vec* d, int set, int v) {
#pragma GCC unroll 8
        for (int e = 0; e < N; e++)
            if (DECAY == PER_HEAD) d[e] *= left_of_dS[e];
#pragma GCC unroll 8
        for (int i = 0; i < N; i++) {
            const vec of = fw::load(given + (Q * N + i) * at.Vp + v);
#pragma GCC unroll 8
            for (int e = 0; e <= i; e++) d[e] += block.scores_of(set, Q, i)[e] * of;
        }
    }

    // weight = gradient of what a reader read . value of an event, where it sees it
    void weights() { weights(std::make_integer_sequence<int, N / 2>{}); }
    template <int... PAIR>
    INLINE void weights(std::integer_sequence<int, PAIR...>) {
        for (int s = 0; s < SETS; s++)
            (triangle<Part::KINDS, N, PAIR>(weight + s * SCORES + PAIR * Part::GROUP, given, values + s * N * at.Vp, at.Vp), ...);
        for (int s = 0; s < SETS && DECAY == PER_HEAD; s++)
#pragma GCC unroll 8
            for (int i = 0; i < N; i++) {
                if (ERASES && i) pass(Part::place(s, X, i), &block.factor_of(Q, i - 1, 0));  // the x of a token reads what the q of the last one did
                pass(Part::place(s, Q, i), &block.factor_of(Q, i, 0));
            }
    }
    INLINE static const typename Part::of_events& of(const float* x) { return *reinterpret_cast<const typename Part::of_events*>(x); }
    INLINE void pass(int at, const float* left) const {
        *reinterpret_cast<typename Part::of_events*>(passed + at) = of(weight + at) * of(left);
    }
    INLINE const float* weights_of(int set, int kind, int i) const { return weight + Part::place(set, kind, i); }

    // ---- keys --------------------------------------------------------------------------------------------------------

    // Everything that has one of W keys from k on: T and U are S_0 times the readers' gradients and dS times the values.
    INLINE void keys(const float* S, int k) {
        float T[READERS * W], U[EVENTS * W];
        const float *s = S + k * at.Vp, *d = dS + k * at.Vp;
#pragma GCC unroll 2
        for (int r = 0; r < READERS; r += ROWS) product(T + r * W, given + r * at.Vp, s, left_of_S + r);
#pragma GCC unroll 2
        for (int e = 0; e < EVENTS; e += ROWS) product(U + e * W, values + e * at.Vp, d, left_of_dS + e % N);
        for (int v = 0; v < W && DECAY == PER_HEAD; v += L) whole += row_sums(s + v, d + v);
        for (int v = 0; v < W; v += L) keys(s + v, d + v, k + v, T + v, U + v);
    }

    // Rows times a panel, and times what is left of them
    INLINE void product(float* out, const float* rows, const float* panel, const float* left) {
        counted(at.Vp, [&](auto V) INLINE_CALL { rows_times_panel<ROWS, NK>(block.next, out, rows, V, panel, left); });
    }

    // L of those keys, in columns of the panels and of T and U
    APART void keys(const float* S, const float* d_of_S, int k, float* T, float* U) {
        vec log[N];
        if (DECAY == PER_KEY) per_key(S, d_of_S, k, T, U, log);
        else per_head(k, T, U);
        for (int i = 0; i < N && ERASES; i++) {
            vec x = fw::load(block.reader[X][i] + k), d = fw::load(T + i * W);
            if (DECAY == PER_KEY && block.x_decays()) {
                const vec a = fw::load(block.decay + i * at.Kp + k);
                x *= a, log[i] += x * d * block.cx[i], of_x[i] += x * d, d *= a;
            } else {
                of_x[i] += x * d;
            }
            if (block.micro().x_is_y) store(U + i * W, fw::load(U + i * W) + d * block.cx[i]);
            else store(dx + i * at.Kp + k, d * block.cx[i]);
        }
        for (int i = 0; i < N; i++) {
            q_to.put(i, k, fw::load(T + (Q * N + i) * W));
            if (DECAY == PER_KEY) log_to.put(i, k, log[i]);
        }
        for (int e = 0; e < EVENTS; e++) key_to[e / N].put(e % N, k, fw::load(U + e * W));
    }

    // Where a number decays all keys it is part of T, U and the weights.
    INLINE void per_head(int k, float* T, float* U) {
        if (DECAY == PER_HEAD) {
#pragma GCC unroll 16
            for (int r = 0; r < READERS; r++) of_reader[r] += fw::load(block.reader_row(r) + k) * fw::load(T + r * W);
#pragma GCC unroll 16
            for (int e = 0; e < EVENTS; e++) of_event[e] += fw::load(block.key[e / N][e % N] + k) * fw::load(U + e * W);
        }
        for (int s = 0; s < SETS; s++) {
            vec key[N], d[N];
#pragma GCC unroll 8
            for (int e = 0; e < N; e++) key[e] = fw::load(block.key[s][e] + k), d[e] = fw::load(U + (s * N + e) * W);
#pragma GCC unroll 8
            for (int i = 0; i < N; i++) {
                if (ERASES) pairs(i, T + i * W, fw::load(block.reader[X][i] + k) * block.cx[i], passed + Part::place(s, X, i), key, d);
                pairs(i + 1, T + (Q * N + i) * W, fw::load(block.reader[Q][i] + k), passed + Part::place(s, Q, i), key, d);
            }
#pragma GCC unroll 8
            for (int e = 0; e < N; e++) store(U + (s * N + e) * W, d[e]);
        }
    }

    // A reader and the events that it sees
    INLINE void pairs(int events, float* t, vec reader, const float* w, const vec* key, vec* d) const {
        vec sum = fw::load(t);
#pragma GCC unroll 8
        for (int e = 0; e < events; e++) {
            sum += w[e] * key[e];
            d[e] += w[e] * reader;
        }
        store(t, sum);
    }

    // Where every key has its decay. sink is what an event gives to readers at or after a token, per unit of what is left of it then.
    INLINE void per_key(const float* S, const float* d_of_S, int k, float* T, float* U, vec* log) {
        const int64_t K = at.Kp;
        vec a[N], reader[READERS], so_far[N + 1], to_end[N];
        so_far[0] = broadcast(1), to_end[N - 1] = broadcast(1);
#pragma GCC unroll 8
        for (int i = 0; i < N; i++) a[i] = fw::load(block.decay + i * K + k), so_far[i + 1] = so_far[i] * a[i];
#pragma GCC unroll 8
        for (int i = N - 1; i > 0; i--) to_end[i - 1] = to_end[i] * a[i];
#pragma GCC unroll 16
        for (int r = 0; r < READERS; r++) reader[r] = fw::load(block.reader_row(r) + k);
        for (int i = 0; i < N && block.x_decays(); i++) reader[i] *= a[i];
        vec later = {};  // what readers after a token take from S_0
#pragma GCC unroll 16
        for (int v = N; v > 0; v--) {
            if (ERASES && v < N) later += through(T + v * W, block.scaled + v * K + k, so_far[v]) * block.cx[v];
            later += through(T + (Q * N + v - 1) * W, block.scaled + (Q * N + v - 1) * K + k, so_far[v]);
            log[v - 1] = later;
        }
        vec before = row_sums(S, d_of_S) * so_far[N];  // what passes through all of the block, and what events before a token leave in S
#pragma GCC unroll 8
        for (int e = 0; e < N; e++) {
            log[e] += before;
            for (int s = 0; s < SETS; s++) before += through(U + (s * N + e) * W, block.ends + (s * N + e) * K + k, to_end[e]);
        }
        for (int s = 0; s < SETS; s++) {
            vec sink[N][N], now[N];
#pragma GCC unroll 8
            for (int l = N - 1; l >= 0; l--) {
                const float *x = weights_of(s, X, l + 1 < N ? l + 1 : l), *q = weights_of(s, Q, l);
#pragma GCC unroll 8
                for (int e = 0; e <= l; e++) {
                    vec sum = q[e] * reader[Q * N + l];
                    if (l + 1 < N) {
                        sum += now[e] * a[l + 1];
                        if (ERASES) sum += x[e] * block.cx[l + 1] * reader[l + 1];
                    }
                    sink[l][e] = now[e] = sum;
                }
                store(U + (s * N + l) * W, fw::load(U + (s * N + l) * W) + now[l]);
            }
#pragma GCC unroll 8
            for (int v = 0; v < N; v++) {
                const float *x = weights_of(s, X, v), *q = weights_of(s, Q, v);
                vec of_x = {}, of_q = {}, of_log = {};
#pragma GCC unroll 8
                for (int e = 0; e < v; e++) {
                    if (ERASES) of_x += x[e] * now[e];
                    now[e] *= a[v];
                    of_log += now[e] * sink[v][e];
                }
                now[v] = fw::load(block.key[s][v] + k);
#pragma GCC unroll 8
                for (int e = 0; e <= v; e++) of_q += q[e] * now[e];
                if (ERASES) store(T + v * W, fw::load(T + v * W) + of_x);
                store(T + (Q * N + v) * W, fw::load(T + (Q * N + v) * W) + of_q);
                log[v] += of_log;
            }
        }
    }

    // What L keys hold of S_0 . what they hold of dS
    INLINE vec row_sums(const float* S, const float* d_of_S) const {
        vec sum[4];
        clear(sum);
        for (int v = 0; v < at.Vp; v += 4)
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) sum[j] += fw::load(S + (v + j) * W) * fw::load(d_of_S + (v + j) * W);
        return (sum[0] + sum[1]) + (sum[2] + sum[3]);
    }

    // The product of a decayed row with its gradient, which decays in its turn.
    INLINE vec through(float* t, const float* row, vec left) const {
        const vec d = fw::load(t);
        store(t, d * left);
        return fw::load(row) * d;
    }

    void log_per_head(double of_whole) {
        float taken[L], left_there[L];
        store(taken, sums(of_reader));
        store(left_there, sums(of_event));
        double through = sum_exactly(whole) * of_whole * *block.total, later = 0, earlier = 0;
        for (int l = N - 1; l >= 0; l--) {
            if (ERASES && l + 1 < N) later += taken[l + 1] * block.cx[l + 1];
            later += taken[Q * N + l];
            log_of_head[l] = through + later;
        }
        for (int l = 0; l < N; l++) {
            log_of_head[l] += earlier;
            for (int s = 0; s < SETS; s++) earlier += left_there[s * N + l];
        }
        for (int s = 0; s < SETS; s++) {
            double pairs[N] = {};
            for (int l = N - 1; l > 0; l--)
                for (int e = 0; e <= l; e++) {
                    if (ERASES && l + 1 < N) pairs[e] += weights_of(s, X, l + 1)[e] * block.scores_of(s, X, l + 1)[e];
                    pairs[e] += weights_of(s, Q, l)[e] * block.scores_of(s, Q, l)[e];
                    if (e < l) log_of_head[l] += pairs[e];
                }
        }
    }

    // ---- on, and out -------------------------------------------------------------------------------------------------

    void advance() {
        float numbers[READERS];
        const float decay = DECAY == PER_HEAD ? kept.decay(*block.total) : 1;
        for (int r = 0; r < READERS; r++) numbers[r] = block.left[r] * (ERASES && r < N ? block.cx[r] : 1.0f) / kept.by;
        add<READERS>(dS, dS, decay, given, [&](int r, int k) { return fw::load(block.scaled + r * at.Kp + k) * numbers[r]; });
    }

    const Tensor& key_gradient(int s) const { return s || !ERASES ? to.micro[0].w : to.micro[0].y; }

    void give() {
        const Micro& d = to.micro[0];
        if (!q_to.there) block.put(to.read[0].q, dq, at.K, at.Kp);
        for (int s = 0; s < SETS; s++)
            if (!key_to[s].there) block.put(key_gradient(s), dkeys + s * N * at.Kp, at.K, at.Kp);
        if (ERASES) give_x();
        if (DECAY == PER_KEY && !log_to.there) block.put(d.g, dlog, at.K, at.Kp);
        if (DECAY == PER_HEAD) add_numbers(d.g, block.token * d.g.time, block.count, log_of_head);
        give_values();
    }

    void give_x() {
        const Micro& d = to.micro[0];
        float number[L];
        store(number, sums(of_x));
        for (int i = 0; i < N; i++) {
            const bool decayed = DECAY == PER_HEAD && block.x_decays();
            if (decayed) log_of_head[i] += static_cast<double>(block.cx[i]) * number[i];
            number[i] *= static_cast<float>(block.micro().sx) * (decayed ? block.decay[i] : 1.0f);
        }
        add_numbers(d.cx, block.token * d.cx.time, block.count, number);
        if (!block.micro().x_is_y) block.put(d.x, dx, at.K, at.Kp);
    }

    INLINE bool gives_number() const { return block.micro().u && gradient_of_cu(to.micro[0]); }

    void give_values() {
        if (!block.micro().u) return;
        const float* d = ERASE == TIED ? given : du;
        if (ERASE == TIED) block.numbers(block.cu, block.micro().cu, static_cast<float>(block.micro().su), 1);
        block.put(to.micro[0].u, d, at.V, at.Vp, block.cu);
        if (!gives_number()) return;
        const Tensor number_to = gradient_of_cu(to.micro[0]);
        vec products[L];
        clear(products);
        for (int i = 0; i < N; i++)
            for (int v = 0; v < at.Vp; v += L) products[i] += fw::load(u[i] + v) * fw::load(d + i * at.Vp + v);
        float number[L];
        store(number, sums(products) * static_cast<float>(block.micro().su));
        add_numbers(number_to, block.token * number_to.time, block.count, number);
    }
};

}  // namespace fw
