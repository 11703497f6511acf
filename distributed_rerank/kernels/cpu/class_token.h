// The class token, the first of each image, in a block of a transformer: in two parts at least.
//
// A score is made of nothing but class tokens. What they take from the other tokens is averaged over hundreds of them,
// and so are these tokens' rounding errors; those of the class token itself are averaged by nothing. Nor are those
// of the values that it attends to, since the weights' roundings are the same for all tokens. So its values are not the
// weighted mean of rounded values but the projection of the weighted mean of normed tokens, which is the same but for
// rounding: sum_j w_j (V n_j) = V (sum_j w_j n_j).
#pragma once
#include "layers.h"

namespace rerank {

template <int PARTS>
class ClassTokens {
public:
    ClassTokens(Arena& arena, const BlockArguments& block, int images, int n_tokens)
        : b_(block),
          images_(images),
          n_(n_tokens),
          padded_(up_to(n_tokens, BLOCK)),
          dim_(block.dim),
          head_dim_(block.dim / block.heads),
          queries_(arena.take<float>((size_t)images * dim_)),
          weights_(arena.take<float>((size_t)block.heads * padded_)),
          attended_(arena.take<float>((size_t)images * dim_)),
          rows_(take_rows(arena, PARTS, images, dim_)),
          hidden_(take_rows(arena, PARTS, images, block.hidden)),
          means_(take_rows(arena, PARTS, block.heads * up_to(images, BLOCK), dim_)) {}

    // `tokens` [image, token, dim] as they enter the block.
    void project_queries(const float* tokens) {
        normalise<PARTS>(tokens, image_stride(), images_, b_.norm1, b_.eps, rows_);
        multiply<PARTS, PARTS>(rows_, images_, qkv(), {0, dim_}, {0, dim_}, write_to(queries_, dim_, b_.qkv.bias));
    }

    // After the keys of a head were set.
    template <class Attention>
    void attend(int image, int head, Attention& attention) {
        attention.weights_of_one(queries_ + (size_t)image * dim_ + head * head_dim_, weights_ + (size_t)head * padded_);
    }

    // After `attend` for all heads of an image: the weighted means of its normed tokens, one for each head.
    void average(int image, const float* x, const Statistics* statistics) {
        for (int head = 0; head < b_.heads; head += 3) {
            switch (std::min(3, b_.heads - head)) {
                case 3:
                    average_heads<3>(image, head, x, statistics);
                    break;
                case 2:
                    average_heads<2>(image, head, x, statistics);
                    break;
                default:
                    average_heads<1>(image, head, x, statistics);
            }
        }
    }

    // The rest of the block, in place.
    void finish(float* tokens) {
        for (int head = 0; head < b_.heads; head++) {
            const int values = 2 * dim_ + head * head_dim_;
            const Rows means = {mean_row(head, 0), means_.part, dim_};
            multiply<PARTS, PARTS>(means, images_, qkv(), {values, values + head_dim_}, {0, dim_},
                           write_to(attended_, dim_, b_.qkv.bias, 2 * dim_));
        }
        for (int image = 0; image < images_; image++) {
            for (int i = 0; i < dim_; i += 32) {
                const float* from = attended_ + (size_t)image * dim_ + i;
                store_parts<PARTS>(rows_.at(image, i), rows_.part, load(from), load(from + 16));
            }
        }
        multiply<PARTS, PARTS>(rows_, images_, weights_of(b_.proj, dim_, dim_), {0, dim_}, {0, dim_},
                       add_to(tokens, image_stride(), b_.proj.bias, 0));
        normalise<PARTS>(tokens, image_stride(), images_, b_.norm2, b_.eps, rows_);
        multiply<PARTS, PARTS>(rows_, images_, weights_of(b_.fc1, dim_, b_.hidden), {0, b_.hidden}, {0, dim_},
                       gelu_to<PARTS>(hidden_, b_.fc1.bias, 0));
        multiply<PARTS, PARTS>(hidden_, images_, weights_of(b_.fc2, b_.hidden, dim_), {0, dim_}, {0, b_.hidden},
                       add_to(tokens, image_stride(), b_.fc2.bias, 0));
    }

private:
    const BlockArguments& b_;
    const int images_, n_, padded_, dim_, head_dim_;
    float *const queries_, *const weights_, *const attended_;  // weights: of one image [head, padded token]
    const Rows rows_, hidden_, means_;                         // means: [head, image]

    size_t image_stride() const { return (size_t)n_ * dim_; }
    Weights qkv() const { return weights_of(b_.qkv, dim_, 3 * dim_); }
    bf16* mean_row(int head, int image) const { return means_.at(head * up_to(images_, BLOCK) + image, 0); }

    // sum_j w_j ((x_j - mean_j) factor_j scale + shift) = (sum_j a_j x_j - sum_j a_j mean_j) scale + shift,
    // a_j = w_j factor_j, since the weights add up to 1. With three parts means are taken off before the sum: after it
    // some of float32's bits would be lost where they are large.
    template <int HEADS>
    void average_heads(int image, int first_head, const float* x, const Statistics* statistics) {
        float* a[HEADS];
        Floats means[HEADS];
        for (int h = 0; h < HEADS; h++) {
            a[h] = weights_ + (size_t)(first_head + h) * padded_;
            float mean = 0;
            for (int token = 0; token < n_; token++) {
                a[h][token] *= statistics[token].factor;
                if (PARTS < 3) mean += a[h][token] * statistics[token].mean;
            }
            means[h] = all(mean);
        }
        for (int i = 0; i < dim_; i += 32) {
            Floats first[HEADS], second[HEADS];
            for (int h = 0; h < HEADS; h++) first[h] = second[h] = _mm512_setzero_ps();
            for (int token = 0; token < n_; token++) {
                const float* from = x + (size_t)token * dim_ + i;
                Floats left = load(from), right = load(from + 16);
                if (PARTS == 3) {
                    left = _mm512_sub_ps(left, all(statistics[token].mean));
                    right = _mm512_sub_ps(right, all(statistics[token].mean));
                }
                for (int h = 0; h < HEADS; h++) {
                    first[h] = _mm512_fmadd_ps(all(a[h][token]), left, first[h]);
                    second[h] = _mm512_fmadd_ps(all(a[h][token]), right, second[h]);
                }
            }
            for (int h = 0; h < HEADS; h++) {
                const auto normed = [&](Floats sum, int at) __attribute__((always_inline)) {
                    return _mm512_fmadd_ps(_mm512_sub_ps(sum, means[h]), load(b_.norm1.scale + at),
                                           load(b_.norm1.shift + at));
                };
                store_parts<PARTS>(mean_row(first_head + h, image) + i / 32 * TILE, means_.part, normed(first[h], i),
                               normed(second[h], i + 16));
            }
        }
    }
};

}  // namespace rerank
