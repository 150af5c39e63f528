// What a scan is given, as plain data: the same structures, field by field, as in engine/kernels.py.
//
// A token is n micro-steps  S <- diag(a) S + (sum over writes of key value^T)  of a state S (K keys x V values), with
//   erase none   write  w u^T              erase tied   write  y (u + S^T x)^T           erase free   write  y (S^T x)^T + w u^T
// where x reads S before the micro-step, and reads S^T q (or S q, if the program acts on rows) of S between micro-steps.
#pragma once
#include <optional>

#include "micro.h"

namespace fw {

constexpr int C = 16;  // micro-steps a chunk
static_assert(C % L == 0 && C == 2 * HALF, "a chunk is a whole number of vectors");

enum Decay : int64_t { NO_DECAY = 0, PER_HEAD = 1, PER_KEY = 2 };
enum Erase : int64_t { NO_ERASE = 0, TIED = 1, FREE = 2 };

// Numbers at any strides (in numbers, not bytes); `heads` may be fewer than the scan's if it divides them.
struct Tensor {
    char* data;
    int64_t batch, time, head, channel, heads, type;

    INLINE explicit operator bool() const { return data != nullptr; }
    // A state whose keys and values change places
    Tensor turned() const {
        Tensor out = *this;
        std::swap(out.time, out.channel);
        return out;
    }
    INLINE int64_t offset(int64_t b, int64_t t, int64_t h, int64_t of) const { return b * batch + t * time + h / (of / heads) * head; }

    // What head h of `of` sees: `data` starts there, and `heads` says which of the heads that share it this one is.
    Tensor seen_from(int64_t b, int64_t h, int64_t of) const {
        Tensor out = *this;
        if (data) out.data += offset(b, 0, h, of) * (type == F32 ? 4 : 2), out.heads = h % (of / heads);
        return out;
    }
};

struct Micro {
    Tensor x, y, u, w;   // vectors, w and y one and the same where the erase is tied
    Tensor cx, cu;       // numbers that multiply x and u, besides sx and su
    Tensor g;            // the log of the decay, a number or one per key
    double sx, su;
    int64_t lag;         // x reads S that many micro-steps earlier
    int64_t x_is_y;      // x is the key itself, and data is not given
    int64_t decayed;     // x is multiplied by this micro-step's decay
};

struct Read {
    Tensor q, out;       // backward pass: q holds the gradient of q, out that of what was read
    int64_t version;     // after how many micro-steps of the token
};

// Where the address of that index belongs.
struct Use {
    char** place;
    int64_t index;
};

struct Problem {
    int64_t B, T, H, K, V, n, reads;
    Decay decay;
    Erase erase;
    int64_t backward_reads;
    Micro* micro;
    Read* read;
    Tensor first, last;  // the state before and after: strides batch, (time) values, head, (channel) keys; data may be missing
    const uint8_t* reset;
    int64_t reset_batch, reset_time;
    float* values;       // what a tied or free erase wrote, (B, H, T * n, padded V); missing where nothing is saved
    float* checkpoints;  // S at the start of every segment, as the kernels lay it out; likewise
    int64_t segment;     // tokens a segment
    int64_t uses;
    const Use* use;      // where the addresses of every call belong, in these structures
    int64_t threads;
    int* positive;       // set to 1 where a log decay is > 0
};

// What the gradients are written to: the same structures with data where a gradient is wanted.
struct Gradient {
    Micro* micro;
    Read* read;          // q: the gradient of q; out: that of what was read (given)
    Tensor first, last;  // first is written, last is given
    int64_t groups;      // heads that some tensor shares are done in turn: H / groups of them
};

// Puts the addresses where they belong, for one call of many of the same shapes.
struct Call {
    int positive = 0;
    Call(Problem& p, char* const* address, int threads) {
        for (int64_t i = 0; i < p.uses; i++) *p.use[i].place = address[p.use[i].index];
        p.threads = threads, p.positive = &positive;
    }
};

// The micro-steps and reads of a program, as one head sees them.
struct Head {
    Micro micro[C];
    Read read[C];

    void enter(const Problem& p, const Micro* micros, const Read* reads, int64_t b, int64_t h) {
        for (int i = 0; i < p.n; i++) {
            micro[i] = micros[i];
            for (Tensor* t : {&micro[i].x, &micro[i].y, &micro[i].u, &micro[i].w, &micro[i].cx, &micro[i].cu, &micro[i].g})
                *t = t->seen_from(b, h, p.H);
        }
        for (int r = 0; r < p.reads; r++)
            read[r] = {reads[r].q.seen_from(b, h, p.H), reads[r].out.seen_from(b, h, p.H), reads[r].version};
    }
};

INLINE int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

constexpr int STEP = L < 8 ? 8 : L;  // what rows of a panel are padded to

// How S and rows are padded: keys and values to whole tiles, values to panels of one or two vectors. S is [panel][key][value of panel].
struct Layout {
    int K, V, Kp, Vp, panel, panels;

    explicit Layout(const Problem& p)
        : K(p.K), V(p.V), Kp(round_up(p.K, STEP)), Vp(p.V <= L ? STEP : round_up(p.V, 2 * L)), panel(Vp <= L ? L : 2 * L),
          panels(Vp / panel) {}
    int64_t state() const { return static_cast<int64_t>(Kp) * Vp; }

    // That of S turned: [panel][value][key of panel], panels of so many keys.
    Layout turned(int keys) const {
        Layout out = *this;
        std::swap(out.K, out.V), std::swap(out.Kp, out.Vp);
        out.panel = keys, out.panels = Kp / keys;
        return out;
    }
};

// A part of a thread's scratch memory, which is kept from call to call.
struct Scratch {
    float* next;
    INLINE float* take(int64_t n) {
        float* out = next;
        next += round_up(n, 16);
        return out;
    }
};
float* scratch(int64_t numbers);

// The heads that a task takes abreast, block after block: what a token brings for several heads lies in the same pages of memory, which are
// looked up once. One alone, if so the thread that has most to do has less.
constexpr int MOST_ABREAST = 2;
INLINE int64_t shares(int64_t tasks, int64_t threads) { return (tasks + threads - 1) / threads; }
INLINE int abreast(int64_t batch, int64_t heads, int64_t threads) {
    if (heads % MOST_ABREAST) return 1;
    const int64_t together = MOST_ABREAST * shares(batch * heads / MOST_ABREAST, threads);
    return together <= shares(batch * heads, threads) ? MOST_ABREAST : 1;
}

template <class Pass>
struct Abreast {
    const int count;
    std::optional<Pass> passes[MOST_ABREAST];

    Abreast(const Problem& p, int heads) : count(heads) {
        const int64_t room = round_up(Pass::size(p), 16);
        float* memory = scratch(count * room);
        for (int i = 0; i < count; i++) passes[i].emplace(p, memory + i * room);
    }
    Pass& operator[](int i) { return *passes[i]; }
};

// Runs work(context, i) for i < tasks on up to `threads` threads of the runtime that torch has loaded, where numbers below the normal
// ones are zeros meanwhile.
void parallel(int64_t tasks, int64_t threads, void (*work)(void*, int64_t), void* context, bool same_thread = false);

}  // namespace fw
