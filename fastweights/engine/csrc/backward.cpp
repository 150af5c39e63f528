// The backward pass, chunk by chunk from the last to the first. do_r is the gradient of what reader r read: of val_i for x_i (so that
// du_i = dval_i), of the output for q_r. dS is the gradient of S at the end of the chunk, S_0 the state at its start:
//
//   dval_e    = dS^T (D(e -> C) y_e) + sum over readers r that see e of score_re do_r        from the last to the first
//   dreader_r = P (S_0 do_r) + sum over e < p_r of (do_r . val_e) D(e -> p_r) y_e
//   dy_e      = D(e -> C) (dS val_e) + sum over r of (do_r . val_e) D(e -> p_r) reader_r
//   dlog a_l  = P_C rowsum(S_0 dS) + what readers at or after l take from S_0 + what events before l leave in S + the pairs (e, r) around l
//   dS_0      = diag(P_C) dS + sum over r of (P reader_r) do_r^T
//
// dlog a is a sum over the paths that a_l decays, so that nothing cancels and nothing is divided by a decay. The states S_0 of a segment are
// rebuilt from its checkpoint and the values that the forward pass saved. A read of a program on rows is the same with q and the
// gradient of what was read in each other's place. Heads that share a key are one task, so that sums over them have one order.
#include <type_traits>

#include "usual_backward.h"

namespace fw {

template <Decay DECAY, Erase ERASE>
struct Backward {
    using Part = Chunk<DECAY, ERASE>;
    static constexpr int EVENTS = Part::EVENTS, SETS = Part::SETS;
    const Problem& p;
    Layout at;
    Scratch memory;
    Part chunk;
    Head to;                        // the gradients of this head
    float *states, *zeros, *dS;     // S_0 of the chunks of a segment; nothing; the gradient of S
    float *given, *given_turned;    // [2C][Vp] do_r, and transposed
    float *values_turned, *dvalues; // [EVENTS][Vp]
    float *weight, *full;           // [2C][EVENTS] do_r . val_e; the same times the reader's coefficient (and, per head, D)
    float *dreaders, *dkeys;        // [2C][Kp], [EVENTS][Kp]
    float *turned, *dlog;           // a product with tokens along rows; [C][Kp]
    double log_of_head[C];

    static int64_t slots(const Problem& p) { return p.segment / Part::most_tokens(p) + 2; }
    static int64_t size(const Problem& p) {
        Layout at(p);
        return Part::size(at) + (slots(p) + 2) * at.state() + (4 * C + 2 * EVENTS) * at.Vp + 4 * C * EVENTS +
               (4 * C + EVENTS + C) * at.Kp + 4096;
    }

    Backward(const Problem& problem, float* room)
        : p(problem), at(p), memory{room}, chunk(p, at, memory, false) {
        chunk.gradient = &to;
        states = memory.take(slots(p) * at.state()), zeros = memory.take(at.state()), dS = memory.take(at.state());
        given = memory.take(2 * C * at.Vp), given_turned = memory.take(2 * C * at.Vp);
        values_turned = memory.take(EVENTS * at.Vp), dvalues = memory.take(EVENTS * at.Vp);
        weight = memory.take(2 * C * EVENTS), full = memory.take(2 * C * EVENTS);
        dreaders = memory.take(2 * C * at.Kp), dkeys = memory.take(EVENTS * at.Kp);
        turned = memory.take(2 * C * at.Kp), dlog = memory.take(C * at.Kp);
        std::memset(zeros, 0, sizeof(float) * at.state());
    }

    Head& head() { return chunk.head; }
    float* slot(int64_t i) const { return states + i * at.state(); }
    const float* opened(const float* state) { return state; }
    void clear_gradient() { std::memset(dS, 0, sizeof(float) * at.state()); }
    void load_gradient(const Tensor& t, int64_t b, int64_t h) { load_state(at, dS, t, b, h); }
    void store_gradient(const Tensor& t, int64_t b, int64_t h) { store_state(at, dS, t, b, h); }
    static int64_t most_tokens(const Problem& p) { return Part::most_tokens(p); }

    void rebuild(float* slot, const float* from, int64_t token, int count, int64_t row) {
        chunk.load_keys(token, count, false);
        load_values(row);
        chunk.write(slot, from, chunk.ends);
    }

    void load_values(int64_t of_head) {
        if (ERASE != NO_ERASE) {
            const float* values = p.values + (of_head * p.T + chunk.token) * p.n * at.Vp;
            std::memcpy(chunk.values, values, sizeof(float) * chunk.steps * at.Vp);
            chunk.next.add(values + chunk.ahead * p.n * at.Vp, 4 * chunk.steps * at.Vp);
        }
        if (ERASE != TIED) chunk.load_u(chunk.values + (ERASE == FREE ? C * at.Vp : 0));
    }

    void run(const float* S, int64_t token, int count, int64_t row, bool) {
        chunk.load_keys(token, count, true);
        load_values(row);
        const int readers = ERASE == NO_ERASE ? C : 2 * C, from = 2 * C - readers;
        chunk.scores();
        for (int j = 0; j < p.reads; j++)
            chunk.vectors(given + C * at.Vp, p.backward_reads ? chunk.head.read[j].q : to.read[j].out, j, chunk.per_token, at.V, at.Vp);
        gradient_of_values();
        for (int s = 0; s < SETS; s++) transpose(values_turned + s * C, EVENTS, chunk.values + s * C * at.Vp, at.Vp, C, at.Vp);
        transpose(given_turned, readers, given + from * at.Vp, at.Vp, readers, at.Vp);
        weights(from);
        read_back(chunk.next, at, turned, S, given_turned, readers);
        transpose(dreaders + from * at.Kp, at.Kp, turned, readers, at.Kp, readers);
        read_back(chunk.next, at, turned, dS, values_turned, EVENTS);
        transpose(dkeys, at.Kp, turned, EVENTS, at.Kp, EVENTS);
        if (DECAY != NO_DECAY) through_the_chunk(S);
        advance();
        if (DECAY == PER_KEY) within_per_key();
        else within();
        if (p.backward_reads) gradient_of_backward_queries(S);
        write_gradients();
    }

    // ---- value space -------------------------------------------------------------------------------------------------

    INLINE float* gradient_of_first() { return ERASE == NO_ERASE ? dvalues : given; }

    void gradient_of_values() {
        float* first = gradient_of_first();
        read_rows(chunk.next, at, first, chunk.ends, dS, chunk.steps);
        solve(first, 0, ERASE != NO_ERASE);
        if (ERASE != FREE) return;
        read_rows(chunk.next, at, dvalues + C * at.Vp, chunk.ends + C * at.Kp, dS, chunk.steps);
        solve(dvalues + C * at.Vp, C, true);
    }

    // rows_e += what later readers of event `set` + e pass on
    void solve(float* rows, int set, bool with_x) {
        const int* of = chunk.versions.of;
        for (int e = chunk.steps - 1; e >= 0; e--) {
            int r = 0;
            while (r < chunk.reads && of[C + r] <= e) r++;
            const float* score = chunk.score + set + e;
            combine(rows + e * at.Vp, score + (C + r) * EVENTS, EVENTS, given + (C + r) * at.Vp, at.Vp, chunk.reads - r, at.Vp);
            if (with_x) combine(rows + e * at.Vp, score + (e + 1) * EVENTS, EVENTS, given + (e + 1) * at.Vp, at.Vp, chunk.steps - 1 - e, at.Vp);
        }
    }

    // weight_re = do_r . val_e, zero where r does not see e
    void weights(int from) {
        for (int r = from; r < 2 * C; r += 2 * MR)
            for (int e = 0; e < EVENTS && r % C < (r < C ? chunk.steps : chunk.reads); e += L)
                tile<2 * MR, 1, ZERO>(weight + r * EVENTS + e, EVENTS, given + r * at.Vp, at.Vp, 1, values_turned + e, EVENTS, at.Vp, nullptr, nullptr, 0);
        each_reader([&](int r, int seen) {
            for (int e = 0; e < EVENTS; e += L) {
                float* w = weight + r * EVENTS + e;
                store(w, select(first_lanes(seen - e % C), load(w), vec{}));
            }
        });
    }

    template <class F>
    void each_reader(F f) const {
        for (int i = 0; i < chunk.steps && ERASE != NO_ERASE; i++) f(i, chunk.versions.of[i]);
        for (int r = C; r < C + chunk.reads; r++) f(r, chunk.versions.of[r]);
    }

    // full_re = weight_re times the coefficient of the reader; per head D becomes part of both
    void weigh() {
        each_reader([&](int r, int seen) {
            for (int e = 0; e < EVENTS; e += L) {
                vec x = load(weight + r * EVENTS + e);
                if (DECAY == PER_HEAD) x = select(first_lanes(seen - e % C), x * load(chunk.between + seen * C + e % C), vec{});
                store(weight + r * EVENTS + e, x);
                store(full + r * EVENTS + e, r < C ? x * chunk.cx[r] : x);
            }
        });
    }

    // ---- key space ---------------------------------------------------------------------------------------------------

    // the products of SUMMED numbers of S with those of dS, summed to a vector
    static constexpr int SUMMED = 8 * L;
    INLINE vec products_with_dS(const float* S, int64_t at) const {
        vec sum[4] = {};
        for (int i = 0; i < SUMMED; i += 4 * L)
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) sum[j] += load(S + at + i + j * L) * load(dS + at + i + j * L);
        return (sum[0] + sum[1]) + (sum[2] + sum[3]);
    }

    // What passes through the start or the end of the chunk: decays dreaders and dkeys, and begins dlog.
    void through_the_chunk(const float* S) {
        if (DECAY == PER_KEY) through_per_key(S);
        else through_per_head(S);
    }

    void through_per_key(const float* S) {
        const int steps = chunk.steps;
        const Versions& at_version = chunk.versions;
        for (int k = 0; k < at.Kp; k += L) {
            vec from_start = {}, taken[C], to_end[C], a = broadcast(1);
            for (int v = steps; v >= 0; v--) {
                for (int n = at_version.start[v]; n < at_version.start[v + 1]; n++) {
                    int of = at_version.reader[n] * at.Kp + k;
                    vec d = load(dreaders + of);
                    from_start += load(chunk.scaled + of) * d;
                    store(dreaders + of, d * load(chunk.left + v * at.Kp + k));
                }
                if (v == 0) break;
                taken[v - 1] = from_start, to_end[v - 1] = a;
                a *= load(chunk.decay + (v - 1) * at.Kp + k);
            }
            vec whole = row_sums(at, S, dS, k) * load(chunk.left + steps * at.Kp + k), left_there = {};
            for (int e = 0; e < steps; e++) {
                store(dlog + e * at.Kp + k, whole + (taken[e] + left_there));
                for (int s = 0; s < SETS; s++) {
                    int of = (s * C + e) * at.Kp + k;
                    vec d = load(dkeys + of);
                    left_there += load(chunk.ends + of) * d;
                    store(dkeys + of, d * to_end[e]);
                }
            }
        }
    }

    // One number a micro-step: sums over rows, kept in double precision.
    void through_per_head(const float* S) {
        const int steps = chunk.steps;
        float taken[2 * C], left_there[EVENTS];
        double whole = 0, later = 0, earlier = 0;
        for (int64_t i = 0; i < at.state(); i += SUMMED) whole += sum_exactly(products_with_dS(S, i));
        whole *= chunk.left[steps];
        row_products(taken, dreaders, chunk.scaled, at.Kp, 2 * C, at.Kp);
        row_products(left_there, dkeys, chunk.ends, at.Kp, EVENTS, at.Kp);
        each_reader([&](int r, int seen) { scale(dreaders + r * at.Kp, chunk.left[seen]); });
        for (int s = 0; s < EVENTS; s += C)
            for (int e = 0; e < steps; e++) scale(dkeys + (s + e) * at.Kp, chunk.to_end(e));
        for (int l = steps - 1; l >= 0; l--) {
            for (int n = chunk.versions.start[l + 1]; n < chunk.versions.start[l + 2]; n++) later += taken[chunk.versions.reader[n]];
            log_of_head[l] = whole + later;
        }
        for (int l = 0; l < steps; l++) {
            log_of_head[l] += earlier;
            for (int s = 0; s < EVENTS; s += C) earlier += left_there[s + l];
        }
    }

    INLINE void scale(float* row, float by) const {
        for (int k = 0; k < at.Kp; k += L) store(row + k, load(row + k) * by);
    }

    // dS at the start of the chunk
    void advance() {
        if (ERASE == NO_ERASE)
            write_rows(chunk.next, at, dS, dS, chunk.total(), Part::TOTAL_STRIDE, chunk.scaled + C * at.Kp, given + C * at.Vp, chunk.reads);
        else
            write_two_sets(chunk.next, at, dS, dS, chunk.total(), Part::TOTAL_STRIDE, chunk.scaled, given, chunk.steps, chunk.reads);
    }

    // Between the events and readers of the chunk, where decays are numbers and part of the weights.
    void within() {
        const int* of = chunk.versions.of;
        if (DECAY == PER_HEAD) pairs_per_head();
        weigh();
        for (int s = 0; s < SETS; s++) {
            const float* keys = chunk.keys + s * C * at.Kp;
            for (int r = 0; r < chunk.reads; r++)
                combine(dreaders + (C + r) * at.Kp, weight + (C + r) * EVENTS + s * C, 1, keys, at.Kp, of[C + r], at.Kp);
            for (int i = 0; i < chunk.steps && ERASE != NO_ERASE; i++)
                combine(dreaders + i * at.Kp, weight + i * EVENTS + s * C, 1, keys, at.Kp, of[i], at.Kp);
            for (int e = 0; e < chunk.steps; e++) {
                float *to = dkeys + (s * C + e) * at.Kp, *w = full + s * C + e;
                int r = 0;
                while (r < chunk.reads && of[C + r] <= e) r++;
                combine(to, w + (C + r) * EVENTS, EVENTS, chunk.readers + (C + r) * at.Kp, at.Kp, chunk.reads - r, at.Kp);
                if (ERASE != NO_ERASE)
                    combine(to, w + (e + 1) * EVENTS, EVENTS, chunk.readers + (e + 1) * at.Kp, at.Kp, chunk.steps - 1 - e, at.Kp);
            }
        }
    }

    // dlog_l += sum over e < l <= p_r - 1 of what event e gave to reader r
    void pairs_per_head() {
        const Versions& at_version = chunk.versions;
        for (int e = 0; e < EVENTS; e += L) {
            vec later = {};
            for (int l = chunk.steps - 1; l > 0; l--) {
                for (int n = at_version.start[l + 1]; n < at_version.start[l + 2]; n++) {
                    int of = at_version.reader[n] * EVENTS + e;
                    later += load(weight + of) * load(chunk.score + of);
                }
                log_of_head[l] += sum_exactly(select(first_lanes(l - e % C), later, vec{}));
            }
        }
    }

    // The same where every key has its decay: a vector of keys at a time. sink_le is what event e gives to readers at or after
    // micro-step l, per unit of what is left of it then.
    void within_per_key() {
        const Versions& at_version = chunk.versions;
        const int steps = chunk.steps;
        weigh();
        for (int k = 0; k < at.Kp; k += L) {
            vec sinks[C][EVENTS], now[EVENTS];
            for (int l = steps - 1; l >= 0; l--)
                for (int s = 0; s < EVENTS; s += C) {
                    vec a = l + 1 < steps ? load(chunk.decay + (l + 1) * at.Kp + k) : vec{};
                    for (int e = 0; e <= l; e++) now[s + e] = l + 1 < steps ? now[s + e] * a : vec{};
                    for (int n = at_version.start[l + 1]; n < at_version.start[l + 2]; n++) {
                        int r = at_version.reader[n];
                        vec reader = load(chunk.readers + r * at.Kp + k);
                        for (int e = 0; e <= l; e++) now[s + e] += full[r * EVENTS + s + e] * reader;
                    }
                    for (int e = 0; e < l; e++) sinks[l][s + e] = now[s + e];
                    float* to = dkeys + (s + l) * at.Kp + k;
                    store(to, load(to) + now[s + l]);
                }
            for (int v = 0; v <= steps; v++) {
                for (int n = at_version.start[v]; n < at_version.start[v + 1]; n++) {
                    int r = at_version.reader[n];
                    vec sum = load(dreaders + r * at.Kp + k);
                    for (int s = 0; s < EVENTS; s += C)
                        for (int e = 0; e < v; e++) sum += weight[r * EVENTS + s + e] * now[s + e];
                    store(dreaders + r * at.Kp + k, sum);
                }
                if (v == steps) break;
                vec a = load(chunk.decay + v * at.Kp + k), sum = load(dlog + v * at.Kp + k);
                for (int s = 0; s < EVENTS; s += C) {
                    for (int e = 0; e < v; e++) {
                        now[s + e] *= a;
                        sum += now[s + e] * sinks[v][s + e];
                    }
                    now[s + v] = load(chunk.keys + (s + v) * at.Kp + k);
                }
                store(dlog + v * at.Kp + k, sum);
            }
        }
    }

    // ---- out ---------------------------------------------------------------------------------------------------------

    // The query of a program on rows is in value space: its gradient is read as an output is.
    void gradient_of_backward_queries(const float* S) {
        float* rows = given_turned;
        read_rows(chunk.next, at, rows, chunk.scaled + C * at.Kp, S, chunk.reads);
        for (int r = 0; r < chunk.reads; r++)
            for (int s = 0; s < SETS; s++)
                combine(rows + r * at.Vp, chunk.score + (C + r) * EVENTS + s * C, 1, chunk.values + s * C * at.Vp, at.Vp,
                        chunk.versions.of[C + r], at.Vp);
        for (int j = 0; j < p.reads; j++) chunk.put(to.read[j].q, j, chunk.per_token, rows, at.V, at.Vp);
    }

    void write_gradients() {
        if (ERASE != NO_ERASE) gradients_of_x();
        gradients_of_u();
        for (int j = 0; j < p.reads && !p.backward_reads; j++)
            chunk.put(to.read[j].q, j, chunk.per_token, dreaders + C * at.Kp, at.K, at.Kp);
        for (int j = 0; j < p.n; j++) {
            const Micro& d = to.micro[j];
            chunk.put(ERASE == NO_ERASE ? d.w : d.y, j, chunk.n, dkeys, at.K, at.Kp);
            if (ERASE == FREE) chunk.put(d.w, j, chunk.n, dkeys + C * at.Kp, at.K, at.Kp);
            if (DECAY == PER_KEY) chunk.put(d.g, j, chunk.n, dlog, at.K, at.Kp);
            if (DECAY == PER_HEAD) put_numbers(d.g, j, log_of_head);
        }
    }

    template <class Number>
    void put_numbers(const Tensor& t, int j, const Number* x) {
        add_numbers(t, chunk.token * t.time, chunk.tokens, x + j, chunk.n);
    }

    void gradients_of_x() {
        float inner[C], number[C];
        row_products(inner, chunk.readers, dreaders, at.Kp, C, at.Kp);
        for (int i = 0; i < chunk.steps; i++) {
            const Micro& m = chunk.micro(i);
            const bool decayed = DECAY != NO_DECAY && m.decayed;
            number[i] = static_cast<float>(inner[i] * m.sx) * (DECAY == PER_HEAD && decayed ? chunk.decay[i] : 1.0f);
            if (DECAY == PER_HEAD && decayed) log_of_head[i] += static_cast<double>(chunk.cx[i]) * inner[i];
            if (DECAY == PER_KEY && decayed) gradient_of_decayed_x(i);
            if (m.x_is_y) add_to_key(i);
        }
        for (int j = 0; j < p.n; j++) {
            put_numbers(to.micro[j].cx, j, number);
            if (!chunk.head.micro[j].x_is_y) chunk.put(to.micro[j].x, j, chunk.n, dreaders, at.K, at.Kp, chunk.cx);
        }
    }

    void gradient_of_decayed_x(int i) {
        float *d = dreaders + i * at.Kp, *log = dlog + i * at.Kp;
        for (int k = 0; k < at.Kp; k += L) {
            store(log + k, load(log + k) + load(chunk.readers + i * at.Kp + k) * load(d + k) * chunk.cx[i]);
            store(d + k, load(d + k) * load(chunk.decay + i * at.Kp + k));
        }
    }

    void add_to_key(int i) {
        float *d = dreaders + i * at.Kp, *key = dkeys + i * at.Kp;
        for (int k = 0; k < at.Kp; k += L) store(key + k, load(key + k) + load(d + k) * chunk.cx[i]);
    }

    void gradients_of_u() {
        const float* du = ERASE == TIED ? given : dvalues + (ERASE == FREE ? C * at.Vp : 0);
        float cu[C], number[C];
        chunk.numbers(cu, &Micro::cu, &Micro::su, 1);
        for (int j = 0; j < p.n; j++) {
            const Tensor& u = chunk.head.micro[j].u;
            if (u) chunk.put(to.micro[j].u, j, chunk.n, du, at.V, at.Vp, cu);
            if (u && to.micro[j].cu) chunk.vectors(given_turned, u, j, chunk.n, at.V, at.Vp);
        }
        row_products(number, given_turned, du, at.Vp, C, at.Vp);
        for (int i = 0; i < chunk.steps; i++) number[i] *= static_cast<float>(chunk.micro(i).su);
        for (int j = 0; j < p.n; j++)
            if (chunk.head.micro[j].u) put_numbers(gradient_of_cu(to.micro[j]), j, number);
    }
};

// One head of every pass, `apart` from h on, from their last token to their first
template <class Pass>
static void heads(Abreast<Pass>& passes, const Gradient& grad, int64_t b, int64_t h, int64_t apart) {
    constexpr int MOST = 1024;  // blocks a segment
    const Problem& p = passes[0].p;
    const int64_t segments = (p.T + p.segment - 1) / p.segment, size = passes[0].at.state();
    for (int i = 0; i < passes.count; i++) {
        passes[i].head().enter(p, p.micro, p.read, b, h + i * apart);
        passes[i].to.enter(p, grad.micro, grad.read, b, h + i * apart);
        passes[i].load_gradient(grad.last, b, h + i * apart);
    }
    auto row = [&](int i) { return b * p.H + h + i * apart; };
    for (int64_t s = segments - 1; s >= 0; s--) {
        int64_t token = s * p.segment, end = token + p.segment < p.T ? token + p.segment : p.T, first[MOST + 1], rebuilt = 0;
        const float* start[MOST][MOST_ABREAST];
        bool last[MOST];  // before a reset, or the end: no state after it is needed
        int blocks = 0;
        for (; token < end; blocks++) {
            const bool anew = starts_anew(p, b, token);
            first[blocks] = token;
            const int count = next_chunk(p, Pass::most_tokens(p), b, token, end);
            token += count;
            last[blocks] = token == end || starts_anew(p, b, token);
            for (int i = 0; i < passes.count; i++) {
                const float* checkpoint = p.checkpoints + (row(i) * segments + s) * size;
                start[blocks][i] = anew ? passes[i].zeros : blocks ? passes[i].slot(rebuilt - 1) : passes[i].opened(checkpoint);
                if (!last[blocks]) passes[i].rebuild(passes[i].slot(rebuilt), start[blocks][i], first[blocks], count, row(i));
            }
            rebuilt += !last[blocks];
        }
        first[blocks] = end;
        for (int c = blocks - 1; c >= 0; c--)
            for (int i = 0; i < passes.count; i++) {
                passes[i].run(start[c][i], first[c], static_cast<int>(first[c + 1] - first[c]), row(i), !last[c]);
                if (start[c][i] == passes[i].zeros) passes[i].clear_gradient();
            }
    }
    for (int i = 0; i < passes.count; i++) passes[i].store_gradient(grad.first, b, h + i * apart);
}

struct Job {
    const Problem* p;
    const Gradient* grad;
    const int abreast = fw::abreast(p->B, grad->groups, p->threads);
};

template <class Pass>
static void backward(Job job) {
    parallel(
        job.p->B * job.grad->groups / job.abreast, job.p->threads,
        [](void* context, int64_t i) {
            const Job& job = *static_cast<Job*>(context);
            const int64_t groups = job.grad->groups, heads = job.p->H / groups, group = i * job.abreast;
            Abreast<Pass> passes(*job.p, job.abreast);
            for (int64_t h = 0; h < heads; h++) fw::heads(passes, *job.grad, group / groups, group % groups * heads + h, heads);
            settle();
        },
        &job);
}

template <Decay DECAY, Erase ERASE>
static void backward_of(Job job) {
    if (!usual(*job.p)) backward<Backward<DECAY, ERASE>>(job);
    else if (Layout(*job.p).Kp % (2 * L)) backward<UsualBackward<DECAY, ERASE, 1>>(job);
    else backward<UsualBackward<DECAY, ERASE, 2>>(job);
}

}  // namespace fw

extern "C" __attribute__((visibility("default")))
void fastweights_backward(fw::Problem* p, fw::Gradient* grad, char* const* address, int threads) {
    fw::Call call(*p, address, threads);
    fw::dispatch(*p, [&](auto decay, auto erase) { fw::backward_of<decay.value, erase.value>({p, grad}); });
}
