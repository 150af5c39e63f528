// A block of the usual programs, in which a token is one micro-step and its query reads what it leaves: N tokens of one head, loaded,
// decayed, and multiplied with each other. i and e number them; readers are the x of every token, then the q; events are the keys y
// (w, where nothing is erased) and, where the erase is free, a second set of them, the w. With P_i = a_0 ... a_{i-1} and
// D(e -> i) = a_{e+1} ... a_{i-1},
//
//   score of x_i and e < i:  x_i . D(e -> i) key_e          score of q_i and e <= i:  q_i . D(e -> i + 1) key_e
//
// Where keys decay each at their own pace they do so step by step, and meet their readers as they are then; one number for all keys
// multiplies scores, and what is read and written, instead. Rows beyond the last token are zero.
#pragma once
#include "chunk.h"

namespace fw {

INLINE bool usual(const Problem& p) {
    return p.n == 1 && p.reads == 1 && p.read[0].version == 1 && !p.backward_reads && (p.erase == NO_ERASE || !p.micro[0].lag);
}

// The inner products of the readers (KINDS times N rows) of tokens 2 PAIR and 2 PAIR + 1 with the events that they see: [kind][token][event].
template <int KINDS, int N, int PAIR>
INLINE void triangle(float* to, const float* readers, const float* events, int64_t width) {
    constexpr int FIRST = 2 * PAIR, GROUP = KINDS * 2 * N;
    vec sum[GROUP];
#pragma GCC unroll 32
    for (int i = 0; i < GROUP; i++) sum[i] = vec{};
    for (int64_t c = 0; c < width; c += L) {
        vec event[FIRST + 2];
#pragma GCC unroll 8
        for (int e = 0; e < FIRST + 2; e++) event[e] = load(events + e * width + c);
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++)
#pragma GCC unroll 2
            for (int kind = 0; kind < KINDS; kind++) {
                const vec reader = load(readers + (kind * N + FIRST + j) * width + c);
#pragma GCC unroll 8
                for (int e = 0; e < FIRST + j + (kind == KINDS - 1); e++) sum[(kind * 2 + j) * N + e] += reader * event[e];
            }
    }
#pragma GCC unroll 4
    for (int i = 0; i < GROUP; i += L) store(to + i, sums(sum + i));
}

// The rows of a unit matrix
template <int N>
struct Unit {
    float at[2 * N] = {};
    constexpr Unit() { at[N - 1] = 1; }
    INLINE const float* row(int i) const { return at + N - 1 - i; }
};

template <Decay DECAY, Erase ERASE, int TOKENS>
struct Block {
    static constexpr int N = TOKENS, KINDS = ERASE == NO_ERASE ? 1 : 2, SETS = ERASE == FREE ? 2 : 1, READERS = KINDS * N, EVENTS = SETS * N;
    static constexpr int X = 0, Q = KINDS - 1, GROUP = KINDS * 2 * N;  // scores of two tokens: [kind][token][event]
    static_assert(N % 2 == 0 && GROUP % L == 0, "scores fill vectors");
    struct Rows {
        const float* first;
        int64_t step;
        INLINE const float* operator[](int i) const { return first + i * step; }
    };
    struct Places {  // of rows of results
        float* first;
        int64_t step;
        bool there, past;  // in the tensor itself; past the caches, once they are there
        template <int NV>
        INLINE void put(int i, int64_t at, const vec (&x)[NV]) const {
            float* to = first + i * step + at;
            const auto each = [&x, to](auto store) INLINE_CALL {
#pragma GCC unroll 2
                for (int v = 0; v < NV; v++) store(to + v * L, x[v]);
            };
            if (there && past) each([](float* to, vec y) INLINE_CALL { store_past(to, y); });
            else each([](float* to, vec y) INLINE_CALL { store(to, y); });
        }
        INLINE void put(int i, int64_t at, vec x) const {
            const vec one[1] = {x};
            put(i, at, one);
        }
    };
    typedef float of_events __attribute__((vector_size(4 * N), aligned(4)));  // numbers of the events of a set
    static constexpr int64_t FAR = int64_t{1} << 18;  // numbers
    const Problem& p;
    Layout at;
    const bool far;                 // results are more than the caches of a core hold until they are used
    const bool apart;               // what decays does not take the place of what it was
    Head head;
    Ahead next;
    int64_t token = 0, ahead = N;   // tokens from this block to the one that comes after it
    int count = 0;
    float *readers, *keys;          // [KINDS][N][Kp], [SETS][N][Kp]; one place for keys that are x, too, where neither changes
    float *scaled, *ends;           // per key: the same times P_i (P_{i+1} for q), and times D(e -> N)
    float *decay, *total;           // [N][Kp] a_i; [Kp] P_N; one number each if per head
    float* before;                  // per key: [Kp] what P_0 is, that is 1, unless decays wait (see PutOff)
    float *u;                       // [N][Vp]
    float *factor, *score;          // [N / 2][GROUP]; [SETS][N / 2][GROUP], zero where a reader does not see the event
    Rows reader[KINDS], key[SETS];  // the same, or where they lie in tensors
    float cx[N], cu[N];
    ivec positive = {};             // where a log decay was
    float left[READERS], to_end[N]; // per head: P_i or P_{i+1}, and D(e -> N)

    static int64_t size(const Layout& at, bool apart) {
        return (apart ? 2 : 1) * (READERS + EVENTS) * at.Kp + (N + 2) * at.Kp + N * at.Vp + (1 + SETS) * N / 2 * GROUP + 256;
    }

    Block(const Problem& problem, Scratch& memory, bool keeps)
        : p(problem), at(p), far(p.B * p.T * p.H * (at.Kp + at.Vp) >= 2 * FAR), apart(keeps && DECAY == PER_KEY) {
        readers = memory.take(READERS * at.Kp), scaled = apart ? memory.take(READERS * at.Kp) : readers;
        const bool same = ERASE == TIED && DECAY != PER_KEY && p.micro[0].x_is_y;
        keys = same ? readers : memory.take(EVENTS * at.Kp), ends = apart ? memory.take(EVENTS * at.Kp) : keys;
        decay = memory.take(N * at.Kp), total = memory.take(at.Kp), before = memory.take(at.Kp), u = memory.take(N * at.Vp);
        factor = memory.take(N / 2 * GROUP), score = memory.take(SETS * N / 2 * GROUP);
        std::memset(factor, 0, sizeof(float) * N / 2 * GROUP);
        for (int i = 0; i < N; i++)
            for (int e = 0; e <= i; e++) factor_of(Q, i, e) = 1;
        for (float& x : left) x = 1;
        for (float& x : to_end) x = 1;
        *total = 1;
        nothing_before();
    }

    void nothing_before() {
        for (int k = 0; k < at.Kp; k++) before[k] = 1;
    }

    INLINE const Micro& micro() const { return head.micro[0]; }
    INLINE bool x_decays() const { return DECAY != NO_DECAY && ERASE != NO_ERASE && micro().decayed; }
    INLINE static int place(int kind, int i) { return (i / 2 * KINDS + kind) * 2 * N + i % 2 * N; }
    INLINE float& factor_of(int kind, int i, int e) const { return factor[place(kind, i) + e]; }
    INLINE static int place(int set, int kind, int i) { return set * (N / 2) * GROUP + place(kind, i); }
    INLINE const float* scores_of(int set, int kind, int i) const { return score + place(set, kind, i); }

    // What was found, after the last block.
    void finish() const {
        if (any(positive)) *p.positive = 1;
    }

    // What is needed to write events, and what to read them.
    void begin(int64_t first, int tokens) {
        token = first, count = tokens;
        next.clear();
    }
    void load_events(bool decays_too = true) {
        key[0] = decaying_rows(keys, ERASE == NO_ERASE ? micro().w : micro().y);
        if (ERASE == FREE) key[SETS - 1] = decaying_rows(keys + N * at.Kp, micro().w);
        if (decays_too) load_decays();
    }
    // What is left of events in the end, where it is not asked for what readers see of them before
    void decay_events() {
        for (int k = 0; k < at.Kp && DECAY == PER_KEY; k += L) {
            vec a = broadcast(1);
            for (int i = N - 1; i >= 0; i--) {
                for (int s = 0; s < SETS; s++) store(ends + (s * N + i) * at.Kp + k, load(key[s][i] + k) * a);
                a *= load(decay + i * at.Kp + k);
            }
            store(total + k, a);
        }
    }

    void load_readers() {
        if (ERASE != NO_ERASE) {
            if (!micro().x_is_y) reader[X] = decaying_rows(readers, micro().x);
            else if (key[0].first != keys || keys == readers) reader[X] = key[0];
            else reader[X] = {static_cast<float*>(std::memcpy(readers, keys, sizeof(float) * N * at.Kp)), at.Kp};
            numbers(cx, micro().cx, static_cast<float>(micro().sx), 1);
        }
        reader[Q] = decaying_rows(readers + Q * N * at.Kp, head.read[0].q);
        weigh();
    }
    void load_u(float* to) {
        numbers(cu, micro().cu, static_cast<float>(micro().su), 1);
        rows(to, micro().u, at.V, at.Vp, cu);
    }

    void rows(float* to, const Tensor& t, int width, int padded, const float* scales = nullptr) {
        load_rows(to, padded, t, token * t.time, count, width, padded, scales, 1);
        if (count < N) std::memset(to + count * padded, 0, sizeof(float) * (N - count) * padded);
        soon(t, width);
    }
    // Rows where they lie, if they can be read there and all of them are; or copied.
    Rows rows_or_copies(float* to, const Tensor& t, int width, int padded, bool there = true) {
        if (!there || !t || !in_place(t) || count < N || width < padded) {
            rows(to, t, width, padded);
            return {to, padded};
        }
        soon(t, width);
        return {reinterpret_cast<const float*>(t.data) + token * t.time, t.time};
    }
    // Where rows of results go: to the tensor itself, if they can be written there and all of them are; or to `room`, from where they are put.
    Places places(float* room, const Tensor& t, int width, int padded) const {
        const bool past = goes_past(t, width);
        if (!t || !in_place(t) || t.heads || count < N || width < padded) return {room, padded, false, past};
        return {reinterpret_cast<float*>(t.data) + token * t.time, t.time, true, past};
    }
    // Whether they are whole lines, and too many for the caches
    INLINE bool goes_past(const Tensor& t, int width) const {
        const int64_t size = t.type == F32 ? 4 : 2;
        return far && t.channel == 1 && !t.heads && whole_lines(t.data) && t.time * size % Ahead::LINE == 0 && width * size % Ahead::LINE == 0;
    }
    INLINE static bool whole_lines(const void* from) { return reinterpret_cast<uintptr_t>(from) % Ahead::LINE == 0; }
    void put(const Tensor& t, const float* rows, int width, int padded, const float* scales = nullptr) const {
        if (t) store_rows(t, token * t.time, rows, padded, count, width, scales, 1, goes_past(t, width));
    }
    // What decays key by key goes elsewhere on the way.
    Rows decaying_rows(float* to, const Tensor& t) { return rows_or_copies(to, t, at.K, at.Kp, DECAY == PER_KEY); }
    void soon(const Tensor& t, int width) {
        if (t) next.add(t, (token + ahead) * t.time, N, width);
    }
    // Those that will be written, unless they go past the caches
    void soon_written(bool past, const Tensor& t, int width) {
        if (!past) soon(t, width);
    }
    INLINE const float* reader_row(int r) const { return reader[r / N][r % N]; }
    void numbers(float* to, const Tensor& t, float scale, float absent) const {
        if (t && t.type == F32 && count == N) {
            const float* from = reinterpret_cast<const float*>(t.data) + token * t.time;
#pragma GCC unroll 16
            for (int i = 0; i < N; i++) to[i] = scale * from[i * t.time];
            return;
        }
        load_numbers(to, t, token * t.time, count, scale, absent);
        for (int i = count; i < N; i++) to[i] = 0;
    }

    void load_decays() {
        if (DECAY == NO_DECAY) return;
        constexpr int NUMBERS = (N + L - 1) / L * L;
        Rows log{decay, 0};
        if (DECAY == PER_KEY) log = rows_or_copies(decay, micro().g, at.K, at.Kp);
        else numbers(decay, micro().g, 1, 0);
        for (int i = N; DECAY == PER_HEAD && i < NUMBERS; i++) decay[i] = 0;
        for (int i = 0; i < (DECAY == PER_KEY ? N : 1); i++)
            for (int k = 0; k < (DECAY == PER_KEY ? at.Kp : NUMBERS); k += L) {
                const vec g = load(log[i] + k);
                positive |= g > 0.0f;
                store(decay + i * at.Kp + k, exponential(g));
            }
        if (DECAY == PER_KEY) return;
        *total = 1;
        for (int i = 0; i < N; i++) *total *= decay[i];
        for (int e = N - 1, i = 0; e >= 0; e--, i++) to_end[e] = i ? to_end[e + 1] * decay[e + 1] : 1.0f;
    }

    // The numbers that multiply scores, and those that multiply what is read.
    void weigh() {
        static constexpr Unit<N> unit;
        const bool decayed = x_decays();
        float now = 1;           // P_i
        of_events between = {};  // D(e -> i), zero where there is none
#pragma GCC unroll 8
        for (int i = 0; i < N; i++) {
            const float a = DECAY == PER_HEAD ? decay[i] : 1.0f;
            if (ERASE != NO_ERASE) {
                const float c = decayed ? cx[i] * a : cx[i];
                if (DECAY == PER_HEAD) cx[i] = c, left[i] = now;
                *reinterpret_cast<of_events*>(&factor_of(X, i, 0)) = between * c;
            }
            if (DECAY == PER_HEAD) now *= a, left[Q * N + i] = now;
            between = between * a + *reinterpret_cast<const of_events*>(unit.row(i));
            if (DECAY == PER_HEAD) *reinterpret_cast<of_events*>(&factor_of(Q, i, 0)) = between;
        }
    }

    void scores() { scores(std::make_integer_sequence<int, N / 2>{}); }
    template <int... PAIR>
    INLINE void scores(std::integer_sequence<int, PAIR...>) {
        for (int s = 0; s < SETS; s++) {
            float* to = score + s * (N / 2) * GROUP;
            if (DECAY != PER_KEY) (triangle<KINDS, N, PAIR>(to + PAIR * GROUP, readers, keys + s * N * at.Kp, at.Kp), ...);
            else if (s + 1 < SETS) (meet<PAIR, false>(to + PAIR * GROUP, s), ...);
            else (meet<PAIR, true>(to + PAIR * GROUP, s), ...);
            for (int i = 0; i < N / 2 * GROUP; i += L) store(to + i, load(to + i) * load(factor + i));
        }
    }

    // As `triangle`, of events that decay key by key up to their readers. `LAST`: of all sets, so that readers can take over what is left.
    template <int PAIR, bool LAST>
    INLINE void meet(float* to, int set) {
        constexpr int FIRST = 2 * PAIR;
        const int64_t K = at.Kp;
        float* end = ends + set * N * K;
        const bool decayed = x_decays();
        vec sum[GROUP];
#pragma GCC unroll 32
        for (int i = 0; i < GROUP; i++) sum[i] = vec{};
        for (int k = 0; k < K; k += L) {
            vec seen[N], so_far = load((FIRST > 0 ? total : before) + k);
#pragma GCC unroll 8
            for (int e = 0; e < FIRST; e++) seen[e] = load(end + e * K + k);
#pragma GCC unroll 2
            for (int j = 0; j < 2; j++) {
                const int i = FIRST + j;
                const vec a = load(decay + i * K + k);
                if (ERASE != NO_ERASE) {
                    vec x = load(reader[X][i] + k);
                    if (decayed) x *= a;
#pragma GCC unroll 8
                    for (int e = 0; e < i; e++) sum[(X * 2 + j) * N + e] += x * seen[e];
                    if (LAST) store(scaled + i * K + k, x * so_far);
                }
                seen[i] = load(key[set][i] + k);
                so_far *= a;
#pragma GCC unroll 8
                for (int e = 0; e < i; e++) seen[e] *= a;
                const vec q = load(reader[Q][i] + k);
#pragma GCC unroll 8
                for (int e = 0; e <= i; e++) sum[(Q * 2 + j) * N + e] += q * seen[e];
                if (LAST) store(scaled + (Q * N + i) * K + k, q * so_far);
            }
#pragma GCC unroll 8
            for (int e = 0; e < FIRST + 2; e++) store(end + e * K + k, seen[e]);
            if (LAST) store(total + k, so_far);
        }
#pragma GCC unroll 4
        for (int i = 0; i < GROUP; i += L) store(to + i, sums(sum + i));
    }
};

// A state is not multiplied by its decay in every block: it is `by` times what is kept of it, until that is little. Where every key has its
// decay, so has every row of the state.
struct PutOff {
    static constexpr float LEAST = 1e-6f;
    float by = 1;

    // One decay more. What is kept is multiplied by the result, and stays as it is if that is 1.
    INLINE float decay(float a) {
        const float all = by * a;
        const bool enough = all >= LEAST;
        by = enough ? all : 1.0f;
        return enough ? 1.0f : all;
    }
};
INLINE void scale_state(const Layout& at, float* to, const float* from, float by) {
    for (int64_t i = 0; i < at.state(); i += L) store(to + i, load(from + i) * by);
}

// ---- a panel of S: rows of NV vectors --------------------------------------------------------------------------------

// sum[m] = row m of M . panel
template <int M, int NV>
INLINE void read_panel(Ahead& next, vec (*sum)[NV], const float* rows, int64_t K, const float* s) {
    vec now[M][NV];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) clear(now[m]);
    next.between<2>(K, [&](int64_t k) INLINE_CALL {
#pragma GCC unroll 2
        for (int64_t d = k; d < k + 2; d++) {
            vec row[NV];
#pragma GCC unroll 2
            for (int v = 0; v < NV; v++) row[v] = load(s + (d * NV + v) * L);
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) add_products(now[m], rows + m * K + d, row, 2 * m < M);
        }
    });
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 2
        for (int v = 0; v < NV; v++) sum[m][v] = now[m][v];
}

// to = `decayed` from + the sum over E of keys times values, where decayed(x, k, v) is what is left of vector v of row k
template <int E, int NV, class Decayed>
INLINE void write_panel(Ahead& next, float* to, const float* from, const float* keys, int64_t K, const vec (&value)[E][NV], Decayed decayed) {
    constexpr bool FEW = E <= 4;             // their rows and not their multiply-adds are what takes long
    constexpr int ROWS = FEW ? 2 : MR / 2;  // at once
    next.between<ROWS>(K, [&](int64_t k) INLINE_CALL {
        vec row[ROWS][NV];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
            for (int v = 0; v < NV; v++) row[r][v] = decayed(load(from + (r * NV + v) * L), k + r, v);
#pragma GCC unroll 16
        for (int e = 0; e < E; e++)
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++) add_products(row[r], keys + e * K + k + r, value[e], !FEW && 2 * e >= E);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
            for (int v = 0; v < NV; v++) store(to + (r * NV + v) * L, row[r][v]);
        from += ROWS * NV * L, to += ROWS * NV * L;
    });
}

// The same two as functions of their own, compiled once for all classes of programs: the first with a number that multiplies each sum, the
// second with a factor for all rows, if there is one.
template <int M, int NV, class Number>
APART void rows_times_panel(Ahead& next, float* out, const float* rows, Number K, const float* panel, const float* scale) {
    vec sum[M][NV];
    read_panel<M>(next, sum, rows, K, panel);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 2
        for (int v = 0; v < NV; v++) store(out + (m * NV + v) * L, sum[m][v] * scale[m]);
}
template <int E, int NV, class Number>
APART void add_to_panel(Ahead& next, float* to, const float* from, const float* keys, Number K, const vec (&value)[E][NV], const vec* factor) {
    vec own[E][NV], left[NV];  // which no store changes
#pragma GCC unroll 16
    for (int e = 0; e < E; e++)
#pragma GCC unroll 2
        for (int v = 0; v < NV; v++) own[e][v] = value[e][v];
    if (!factor) return write_panel(next, to, from, keys, K, own, [](vec x, int, int) INLINE_CALL { return x; });
#pragma GCC unroll 2
    for (int v = 0; v < NV; v++) left[v] = factor[v];
    write_panel(next, to, from, keys, K, own, [&left](vec x, int, int v) INLINE_CALL { return x * left[v]; });
}

}  // namespace fw
