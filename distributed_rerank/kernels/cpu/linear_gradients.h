// The gradients of a linear layer's weights and bias from those of its outputs: of_out' x, summed over all rows.
#pragma once
#include <cstring>

#include "packing.h"

namespace rerank {

// Row after row of `width` numbers.
struct Matrix {
    const bf16* data;
    int64_t n_rows;
    int width;

    // Asks for the numbers that are fetched from this row next: 32 rows at a time are too many for the processor to
    // foresee.
    INLINE Pairs fetch(int64_t row, int column) const {
        const bf16* from = data + row * width + column;
        _mm_prefetch((const char*)(from + 4 * 32), _MM_HINT_T0);
        return row < n_rows ? _mm512_loadu_si512(from) : _mm512_setzero_si512();
    }
};

// For some of the outputs and inputs (multiples of 32), in chunks of rows whose products are added up in float32: the
// terms of a sum and their order do not depend on which others are computed.
class LinearGradients {
private:
    // Adds sums to those of the chunks before. (Here, as its type must be known below.)
    auto add_products(int n_outputs, bool is_first) const {
        float* const products = products_;
        return [=](int o, int i, const float* sums) __attribute__((always_inline)) {
            float* to = products + (size_t)i * n_outputs + 32 * o;
            const Floats zero = _mm512_setzero_ps();
            store_row(to, add(load(sums), is_first ? zero : load(to)),
                      add(load(sums + 16), is_first ? zero : load(to + 16)));
        };
    }

public:
    static constexpr int CHUNK = 384;  // a panel of 32 inputs is 24 KB, half of the first cache

    LinearGradients(Arena& arena, int n_outputs, int n_inputs)
        : of_out_(take_rows(arena, 1, n_outputs, CHUNK)),
          x_(arena.take<bf16>((size_t)CHUNK * n_inputs)),
          products_(arena.take<float>((size_t)n_outputs * n_inputs)),
          sums_(arena.take<float>(n_outputs)) {}

    // Into `of_weight` [output, input] of the whole layer, and `of_bias` [output] unless it is null.
    void run(const Matrix& x, const Matrix& of_out, Range outputs, Range inputs, float* of_weight, float* of_bias) {
        const int n_outputs = outputs.end - outputs.begin, n_inputs = inputs.end - inputs.begin;
        memset(sums_, 0, n_outputs * sizeof(float));
        for (int64_t row = 0; row < x.n_rows; row += CHUNK) {
            const int n_rows = up_to((int)std::min<int64_t>(CHUNK, x.n_rows - row), 32);
            const Rows left = {of_out_.data, 0, n_rows};
            const Weights right = {x_, 0, nullptr, n_rows, n_inputs};
            for (int r = 0; r < n_rows; r += 32) {
                for (int o = 0; o < n_outputs; o += 32) {
                    pack_of_out(of_out, row + r, outputs.begin + o, left.at(o, r), left.at(o + 16, r), sums_ + o);
                }
                for (int i = 0; i < n_inputs; i += 32) {
                    pack_x(x, row + r, inputs.begin + i, x_ + ((size_t)(i / 32) * (n_rows / 32) + r / 32) * 2 * TILE);
                }
            }
            multiply<1, 1>(left, n_outputs, right, {0, n_inputs}, {0, n_rows}, add_products(n_outputs, row == 0));
        }
        for (int o = 0; o < n_outputs; o++) {
            for (int i = 0; i < n_inputs; i += 32) {
                memcpy(of_weight + (size_t)(outputs.begin + o) * x.width + inputs.begin + i,
                       products_ + (size_t)i * n_outputs + 32 * o, 32 * sizeof(float));
            }
        }
        if (of_bias) memcpy(of_bias + outputs.begin, sums_, n_outputs * sizeof(float));
    }

private:
    const Rows of_out_;  // transposed: [output, row of the chunk]
    bf16* const x_;
    float* const products_;  // 32 inputs, output, input: in the order in which they are computed
    float* const sums_;

    // 32 rows of 32 outputs: transposed in two tiles, and added to the sums of the outputs.
    INLINE static void pack_of_out(const Matrix& from, int64_t row, int column, bf16* upper, bf16* lower, float* sums) {
        alignas(64) bf16 left[TILE], right[TILE];
        Floats first = load(sums), second = load(sums + 16);
        for (int r = 0; r < 32; r += 2) {
            const Pairs one = from.fetch(row + r, column), other = from.fetch(row + r + 1, column);
            first = add(first, add(first_half(one), first_half(other)));
            second = add(second, add(second_half(one), second_half(other)));
            interleave(one, other, left + r * 16, right + r * 16);
        }
        store(sums, first);
        store(sums + 16, second);
        transpose_tile(left, upper);
        transpose_tile(right, lower);
    }

    // 32 rows of 32 inputs as two tiles of the right side.
    INLINE static void pack_x(const Matrix& from, int64_t row, int column, bf16* to) {
        for (int r = 0; r < 32; r += 2) {
            interleave(from.fetch(row + r, column), from.fetch(row + r + 1, column), to + r * 16, to + TILE + r * 16);
        }
    }
};

}  // namespace rerank
