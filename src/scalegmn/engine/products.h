// Vectors of numbers, functions of them, and products of small matrices.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined __AVX512F__ || defined __AVX2__
#include <immintrin.h>
#endif

namespace {

typedef int64_t Int;
typedef uint32_t Pair;  // two bfloat16 numbers
typedef uint16_t Half;  // one

#ifdef __AVX512F__
const int BYTES = 64;  // of a vector register; there are 32
#else
const int BYTES = 32;  // there are 16
#endif

template <class T>
struct Lanes {
    typedef T Vector __attribute__((vector_size(BYTES), aligned(sizeof(T)), may_alias));
    static const int count = BYTES / sizeof(T);
};

// Numbers

inline Lanes<double>::Vector exponential(Lanes<double>::Vector x) {
    for (int i = 0; i < Lanes<double>::count; i++) x[i] = std::exp(x[i]);
    return x;
}

inline Lanes<float>::Vector exponential(Lanes<float>::Vector x) {
    typedef Lanes<float>::Vector Vector;
    typedef int32_t Whole __attribute__((vector_size(BYTES)));
    x = x > 88.0f ? Vector{} + 88.0f : x;  // comparisons are false for NaN, which stays
    x = x < -87.0f ? Vector{} - 87.0f : x;
    const float shift = 12582912.0f;  // 1.5 2^23: the sum is rounded to a whole number
    Vector t = x * 1.44269504088896341f + shift;
    Vector n = t - shift;
    Vector r = x - n * 0.693145751953125f;
    r = r - n * 1.428606820309417232e-6f;
    Vector p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    Whole exponent = ((Whole)t - 0x4b400000 + 127) << 23;
    return p * (Vector)exponent;
}

// log x of normal x > 0: a polynomial on [sqrt(1/2), sqrt(2)] (Cephes), after the power of 2 is taken off; of N vectors at
// once, which read each constant once
template <int N>
inline __attribute__((always_inline)) void logarithms(const Lanes<float>::Vector (&x)[N], Lanes<float>::Vector (&to)[N]) {
    typedef Lanes<float>::Vector Vector;
    typedef int32_t Whole __attribute__((vector_size(BYTES)));
    const int32_t root_half = 0x3f3504f3;
    Vector e[N], f[N], p[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) {
        const Whole shifted = (Whole)x[j] - root_half;
        e[j] = __builtin_convertvector(shifted >> 23, Vector);
        f[j] = (Vector)((shifted & 0x7fffff) + root_half) - 1.0f;
    }
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) {  // in pairs of powers, which do not wait for one another
        const Vector x1 = f[j], x2 = x1 * x1, x4 = x2 * x2;
        const Vector low = (x1 * -2.4999993993e-1f + 3.3333331174e-1f) + x2 * (x1 * -1.6668057665e-1f + 2.0000714765e-1f);
        const Vector high = (x1 * -1.2420140846e-1f + 1.4249322787e-1f) + x2 * (x1 * -1.1514610310e-1f + 1.1676998740e-1f);
        p[j] = low + x4 * (high + x4 * 7.0376836292e-2f);
    }
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) {
        const Vector f2 = f[j] * f[j];
        const Vector rest = p[j] * (f[j] * f2) - (e[j] * 2.12194440e-4f + 0.5f * f2);
        const Vector result = (f[j] + e[j] * 0.693359375f) + rest;
        to[j] = x[j] < INFINITY ? result : x[j];
    }
}

inline Lanes<float>::Vector logarithm(Lanes<float>::Vector x) {
    const Lanes<float>::Vector one[1] = {x};
    Lanes<float>::Vector result[1];
    logarithms(one, result);
    return result[0];
}

// max(x, 0), in place; NaN stays
inline void relu(float* x, Int count) {
    typedef Lanes<float>::Vector Vector;
    for (Int i = 0; i < count; i += Lanes<float>::count) {
        Vector& y = *(Vector*)(x + i);
        y = y < 0.0f ? Vector{} : y;
    }
}

inline Lanes<double>::Vector sigmoid(Lanes<double>::Vector x) { return 1 / (1 + exponential(-x)); }

#ifdef __AVX512DQ__
inline Lanes<float>::Vector sigmoid(Lanes<float>::Vector x) {
    __m512 t = _mm512_mul_ps((__m512)x, _mm512_set1_ps(-1.44269504088896341f));
    __m512 r = _mm512_reduce_ps(t, 1);  // t without its whole part, from 0 to 1
    __m512 p = _mm512_set1_ps(1.867130515e-03f);  // 2^r
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.017029777e-03f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.579991266e-02f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.401644439e-01f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.931512952e-01f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    p = _mm512_scalef_ps(p, t);  // of the whole part of t
    __m512 d = _mm512_add_ps(_mm512_min_ps(_mm512_set1_ps(1e38f), p), _mm512_set1_ps(1.0f));  // NaN stays
    __m512 q = _mm512_rcp14_ps(d);
    return (Lanes<float>::Vector)_mm512_mul_ps(q, _mm512_fnmadd_ps(d, q, _mm512_set1_ps(2.0f)));
}
#elif defined __AVX2__ && defined __FMA__ && !defined __AVX512F__
inline Lanes<float>::Vector sigmoid(Lanes<float>::Vector x) {
    __m256 t = _mm256_mul_ps((__m256)x, _mm256_set1_ps(-1.44269504088896341f));
    t = _mm256_max_ps(_mm256_set1_ps(-126.0f), _mm256_min_ps(_mm256_set1_ps(126.0f), t));  // NaN stays
    __m256 n = _mm256_round_ps(t, 8), r = _mm256_sub_ps(t, n);
    __m256 p = _mm256_set1_ps(1.535336188e-4f);  // 2^r
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.339887440e-3f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(9.618437357e-3f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(5.550332548e-2f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(2.402264791e-1f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(6.931472028e-1f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    __m256 d = _mm256_fmadd_ps(p, (__m256)power, _mm256_set1_ps(1.0f));
    __m256 q = _mm256_rcp_ps(d);  // to 12 bits
    return (Lanes<float>::Vector)_mm256_mul_ps(q, _mm256_fnmadd_ps(d, q, _mm256_set1_ps(2.0f)));
}
#else
inline Lanes<float>::Vector sigmoid(Lanes<float>::Vector x) { return 1 / (1 + exponential(-x)); }
#endif

// Its value, rounded: sums of two products are the same in either order
template <class Vector>
inline Vector rounded(Vector x) {
#ifdef __AVX512F__
    __asm__("" : "+v"(x));
#endif
    return x;
}

// In a register: compilers would read what is used several times from memory each time
template <class Vector>
inline Vector in_register(Vector x) {
#if defined(__AVX512F__)
    __asm__("" : "+v"(x));
#elif defined(__AVX__)
    __asm__("" : "+x"(x));
#endif
    return x;
}

// An address that compilers do not derive from others
template <class T>
inline const T* address(const T* x) {
    __asm__("" : "+r"(x));
    return x;
}

// The sum of its numbers: of its halves' sum, and so on
template <class T, class Vector>
inline T total(Vector x) {
    if constexpr (sizeof(x) == 2 * sizeof(T)) {
        return x[0] + x[1];
    } else {
        typedef T Part __attribute__((vector_size(sizeof(x) / 2), aligned(sizeof(T)), may_alias));
        Part halves[2];
        std::memcpy(halves, &x, sizeof(x));
        return total<T>(halves[0] + halves[1]);
    }
}

// The totals of as many vectors as one has lanes
template <class T>
inline typename Lanes<T>::Vector totals(const typename Lanes<T>::Vector* x) {
    typename Lanes<T>::Vector result;
    for (int i = 0; i < Lanes<T>::count; i++) result[i] = total<T>(x[i]);
    return result;
}

#ifdef __AVX512F__
template <>
inline Lanes<float>::Vector totals<float>(const Lanes<float>::Vector* x) {
    __m512 y[16];  // halves of two vectors, then quarters of four, and so on: sums are the same as in `total`
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) y[i] = (__m512)x[i % 4 * 4 + i / 4];  // as the last two steps turn their order
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        const __m512 a = y[2 * i], b = y[2 * i + 1];
        y[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const __m512 a = y[2 * i], b = y[2 * i + 1];
        y[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        const __m512 a = y[2 * i], b = y[2 * i + 1];
        y[i] = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
    }
    return (Lanes<float>::Vector)_mm512_add_ps(_mm512_shuffle_ps(y[0], y[1], 0x88), _mm512_shuffle_ps(y[0], y[1], 0xdd));
}
#endif

#ifdef __AVX512BF16__
inline void to_halves(const float* from, Half* to, Int count) {
    for (Int i = 0; i < count; i += 16)
        _mm256_storeu_si256((__m256i*)(to + i), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + i)));
}
#endif

// [rows, columns] -> [rows / 2, columns] pairs of one column of two rows
inline void to_row_pairs(const Half* from, Pair* to, Int rows, Int columns) {
    for (Int r = 0; r < rows; r += 2) {
        Int c = 0;
#ifdef __AVX512BW__
        const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                             37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
        const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
        for (; c + 32 <= columns; c += 32) {
            const Half* both = from + r * columns + c;
            const __m512i x = _mm512_loadu_si512(both), y = _mm512_loadu_si512(both + columns);
            Pair* place = to + r / 2 * columns + c;
            _mm512_storeu_si512(place, _mm512_permutex2var_epi16(x, low, y));
            _mm512_storeu_si512(place + 16, _mm512_permutex2var_epi16(x, high, y));
        }
#endif
        for (; c < columns; c++)
            to[r / 2 * columns + c] = from[r * columns + c] | (Pair)from[(r + 1) * columns + c] << 16;
    }
}

// Rounded to the nearest, ties to even
template <class T>
inline void to_halves(const T* from, Half* to, Int count) {
    for (Int i = 0; i < count; i++) {
        const float number = from[i];
        uint32_t bits;
        std::memcpy(&bits, &number, 4);
        to[i] = number != number ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    }
}

// The same by rows [rows, columns], and pairs of rows
inline void to_halves(const float* from, Half* to, Pair* pairs, Int rows, Int columns) {
#ifdef __AVX512BF16__
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                           5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    for (Int r = 0; r < rows; r += 2)
        for (Int c = 0; c < columns; c += 16) {
            const float* place = from + r * columns + c;
            const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(place + columns), _mm512_loadu_ps(place));
            Half* half = to + r * columns + c;
            _mm256_storeu_si256((__m256i*)half, _mm512_castsi512_si256(both));
            _mm256_storeu_si256((__m256i*)(half + columns), _mm512_extracti64x4_epi64(both, 1));
            _mm512_storeu_si512(pairs + r / 2 * columns + c, _mm512_permutexvar_epi16(order, both));
        }
#else
    to_halves(from, to, rows * columns);
    to_row_pairs(to, pairs, rows, columns);
#endif
}

inline void to_halves(const double*, Half*, Pair*, Int, Int) {}

template <bool ADDS = false, class T>
inline void copy(const T* from, T* to, Int count) {
    typedef typename Lanes<T>::Vector Vector;
    const int L = Lanes<T>::count;
    if (count % (2 * L) == 0) {
        for (Int i = 0; i < count; i += 2 * L) {
            const Vector x = *(const Vector*)(from + i), y = *(const Vector*)(from + i + L);
            Vector *to_x = (Vector*)(to + i), *to_y = (Vector*)(to + i + L);
            *to_x = ADDS ? *to_x + x : x, *to_y = ADDS ? *to_y + y : y;
        }
        return;
    }
    for (Int i = 0; i < count; i++) to[i] = ADDS ? to[i] + from[i] : from[i];
}

// Rows [count, width], by so many numbers apart
template <bool ADDS, class T>
inline void copy_rows(const T* from, Int from_row, T* to, Int to_row, Int count, Int width) {
    typedef typename Lanes<T>::Vector Vector;
    const int L = Lanes<T>::count;
    if (from_row == width && to_row == width) {
        copy<ADDS>(from, to, count * width);
    } else if (from_row == 0 && width % L == 0) {  // one row to many
        for (Int c = 0; c < width; c += L) {
            const Vector x = *(const Vector*)(from + c);
            for (Int i = 0; i < count; i++) {
                Vector& y = *(Vector*)(to + i * to_row + c);
                y = ADDS ? y + x : x;
            }
        }
    } else if (ADDS && to_row == 0 && width % L == 0) {  // many to one
        for (Int c = 0; c < width; c += L) {
            Vector sum = *(const Vector*)(to + c);
            for (Int i = 0; i < count; i++) sum += *(const Vector*)(from + i * from_row + c);
            *(Vector*)(to + c) = sum;
        }
    } else {
        for (Int i = 0; i < count; i++) copy<ADDS>(from + i * from_row, to + i * to_row, width);
    }
}

template <bool ADDS = false, class T>
inline void from_halves(const Half* from, T* to, Int count) {
    for (Int i = 0; i < count; i++) {
        uint32_t bits = (uint32_t)from[i] << 16;
        float number;
        std::memcpy(&number, &bits, 4);
        to[i] = ADDS ? to[i] + number : number;
    }
}

// Matrix products

template <class T, class E>
inline __attribute__((always_inline)) typename Lanes<T>::Vector multiply_add(typename Lanes<T>::Vector sum, E a,
                                                                             typename Lanes<T>::Vector b) {
    return sum + a * b;
}

#ifdef __AVX512BF16__
template <>
inline __attribute__((always_inline)) Lanes<float>::Vector multiply_add<float, Pair>(Lanes<float>::Vector sum, Pair a,
                                                                                     Lanes<float>::Vector b) {
    return (Lanes<float>::Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
}
#else
template <>
inline Lanes<float>::Vector multiply_add<float, Pair>(Lanes<float>::Vector sum, Pair, Lanes<float>::Vector) {
    return sum;
}
#endif

// C [M, V lanes] = S (if there is one) + A [M, K] B [K, V lanes]; A by strides, B, C and S by rows. BY_ROWS: A by rows, too
template <class T, class E, int M, int V, bool BY_ROWS>
void micro(Int depth, const E* a, Int a_row, Int a_column, const E* b, Int b_row, T* c, Int c_row, const T* s, Int s_row) {
    typedef typename Lanes<T>::Vector Vector;
    const int L = Lanes<T>::count;
    Vector sums[M][V];
#pragma GCC unroll 16
    for (int i = 0; i < M; i++)
#pragma GCC unroll 4
        for (int j = 0; j < V; j++) sums[i][j] = s ? *(const Vector*)(s + i * s_row + j * L) : Vector{};
    const E* starts[(M + 2) / 3];  // of every third row: addresses of three rows are one register and a multiple of another
    if (BY_ROWS)
#pragma GCC unroll 4
        for (int i = 0; i < M; i += 3) starts[i / 3] = address(a + i * a_row);
    for (Int k = 0; k < depth; k++) {
        Vector factors[V];
#pragma GCC unroll 4
        for (int j = 0; j < V; j++) factors[j] = *(const Vector*)(b + j * L);
#pragma GCC unroll 16
        for (int i = 0; i < M; i++) {
            E factor = BY_ROWS ? starts[i / 3][i % 3 * a_row] : a[i * a_row + k * a_column];
#pragma GCC unroll 4
            for (int j = 0; j < V; j++) sums[i][j] = multiply_add<T, E>(sums[i][j], factor, factors[j]);
        }
        b += b_row;
        if (BY_ROWS)
#pragma GCC unroll 4
            for (int i = 0; i < M; i += 3) starts[i / 3] = address(starts[i / 3] + 1);
    }
#pragma GCC unroll 16
    for (int i = 0; i < M; i++)
#pragma GCC unroll 4
        for (int j = 0; j < V; j++) *(Vector*)(c + i * c_row + j * L) = sums[i][j];
}

template <class T, class E, int M, int V>
inline Int panel(Int start, Int rows, Int depth, const E* a, Int a_row, Int a_column, const E* b, Int b_row, T* c,
                 Int c_row, const T* s, Int s_row) {
    const auto of_tile = a_column == 1 ? micro<T, E, M, V, true> : micro<T, E, M, V, false>;
    for (; start + M <= rows; start += M)
        of_tile(depth, a + start * a_row, a_row, a_column, b, b_row, c + start * c_row, c_row, s ? s + start * s_row : s,
                s_row);
    return start;
}

// C [rows, columns] = S (if there is one) + A [rows, depth] B [depth, columns]; columns is a multiple of the lanes
template <class T, class E>
void product(Int rows, Int columns, Int depth, const E* a, Int a_row, Int a_column, const E* b, T* c, const T* s,
             Int s_row) {
    const int L = Lanes<T>::count;
    const bool is_plain = sizeof(E) == sizeof(T) && !std::is_same<E, Pair>::value;
    const int M4 = is_plain ? 6 : 4, M2 = BYTES == 32 ? 6 : is_plain ? 12 : 8;
    Int j = 0;
    const auto next = [&] { return s ? s + j : s; };
    for (; BYTES == 64 && j + 4 * L <= columns; j += 4 * L) {
        Int i = panel<T, E, M4, 4>(0, rows, depth, a, a_row, a_column, b + j, columns, c + j, columns, next(), s_row);
        i = panel<T, E, 2, 4>(i, rows, depth, a, a_row, a_column, b + j, columns, c + j, columns, next(), s_row);
        panel<T, E, 1, 4>(i, rows, depth, a, a_row, a_column, b + j, columns, c + j, columns, next(), s_row);
    }
    const Int most = M2 == 6 && rows % 6 == 2 && rows > 2 ? rows - 8 : rows;  // 8 are two times 4
    for (; j + 2 * L <= columns; j += 2 * L) {
        Int i = panel<T, E, M2, 2>(0, most, depth, a, a_row, a_column, b + j, columns, c + j, columns, next(), s_row);
        if (BYTES == 64) i = panel<T, E, 8, 2>(i, rows, depth, a, a_row, a_column, b + j, columns, c + j, columns, next(), s_row);
        i = panel<T, E, 4, 2>(i, rows, depth, a, a_row, a_column, b + j, columns, c + j, columns, next(), s_row);
        panel<T, E, 1, 2>(i, rows, depth, a, a_row, a_column, b + j, columns, c + j, columns, next(), s_row);
    }
    for (; j < columns; j += L) {
        Int i = panel<T, E, 12, 1>(0, rows, depth, a, a_row, a_column, b + j, columns, c + j, columns, next(), s_row);
        panel<T, E, 1, 1>(i, rows, depth, a, a_row, a_column, b + j, columns, c + j, columns, next(), s_row);
    }
}

// C = (or +=) A B
template <class T, class E>
void product(Int rows, Int columns, Int depth, const E* a, Int a_row, Int a_column, const E* b, T* c, bool adds) {
    product<T, E>(rows, columns, depth, a, a_row, a_column, b, c, adds ? c : nullptr, columns);
}

}  // namespace
