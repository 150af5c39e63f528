// The forward pass of the usual programs, a block at a time: as many tokens as let all their readers be the rows of one tile, or of two
// where that would leave only two events to write at once. In the words of block.h,
//
//   val_i = u_i + S_0^T (P_i x_i)     + sum over e <  i of (x_i . D(e -> i) y_e) val_e
//   o_i   =       S_0^T (P_{i+1} q_i) + sum over e <= i of (q_i . D(e -> i + 1) y_e) val_e
//   S     = diag(P_N) S_0 + sum over e of (D(e -> N) y_e) val_e^T
//
// A panel of S is read once for all readers of a tile and written once for all events; the triangles between are short enough to stay in
// registers.
// S itself is not decayed in every block: see PutOff.
#pragma once
#include "block.h"

namespace fw {

template <Decay DECAY, Erase ERASE, int NV>
struct Usual {
    using Part = Block<DECAY, ERASE, ERASE == NO_ERASE || (ERASE == TIED && MR == 4) ? MR : MR / 2>;
    static constexpr int N = Part::N, EVENTS = Part::EVENTS, READERS = Part::READERS, X = Part::X, Q = Part::Q;
    static constexpr int AT_ONCE = READERS < MR ? READERS : MR;  // readers in one tile
    const Problem& p;
    Scratch memory;
    Part block;
    const Layout& at;
    float *S, *val, *out;  // val and out: [N][Vp]
    typename Part::Rows u;
    typename Part::Places read_to;
    float of_x[N];         // what multiplies what x read
    PutOff kept;           // per head: S is this times what is kept of it; per key, row k is block.before[k] times that
    bool waits = true;     // what is kept is not multiplied now; else by
    float decay = 1;       // this, or per key by block.total

    static int64_t size(const Problem& p) {
        Layout at(p);
        return Part::size(at, false) + at.state() + 2 * N * at.Vp + 256;
    }
    static int64_t most_tokens(const Problem&) { return N; }
    Head& head() { return block.head; }
    void clear() {
        std::memset(S, 0, sizeof(float) * at.state());
        kept = {};
        block.nothing_before();
    }
    void keep(float* checkpoint) const {
        for (int n = 0; n < at.panels && DECAY == PER_KEY; n++)
            for (int64_t k = 0, of = n * at.Kp * NV * L; k < at.Kp; k++)
                for (int v = 0; v < NV; v++, of += L) store(checkpoint + of, load(S + of) * block.before[k]);
        if (DECAY != PER_KEY) scale_state(at, checkpoint, S, kept.by);
    }
    void finish() {
        block.finish();
        keep(S);
    }

    Usual(const Problem& problem, float* room) : p(problem), memory{room}, block(p, memory, false), at(block.at) {
        S = memory.take(at.state()), val = memory.take(N * at.Vp), out = memory.take(N * at.Vp);
    }

    void run(int64_t token, int count, int64_t row) {
        block.begin(token, count);
        block.load_events();
        block.load_readers();
        block.numbers(block.cu, block.micro().cu, static_cast<float>(block.micro().su), 1);
        u = block.rows_or_copies(block.u, block.micro().u, at.V, at.Vp);
        const Tensor& o = block.head.read[0].out;
        read_to = block.places(out, o, at.V, at.Vp);
        block.soon_written(read_to.past, o, at.V);
        block.scores();
        if (DECAY == PER_HEAD) put_off();
        if (DECAY == PER_KEY) put_off_keys();
        for (int i = 0; i < N && ERASE != NO_ERASE; i++) of_x[i] = DECAY == PER_HEAD ? block.left[i] * block.cx[i] : block.cx[i];
        counted(at.Kp, [&](auto K) INLINE_CALL { panels(K); });
        if (!read_to.there) block.put(o, out, at.V, at.Vp);
        if (p.values && ERASE != NO_ERASE) save(p.values + (row * p.T + token) * at.Vp);
    }

    void save(float* values) const {
        const float* from = val;
        const int64_t numbers = block.count * at.Vp;
        if (block.far && block.whole_lines(values))
            for (int64_t c = 0; c < numbers; c += L) store_past(values + c, load(from + c));
        else std::memcpy(values, from, sizeof(float) * numbers);
    }

    void put_off() {
        for (float& left : block.left) left *= kept.by;
        decay = kept.decay(*block.total), waits = decay == 1;
        for (float& left : block.to_end) left /= kept.by;
    }
    void put_off_keys() {
        ivec enough = ~ivec{};
        for (int k = 0; k < at.Kp; k += L) enough &= load(block.total + k) >= PutOff::LEAST;
        waits = !any(~enough);
        if (!waits) return block.nothing_before();
        for (int k = 0; k < at.Kp; k += L) {
            const vec now = load(block.total + k), inverse = 1.0f / now;
            store(block.before + k, now);
            for (int e = 0; e < EVENTS; e++) store(block.ends + e * at.Kp + k, load(block.ends + e * at.Kp + k) * inverse);
        }
    }

    template <class Number>  // see counted
    APART void panels(Number K) {
        for (int n = 0; n < at.panels; n++) panel(K, S + n * K * NV * L, n * NV * L);
    }
    INLINE void panel(int64_t K, float* s, int c) {
        vec read[READERS][NV], value[EVENTS][NV];
        read_panel<AT_ONCE>(block.next, read, block.scaled, K, s);
#pragma GCC unroll 8
        for (int i = 0; i < N; i++)
#pragma GCC unroll 2
            for (int v = 0; v < NV; v++) {
                value[EVENTS - N + i][v] = load(u[i] + c + v * L) * block.cu[i];
                if (ERASE == NO_ERASE) continue;
                value[i][v] = ERASE == TIED ? value[i][v] + read[i][v] * of_x[i] : read[i][v] * of_x[i];
                value[i][v] = add_seen<X>(value[i][v], value, i, v);
                store(val + i * at.Vp + c + v * L, value[i][v]);
            }
        if (AT_ONCE < READERS) read_panel<READERS - AT_ONCE>(block.next, read + AT_ONCE, block.scaled + AT_ONCE * K, K, s);
#pragma GCC unroll 8
        for (int i = 0; i < N; i++) {
            vec seen[NV];
#pragma GCC unroll 2
            for (int v = 0; v < NV; v++) {
                seen[v] = DECAY == PER_HEAD ? read[Q * N + i][v] * block.left[Q * N + i] : read[Q * N + i][v];
                seen[v] = add_seen<Q>(seen[v], value, i, v);
            }
            read_to.put(i, c, seen);
        }
#pragma GCC unroll 16
        for (int e = 0; e < EVENTS; e++)
#pragma GCC unroll 2
            for (int v = 0; v < NV; v++) {
                if (DECAY == PER_HEAD) value[e][v] *= block.to_end[e % N];
                if (e % N >= block.count) value[e][v] = vec{};  // there is no such token
            }
        const auto write = [&](auto decayed) INLINE_CALL { write_panel(block.next, s, s, block.ends, K, value, decayed); };
        if (DECAY == NO_DECAY || waits) write([](vec x, int, int) { return x; });
        else if (DECAY == PER_KEY) write([total = block.total](vec x, int k, int) { return x * total[k]; });
        else write([same = broadcast(decay)](vec x, int, int) { return x * same; });
    }

    // What a reader of token i sees of the events of the block
    template <int KIND>
    INLINE vec add_seen(vec sum, const vec (&value)[EVENTS][NV], int i, int v) const {
#pragma GCC unroll 8
        for (int e = 0; e < (KIND == Q ? i + 1 : i); e++) {
            sum += block.scores_of(0, KIND, i)[e] * value[e][v];
            if (ERASE == FREE) sum += block.scores_of(1, KIND, i)[e] * value[N + e][v];
        }
        return sum;
    }
};

}  // namespace fw
