// Layer norms of rows: the statistics, and forward and backward passes for training.
#pragma once
#include "vectors.h"

namespace rerank {

struct Norm {
    const float *scale, *shift;
};

// Norms are (x - mean) factor scale + shift.
struct Statistics {
    float mean, factor;
};

INLINE Statistics statistics_of(const float* x, int dim, float eps) {
    Floats first = _mm512_setzero_ps(), second = first;
    for (int i = 0; i < dim; i += 32) {
        first = add(first, load(x + i));
        second = add(second, load(x + i + 16));
    }
    const float mean = _mm512_reduce_add_ps(add(first, second)) / dim;
    first = second = _mm512_setzero_ps();
    for (int i = 0; i < dim; i += 32) {
        const Floats a = _mm512_sub_ps(load(x + i), all(mean)), b = _mm512_sub_ps(load(x + i + 16), all(mean));
        first = _mm512_fmadd_ps(a, a, first);
        second = _mm512_fmadd_ps(b, b, second);
    }
    return {mean, 1.0f / std::sqrt(_mm512_reduce_add_ps(add(first, second)) / dim + eps)};
}

INLINE Floats normed(const float* x, const Statistics& statistics) {
    return _mm512_mul_ps(_mm512_sub_ps(load(x), all(statistics.mean)), all(statistics.factor));
}
INLINE Floats scaled(Floats x, const Norm& norm, int i) {
    return _mm512_fmadd_ps(x, load(norm.scale + i), load(norm.shift + i));
}

inline void norm_rows(const float* x, int64_t n_rows, int dim, const Norm& norm, float eps, bf16* out,
                      Statistics* statistics) {
    for (int64_t row = 0; row < n_rows; row++, x += dim, out += dim) {
        statistics[row] = statistics_of(x, dim, eps);
        for (int i = 0; i < dim; i += 32) {
            store_row(out + i, scaled(normed(x + i, statistics[row]), norm, i),
                      scaled(normed(x + i + 16, statistics[row]), norm, i + 16));
        }
    }
}

// With n = (x - mean) factor and g = of_out scale: of_x = factor (g - mean(g) - n mean(g n)), of_scale += of_out n and
// of_shift += of_out.
inline void norm_rows_gradients(const float* x, const bf16* of_out, const Statistics* statistics, int64_t n_rows,
                                int dim, const float* scale, float* of_x, float* of_scale, float* of_shift) {
    for (int64_t row = 0; row < n_rows; row++, x += dim, of_out += dim, of_x += dim) {
        const auto at = [&](int i) __attribute__((always_inline)) {
            return widened(_mm256_loadu_si256((const __m256i*)(of_out + i)));
        };
        Floats sum = _mm512_setzero_ps(), product = sum;
        for (int i = 0; i < dim; i += 16) {
            const Floats n = normed(x + i, statistics[row]), gradient = at(i),
                         g = _mm512_mul_ps(gradient, load(scale + i));
            sum = add(sum, g);
            product = _mm512_fmadd_ps(g, n, product);
            store(of_scale + i, _mm512_fmadd_ps(gradient, n, load(of_scale + i)));
            store(of_shift + i, add(gradient, load(of_shift + i)));
        }
        const Floats mean = all(_mm512_reduce_add_ps(sum) / dim), share = all(_mm512_reduce_add_ps(product) / dim);
        for (int i = 0; i < dim; i += 16) {
            const Floats n = normed(x + i, statistics[row]);
            const Floats rest = _mm512_fnmadd_ps(n, share, _mm512_fmsub_ps(at(i), load(scale + i), mean));
            store(of_x + i, _mm512_mul_ps(rest, all(statistics[row].factor)));
        }
    }
}

}  // namespace rerank
