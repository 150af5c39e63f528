// Rows of tensors in and out of scratch memory, and the products of rows with the state S, which is kept in panels of values.
#pragma once
#include "problem.h"

namespace fw {

// Rows that the next chunk will load. They are fetched a few lines at a time between the products of this one: a processor waits
// for memory where it is asked for more lines at once than it can have under way, and products wait where it looks for lines too often.
struct Ahead {
    static constexpr int MOST = 64 * C, PIECE = 128, LINE = 64;  // pieces; bytes a piece and a line
    static constexpr int64_t SELDOM = 64, OFTEN = L == 8 ? SELDOM : 16;  // rows of a panel between two fetches
    static constexpr float AT_ONCE = 4;  // pieces of a fetch, or more where it would come too often
    const char* piece[MOST];
    int count = 0, done = 0, rows = 0;  // pieces, those fetched, and rows of the panels that went by
    int64_t every = OFTEN;              // rows between two fetches
    float each = AT_ONCE / OFTEN;       // pieces a row

    // The last chunk says how the pieces of this one are spread evenly.
    INLINE void clear() {
        if (rows) each = static_cast<float>(count) / rows;
        for (every = OFTEN; every < SELDOM && each * (2 * every) <= AT_ONCE;) every *= 2;
        count = done = rows = 0;
    }
    INLINE void add(const Tensor& t, int64_t offset, int64_t number, int64_t n) {
        const int64_t size = t.type == F32 ? 4 : 2;
        if (t.channel == 1) add(t.data + offset * size, t.time * size, number, n * size);
    }
    INLINE void add(const void* data, int64_t bytes) { add(static_cast<const char*>(data), 0, 1, bytes); }
    INLINE void add(const char* row, int64_t step, int64_t number, int64_t bytes) {  // a column of them at a time, which is quickly noted
        for (const char* end = row + bytes; row < end && count + number <= MOST; row += PIECE, count += static_cast<int>(number)) {
            const char** to = piece + count;
            for (int64_t r = 0; r < number; r++) to[r] = row + r * step;
        }
    }
    // What is due before `number` rows
    INLINE void fetch(int64_t number) {
        rows += static_cast<int>(number);
        const int due = static_cast<int>(rows * each) + 1;
        for (const int last = due < count ? due : count; done < last; done++)
#pragma GCC unroll 2
            for (int line = 0; line < PIECE; line += LINE) __builtin_prefetch(piece[done] + line);
    }
    // f(k) for every STRIDE of `number` rows, and what is due between
    template <int STRIDE, class F>
    INLINE void between(int64_t number, F f) {
        for (int64_t k = 0; k < number;) {
            const int64_t end = k + every < number ? k + every : number;
            fetch(end - k);
            for (; k < end; k += STRIDE) f(k);
        }
    }
};

// Whether rows can be read and written where they lie.
INLINE bool in_place(const Tensor& t) { return t.channel == 1 && t.type == F32; }

// f(n), with a constant for the usual numbers of keys and values: compilers then unroll what is short, and need no registers for where each
// of several rows is.
template <class F>
INLINE void counted(int64_t n, F f) {
    if (n == 64) f(std::integral_constant<int64_t, 64>{});
    else if (n == 128) f(std::integral_constant<int64_t, 128>{});
    else f(n);
}
// `count` rows of n numbers, whole vectors, each times a number if numbers are given
template <class To, class From, class Load, class Store>
INLINE void copy_rows(To* to, int64_t to_stride, const From* from, int64_t from_stride, int count, int n, const float* scales, int stride,
                      Load load, Store store) {
    counted(n, [&](auto N) {
        for (int r = 0; r < count; r++, to += to_stride, from += from_stride) {
            const vec scale = broadcast(scales ? scales[r * stride] : 1.0f);
            for (int i = 0; i < N; i += L) store(to + i, scales ? load(from + i) * scale : load(from + i));
        }
    });
}

// Copies a row of a tensor, times a number, padded with zeros.
SHARED void load_row(float* out, const Tensor& t, int64_t offset, int n, int padded, float scale) {
    const Type type = static_cast<Type>(t.type);
    int i = 0;
    if (t.channel == 0 && n > 0) {  // one number for all
        const vec same = broadcast(load_one(t.data, offset, type) * scale);
        for (; i + L <= n; i += L) store(out + i, same);
    } else if (t.channel == 1) {
        if (type == F32) {
            const float* from = reinterpret_cast<const float*>(t.data) + offset;
            for (; i + L <= n; i += L) store(out + i, load(from + i) * scale);
        } else {
            const uint16_t* from = reinterpret_cast<const uint16_t*>(t.data) + offset;
            for (; i + L <= n; i += L) store(out + i, load16(from + i, type) * scale);
        }
    }
    for (; i < n; i++) out[i] = load_one(t.data, offset + i * t.channel, type) * scale;
    for (; i < padded; i++) out[i] = 0;
}

// `count` such rows, one a token from `offset` on, each times a number if numbers are given; zeros for a tensor that is not there.
SHARED void load_rows(float* out, int out_stride, const Tensor& t, int64_t offset, int count, int n, int padded, const float* scales, int stride) {
    const auto whole = [=](auto* from, auto load) {
        copy_rows(out, out_stride, from + offset, t.time, count, n, scales, stride, load, [](float* p, vec x) { store(p, x); });
    };
    if (t && t.channel == 1 && n == padded) {
        const auto half = reinterpret_cast<const uint16_t*>(t.data);
        if (t.type == F32) return whole(reinterpret_cast<const float*>(t.data), [](const float* p) { return load(p); });
        if (t.type == BF16) return whole(half, [](const uint16_t* p) { return load16(p, BF16); });
        return whole(half, [](const uint16_t* p) { return load16(p, F16); });
    }
    for (int r = 0; r < count; r++, out += out_stride) {
        if (t) load_row(out, t, offset + r * t.time, n, padded, scales ? scales[r * stride] : 1.0f);
        else std::memset(out, 0, sizeof(float) * padded);
    }
}

// The numbers of `count` tokens, times one, or `absent` for a tensor that is not there; `stride` is that of out.
INLINE void load_numbers(float* out, const Tensor& t, int64_t offset, int count, float scale, float absent, int stride = 1) {
    const float* single = t && t.type == F32 ? reinterpret_cast<const float*>(t.data) + offset : nullptr;
    for (int r = 0; r < count; r++)
        out[r * stride] = scale * (single ? single[r * t.time] : t ? load_one(t.data, offset + r * t.time, static_cast<Type>(t.type)) : absent);
}

// x given back as the numbers of `count` tokens, added where a head before this one has written the sum so far.
template <class Number>
INLINE void add_numbers(const Tensor& t, int64_t offset, int count, const Number* x, int stride = 1) {
    const Type type = static_cast<Type>(t.type);
    for (int r = 0; t && r < count; r++) {
        const int64_t of = offset + r * t.time;
        store_one(t.data, of, static_cast<float>((t.heads ? load_one(t.data, of, type) : 0.0f) + x[r * stride]), type);
    }
}

// The gradient of the number of u, which is added to that of x where one number is both.
INLINE Tensor gradient_of_cu(const Micro& to) {
    Tensor out = to.cu;
    if (out && out.data == to.cx.data) out.heads = 1;
    return out;
}

SHARED void store_row(const Tensor& t, int64_t offset, const float* row, int n, float scale, bool add) {
    const Type type = static_cast<Type>(t.type);
    int i = 0;
    if (t.channel == 1 && type == F32) {
        float* to = reinterpret_cast<float*>(t.data) + offset;
        for (; i + L <= n; i += L) store(to + i, add ? load(to + i) + load(row + i) * scale : load(row + i) * scale);
    } else if (t.channel == 1 && !add) {
        uint16_t* to = reinterpret_cast<uint16_t*>(t.data) + offset;
        for (; i + L <= n; i += L) store16(to + i, load(row + i) * scale, type);
    }
    for (; i < n; i++) {
        int64_t at = offset + i * t.channel;
        store_one(t.data, at, (add ? load_one(t.data, at, type) : 0.0f) + row[i] * scale, type);
    }
}

SHARED void store_rows(const Tensor& t, int64_t offset, const float* rows, int rows_stride, int count, int n, const float* scales, int stride,
                       bool past = false) {
    const bool add = t.heads != 0;  // a head before this one has written the sum so far
    const auto whole = [=](auto* to, auto store) {
        copy_rows(to + offset, t.time, rows, rows_stride, count, n, scales, stride, [](const float* p) { return load(p); }, store);
    };
    if (t.channel == 1 && n % L == 0 && !add) {
        const auto half = reinterpret_cast<uint16_t*>(t.data);
        if (t.type == F32) return whole(reinterpret_cast<float*>(t.data), [=](float* p, vec x) { past ? store_past(p, x) : store(p, x); });
        if (t.type == BF16) return whole(half, [=](uint16_t* p, vec x) { store16(p, x, BF16, past); });
        return whole(half, [=](uint16_t* p, vec x) { store16(p, x, F16, past); });
    }
    for (int r = 0; r < count; r++, rows += rows_stride) store_row(t, offset + r * t.time, rows, n, scales ? scales[r * stride] : 1.0f, add);
}

// ---- rows of any length, a vector at a time ------------------------------------------------------------------------

template <class F>
INLINE void vectors(int from, int to, F f) {  // f(at, lanes): the last vector may be a part of one
    for (int i = from; i < to; i += L) f(i, to - i < L ? to - i : L);
}
INLINE vec some(const float* p, int n) {
    if (n == L) return load(p);
    float out[L] = {};
    for (int i = 0; i < n; i++) out[i] = p[i];
    return load(out);
}
INLINE void put_some(float* p, vec x, int n) {
    if (n == L) return store(p, x);
    for (int i = 0; i < n; i++) p[i] = x[i];
}
INLINE float total(vec x) {
    float out = 0;
    for (int i = 0; i < L; i++) out += x[i];
    return out;
}
INLINE vec sigmoid(vec x) { return 1.0f / (1.0f + exponential(-x)); }

// ---- products with S, in panels ------------------------------------------------------------------------------------

// out[r] = rows[r] . S for `count` rows (out and rows have room for whole tiles)
SHARED void read_rows(Ahead& next, const Layout& at, float* out, const float* rows, const float* S, int count) {
    for (int n = 0; n < at.panels; n++)
        for (int r = 0; r < count; r += MR) {
            next.fetch(at.K);
            float* to = out + r * at.Vp + n * at.panel;
            const float *a = rows + r * at.Kp, *s = S + n * at.Kp * at.panel;
            if (at.panel == L) tile<MR, 1, ZERO>(to, at.Vp, a, at.Kp, 1, s, L, at.K, nullptr, nullptr, 0);
            else tile<MR, 2, ZERO>(to, at.Vp, a, at.Kp, 1, s, 2 * L, at.K, nullptr, nullptr, 0);
        }
}

// S = diag(scale) from + keys^T values
SHARED void write_rows(Ahead& next, const Layout& at, float* S, const float* from, const float* scale, int scale_stride,
                       const float* keys, const float* values, int count) {
    for (int n = 0; n < at.panels; n++)
        for (int k = 0; k < at.Kp; k += MR) {
            next.fetch(count);
            float* to = S + n * at.Kp * at.panel + k * at.panel;
            const float *start = from + (to - S), *s = scale + k * scale_stride, *v = values + n * at.panel;
            if (at.panel == L) tile<MR, 1, SCALED>(to, L, keys + k, 1, at.Kp, v, at.Vp, count, start, s, scale_stride);
            else tile<MR, 2, SCALED>(to, 2 * L, keys + k, 1, at.Kp, v, at.Vp, count, start, s, scale_stride);
        }
}

// The same with two sets of rows, of which the second begins C rows on.
INLINE void write_two_sets(Ahead& next, const Layout& at, float* S, const float* from, const float* scale, int scale_stride,
                           const float* keys, const float* values, int count, int more) {
    static const float one[1] = {1.0f};
    const bool joined = count == C;
    write_rows(next, at, S, from, scale, scale_stride, keys, values, joined ? C + more : count);
    if (!joined) write_rows(next, at, S, S, one, 0, keys + C * at.Kp, values + C * at.Vp, more);
}

// out (Kp x width) = S values^T, the values transposed: (Vp x width); width is a multiple of C
SHARED void read_back(Ahead& next, const Layout& at, float* out, const float* S, const float* turned, int width) {
    const int64_t panel = static_cast<int64_t>(at.Kp) * at.panel;
    const int p = at.panel, n = at.panels;
    int c = 0;
    for (; c + 2 * L <= width; c += 2 * L)
        for (int k = 0; k < at.Kp; k += MR) {
            next.fetch(at.Vp);
            tile<MR, 2, ZERO>(out + k * width + c, width, S + k * p, p, 1, turned + c, width, p, nullptr, nullptr, 0, n, panel);
        }
    for (; c < width; c += L)
        for (int k = 0; k < at.Kp; k += 2 * MR) {  // Kp is a multiple of L, which is 2 MR where C is no multiple of 2 L
            next.fetch(at.Vp);
            tile<2 * MR, 1, ZERO>(out + k * width + c, width, S + k * p, p, 1, turned + c, width, p, nullptr, nullptr, 0, n, panel);
        }
}

// a row of S . the same row of dS, for L keys from k on
INLINE vec row_sums(const Layout& at, const float* S, const float* dS, int k) {
    vec products[L];
#pragma GCC unroll 16
    for (int j = 0; j < L; j++) products[j] = vec{};
    for (int n = 0; n < at.panels; n++) {
        const int64_t of = (static_cast<int64_t>(n) * at.Kp + k) * at.panel;
#pragma GCC unroll 16
        for (int j = 0; j < L; j++)
            for (int v = 0; v < at.panel; v += L) products[j] += load(S + of + j * at.panel + v) * load(dS + of + j * at.panel + v);
    }
    return sums(products);
}

// f(panel of S, where it lies in the state of a head, its values) for every panel
template <class F>
INLINE void panels_of(const Layout& at, const Tensor& t, int64_t b, int64_t h, F f) {
    float* state = reinterpret_cast<float*>(t.data) + b * t.batch + h * t.head;
    for (int v = 0; v < at.V; v += at.panel)
        f(static_cast<int64_t>(v) * at.Kp, state + v * t.time, at.V - v < at.panel ? at.V - v : at.panel);
}
INLINE bool whole_squares(const Layout& at, const Tensor& t, int values) { return t.channel == 1 && values % L == 0 && at.K % L == 0; }

// S from and to the state of a head, which may have any strides.
SHARED void load_state(const Layout& at, float* S, const Tensor& t, int64_t b, int64_t h) {
    std::memset(S, 0, sizeof(float) * at.state());
    if (!t) return;
    panels_of(at, t, b, h, [&](int64_t panel, const float* from, int values) {
        float* to = S + panel;
        if (whole_squares(at, t, values)) return transpose(to, at.panel, from, t.time, values, at.K);
        for (int k = 0; k < at.K; k++)
            for (int v = 0; v < values; v++) to[k * at.panel + v] = from[v * t.time + k * t.channel];
    });
}

SHARED void store_state(const Layout& at, const float* S, const Tensor& t, int64_t b, int64_t h) {
    if (!t) return;
    panels_of(at, t, b, h, [&](int64_t panel, float* to, int values) {
        const float* from = S + panel;
        if (whole_squares(at, t, values)) return transpose(to, t.time, from, at.panel, at.K, values);
        for (int k = 0; k < at.K; k++)
            for (int v = 0; v < values; v++) to[v * t.time + k * t.channel] = from[k * at.panel + v];
    });
}

}  // namespace fw
