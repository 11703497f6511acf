// Sums of products by the vector units, for CPUs with AVX-512 BF16 and no AMX: what tiles_amx.h has, by the same names.
#pragma once
#include "vectors.h"

namespace rerank {

inline bool request_tiles() {
    return true;
}

class Tiles {
public:
    Tiles() {}
    ~Tiles() {}
    Tiles(const Tiles&) = delete;
};

// Sums of ROWS (16 or 32) x 32 floats, in the first cache. Rows and columns are read when they are multiplied.
template <int ROWS>
class Sums {
public:
    INLINE Sums() {
        for (auto& row : sums_) row[0] = row[1] = _mm512_setzero_ps();
    }
    INLINE void rows(const bf16* upper, const bf16* lower) {
        upper_ = upper;
        lower_ = lower;
    }
    INLINE void passing_rows(const bf16* upper, const bf16* lower) { rows(upper, lower); }
    INLINE void columns(const bf16* left, const bf16* right) {
        left_ = left;
        right_ = right;
    }
    INLINE void passing_columns(const bf16* left, const bf16* right) { columns(left, right); }
    INLINE void multiply() {
        for (int row = 0; row < ROWS; row += TOGETHER) {
            multiply_rows((row < 16 ? upper_ : lower_) + row % 16 * 32, sums_ + row);
        }
    }
    INLINE void store(float* to, size_t width) const {
        for (int row = 0; row < ROWS; row++, to += width) {
            _mm512_storeu_ps(to, sums_[row][0]);
            _mm512_storeu_ps(to + 16, sums_[row][1]);
        }
    }

private:
    static constexpr int TOGETHER = 8;  // rows whose sums are in registers at a time
    Floats sums_[ROWS][2];
    const bf16 *upper_, *lower_, *left_, *right_;

    // As in AMX products of 32 numbers are summed up before they are added: without that, errors of long sums are three
    // to eight times as large.
    __attribute__((noinline)) void multiply_rows(const bf16* rows, Floats (*sums)[2]) const {
        Floats s[TOGETHER][2];
        for (auto& row : s) row[0] = row[1] = _mm512_setzero_ps();
        for (int pair = 0; pair < 16; pair++) {
            const auto left = (__m512bh)_mm512_load_si512(left_ + 32 * pair);
            const auto right = (__m512bh)_mm512_load_si512(right_ + 32 * pair);
#pragma GCC unroll 8
            for (int row = 0; row < TOGETHER; row++) {
                const auto numbers = (__m512bh)_mm512_broadcastd_epi32(_mm_loadu_si32(rows + 32 * row + 2 * pair));
                s[row][0] = _mm512_dpbf16_ps(s[row][0], numbers, left);
                s[row][1] = _mm512_dpbf16_ps(s[row][1], numbers, right);
            }
        }
#pragma GCC unroll 8
        for (int row = 0; row < TOGETHER; row++) {
            sums[row][0] = add(sums[row][0], s[row][0]);
            sums[row][1] = add(sums[row][1], s[row][1]);
        }
    }
};

}  // namespace rerank
