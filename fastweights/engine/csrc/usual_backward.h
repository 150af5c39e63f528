// The backward pass of the usual programs that erase, block by block from the last to the first. In the words of block.h, with do_i the
// gradient of what q_i read, dS that of S at the end of the block and S_0 the state at its start,
//
//   dval_e = dS^T (D(e -> N) y_e) + sum over i >= e of score(q_i, e) do_i + sum over i > e of score(x_i, e) dval_i
//   dx_i   = P_i (S_0 dval_i)     + sum over e <  i of (dval_i . val_e) D(e -> i) y_e
//   dq_i   = P_{i+1} (S_0 do_i)   + sum over e <= i of (do_i . val_e) D(e -> i + 1) y_e
//   dy_e   = D(e -> N) (dS val_e) + the same pairs, with what read in the place of y_e
//   dS_0   = diag(P_N) dS + sum over i of (P_i x_i) dval_i^T + (P_{i+1} q_i) do_i^T
//
// and the gradient of log a_l is the sum over all paths that a_l decays, as in backward.cpp. S_0 times all readers' gradients is a product
// whose columns, readers, fill a vector; it and dS times the values are turned into rows L keys at a time, where everything that has a key
// is done while it is in registers.
#pragma once
#include "block.h"

namespace fw {

template <Decay DECAY, Erase ERASE, int NV>
struct UsualBackward {
    using Part = Block<DECAY, ERASE, L / 2>;
    static constexpr int N = Part::N, SETS = Part::SETS, EVENTS = Part::EVENTS, READERS = Part::READERS, X = Part::X, Q = Part::Q;
    static_assert(ERASE != NO_ERASE && READERS == L, "readers fill a vector");
    static constexpr bool PAIRS = EVENTS < L;  // events fill half a vector
    static constexpr int W = NV * L, SCORES = N / 2 * Part::GROUP;
    const Problem& p;
    Scratch memory;
    Part block;
    const Layout& at;
    Head to;                        // the gradients of this head
    float *states, *zeros, *dS;     // S_0 of the blocks of a segment; nothing; the gradient of S
    float *given, *values, *du;     // [L][Vp] dval_i and do_i; [L][Vp] val_e, and u_e or zeros; [N][Vp], where the erase is free
    float *seen, *written;          // [Vp][L] the same turned
    float *decays, *decay;          // per key: [segment][Kp] a_i of the blocks that were rebuilt; [N][Kp] those of another
    float *dx, *dq, *dkeys, *dlog;  // [N][Kp]; dkeys [EVENTS][Kp]
    typename Part::Places q_to, key_to[SETS], log_to;  // their rows, or those of tensors
    float *weight, *passed;         // as score: gradient . value; the same times what is left of the event, if that is a number
    vec of_reader[L], of_event[L], of_x[L], whole[4];  // sums over keys: reader . gradient, key . gradient, x . dx, S_0 . dS
    float left_of_events[L];        // per head: D(e -> N)
    double log_of_head[N];

    static int64_t slots(const Problem& p) { return p.segment / N + 2; }
    static int64_t size(const Problem& p) {
        Layout at(p);
        return Part::size(at, true) + (slots(p) + 2) * at.state() + (4 * L + N) * at.Vp + (3 * N + EVENTS) * at.Kp + decays_size(p, at) +
               2 * SETS * SCORES + 512;
    }
    static int64_t decays_size(const Problem& p, const Layout& at) { return DECAY == PER_KEY ? p.segment * at.Kp : 0; }
    static int64_t most_tokens(const Problem&) { return N; }

    UsualBackward(const Problem& problem, float* room) : p(problem), memory{room}, block(p, memory, true), at(block.at) {
        states = memory.take(slots(p) * at.state()), zeros = memory.take(at.state()), dS = memory.take(at.state());
        given = memory.take(L * at.Vp), values = memory.take(L * at.Vp), du = memory.take(N * at.Vp);
        seen = memory.take(L * at.Vp), written = memory.take(L * at.Vp);
        dx = memory.take(N * at.Kp), dq = memory.take(N * at.Kp), dkeys = memory.take(EVENTS * at.Kp), dlog = memory.take(N * at.Kp);
        weight = memory.take(SETS * SCORES), passed = DECAY == PER_HEAD ? memory.take(SETS * SCORES) : weight;
        decays = memory.take(decays_size(p, at)), decay = block.decay;
        std::memset(zeros, 0, sizeof(float) * at.state());
        std::memset(values, 0, sizeof(float) * L * at.Vp);
    }
    Head& head() { return block.head; }

    // A block that is rebuilt leaves its decays for its way back.
    void load(int64_t token, int count, int64_t row, bool kept, bool known) {
        block.begin(token, count);
        if (DECAY == PER_KEY) block.decay = kept ? decays + token % p.segment * at.Kp : decay;
        block.load_events(DECAY != PER_KEY || !known);
        if (ERASE != TIED) {
            block.load_u();
            std::memcpy(values + (SETS - 1) * N * at.Vp, block.u, sizeof(float) * N * at.Vp);
        }
        const float* saved = p.values + (row * p.T + token) * at.Vp;
        std::memcpy(values, saved, sizeof(float) * count * at.Vp);
        std::memset(values + count * at.Vp, 0, sizeof(float) * (N - count) * at.Vp);
        block.next.add(saved + block.ahead * at.Vp, 4 * N * at.Vp);
    }

    void rebuild(float* slot, const float* from, int64_t token, int count, int64_t row) {
        block.ahead = N;
        load(token, count, row, true, false);
        block.decay_events();
        float numbers[EVENTS];
        for (int s = 0; s < SETS; s++) std::memcpy(numbers + s * N, block.to_end, sizeof block.to_end);
        add<EVENTS>(slot, from, block.ends, values, numbers);
    }

    // to = from, decayed, + the sum over E of keys times numbers times rows
    template <int E>
    INLINE void add(float* to, const float* from, const float* keys, const float* rows, const float (&numbers)[E]) {
        for (int n = 0; n < at.panels; n++, to += at.Kp * W, from += at.Kp * W, rows += W) {
            vec value[E][NV];
#pragma GCC unroll 16
            for (int e = 0; e < E; e++)
#pragma GCC unroll 2
                for (int v = 0; v < NV; v++) value[e][v] = fw::load(rows + e * at.Vp + v * L) * numbers[e];
            write_panel<DECAY>(block.next, to, from, block.total, keys, at.Kp, value);
        }
    }

    void run(const float* S, int64_t token, int count, int64_t row, bool rebuilt) {
        block.ahead = -N;
        load(token, count, row, rebuilt, rebuilt);
        block.load_readers();
        block.rows(given + Q * N * at.Vp, to.read[0].out, at.V, at.Vp);
        soon();
        block.scores();
        for (int n = 0; n < at.panels; n++) gradient_of_values(n);
        turn_values();
        weights();
        for (int i = 0; i < L; i++) of_reader[i] = of_event[i] = of_x[i] = vec{};
        for (vec& x : whole) x = vec{};
        q_to = block.places(dq, to.read[0].q, at.K, at.Kp), log_to = block.places(dlog, to.micro[0].g, at.K, at.Kp);
        for (int s = 0; s < SETS; s++) key_to[s] = block.places(dkeys + s * N * at.Kp, key_gradient(s), at.K, at.Kp);
        for (int k = 0; k < at.Kp; k += L) keys(S, k);
        if (DECAY == PER_HEAD) log_per_head();
        advance();
        give();
    }

    // The rows that the block after this one writes
    void soon() {
        const Micro& d = to.micro[0];
        block.soon(to.read[0].q, at.K);
        for (const Tensor* t : {&d.x, &d.y, &d.w}) block.soon(*t, at.K);
        if (DECAY == PER_KEY) block.soon(d.g, at.K);
        block.soon(d.u, at.V);
    }

    // ---- values ------------------------------------------------------------------------------------------------------

    INLINE void gradient_of_values(int n) {
        const float* panel = dS + n * static_cast<int64_t>(at.Kp) * W;
        vec d[N][NV], second[N][NV];
        read_panel(block.next, d, block.ends, at.Kp, panel);
        from_queries(d, 0, n);
#pragma GCC unroll 8
        for (int i = N - 1; i > 0; i--)
#pragma GCC unroll 8
            for (int e = 0; e < i; e++)
#pragma GCC unroll 2
                for (int v = 0; v < NV; v++) d[e][v] += block.scores_of(0, X, i)[e] * d[i][v];
        put_values(given, d, n);
        if (ERASE != FREE) return;
        read_panel(block.next, second, block.ends + N * at.Kp, at.Kp, panel);
        from_queries(second, 1, n);
#pragma GCC unroll 8
        for (int i = 1; i < N; i++)
#pragma GCC unroll 2
            for (int v = 0; v < NV; v++) {
                const vec of = fw::load(given + i * at.Vp + n * W + v * L);
#pragma GCC unroll 8
                for (int e = 0; e < i; e++) second[e][v] += block.scores_of(1, X, i)[e] * of;
            }
        put_values(du, second, n);
    }

    INLINE void from_queries(vec (&d)[N][NV], int set, int n) {
#pragma GCC unroll 8
        for (int e = 0; e < N; e++)
#pragma GCC unroll 2
            for (int v = 0; v < NV; v++)
                if (DECAY == PER_HEAD) d[e][v] *= block.to_end[e];
#pragma GCC unroll 8
        for (int i = 0; i < N; i++)
#pragma GCC unroll 2
            for (int v = 0; v < NV; v++) {
                const vec of = fw::load(given + (Q * N + i) * at.Vp + n * W + v * L);
#pragma GCC unroll 8
                for (int e = 0; e <= i; e++) d[e][v] += block.scores_of(set, Q, i)[e] * of;
            }
    }

    INLINE void put_values(float* rows, const vec (&d)[N][NV], int n) {
#pragma GCC unroll 8
        for (int e = 0; e < N; e++)
#pragma GCC unroll 2
            for (int v = 0; v < NV; v++) store(rows + e * at.Vp + n * W + v * L, d[e][v]);
    }

    void turn_values() {
        transpose(seen, L, given, at.Vp, L, at.Vp);
        if (PAIRS) transpose_pairs(written, values, at.Vp, at.Vp);
        else transpose(written, L, values, at.Vp, L, at.Vp);
        for (int e = 0; e < EVENTS; e++) left_of_events[e] = block.to_end[e % N];
    }

    // weight = gradient of what a reader read . value of an event, where it sees it
    void weights() { weights(std::make_integer_sequence<int, N / 2>{}); }
    template <int... PAIR>
    INLINE void weights(std::integer_sequence<int, PAIR...>) {
        for (int s = 0; s < SETS; s++)
            (triangle<2, N, PAIR>(weight + s * SCORES + PAIR * Part::GROUP, given, values + s * N * at.Vp, at.Vp), ...);
        for (int s = 0; s < SETS && DECAY == PER_HEAD; s++)
#pragma GCC unroll 8
            for (int i = 0; i < N; i++) {
                if (i) pass(place(s, X, i), &block.factor_of(Q, i - 1, 0));  // the x of a token reads what the q of the last one did
                pass(place(s, Q, i), &block.factor_of(Q, i, 0));
            }
    }
    INLINE void pass(int at, const float* left) const {
        using Numbers = typename Part::of_events;
        *reinterpret_cast<Numbers*>(passed + at) = *reinterpret_cast<const Numbers*>(weight + at) * *reinterpret_cast<const Numbers*>(left);
    }
    INLINE static int place(int set, int kind, int i) { return set * SCORES + Part::place(kind, i); }
    INLINE const float* weights_of(int set, int kind, int i) const { return weight + place(set, kind, i); }

    // ---- keys --------------------------------------------------------------------------------------------------------

    // Everything that has one of L keys from k on: T and U are S_0 times the readers' gradients and dS times the values.
    INLINE void keys(const float* S, int k) {
        float T[L * L], U[L * L];
        vec log[N];
        product(T, S, seen, block.left, k);
        if (PAIRS) narrow_product(U, k);
        else product(U, dS, written, left_of_events, k);
        if (DECAY == PER_KEY) per_key(S, k, T, U, log);
        else per_head(S, k, T, U);
        for (int i = 0; i < N; i++) {
            vec x = fw::load(block.reader[X][i] + k), d = fw::load(T + i * L);
            if (DECAY == PER_KEY && block.x_decays()) {
                const vec a = fw::load(block.decay + i * at.Kp + k);
                x *= a, log[i] += x * d * block.cx[i], of_x[i] += x * d, d *= a;
            } else {
                of_x[i] += x * d;
            }
            if (block.micro().x_is_y) store(U + i * L, fw::load(U + i * L) + d * block.cx[i]);
            else store(dx + i * at.Kp + k, d * block.cx[i]);
        }
        for (int i = 0; i < N; i++) {
            store(q_to[i] + k, fw::load(T + (Q * N + i) * L));
            if (DECAY == PER_KEY) store(log_to[i] + k, log[i]);
        }
        for (int e = 0; e < EVENTS; e++) store(key_to[e / N][e % N] + k, fw::load(U + e * L));
    }

    INLINE void product(float* out, const float* state, const float* columns, const float* scale, int k) {
        vec rows[L];
        block.next.fetch();
        square_tile(rows, state + k * W, W, columns, W, fw::load(scale), at.panels, static_cast<int64_t>(at.Kp) * W);
#pragma GCC unroll 16
        for (int r = 0; r < L; r++) store(out + r * L, rows[r]);
    }
    INLINE void narrow_product(float* out, int k) {
        vec rows[L / 2];
        block.next.fetch();
        narrow_tile(rows, dS + k * W, W, written, W, at.panels, static_cast<int64_t>(at.Kp) * W);
#pragma GCC unroll 8
        for (int e = 0; e < L / 2; e++) store(out + e * L, DECAY == PER_HEAD ? rows[e] * block.to_end[e] : rows[e]);
    }

    // Where a number decays all keys it is part of T, U and the weights.
    INLINE void per_head(const float* S, int k, float* T, float* U) {
        const int64_t K = at.Kp;
        if (DECAY == PER_HEAD) {
            for (int n = 0; n < at.panels; n++)
                for (int64_t of = (n * K + k) * W; of < (n * K + k + L) * W; of += 4 * L)
#pragma GCC unroll 4
                    for (int j = 0; j < 4; j++) whole[j] += fw::load(S + of + j * L) * fw::load(dS + of + j * L);
#pragma GCC unroll 16
            for (int r = 0; r < READERS; r++) of_reader[r] += fw::load(block.reader_row(r) + k) * fw::load(T + r * L);
#pragma GCC unroll 16
            for (int e = 0; e < EVENTS; e++) of_event[e] += fw::load(block.key[e / N][e % N] + k) * fw::load(U + e * L);
        }
        for (int s = 0; s < SETS; s++) {
            vec key[N], d[N];
#pragma GCC unroll 8
            for (int e = 0; e < N; e++) key[e] = fw::load(block.key[s][e] + k), d[e] = fw::load(U + (s * N + e) * L);
#pragma GCC unroll 8
            for (int i = 0; i < N; i++) {
                pairs(i, T + i * L, fw::load(block.reader[X][i] + k) * block.cx[i], passed + place(s, X, i), key, d);
                pairs(i + 1, T + (Q * N + i) * L, fw::load(block.reader[Q][i] + k), passed + place(s, Q, i), key, d);
            }
#pragma GCC unroll 8
            for (int e = 0; e < N; e++) store(U + (s * N + e) * L, d[e]);
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
    INLINE void per_key(const float* S, int k, float* T, float* U, vec* log) {
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
            if (v < N) later += through(T + v * L, block.scaled + v * K + k, so_far[v]) * block.cx[v];
            later += through(T + (Q * N + v - 1) * L, block.scaled + (Q * N + v - 1) * K + k, so_far[v]);
            log[v - 1] = later;
        }
        vec before = whole_rows(S, k) * so_far[N];  // what passes through all of the block, and what events before a token leave in S
#pragma GCC unroll 8
        for (int e = 0; e < N; e++) {
            log[e] += before;
            for (int s = 0; s < SETS; s++) before += through(U + (s * N + e) * L, block.ends + (s * N + e) * K + k, to_end[e]);
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
                        sum += x[e] * block.cx[l + 1] * reader[l + 1];
                    }
                    sink[l][e] = now[e] = sum;
                }
                store(U + (s * N + l) * L, fw::load(U + (s * N + l) * L) + now[l]);
            }
#pragma GCC unroll 8
            for (int v = 0; v < N; v++) {
                const float *x = weights_of(s, X, v), *q = weights_of(s, Q, v);
                vec of_x = {}, of_q = {}, of_log = {};
#pragma GCC unroll 8
                for (int e = 0; e < v; e++) {
                    of_x += x[e] * now[e];
                    now[e] *= a[v];
                    of_log += now[e] * sink[v][e];
                }
                now[v] = fw::load(block.key[s][v] + k);
#pragma GCC unroll 8
                for (int e = 0; e <= v; e++) of_q += q[e] * now[e];
                store(T + v * L, fw::load(T + v * L) + of_x);
                store(T + (Q * N + v) * L, fw::load(T + (Q * N + v) * L) + of_q);
                log[v] += of_log;
            }
        }
    }

    // a row of S_0 . the same row of dS, for L keys from k on
    INLINE vec whole_rows(const float* S, int k) const {
        vec products[L];
        clear(products);
        for (int n = 0; n < at.panels; n++) {
            const int64_t of = (static_cast<int64_t>(n) * at.Kp + k) * W;
#pragma GCC unroll 16
            for (int j = 0; j < L; j++)
#pragma GCC unroll 2
                for (int v = 0; v < NV; v++) products[j] += fw::load(S + of + (j * NV + v) * L) * fw::load(dS + of + (j * NV + v) * L);
        }
        return sums(products);
    }

    // The product of a decayed row with its gradient, which decays in its turn.
    INLINE vec through(float* t, const float* row, vec left) const {
        const vec d = fw::load(t);
        store(t, d * left);
        return fw::load(row) * d;
    }

    void log_per_head() {
        float taken[L], left_there[L];
        store(taken, sums(of_reader));
        store(left_there, sums(of_event));
        double through = sum_exactly((whole[0] + whole[1]) + (whole[2] + whole[3])) * *block.total, later = 0, earlier = 0;
        for (int l = N - 1; l >= 0; l--) {
            if (l + 1 < N) later += taken[l + 1] * block.cx[l + 1];
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
                    if (l + 1 < N) pairs[e] += weights_of(s, X, l + 1)[e] * block.scores_of(s, X, l + 1)[e];
                    pairs[e] += weights_of(s, Q, l)[e] * block.scores_of(s, Q, l)[e];
                    if (e < l) log_of_head[l] += pairs[e];
                }
        }
    }

    // ---- on, and out -------------------------------------------------------------------------------------------------

    void advance() {
        float numbers[READERS];
        for (int r = 0; r < READERS; r++) numbers[r] = block.left[r] * (r < N ? block.cx[r] : 1.0f);
        add<READERS>(dS, dS, block.scaled, given, numbers);
    }

    const Tensor& key_gradient(int s) const { return s ? to.micro[0].w : to.micro[0].y; }

    void give() {
        const Micro& d = to.micro[0];
        if (q_to.first == dq) block.put(to.read[0].q, dq, at.K, at.Kp);
        for (int s = 0; s < SETS; s++) {
            float* rows = dkeys + s * N * at.Kp;
            if (key_to[s].first == rows) block.put(key_gradient(s), rows, at.K, at.Kp);
        }
        float number[L];
        store(number, sums(of_x));
        for (int i = 0; i < N; i++) {
            const bool decayed = DECAY == PER_HEAD && block.x_decays();
            if (decayed) log_of_head[i] += static_cast<double>(block.cx[i]) * number[i];
            number[i] *= static_cast<float>(block.micro().sx) * (decayed ? block.decay[i] : 1.0f);
        }
        add_numbers(d.cx, block.token * d.cx.time, block.count, number);
        if (!block.micro().x_is_y) block.put(d.x, dx, at.K, at.Kp);
        if (DECAY == PER_KEY && log_to.first == dlog) block.put(d.g, dlog, at.K, at.Kp);
        if (DECAY == PER_HEAD) add_numbers(d.g, block.token * d.g.time, block.count, log_of_head);
        give_values();
    }

    void give_values() {
        const Tensor& u = block.micro().u;
        if (!u) return;
        const float* d = ERASE == TIED ? given : du;
        if (ERASE == TIED) block.numbers(block.cu, block.micro().cu, static_cast<float>(block.micro().su), 1);
        block.put(to.micro[0].u, d, at.V, at.Vp, block.cu);
        const Tensor number_to = gradient_of_cu(to.micro[0]);
        if (!number_to) return;
        const typename Part::Rows row = block.rows_or_copies(block.u, u, at.V, at.Vp);
        vec products[L];
        clear(products);
        for (int i = 0; i < N; i++)
            for (int v = 0; v < at.Vp; v += L) products[i] += fw::load(row[i] + v) * fw::load(d + i * at.Vp + v);
        float number[L];
        store(number, sums(products) * static_cast<float>(block.micro().su));
        add_numbers(number_to, block.token * number_to.time, block.count, number);
    }
};

}  // namespace fw
