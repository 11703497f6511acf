// Two steps of exact search, for CPUs with AVX-512. Called from kernels/search.py, which explains the arguments.
#include <algorithm>

#include "vectors.h"

using namespace rerank;

namespace {

using Doubles = __m512d;

INLINE Doubles squared_difference(const float* a, const float* b, __mmask8 existing, Doubles sum) {
    const Doubles difference = _mm512_sub_pd(_mm512_cvtps_pd(_mm256_maskz_loadu_ps(existing, a)),
                                             _mm512_cvtps_pd(_mm256_maskz_loadu_ps(existing, b)));
    return _mm512_fmadd_pd(difference, difference, sum);
}

// Four sums of eight lanes, added in a fixed order.
INLINE double squared_distance(const float* a, const float* b, int dim) {
    Doubles sums[4];
    for (auto& sum : sums) sum = _mm512_setzero_pd();
    int i = 0;
    for (; i + 32 <= dim; i += 32) {
        for (int s = 0; s < 4; s++) sums[s] = squared_difference(a + i + 8 * s, b + i + 8 * s, 0xff, sums[s]);
    }
    for (int s = 0; i < dim; i += 8, s++) {
        const __mmask8 existing = (__mmask8)((1u << std::min(8, dim - i)) - 1);
        sums[s] = squared_difference(a + i, b + i, existing, sums[s]);
    }
    return _mm512_reduce_add_pd(_mm512_add_pd(_mm512_add_pd(sums[0], sums[1]), _mm512_add_pd(sums[2], sums[3])));
}

}  // namespace

extern "C" {

void pair_distances(const float* queries, const float* gallery, const int64_t* rows, const int64_t* columns,
                    int64_t n_pairs, int dim, float* out) {
    constexpr int AHEAD = 4;  // pairs: gallery rows lie anywhere
    for (int64_t pair = 0; pair < n_pairs; pair++) {
        if (pair + AHEAD < n_pairs) {
            const char* next = (const char*)(gallery + columns[pair + AHEAD] * dim);
            for (int byte = 0; byte < 4 * dim; byte += 64) _mm_prefetch(next + byte, _MM_HINT_T0);
        }
        out[pair] = (float)std::sqrt(squared_distance(queries + rows[pair] * dim, gallery + columns[pair] * dim, dim));
    }
}

void minima_of_32(const bf16* entries, int64_t n_groups, float* out) {
    for (int64_t group = 0; group < n_groups; group++, entries += 32) {
        const Pairs pairs = _mm512_loadu_si512(entries);
        out[group] = _mm512_reduce_min_ps(_mm512_min_ps(even(pairs), odd(pairs)));
    }
}
}
