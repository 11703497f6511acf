// The backward pass of attention in one part. The weights are not kept but computed again from the scores and the
// logarithm of their sum, transposed, a block of 32 keys at a time (Dao, FlashAttention-2, arXiv 2307.08691, section
// 3).
#pragma once
#include "attention.h"

namespace rerank {

// One head's tensors and where its gradients go.
struct HeadGradients {
    Projected<bf16> projected;
    Head<const bf16> out, of_out;  // the forward pass's output and its gradient
    const float* logs;             // as `attend_all` gave them
    bf16 *of_q, *of_k, *of_v;      // token after token, as far apart as the queries
};

class AttentionGradients {
public:
    AttentionGradients(Arena& arena, int n_tokens, int head_dim)
        : n_(n_tokens),
          padded_(up_to(n_tokens, BLOCK)),
          dim_(head_dim),
          scale_(1.0f / std::sqrt((float)head_dim)),
          queries_across_(arena, padded_, head_dim),
          of_out_across_(arena, padded_, head_dim),
          queries_down_(arena, padded_, head_dim),
          keys_down_(arena, padded_, head_dim),
          of_out_down_(arena, padded_, head_dim),
          keys_transposed_{arena.take<bf16>((size_t)head_dim * padded_), 0, padded_},
          keys_{arena.take<bf16>((size_t)BLOCK * head_dim), 0, head_dim},
          values_{arena.take<bf16>((size_t)BLOCK * head_dim), 0, head_dim},
          weights_{arena.take<bf16>((size_t)BLOCK * padded_), 0, padded_},
          of_scores_{arena.take<bf16>((size_t)BLOCK * padded_), 0, padded_},
          of_scores_down_(arena, padded_, padded_),
          logs_(arena.take<float>(padded_)),
          shares_(arena.take<float>(padded_)) {}

    void run(const HeadGradients& head) {
        take(head);
        const size_t stride = head.projected.q.stride;
        for (int key = 0; key < padded_; key += BLOCK) {
            pack_rows<1>(head.projected.k, key, BLOCK, keys_);
            pack_rows<1>(head.projected.v, key, BLOCK, values_);
            for (int query = 0; query < padded_; query += BLOCK) weigh_block(key, query);
            sum_over_queries(weights_, of_out_down_, 1.0f, key, head.of_v, stride);
            sum_over_queries(of_scores_, queries_down_, scale_, key, head.of_k, stride);
        }
        sum_over_keys(head.of_q, stride);
    }

private:
    const int n_, padded_, dim_;
    const float scale_;
    const TokensAcross<1> queries_across_, of_out_across_;
    const TokensDown<1> queries_down_, keys_down_, of_out_down_;
    const Rows keys_transposed_;          // [head_dim, padded key]
    const Rows keys_, values_;            // of a block of keys
    const Rows weights_, of_scores_;      // of a block of keys [BLOCK, padded query]
    const TokensDown<1> of_scores_down_;  // of all keys, as the right side of a product
    float *const logs_, *const shares_;   // of the queries; shares: sum of out x of_out

    void take(const HeadGradients& head) {
        queries_across_.pack(head.projected.q);
        of_out_across_.pack(head.of_out);
        queries_down_.pack(head.projected.q);
        keys_down_.pack(head.projected.k);
        of_out_down_.pack(head.of_out);
        for (int d = 0; d < dim_; d += 16) {
            for (int key = 0; key < padded_; key += 32)
                transpose_tile(keys_down_.tile(key, d), keys_transposed_.at(d, key));
        }
        for (int query = 0; query < padded_; query++) {
            // Weights of queries that do not exist become 0.
            logs_[query] = query < n_ ? head.logs[query] : 1e30f;
            shares_[query] = query < n_ ? dot(head.out, head.of_out, query) : 0.0f;
        }
    }

    INLINE float dot(const Head<const bf16>& a, const Head<const bf16>& b, int token) const {
        Floats sum = _mm512_setzero_ps();
        for (int column = 0; column < dim_; column += 32) {
            Pairs x, y;
            a.fetch_token<1>(token, column, &x);
            b.fetch_token<1>(token, column, &y);
            sum = _mm512_fmadd_ps(even(x), even(y), _mm512_fmadd_ps(odd(x), odd(y), sum));
        }
        return _mm512_reduce_add_ps(sum);
    }

    // 32 rows x 32 columns into `out`; a panel of the right side has its tiles of one step side by side.
    INLINE void multiply_block(const bf16* upper, const bf16* lower, const bf16* left, const bf16* right, int steps,
                               size_t stride, float* out) const {
        Sums<BLOCK> sums;
        for (int step = 0; step < steps; step++) {
            sums.rows(upper + (size_t)step * TILE, lower + (size_t)step * TILE);
            sums.passing_columns(left + step * stride, right + step * stride);
            sums.multiply();
        }
        sums.store(out, BLOCK);
    }

    // The weights that 32 queries give to 32 keys, and the gradients of these scores.
    INLINE void weigh_block(int key, int query) {
        alignas(64) float scores[BLOCK * BLOCK], of_weights[BLOCK * BLOCK];
        multiply_block(keys_.at(0, 0), keys_.at(16, 0), queries_across_.tile(query, 0),
                       queries_across_.tile(query + 16, 0), dim_ / 32, TILE, scores);
        multiply_block(values_.at(0, 0), values_.at(16, 0), of_out_across_.tile(query, 0),
                       of_out_across_.tile(query + 16, 0), dim_ / 32, TILE, of_weights);
        const Floats logs[] = {load(logs_ + query), load(logs_ + query + 16)};
        const Floats shares[] = {load(shares_ + query), load(shares_ + query + 16)};
        for (int i = 0; i < BLOCK; i += 2) {
            Pairs of_scores[2];
            for (int r = 0; r < 2; r++) {
                const size_t row = (size_t)(i + r) * BLOCK;
                Floats weights[2], gradients[2];
                for (int c = 0; c < 2; c++) {
                    weights[c] = power_of_two<1>(
                        _mm512_fmsub_ps(load(scores + row + 16 * c), all(scale_ * 1.44269504f), logs[c]));
                    gradients[c] = _mm512_mul_ps(weights[c], _mm512_sub_ps(load(of_weights + row + 16 * c), shares[c]));
                }
                store_parts<1>(weights_.at(i + r, query), 0, weights[0], weights[1]);
                of_scores[r] = rounded(gradients[0], gradients[1]);
                _mm512_store_si512(of_scores_.at(i + r, query), of_scores[r]);
            }
            of_scores_down_.put(key + i, query, of_scores[0], of_scores[1]);
        }
    }

    // Gradients of a block of keys or values: what all queries add to them.
    void sum_over_queries(const Rows& shares, const TokensDown<1>& right, float factor, int key, bf16* to,
                          size_t stride) const {
        alignas(64) float sums[BLOCK * BLOCK];
        for (int d = 0; d < dim_; d += 32) {
            multiply_block(shares.at(0, 0), shares.at(16, 0), right.tile(0, d), right.tile(0, d + 16), padded_ / 32,
                           (size_t)dim_ / 16 * TILE, sums);
            for (int i = 0; i < BLOCK && key + i < n_; i++) {
                store_row(to + (key + i) * stride + d, _mm512_mul_ps(load(sums + BLOCK * i), all(factor)),
                          _mm512_mul_ps(load(sums + BLOCK * i + 16), all(factor)));
            }
        }
    }

    // Gradients of the queries: K' of_scores, which is transposed.
    void sum_over_keys(bf16* to, size_t stride) const {
        alignas(64) float sums[BLOCK * BLOCK];
        for (int query = 0; query < padded_; query += BLOCK) {
            for (int d = 0; d < dim_; d += 32) {
                multiply_block(keys_transposed_.at(d, 0), keys_transposed_.at(d + 16, 0),
                               of_scores_down_.tile(0, query), of_scores_down_.tile(0, query + 16), padded_ / 32,
                               (size_t)padded_ / 16 * TILE, sums);
                write_transposed(sums, query, d, to, stride);
            }
        }
    }

    INLINE void write_transposed(const float* sums, int query, int d, bf16* to, size_t stride) const {
        for (int half = 0; half < BLOCK; half += 16) {
            Pairs upper[16], lower[16];
            for (int i = 0; i < 16; i++) {
                upper[i] = _mm512_castps_si512(_mm512_mul_ps(load(sums + BLOCK * i + half), all(scale_)));
                lower[i] = _mm512_castps_si512(_mm512_mul_ps(load(sums + BLOCK * (16 + i) + half), all(scale_)));
            }
            transpose(upper);
            transpose(lower);
            for (int i = 0; i < 16 && query + half + i < n_; i++) {
                store_row(to + (query + half + i) * stride + d, _mm512_castsi512_ps(upper[i]),
                          _mm512_castsi512_ps(lower[i]));
            }
        }
    }
};

}  // namespace rerank
