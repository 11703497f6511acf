// What training computes of attention, linear layers and norms. Called from kernels/attention.py, linear.py and
// norm.py, which explain the arguments.
#include "attention_gradients.h"
#include "linear_gradients.h"
#include "norms.h"

using namespace rerank;

namespace {

// `projected` is token after token of [3, head, head_dim].
Projected<bf16> head_of(const bf16* projected, int n_tokens, int heads, int head_dim, int head) {
    return Projected<bf16>::of(projected, n_tokens, heads * head_dim, head * head_dim);
}

}  // namespace

extern "C" {

size_t attention_scratch(int n_tokens, int head_dim) {
    Arena forward(nullptr), backward(nullptr);
    Attention<1, bf16>(forward, n_tokens, head_dim);
    AttentionGradients(backward, n_tokens, head_dim);
    return std::max(forward.used(), backward.used());
}

void attend(const bf16* projected, int images, int n_tokens, int heads, int head_dim, bf16* out, float* logs,
            void* scratch) {
    Tiles tiles;
    Arena arena(scratch);
    Attention<1, bf16> attention(arena, n_tokens, head_dim);
    const size_t dim = (size_t)heads * head_dim;
    for (int image = 0; image < images; image++, projected += n_tokens * 3 * dim, out += n_tokens * dim) {
        for (int head = 0; head < heads; head++, logs += n_tokens) {
            const auto of_head = head_of(projected, n_tokens, heads, head_dim, head);
            attention.set_keys(of_head);
            attention.set_values(of_head);
            const auto write = [&](int token, int d, Floats first, Floats second) __attribute__((always_inline)) {
                store_row(out + token * dim + head * head_dim + d, first, second);
            };
            attention.attend_all(of_head, write, logs);
        }
    }
}

void attention_gradients(const bf16* projected, const bf16* out, const bf16* of_out, const float* logs, int images,
                         int n_tokens, int heads, int head_dim, bf16* of_projected, void* scratch) {
    Tiles tiles;
    Arena arena(scratch);
    AttentionGradients gradients(arena, n_tokens, head_dim);
    const size_t dim = (size_t)heads * head_dim;
    for (int image = 0; image < images; image++) {
        const size_t at = image * n_tokens * dim;
        for (int head = 0; head < heads; head++, logs += n_tokens) {
            const size_t column = head * head_dim;
            bf16* to = of_projected + 3 * at + column;
            gradients.run({head_of(projected + 3 * at, n_tokens, heads, head_dim, head),
                           {out + at + column, dim, n_tokens},
                           {of_out + at + column, dim, n_tokens},
                           logs,
                           to,
                           to + dim,
                           to + 2 * dim});
        }
    }
}

size_t linear_scratch(int n_outputs, int n_inputs) {
    Arena arena(nullptr);
    LinearGradients(arena, n_outputs, n_inputs);
    return arena.used();
}

void linear_gradients(const bf16* x, const bf16* of_out, int64_t n_rows, int n_outputs, int n_inputs, int first_output,
                      int last_output, int first_input, int last_input, float* of_weight, float* of_bias,
                      void* scratch) {
    Tiles tiles;
    Arena arena(scratch);
    LinearGradients gradients(arena, last_output - first_output, last_input - first_input);
    gradients.run({x, n_rows, n_inputs}, {of_out, n_rows, n_outputs}, {first_output, last_output},
                  {first_input, last_input}, of_weight, of_bias);
}

void norm_rows(const float* x, int64_t n_rows, int dim, const float* scale, const float* shift, float eps, bf16* out,
               Statistics* statistics) {
    rerank::norm_rows(x, n_rows, dim, {scale, shift}, eps, out, statistics);
}

// `of_scale` and `of_shift` [chunk, dim] hold zeros and get the sums of `chunk` rows each.
void norm_rows_gradients(const float* x, const bf16* of_out, const Statistics* statistics, int64_t n_rows, int dim,
                         const float* scale, int chunk, float* of_x, float* of_scale, float* of_shift) {
    for (int64_t row = 0; row < n_rows; row += chunk, of_scale += dim, of_shift += dim) {
        const int64_t n = std::min<int64_t>(chunk, n_rows - row), at = row * dim;
        rerank::norm_rows_gradients(x + at, of_out + at, statistics + row, n, dim, scale, of_x + at, of_scale,
                                    of_shift);
    }
}
}
