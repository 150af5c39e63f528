// A chunk: up to C consecutive micro-steps of one head, loaded, decayed, and multiplied with each other.
//
// Readers are the x of every micro-step (rows 0 ... C-1) and the queries (rows C ...); reader r reads S at version p_r, after p_r
// micro-steps of the chunk. Events are the writes: the key and value of micro-step e (rows 0 ... C-1), and its w and u where the
// erase is free (rows C ...). With D(e -> p) = a_{e+1} ... a_{p-1}, what is left at version p of event e,
//   score_re = reader_r . (D(e -> p_r) key_e)   for e < p_r
// is formed by decaying the keys step by step (or, across the middle of a chunk, as a product of a reader decayed from there and a key
// decayed up to there), so that nothing is ever divided by a decay.
#pragma once
#include "rows.h"

namespace fw {

// The readers of a chunk in the order of the versions they read.
struct Versions {
    int steps = -1, reads = -1;
    int reader[2 * C], start[C + 2], of[2 * C];

    void set(const Problem& p, int steps_now, int reads_now) {
        if (steps == steps_now && reads == reads_now) return;
        steps = steps_now, reads = reads_now;
        if (p.erase != NO_ERASE)
            for (int i = 0; i < steps; i++) of[i] = i - static_cast<int>(p.micro[i % p.n].lag);
        for (int r = 0; r < reads; r++) of[C + r] = r / p.reads * p.n + p.read[r % p.reads].version;
        int at = 0;
        for (int v = 0; v <= steps; v++) {
            start[v] = at;
            for (int i = 0; p.erase != NO_ERASE && i < steps; i++)
                if (of[i] == v) reader[at++] = i;
            for (int r = 0; r < reads; r++)
                if (of[C + r] == v) reader[at++] = C + r;
        }
        start[steps + 1] = at;
    }
};

// A run of tokens of one chunk, and its rows in scratch memory.
template <Decay DECAY, Erase ERASE>
struct Chunk {
    static constexpr int SETS = ERASE == FREE ? 2 : 1, EVENTS = SETS * C;
    const Problem& p;
    const Layout& at;
    const Head* gradient = nullptr;  // in the backward pass: what was read by a program on rows is read at its gradient
    Versions versions;
    Ahead next;
    Head head;
    const int n, per_token;      // micro-steps and reads a token
    int64_t token = 0, ahead = 0;  // `ahead`: tokens from this chunk to the next
    int tokens = 0, steps = 0, reads = 0;
    float *readers, *scaled;    // [2C][Kp]: x and q; the same times D(start -> version) and their coefficients
    float *keys, *ends;         // [EVENTS][Kp]: the same times D(e -> end)
    float *running;             // [Kp][C] keys as they decay, a column each
    float *values;              // [EVENTS][Vp]
    float *score;               // [2C][EVENTS], zero where the reader does not see the event
    float *rescaled;            // [2C][Kp] readers after the middle times D(middle -> version)
    float *decay, *left;        // [C][Kp] a_i of micro-step i; [C + 1][Kp] a_0 ... a_{i-1} (one number a row if per head)
    float between[(C + 1) * C]; // D(e -> p) at [p][e], per head
    float cx[C];
    float by[2 * C];            // D(start -> version) times the coefficient of the reader, where it is a number
    // Numbers may multiply what readers read and what events write rather than keys and readers: then nothing is scaled here.
    const bool outside;
    const bool x_is_key;        // every x is the key itself: then x is not copied where nothing is scaled

    static int64_t most_tokens(const Problem& p) { return C / (p.n > p.reads ? p.n : p.reads); }
    static int64_t size(const Layout& at) { return (6 * C + 2 * EVENTS + 3 * C + 1) * at.Kp + EVENTS * at.Vp + 2 * C * EVENTS + 256; }

    Chunk(const Problem& problem, const Layout& layout, Scratch& memory, bool numbers_outside)
        : p(problem), at(layout), n(p.n), per_token(p.reads), outside(numbers_outside), x_is_key(outside && every_x_is_key(problem)) {
        readers = memory.take(2 * C * at.Kp), scaled = memory.take(2 * C * at.Kp);
        keys = memory.take(EVENTS * at.Kp), ends = memory.take(EVENTS * at.Kp), running = memory.take(C * at.Kp);
        rescaled = memory.take(DECAY == PER_KEY ? 2 * C * at.Kp : 0);
        values = memory.take(EVENTS * at.Vp), score = memory.take(2 * C * EVENTS);
        decay = memory.take(C * at.Kp), left = memory.take((C + 1) * at.Kp);
    }

    static bool every_x_is_key(const Problem& p) {
        for (int i = 0; i < p.n; i++)
            if (!p.micro[i].x_is_y) return false;
        return p.erase == TIED;
    }

    // S at the end of the chunk from S at its start
    void write(float* to, const float* from, const float* rows) {
        if (ERASE == FREE) write_two_sets(next, at, to, from, total(), TOTAL_STRIDE, rows, values, steps, steps);
        else write_rows(next, at, to, from, total(), TOTAL_STRIDE, rows, values, steps);
    }

    // What reads S: x and q, times what is left of S by then unless that is outside
    INLINE const float* x_rows() const { return !outside ? scaled : x_is_key ? keys : readers; }
    INLINE const float* q_rows() const { return (outside ? readers : scaled) + C * at.Kp; }
    INLINE const float* ends_rows() const { return outside ? keys : ends; }
    // what is left of event e at the end of the chunk, per head
    INLINE float to_end(int e) const { return DECAY == PER_HEAD ? between[steps * C + e] : 1.0f; }

    INLINE const Micro& micro(int i) const { return head.micro[of_token(i, n)]; }
    INLINE const Read& read(int r) const { return head.read[of_token(r, per_token)]; }
    INLINE static int of_token(int i, int per) { return per == 1 ? 0 : i % per; }
    // what is left of S at version v after the start of the chunk, as a scale for rows of S
    const float one[1] = {1.0f};
    INLINE const float* total() const { return DECAY == NO_DECAY ? one : left + (DECAY == PER_KEY ? steps * at.Kp : steps); }
    static constexpr int TOTAL_STRIDE = DECAY == PER_KEY ? 1 : 0;

    // out[i] = scale times the number of every micro-step; `absent` where there is none
    void numbers(float* out, Tensor Micro::* which, double Micro::* scale, float absent) const {
        for (int j = 0; j < n; j++) {
            const Tensor& t = head.micro[j].*which;
            const float by = scale ? static_cast<float>(head.micro[j].*scale) : 1.0f;
            load_numbers(out + j, t, token * t.time, tokens, by, absent, n);
        }
    }

    // The u of every micro-step, times its number
    void load_u(float* rows) {
        float cu[C];
        numbers(cu, &Micro::cu, &Micro::su, 1);
        for (int j = 0; j < n; j++) vectors(rows, micro(j).u, j, n, at.V, at.Vp, cu);
    }

    // A tensor's rows for all tokens of the chunk (rows j, j + per, ... of `out`), each times a number if numbers are given.
    void vectors(float* out, const Tensor& t, int j, int per, int width, int padded, const float* scales = nullptr) {
        load_rows(out + j * padded, per * padded, t, token * t.time, tokens, width, padded, scales ? scales + j : nullptr, per);
        if (t) next.add(t, (token + ahead) * t.time, tokens, width);
    }

    // The same rows, given back.
    void put(const Tensor& t, int j, int per, const float* rows, int width, int padded, const float* scales = nullptr) const {
        if (t) store_rows(t, token * t.time, rows + j * padded, per * padded, tokens, width, scales ? scales + j : nullptr, per);
    }

    // Everything of `count` tokens but their values.
    void load_keys(int64_t first, int count, bool with_readers) {
        ahead = most_tokens(p);
        if (first < token) ahead = -ahead;
        next.clear();
        token = first, tokens = count, steps = count * n, reads = count * per_token;
        versions.set(p, steps, reads);
        for (int j = 0; j < n; j++) {
            vectors(keys, ERASE == NO_ERASE ? micro(j).w : micro(j).y, j, n, at.K, at.Kp);
            if (ERASE == FREE) vectors(keys + C * at.Kp, micro(j).w, j, n, at.K, at.Kp);
        }
        load_decays();
        for (int s = 0; s < SETS && !outside; s++) decay_to_end(keys + s * C * at.Kp, ends + s * C * at.Kp);
        if (with_readers) load_readers();
    }

    // a_i, the products a_0 ... a_{i-1}, and, per head, the products between
    void load_decays() {
        if (DECAY == NO_DECAY) return;
        if (DECAY == PER_KEY) {
            for (int k = 0; k < at.Kp; k += L) store(left + k, broadcast(1));
            ivec positive = {};
            for (int j = 0; j < n; j++) vectors(decay, micro(j).g, j, n, at.K, at.Kp);
            for (int i = 0; i < steps; i++) {
                float* a = decay + i * at.Kp;
                for (int k = 0; k < at.Kp; k += L) {
                    vec g = load(a + k);
                    positive |= g > 0.0f;
                    store(a + k, exponential(g));
                    store(left + (i + 1) * at.Kp + k, load(left + i * at.Kp + k) * load(a + k));
                }
            }
            if (any(positive)) *p.positive = 1;
            return;
        }
        float g[C] = {};
        numbers(g, &Micro::g, nullptr, 0);
        for (int i = 0; i < C; i += L) store(decay + i, exponential(load(g + i)));
        for (int i = 0; i < steps; i++)
            if (g[i] > 0) *p.positive = 1;
        left[0] = 1;
        for (int i = 0; i < steps; i++) left[i + 1] = left[i] * decay[i];
        for (int e = 0; e < C; e += L) {
            vec row = broadcast(1);
            for (int i = 0; i < steps; i++) {
                row = first_lanes(i - e) ? row * decay[i] : broadcast(1);
                store(between + (i + 1) * C + e, row);
            }
        }
    }

    void decay_to_end(const float* from, float* to) const {
        if (DECAY == PER_KEY) {
            for (int k = 0; k < at.Kp; k += L) {
                vec a = broadcast(1);
                for (int i = steps - 1; i >= 0; i--) {
                    store(to + i * at.Kp + k, load(from + i * at.Kp + k) * a);
                    a *= load(decay + i * at.Kp + k);
                }
            }
        } else {
            for (int i = 0; i < steps; i++) {
                const float a = to_end(i);
                for (int k = 0; k < at.Kp; k += L) store(to + i * at.Kp + k, load(from + i * at.Kp + k) * a);
            }
        }
    }

    void load_readers() {
        for (int j = 0; ERASE != NO_ERASE && j < n; j++)
            if (!micro(j).x_is_y) vectors(readers, micro(j).x, j, n, at.K, at.Kp);
        if (ERASE != NO_ERASE) numbers(cx, &Micro::cx, &Micro::sx, 1);
        for (int i = 0; ERASE != NO_ERASE && i < steps; i++) {
            float* x = readers + i * at.Kp;
            const float* from = micro(i).x_is_y ? keys + i * at.Kp : x;
            const bool decayed = DECAY != NO_DECAY && micro(i).decayed;
            if (DECAY == PER_HEAD && decayed) cx[i] *= decay[i];
            if (DECAY == PER_KEY && decayed) {
                for (int k = 0; k < at.Kp; k += L) store(x + k, load(from + k) * load(decay + i * at.Kp + k));
                from = x;
            }
            scale_reader(i, from, cx[i]);
        }
        if (ERASE != NO_ERASE && !outside) clear(scaled, steps);
        if (gradient || !p.backward_reads) {
            for (int j = 0; j < per_token; j++)
                vectors(readers + C * at.Kp, p.backward_reads ? gradient->read[j].out : head.read[j].q, j, per_token, at.K, at.Kp);
            for (int r = 0; r < reads; r++) scale_reader(C + r, readers + (C + r) * at.Kp, 1);
        }
        if (!outside) clear(scaled + C * at.Kp, reads);
    }

    // The rows of a tile that hold nothing.
    INLINE void clear(float* rows, int used) const {
        int64_t end = round_up(used, MR);
        if (end > used) std::memset(rows + used * at.Kp, 0, sizeof(float) * (end - used) * at.Kp);
    }

    // readers_r = from, scaled_r = coefficient P from
    INLINE void scale_reader(int r, const float* from, float coefficient) {
        const float* a = left + (DECAY == PER_KEY ? versions.of[r] * at.Kp : versions.of[r]);
        float *to = scaled + r * at.Kp, *plain = readers + r * at.Kp;
        by[r] = DECAY == PER_HEAD ? *a * coefficient : coefficient;
        if (outside) {
            if (from != plain && !x_is_key) std::memcpy(plain, from, sizeof(float) * at.Kp);
            return;
        }
        for (int k = 0; k < at.Kp; k += L) {
            vec x = load(from + k);
            store(plain + k, x);
            store(to + k, DECAY == PER_KEY ? x * load(a + k) * by[r] : x * by[r]);
        }
    }

    // score of all readers and events
    void scores() {
        if (DECAY != PER_KEY) return scores_at_once();
        rescale_readers();
        for (int s = 0; s < SETS; s++) {
            float* out = score + s * C;
            transpose(running, C, keys + s * C * at.Kp, at.Kp, C, at.Kp);
            step_by_step(0, out);
            across_the_middle(out);
            step_by_step(HALF, out);
        }
        for (int v = 0; v <= steps; v++)
            for (int i = versions.start[v]; i < versions.start[v + 1]; i++) scale_scores(versions.reader[i], v);
    }

    // Events and readers on the same side of the middle of a chunk: events decay from version to version, and meet their readers there.
    void step_by_step(int first, float* out) {
        const int last = first + HALF < steps ? first + HALF : steps;
        for (int v = first; v <= last; v++) {
            const int *now = versions.reader + versions.start[v], count = versions.start[v + 1] - versions.start[v];
            for (int i = 0; i < count || (i == 0 && v > first); i += 2) {
                const bool advance = i == 0 && v > first + 1;
                const int m = first && v == first ? 0 : count - i;
                if (m >= 2) advance ? see<2, true>(v, first, now + i, out) : see<2, false>(v, first, now + i, out);
                else if (m == 1) advance ? see<1, true>(v, first, now + i, out) : see<1, false>(v, first, now + i, out);
                else if (advance) see<0, true>(v, first, now, out);
            }
        }
    }

    // What M readers of version v see of HALF events; the events, a column each, first decay to that version from the one before.
    template <int M, bool ADVANCE>
    void see(int v, int first, const int* reader, float* out) {
        constexpr int AT_ONCE = 4;  // sums that do not wait for each other
        const float *a = decay + (v - 1) * at.Kp, *x[2] = {readers + (M > 0 ? reader[0] : 0) * at.Kp, readers + (M > 1 ? reader[1] : 0) * at.Kp};
        const half_ivec older = first_of_half(v - 1 - first);
        half_vec sum[2][AT_ONCE] = {};
        for (int k = 0; k < at.Kp; k += AT_ONCE)
#pragma GCC unroll 4
            for (int j = 0; j < AT_ONCE; j++) {
                auto row = reinterpret_cast<half_vec*>(running + (k + j) * C + first);
                half_vec events = *row;
                if (ADVANCE) *row = events = older ? events * a[k + j] : events;
#pragma GCC unroll 2
                for (int m = 0; m < M; m++) sum[m][j] += events * x[m][k + j];
            }
        for (int m = 0; m < M; m++)
            *reinterpret_cast<half_vec*>(out + reader[m] * EVENTS + first) = (sum[m][0] + sum[m][1]) + (sum[m][2] + sum[m][3]);
    }

    // Readers after the middle take over the decays from there on: what they see of the events before it is a product of matrices.
    void rescale_readers() {
        if (steps <= HALF) return;
        for (int k = 0; k < at.Kp; k += L) {
            vec a = broadcast(1);
            float* to = rescaled + k;
            for (int v = HALF + 1; v <= steps; v++) {
                a *= load(decay + (v - 1) * at.Kp + k);
                for (int i = versions.start[v]; i < versions.start[v + 1]; i++, to += at.Kp)
                    store(to, load(readers + versions.reader[i] * at.Kp + k) * a);
            }
        }
    }

    void across_the_middle(float* out) {
        if (steps <= HALF) return;
        const int from = versions.start[HALF + 1], count = versions.start[steps + 1] - from;
        for (int i = 0; i < count; i += 8)
            for (int e = 0; e < HALF; e += L) {
                float seen[8 * L];
                tile<8, 1, ZERO>(seen, L, rescaled + i * at.Kp, at.Kp, 1, running + e, C, at.K, nullptr, nullptr, 0);
                for (int j = 0; j < 8 && i + j < count; j++) store(out + versions.reader[from + i + j] * EVENTS + e, load(seen + j * L));
            }
    }

    INLINE void scale_scores(int r, int v) {
        const float c = ERASE != NO_ERASE && r < C ? cx[r] : 1.0f;
        for (int s = 0; s < SETS; s++) {
            float* row = score + r * EVENTS + s * C;
            for (int e = 0; e < C; e += L) {
                vec x = load(row + e) * (DECAY == PER_HEAD ? load(between + v * C + e) * c : broadcast(c));
                store(row + e, select(first_lanes(v - e), x, vec{}));
            }
        }
    }

    // the events that some of readers first ... last - 1 see
    int seen_by(int first, int last) const {
        int most = 0;
        for (int r = first; r < last && r % C < (r < C ? steps : reads); r++) most = versions.of[r] > most ? versions.of[r] : most;
        return most;
    }

    // Where one number decays all keys, it multiplies the scores: they are a product of matrices.
    void scores_at_once() {
        for (int s = 0; s < SETS; s++) {
            transpose(running, C, keys + s * C * at.Kp, at.Kp, C, at.Kp);
            for (int r = ERASE == NO_ERASE ? C : 0; r < 2 * C; r += 8) {
                if (r % C >= (r < C ? steps : reads)) continue;
                const float* rows = (r < C && x_is_key ? keys : readers) + r * at.Kp;
                float* out = score + r * EVENTS + s * C;
                if (L > HALF && seen_by(r, r + 8) <= HALF) half_tile(out, EVENTS, rows, at.Kp, running, C, at.K);
                else
                    for (int e = 0; e < C; e += L)
                        tile<8, 1, ZERO>(out + e, EVENTS, rows, at.Kp, 1, running + e, C, at.K, nullptr, nullptr, 0);
            }
        }
        for (int v = 0; v <= steps; v++)
            for (int n = versions.start[v]; n < versions.start[v + 1]; n++) scale_scores(versions.reader[n], v);
    }

    // out[r][e] = row of reader r . row of event e for the readers of version v and the events before it, zero for later events
    void products(int v, const float* of_readers, const float* of_events, int width, float* out) const {
        for (int n = versions.start[v]; n < versions.start[v + 1]; n += 2) {
            int r0 = versions.reader[n], r1 = n + 1 < versions.start[v + 1] ? versions.reader[n + 1] : r0;
            for (int s = 0; s < SETS; s++) {
                float first[C], second[C];
                for (int e = 0; e < v; e += L / 2)
                    inner_products(first + e, second + e, of_readers + r0 * width, of_readers + r1 * width,
                                   of_events + (s * C + e) * width, width, width);
                for (int e = v; e < C; e++) first[e] = second[e] = 0;
                std::memcpy(out + r0 * EVENTS + s * C, first, sizeof first);
                std::memcpy(out + r1 * EVENTS + s * C, second, sizeof second);
            }
        }
    }
};

// The tokens of the next chunk: as many as fit, up to the end of the segment and to the next reset.
INLINE int next_chunk(const Problem& p, int64_t most, int64_t b, int64_t token, int64_t end) {
    int64_t last = token + most < end ? token + most : end;
    if (p.reset)
        for (int64_t t = token + 1; t < last; t++)
            if (p.reset[b * p.reset_batch + t * p.reset_time]) return t - token;
    return last - token;
}
INLINE bool starts_anew(const Problem& p, int64_t b, int64_t token) {
    return p.reset && p.reset[b * p.reset_batch + token * p.reset_time];
}

// Calls f with the class of the program as template arguments.
template <class F>
INLINE void dispatch(const Problem& p, F f) {
    auto with_erase = [&](auto decay) {
        if (p.erase == NO_ERASE) f(decay, std::integral_constant<Erase, NO_ERASE>{});
        else if (p.erase == TIED) f(decay, std::integral_constant<Erase, TIED>{});
        else f(decay, std::integral_constant<Erase, FREE>{});
    };
    if (p.decay == NO_DECAY) with_erase(std::integral_constant<Decay, NO_DECAY>{});
    else if (p.decay == PER_HEAD) with_erase(std::integral_constant<Decay, PER_HEAD>{});
    else with_erase(std::integral_constant<Decay, PER_KEY>{});
}

}  // namespace fw
