// Layer norms, linear layers as they come from Python, and what is done with finished sums of a product.
#pragma once
#include "attention.h"
#include "norms.h"

namespace rerank {

struct Linear {
    const bf16* weights;  // in two parts, or three
    const float* bias;
};

// As in kernels/transformer.py.
struct BlockArguments {
    Norm norm1, norm2;
    Linear qkv, proj, fc1, fc2;
    float eps;
    int dim, heads, hidden, parts;
};

INLINE Weights weights_of(const Linear& linear, int inputs, int outputs) {
    return {linear.weights, (size_t)inputs * outputs, linear.bias, inputs, outputs};
}

// Rows that lie `stride` floats apart; keeps their statistics where asked to.
template <int PARTS>
void normalise(const float* x, size_t stride, int n_rows, const Norm& norm, float eps, const Rows& out,
               Statistics* kept = nullptr) {
    for (int row = 0; row < n_rows; row++) {
        const float* from = x + row * stride;
        const Statistics statistics = statistics_of(from, out.width, eps);
        if (kept) kept[row] = statistics;
        for (int i = 0; i < out.width; i += 32) {
            store_parts<PARTS>(out.at(row, i), out.part, scaled(normed(from + i, statistics), norm, i),
                               scaled(normed(from + i + 16, statistics), norm, i + 16));
        }
    }
}

// Writes to columns that are counted from `first_output` on.
template <class Number>
auto write_to(Number* out, size_t stride, const float* bias, int first_output = 0) {
    return [=](int row, int output, const float* sums) __attribute__((always_inline)) {
        store_row(out + row * stride + (output - first_output), add(load(sums), load(bias + output)),
                  add(load(sums + 16), load(bias + output + 16)));
    };
}

// Adds to rows from `first_row` on; without a bias where it was added before.
inline auto add_to(float* x, size_t stride, const float* bias, int first_row) {
    return [=](int row, int output, const float* sums) __attribute__((always_inline)) {
        if (row < first_row) return;
        float* to = x + row * stride + output;
        const Floats zero = _mm512_setzero_ps();
        store_row(to, add(load(to), add(load(sums), bias ? load(bias + output) : zero)),
                  add(load(to + 16), add(load(sums + 16), bias ? load(bias + output + 16) : zero)));
    };
}

template <int PARTS>
inline const Gelu<PARTS == 3 ? 4 : 3> gelu;

template <int PARTS>
auto gelu_to(const Rows& out, const float* bias, int first_output) {
    return [=](int row, int output, const float* sums) __attribute__((always_inline)) {
        store_parts<PARTS>(out.at(row, output - first_output), out.part,
                           gelu<PARTS>(add(load(sums), load(bias + output))),
                           gelu<PARTS>(add(load(sums + 16), load(bias + output + 16))));
    };
}

}  // namespace rerank
