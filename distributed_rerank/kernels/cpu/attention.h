// Attention of the tokens of one image: softmax(Q K' / sqrt(head_dim)) V, one head after the other.
#pragma once
#include "packing.h"

namespace rerank {

// Where the queries, keys and values of one head of an image lie.
template <class Number>
struct Projected {
    Head<const Number> q, k, v;

    // Of token after token of [3, head, head_dim].
    static Projected of(const Number* tokens, int n_tokens, int dim, int column) {
        const auto head = [=](int which) {
            return Head<const Number>{tokens + which * dim + column, (size_t)3 * dim, n_tokens};
        };
        return {head(0), head(1), head(2)};
    }
};

template <int PARTS, class Number>
class Attention {
public:
    Attention(Arena& arena, int n_tokens, int head_dim)
        : n_(n_tokens),
          padded_(up_to(n_tokens, BLOCK)),
          dim_(head_dim),
          scale_(1.44269504f / std::sqrt((float)head_dim)),
          keys_(arena, padded_, head_dim),
          values_(arena, padded_, head_dim),
          queries_{arena.take<bf16>(PARTS * (size_t)BLOCK * head_dim), (size_t)BLOCK * head_dim, head_dim},
          weights_{arena.take<bf16>(PARTS * (size_t)BLOCK * padded_), (size_t)BLOCK * padded_, padded_},
          scores_(arena.take<float>((size_t)BLOCK * padded_)) {}

    // Takes the keys of one head, or its values.
    void set_keys(const Projected<Number>& head) { keys_.pack(head.k); }
    void set_values(const Projected<Number>& head) { values_.pack(head.v); }

    // `write(token, column, first, second)` gets 32 columns of a token's output for this head; `logs`, where it is
    // given, the base 2 logarithm of each query's sum of weights.
    template <class Write>
    void attend_all(const Projected<Number>& head, const Write& write, float* logs = nullptr) {
        for (int row = 0; row < n_; row += BLOCK) {
            pack_rows<PARTS>(head.q, row, BLOCK, queries_);
            for (int token = 0; token < padded_; token += BLOCK) score_block(token);
            float shares[BLOCK];
            for (int i = 0; i < BLOCK; i++) {
                const float* scores = scores_ + (size_t)i * padded_;
                const float highest = largest(scores) * scale_, sum = soften(scores, highest, weights_.at(i, 0));
                shares[i] = 1.0f / sum;
                if (logs && row + i < n_) logs[row + i] = highest + std::log2(sum);
            }
            for (int d = 0; d < dim_; d += 32) weigh_block(d, shares, row, write);
        }
    }

    // The weights of the tokens for one query [head_dim], which is not rounded, nor are they: their sum is 1.
    void weights_of_one(const float* query, float* weights) {
        for (int token = 0; token < padded_; token += 16) store(scores_ + token, dots(query, token));
        const Floats shift = all(largest(scores_) * scale_);
        Floats sum = _mm512_setzero_ps();
        for (int token = 0; token < padded_; token += 16) {
            const Floats weight = weight_of<PARTS == 3 ? 3 : 2>(scores_ + token, shift, token);
            sum = add(sum, weight);
            store(weights + token, weight);
        }
        const Floats share = all(1.0f / _mm512_reduce_add_ps(sum));
        for (int token = 0; token < padded_; token += 16) {
            store(weights + token, _mm512_mul_ps(load(weights + token), share));
        }
    }

private:
    const int n_, padded_, dim_;
    const float scale_;  // with log2(e): weights are powers of two
    const TokensAcross<PARTS> keys_;
    const TokensDown<PARTS> values_;
    const Rows queries_, weights_;
    float* const scores_;  // of a block of queries [BLOCK][padded tokens]

    // Scores of a block of queries and 32 tokens.
    INLINE void score_block(int token) {
        Sums<BLOCK> sums;
        for (int column = 0; column < dim_; column += 32) {
            const bf16 *upper = queries_.at(0, column), *lower = queries_.at(16, column);
            const bf16 *left = keys_.tile(token, column), *right = keys_.tile(token + 16, column);
            multiply_block(sums, upper, lower, queries_.part, left, right);
        }
        sums.store(scores_ + token, padded_);
    }

    // 32 columns of the outputs of a block of queries, whose weights are multiplied by their shares.
    template <class Write>
    INLINE void weigh_block(int d, const float* shares, int row, const Write& write) {
        alignas(64) float weighed[BLOCK * BLOCK];
        Sums<BLOCK> sums;
        for (int token = 0; token < padded_; token += 32) {
            const bf16 *upper = weights_.at(0, token), *lower = weights_.at(16, token);
            const bf16* left = values_.tile(token, d);
            multiply_block(sums, upper, lower, weights_.part, left, left + TILE);
        }
        sums.store(weighed, BLOCK);
        for (int i = 0; i < BLOCK && row + i < n_; i++) {
            const Floats share = all(shares[i]);
            write(row + i, d, _mm512_mul_ps(load(weighed + BLOCK * i), share),
                  _mm512_mul_ps(load(weighed + BLOCK * i + 16), share));
        }
    }

    // Of the tokens' parts, which lie as far apart as those of the keys.
    INLINE void multiply_block(Sums<BLOCK>& sums, const bf16* upper, const bf16* lower, size_t a_part, const bf16* left,
                               const bf16* right) const {
        const auto rows = [&](int p) __attribute__((always_inline)) {
            sums.rows(upper + p * a_part, lower + p * a_part);
        };
        const auto columns = [&](int p) __attribute__((always_inline)) {
            sums.passing_columns(left + p * keys_.part, right + p * keys_.part);
        };
        multiply_parts<PARTS, PARTS>(sums, rows, columns);
    }

    // The tokens of 16 that exist.
    INLINE __mmask16 existing(int token) const {
        return token + 16 <= n_ ? 0xffff : token < n_ ? (__mmask16)((1u << (n_ - token)) - 1) : 0;
    }
    INLINE float largest(const float* scores) const {
        Floats found = all(-INFINITY);
        int token = 0;
        for (; token + 16 <= n_; token += 16) found = _mm512_max_ps(found, load(scores + token));
        if (token < n_) found = _mm512_mask_max_ps(found, existing(token), found, load(scores + token));
        return _mm512_reduce_max_ps(found);
    }
    template <int ACCURACY>
    INLINE Floats weight_of(const float* scores, Floats shift, int token) const {
        return _mm512_maskz_mov_ps(existing(token),
                                   power_of_two<ACCURACY>(_mm512_fmsub_ps(load(scores), all(scale_), shift)));
    }

    // Scores of one query, of which `highest` is the highest times scale_, to weights up to 1, in parts in tiles of 16
    // rows; returns their sum.
    INLINE float soften(const float* scores, float highest, bf16* weights) const {
        const Floats shift = all(highest);
        Floats sum = _mm512_setzero_ps();
        int token = 0;
        for (; token + 32 <= n_; token += 32, weights += TILE) {
            const Floats first = power_of_two<PARTS>(_mm512_fmsub_ps(load(scores + token), all(scale_), shift));
            const Floats second = power_of_two<PARTS>(_mm512_fmsub_ps(load(scores + token + 16), all(scale_), shift));
            sum = add(sum, add(first, second));
            store_parts<PARTS>(weights, weights_.part, first, second);
        }
        if (token < n_) {
            const Floats first = weight_of<PARTS>(scores + token, shift, token);
            const Floats second = weight_of<PARTS>(scores + token + 16, shift, token + 16);
            sum = add(sum, add(first, second));
            store_parts<PARTS>(weights, weights_.part, first, second);
        }
        return _mm512_reduce_add_ps(sum);
    }

    // Products of one query with 16 keys.
    INLINE Floats dots(const float* query, int token) const {
        Floats evens = _mm512_setzero_ps(), odds = evens;
        for (int column = 0; column < dim_; column += 2) {
            for (int p = 0; p < PARTS; p++) {
                const Pairs keys = _mm512_load_si512(keys_.tile(token, column) + p * keys_.part + column % 32 / 2 * 32);
                evens = _mm512_fmadd_ps(all(query[column]), even(keys), evens);
                odds = _mm512_fmadd_ps(all(query[column + 1]), odd(keys), odds);
            }
        }
        return add(evens, odds);
    }
};

}  // namespace rerank
