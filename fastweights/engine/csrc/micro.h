// The micro-kernels: vectors, one small matrix product, rows combined, inner products of rows, transposition.
//
// A matrix product is always  C[r][:] += sum_d A[r, d] B[d][:]  with C and B contiguous along `:` and A read a number at a
// time with any strides. Which of the scan's axes plays which part is all that distinguishes its products:
//   reads    R = X S      rows tokens, `:` values, d keys          writes   S = S + Y^T U   rows keys, `:` values, d tokens
//   read back T = S U^T   rows keys, `:` tokens, d values
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__AVX__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define INLINE_CALL __attribute__((always_inline))  // of a lambda
#define SHARED inline __attribute__((noinline))     // compiled once a file, not once a class of programs
#define APART __attribute__((noinline))             // loops that need the registers for themselves

namespace fw {

#if defined(__AVX512F__)
constexpr int L = 16, MR = 8;  // lanes of a vector; rows of a tile: MR x 2 accumulators must fit the registers
#elif defined(__AVX2__)
constexpr int L = 8, MR = 4;
#else
constexpr int L = 4, MR = 8;
#endif

typedef float vec __attribute__((vector_size(4 * L)));
typedef int32_t ivec __attribute__((vector_size(4 * L)));
typedef uint32_t uvec __attribute__((vector_size(4 * L)));
typedef int64_t pairs __attribute__((vector_size(4 * L)));  // L / 2 pairs of neighbours
typedef float vec_in_memory __attribute__((vector_size(4 * L), aligned(4)));  // of floats: storing one changes no other type

INLINE vec load(const float* p) { return *reinterpret_cast<const vec_in_memory*>(p); }
INLINE void store(float* p, vec x) { *reinterpret_cast<vec_in_memory*>(p) = x; }
// Past the caches, to a multiple of a vector, for what would not stay there: a line that is written whole is not read before. Others see
// it after `settle`.
INLINE void store_past(float* p, vec x) {
#if defined(__AVX512F__)
    _mm512_stream_ps(p, (__m512)x);
#elif defined(__AVX__)
    _mm256_stream_ps(p, (__m256)x);
#else
    store(p, x);
#endif
}
INLINE void settle() {
#if defined(__AVX__)
    _mm_sfence();
#endif
}
INLINE vec broadcast(float x) { return x - vec{}; }  // of -0, too
// Zeros, a store or a register each: for `= {}` some compilers call for a string instruction, which takes longer than what follows.
template <int N>
INLINE void clear(vec (&x)[N]) {
#pragma GCC unroll 32
    for (int i = 0; i < N; i++) x[i] = vec{};
}
INLINE bool any(ivec mask) {
    int64_t two[L / 2], all = 0;
    std::memcpy(two, &mask, sizeof two);
    for (int64_t lanes : two) all |= lanes;
    return all != 0;
}
INLINE vec select(ivec mask, vec a, vec b) { return (vec)(((ivec)a & mask) | ((ivec)b & ~mask)); }

template <int... I>
INLINE ivec lane_numbers(std::integer_sequence<int, I...>) { return ivec{I...}; }
INLINE ivec first_lanes(int n) { return lane_numbers(std::make_integer_sequence<int, L>{}) < n; }

constexpr int HALF = 8;  // half a chunk
typedef float half_vec __attribute__((vector_size(4 * HALF), aligned(4)));
typedef int32_t half_ivec __attribute__((vector_size(4 * HALF)));
INLINE half_ivec first_of_half(int n) { return half_ivec{0, 1, 2, 3, 4, 5, 6, 7} < n; }

// ---- numbers of 32 and 16 bits -------------------------------------------------------------------------------------

#if defined(__aarch64__)
typedef __fp16 float16;
#else
typedef _Float16 float16;
#endif

enum Type : int64_t { F32 = 0, BF16 = 1, F16 = 2 };

INLINE vec load16(const uint16_t* p, Type type) {
    if (type == BF16) {
#if defined(__AVX512F__)  // some compilers widen the halves of a vector one by one, and put them together
        const uvec bits = (uvec)_mm512_maskz_cvtepu16_epi32(-1, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
        const uvec bits = (uvec)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
        typedef uint16_t half __attribute__((vector_size(2 * L), aligned(2), may_alias));
        const uvec bits = __builtin_convertvector(*reinterpret_cast<const half*>(p), uvec);
#endif
        return (vec)(bits << 16);
    }
#if defined(__AVX512F__)  // some compilers convert lane by lane
    return (vec)_mm512_maskz_cvtph_ps(-1, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
    return (vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    typedef float16 half __attribute__((vector_size(2 * L), aligned(2), may_alias));
    return __builtin_convertvector(*reinterpret_cast<const half*>(p), vec);
#endif
}

typedef uint16_t narrow __attribute__((vector_size(2 * L)));
INLINE narrow to_float16(vec x) {
#if defined(__AVX512F__)
    return (narrow)_mm512_maskz_cvtps_ph(-1, (__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__AVX2__)
    return (narrow)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
    typedef float16 half __attribute__((vector_size(2 * L)));
    return (narrow)__builtin_convertvector(x, half);
#endif
}
INLINE narrow to_bfloat16(vec x) {
#if defined(__AVX512BF16__)
    return (narrow)_mm512_cvtneps_pbh((__m512)x);
#else
    const uvec bits = (uvec)x, even = (bits >> 16) & 1;
    const uvec rounded = (bits + 0x7fff + even) >> 16, nan = (bits >> 16) | 64;
    const ivec is_number = x == x;
    return __builtin_convertvector((rounded & (uvec)is_number) | (nan & ~(uvec)is_number), narrow);
#endif
}
INLINE void store16(uint16_t* p, vec x, Type type, [[maybe_unused]] bool past = false) {
    const narrow out = type == BF16 ? to_bfloat16(x) : to_float16(x);
#if defined(__AVX512F__)
    if (past) return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)out);
#elif defined(__AVX2__)
    if (past) return _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)out);
#endif
    std::memcpy(p, &out, sizeof out);
}

INLINE float load_one(const void* p, int64_t i, Type type) {
    if (type == F32) return static_cast<const float*>(p)[i];
    if (type == F16) return static_cast<float>(static_cast<const float16*>(p)[i]);
    uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(p)[i]) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

INLINE void store_one(void* p, int64_t i, float x, Type type) {
    if (type == F32) {
        static_cast<float*>(p)[i] = x;
    } else if (type == F16) {
        static_cast<float16*>(p)[i] = static_cast<float16>(x);
    } else {
        uint32_t bits;
        std::memcpy(&bits, &x, 4);
        bits = x != x ? (bits >> 16) | 64 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        static_cast<uint16_t*>(p)[i] = static_cast<uint16_t>(bits);
    }
}

// e^x to about one unit in the last place; 0 below the normal numbers, and no more than about their largest above them. Cephes'
// reduction and polynomial.
INLINE vec exponential(vec x) {
    const ivec none = x < -87.3f;
    vec inside = x > 88.3f ? broadcast(88.3f) : none ? broadcast(-87.3f) : x;
    vec shifted = inside * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;  // the low bits of `shifted` are a whole number n
    vec r = inside - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = broadcast(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + (r + 1.0f);
    vec out = (vec)((ivec)p + ((ivec)shifted << 23)) + (inside - inside);  // times 2^n; what is not a number stays so
    return none ? vec{} : out;
}

// ---- shuffles ------------------------------------------------------------------------------------------------------

template <class V>
constexpr int lanes = sizeof(V) / sizeof(V{}[0]);
template <class V>
using lanes_of = std::make_integer_sequence<int, lanes<V>>;

template <int... I>
INLINE vec halves(vec a, vec b, int from, std::integer_sequence<int, I...>) {
    return from ? __builtin_shufflevector(a, b, (I < L / 2 ? I + L / 2 : I + L)...) : __builtin_shufflevector(a, b, (I < L / 2 ? I : I + L / 2)...);
}
// the first half of a and that of b, or the second ones
INLINE vec first_halves(vec a, vec b) { return halves(a, b, 0, lanes_of<vec>{}); }
INLINE vec second_halves(vec a, vec b) { return halves(a, b, 1, lanes_of<vec>{}); }

// Lanes whose number holds N are b's, the others a's: a sum of what was there and of what was N lanes further. One of the two is no shuffle
// but a choice, which has more units in most processors.
template <int N, int... I>
INLINE vec folded(vec a, vec b, std::integer_sequence<int, I...>) {
    const vec stays = __builtin_shufflevector(a, b, (I & N ? L + I : I)...);
    return stays + __builtin_shufflevector(a, b, (I & N ? L + (I ^ N) : I ^ N)...);
}

// Lane i of the result is the sum of the lanes of x[i].
template <int N = L / 2>
INLINE vec sums(vec* x) {
#pragma GCC unroll 8
    for (int i = 0; i < N; i++) x[i] = folded<N>(x[i], x[i + N], lanes_of<vec>{});
    if constexpr (N > 1) return sums<N / 2>(x);
    return x[0];
}

// The columns of a square are its rows afterwards: those of its quarters are, once two of them have changed places.
template <int N, class V, int... I>
INLINE void exchange(V& a, V& b, std::integer_sequence<int, I...>) {
    const V above = __builtin_shufflevector(a, b, (I & N ? lanes<V> + (I ^ N) : I)...);
    b = __builtin_shufflevector(a, b, (I & N ? lanes<V> + I : I ^ N)...), a = above;
}
template <class V, int N = lanes<V> / 2>
INLINE void turn(V (&x)[lanes<V>]) {
#pragma GCC unroll 16
    for (int i = 0; i < lanes<V>; i++)
        if (!(i & N)) exchange<N>(x[i], x[i + N], lanes_of<V>{});
    if constexpr (N > 1) turn<V, N / 2>(x);
}

// out (columns x rows) = in^T (rows x columns), both multiples of L.
SHARED void transpose(float* out, int64_t out_stride, const float* in, int64_t in_stride, int rows, int columns) {
    for (int r = 0; r < rows; r += L)
        for (int c = 0; c < columns; c += L) {
            vec x[L];
#pragma GCC unroll 16
            for (int i = 0; i < L; i++) x[i] = load(in + (r + i) * in_stride + c);
            turn(x);
#pragma GCC unroll 16
            for (int i = 0; i < L; i++) store(out + (c + i) * out_stride + r, x[i]);
        }
}

// The same of half as many rows (L / 2), in pairs of columns: row c / 2 of `out` is  in[0][c], in[0][c + 1], in[1][c], in[1][c + 1], ...
SHARED void transpose_pairs(float* out, const float* in, int in_stride, int columns) {
    for (int c = 0; c < columns; c += L) {
        pairs x[L / 2];
#pragma GCC unroll 8
        for (int i = 0; i < L / 2; i++) x[i] = (pairs)load(in + i * in_stride + c);
        turn(x);
#pragma GCC unroll 8
        for (int i = 0; i < L / 2; i++) store(out + (c / 2 + i) * L, (vec)x[i]);
    }
}

// ---- the product ---------------------------------------------------------------------------------------------------

// sum += *number * row, in one instruction where there is one that reads a number for all lanes (compilers read one that is used twice first).
INLINE void add_product(vec& sum, const float* number, vec row) {
#if defined(__AVX512F__)
    asm("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(row), "m"(*number));
#else
    sum += *number * row;
#endif
}
// The same with a row of N vectors, for the number of one of several rows. Half of them are read by the multiply-adds: that takes an instruction
// less, but all of them would be more reads than a processor does beside its multiply-adds.
template <int N>
INLINE void add_products(vec (&sum)[N], const float* number, const vec (&row)[N], bool read_there) {
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
        if (read_there) add_product(sum[n], number, row[n]);
        else sum[n] += *number * row[n];
    }
}

enum Start { ZERO, SCALED };  // C starts from nothing, or from `start` (of the same strides) times a number a row

// M rows and N vectors of C, over `panels` runs of `depth`; A moves by `a_panel` and B goes on from run to run.
template <int M, int N, Start START>
INLINE void tile(float* c, int c_stride, const float* a, int64_t a_row, int64_t a_depth, const float* b, int b_stride, int depth,
                 const float* start, const float* scale, int scale_stride, int panels = 1, int64_t a_panel = 0) {
    vec acc[M][N];
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) acc[m][n] = START == ZERO ? vec{} : load(start + m * c_stride + n * L) * scale[m * scale_stride];
    for (int p = 0; p < panels; p++, a += a_panel) {
        const float* a_now = a;
        for (int d = 0; d < depth; d++, a_now += a_depth, b += b_stride) {
            vec row[N];
#pragma GCC unroll 4
            for (int n = 0; n < N; n++) row[n] = load(b + n * L);
#pragma GCC unroll 16
            for (int m = 0; m < M; m++) add_products(acc[m], a_now + m * a_row, row, 2 * m < M);
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) store(c + m * c_stride + n * L, acc[m][n]);
}

// C[r][:] = sum_d A[r, d] B[d][:] for L rows and L columns; B goes on from panel to panel. Row r of C is column r of `out`.
INLINE void square_tile(vec (&out)[L], const float* a, int64_t a_row, const float* b, int depth, int panels, int64_t a_panel) {
    clear(out);
    for (int p = 0; p < panels; p++, a += a_panel)
        for (int d = 0; d < depth; d++, b += L) {
            const vec row = load(b);
#pragma GCC unroll 16
            for (int m = 0; m < L; m++) out[m] += a[m * a_row + d] * row;
        }
    turn(out);
}

// C[r][:] = sum_d A[r, d] B[d][:] for L rows and L / 2 columns, which would fill half a vector: the other half takes every second d.
// `b` is laid out by transpose_pairs; its rows go on from panel to panel. Row r of C is column r of `out`.
INLINE void narrow_tile(vec (&out)[L / 2], const float* a, int64_t a_row, const float* b, int depth, int panels, int64_t a_panel) {
    vec acc[L];
    clear(acc);
    for (int p = 0; p < panels; p++, a += a_panel)
        for (int d = 0; d < depth; d += 2, b += L) {
            const vec row = load(b);
#pragma GCC unroll 16
            for (int m = 0; m < L; m++) {
                int64_t two;
                std::memcpy(&two, a + m * a_row + d, sizeof two);
                acc[m] += (vec)(pairs{} + two) * row;
            }
        }
    turn(acc);
#pragma GCC unroll 8
    for (int i = 0; i < L / 2; i++) out[i] = acc[2 * i] + acc[2 * i + 1];
}

// Eight rows and HALF columns, where the other columns are not needed.
INLINE void half_tile(float* c, int c_stride, const float* a, int64_t a_row, const float* b, int b_stride, int depth) {
    half_vec acc[8] = {};
    for (int d = 0; d < depth; d++) {
        const half_vec row = *reinterpret_cast<const half_vec*>(b + d * b_stride);
#pragma GCC unroll 8
        for (int m = 0; m < 8; m++) acc[m] += a[m * a_row + d] * row;
    }
#pragma GCC unroll 8
    for (int m = 0; m < 8; m++) *reinterpret_cast<half_vec*>(c + m * c_stride) = acc[m];
}

// out += sum over j < count of weights[j * stride] * rows[j], over `width` (a multiple of L) numbers.
template <int N>
INLINE void combine_block(float* out, const float* weights, int stride, const float* rows, int row_stride, int count) {
    vec acc[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) acc[n] = load(out + n * L);
    for (int j = 0; j < count; j++)
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) acc[n] += weights[j * stride] * load(rows + j * row_stride + n * L);
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) store(out + n * L, acc[n]);
}

SHARED void combine(float* out, const float* weights, int stride, const float* rows, int row_stride, int count, int width) {
    int at = 0;
    for (; at + 4 * L <= width; at += 4 * L) combine_block<4>(out + at, weights, stride, rows + at, row_stride, count);
    for (; at < width; at += L) combine_block<1>(out + at, weights, stride, rows + at, row_stride, count);
}

INLINE double sum_exactly(vec x) {
    double out = 0;
    for (int i = 0; i < L; i++) out += x[i];
    return out;
}

INLINE double dot(const float* a, const float* b, int width) {
    vec x = {};
    for (int i = 0; i < width; i += L) x += load(a + i) * load(b + i);
    return sum_exactly(x);
}

// out[i] = row i of a . row i of b, for `count` (a multiple of L) rows of the same stride
SHARED void row_products(float* out, const float* a, const float* b, int stride, int count, int width) {
    for (int i = 0; i < count; i += L) {
        vec acc[L];
        clear(acc);
        for (int j = 0; j < L; j++)
            for (int k = 0; k < width; k += L) acc[j] += load(a + (i + j) * stride + k) * load(b + (i + j) * stride + k);
        store(out + i, sums(acc));
    }
}

// The inner products of two rows with L / 2 others: lane j is row0 . others[j], lane L / 2 + j row1 . others[j].
INLINE vec products_with(const float* row0, const float* row1, const float* others, int64_t stride, int width) {
    vec acc[L];
    clear(acc);
    for (int at = 0; at < width; at += L) {
        vec r0 = load(row0 + at), r1 = load(row1 + at);
#pragma GCC unroll 8
        for (int j = 0; j < L / 2; j++) {
            vec other = load(others + j * stride + at);
            acc[j] += r0 * other;
            acc[j + L / 2] += r1 * other;
        }
    }
    return sums(acc);
}

INLINE void inner_products(float* first, float* second, const float* row0, const float* row1, const float* others, int stride, int width) {
    float out[L];
    store(out, products_with(row0, row1, others, stride, width));
    std::memcpy(first, out, sizeof(float) * L / 2);
    std::memcpy(second, out + L / 2, sizeof(float) * L / 2);
}

}  // namespace fw
