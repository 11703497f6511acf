// Numbers in vectors of 16: bfloat16 in one to three parts, exponential, GELU.
//
// A float is kept in PARTS bfloat16 numbers: its rounding, the rounding of what is left, and so on: 8, 16 or all 24
// significant bits. A product of two such numbers is the sum of one, three or six products of their parts, each exact in
// float32; what is left out is of the order of the last bit.
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstddef>
#include <cstdint>

namespace rerank {

using bf16 = uint16_t;
using Floats = __m512;
using Pairs = __m512i;  // 32 bfloat16

#define INLINE inline __attribute__((always_inline))

INLINE Floats load(const float* from) {
    return _mm512_loadu_ps(from);
}
INLINE void store(float* to, Floats x) {
    _mm512_storeu_ps(to, x);
}
INLINE Floats add(Floats x, Floats y) {
    return _mm512_add_ps(x, y);
}
INLINE Floats all(float x) {
    return _mm512_set1_ps(x);
}

INLINE Pairs rounded(Floats first, Floats second) {
    return (Pairs)_mm512_cvtne2ps_pbh(second, first);
}
INLINE Floats widened(__m256i half) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
INLINE Floats first_half(Pairs x) {
    return widened(_mm512_castsi512_si256(x));
}
INLINE Floats second_half(Pairs x) {
    return widened(_mm512_extracti64x4_epi64(x, 1));
}
// The even or odd ones of 32 bfloat16 numbers.
INLINE Floats even(Pairs x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
}
INLINE Floats odd(Pairs x) {
    return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(0xffff0000)));
}

// The parts of 32 floats.
template <int PARTS>
INLINE void split(Floats first, Floats second, Pairs* parts) {
    parts[0] = rounded(first, second);
    for (int p = 1; p < PARTS; p++) {
        first = _mm512_sub_ps(first, first_half(parts[p - 1]));
        second = _mm512_sub_ps(second, second_half(parts[p - 1]));
        parts[p] = rounded(first, second);
    }
}

// The parts of 32 numbers in memory: floats are split, bfloat16 numbers have one part as they are.
template <int PARTS>
INLINE void fetch(const float* from, Pairs* parts) {
    split<PARTS>(load(from), load(from + 16), parts);
}
template <int PARTS>
INLINE void fetch(const bf16* from, Pairs* parts) {
    static_assert(PARTS == 1, "a bfloat16 number has one part");
    parts[0] = _mm512_loadu_si512(from);
}

// Store 32 floats: as parts that lie `part` apart, as floats, or rounded.
template <int PARTS>
INLINE void store_parts(bf16* to, size_t part, Floats first, Floats second) {
    Pairs parts[PARTS];
    split<PARTS>(first, second, parts);
    for (int p = 0; p < PARTS; p++) _mm512_storeu_si512(to + p * part, parts[p]);
}
INLINE void store_row(float* to, Floats first, Floats second) {
    store(to, first);
    store(to + 16, second);
}
INLINE void store_row(bf16* to, Floats first, Floats second) {
    _mm512_storeu_si512(to, rounded(first, second));
}

// 2^x for x <= 0: 2^n 2^f with n the nearest integer and a polynomial for |f| <= 1/2, relative error 1e-4 with one part
// (bfloat16 rounds by 2e-3), 2e-7 with two, 1e-7 with three.
template <int PARTS>
INLINE Floats power_of_two(Floats x) {
    const Floats n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const Floats f = _mm512_sub_ps(x, n);
    static constexpr float degree_3[] = {0.0554906f, 0.2402265f, 0.6931472f, 1.0f};
    static constexpr float degree_5[] = {1.8775767e-3f, 8.9893397e-3f, 5.5826318e-2f,
                                         2.4015361e-1f, 6.9315308e-1f, 0.99999994f};
    static constexpr float degree_6[] = {0.00015345811f, 0.0013399931f, 0.0096184891f, 0.055503286f, 0.24022646f, 0.69314718f, 1.0f};
    const float* coefficients = PARTS == 1 ? degree_3 : PARTS == 2 ? degree_5 : degree_6;
    Floats p = all(coefficients[0]);
    for (int i = 1; i < (PARTS == 1 ? 4 : PARTS == 2 ? 6 : 7); i++) p = _mm512_fmadd_ps(p, f, all(coefficients[i]));
    return _mm512_scalef_ps(p, n);
}

// gelu(x) = x Phi(x) = max(x, 0) - h(|x|), h(a) = a Phi(-a): a polynomial for each of 32 segments of [0, 6), beyond which
// h is below 1e-8; absolute error below 1e-6 with cubics, 5e-8 with polynomials of degree 4.
template <int DEGREE>
class Gelu {
public:
    static constexpr int SEGMENTS = 32;
    static constexpr double END = 6.0;

    Gelu() {
        for (int segment = 0; segment < SEGMENTS; segment++) fit(segment);
    }

    INLINE Floats operator()(Floats x) const {
        const Floats place = _mm512_mul_ps(_mm512_abs_ps(x), all(SEGMENTS / END));
        const Floats inside = _mm512_min_ps(place, all(SEGMENTS - 0.001f));
        const __m512i segment = _mm512_cvttps_epi32(inside);
        const Floats u = _mm512_sub_ps(inside, _mm512_cvtepi32_ps(segment));
        Floats h = looked_up(DEGREE, segment);
        for (int i = DEGREE - 1; i >= 0; i--) h = _mm512_fmadd_ps(h, u, looked_up(i, segment));
        return _mm512_sub_ps(_mm512_max_ps(x, _mm512_setzero_ps()), h);
    }

private:
    alignas(64) float coefficients_[DEGREE + 1][SEGMENTS];

    INLINE Floats looked_up(int power, __m512i segment) const {
        const float* row = coefficients_[power];
        return _mm512_permutex2var_ps(_mm512_load_ps(row), segment, _mm512_load_ps(row + 16));
    }

    // Interpolates h at the Chebyshev points of the segment (Newton's divided differences).
    void fit(int segment) {
        constexpr int N = DEGREE + 1;
        double u[N], d[N], c[N] = {};
        for (int i = 0; i < N; i++) {
            u[i] = 0.5 - 0.5 * std::cos((2 * i + 1) * 3.14159265358979323846 / (2 * N));
            const double a = (segment + u[i]) * END / SEGMENTS;
            d[i] = a * 0.5 * std::erfc(a / std::sqrt(2.0));
        }
        for (int order = 1; order < N; order++) {
            for (int i = N - 1; i >= order; i--) d[i] = (d[i] - d[i - 1]) / (u[i] - u[i - order]);
        }
        for (int i = N - 1; i >= 0; i--) {  // Horner: c(u) = c(u) (u - u[i]) + d[i]
            for (int power = N - 1; power >= 1; power--) c[power] = c[power - 1] - c[power] * u[i];
            c[0] = d[i] - c[0] * u[i];
        }
        for (int power = 0; power < N; power++) coefficients_[power][segment] = (float)c[power];
    }
};

}  // namespace rerank
