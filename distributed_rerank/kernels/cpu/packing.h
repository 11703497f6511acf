// The tokens of one head as operands of tile products.
#pragma once
#include "products.h"

namespace rerank {

// Hands out pieces of a caller's memory; with no memory it counts what would be needed.
class Arena {
public:
    explicit Arena(void* memory) : memory_((char*)memory) {}
    template <class T>
    T* take(size_t count) {
        T* piece = memory_ ? (T*)(memory_ + used_) : nullptr;
        used_ += (count * sizeof(T) + 63) / 64 * 64;
        return piece;
    }
    size_t used() const { return used_; }

private:
    char* memory_;
    size_t used_ = 0;
};

inline Rows take_rows(Arena& arena, int parts, int n_rows, int width) {
    const size_t part = (size_t)up_to(n_rows, BLOCK) * width;
    return {arena.take<bf16>(parts * part), part, width};
}

// 16 rows of 16 numbers of 32 bits, transposed in place.
INLINE void transpose(__m512i* r) {
    __m512i t[16];
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
        r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
        r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
    }
}

// A tile whose rows are the columns of another, in units of two numbers.
INLINE void transpose_tile(const bf16* from, bf16* to) {
    Pairs rows[16];
    for (int i = 0; i < 16; i++) rows[i] = _mm512_load_si512(from + 32 * i);
    transpose(rows);
    for (int i = 0; i < 16; i++) _mm512_store_si512(to + 32 * i, rows[i]);
}

// One head's queries, keys, values or outputs: token after token, `stride` numbers apart. Tokens beyond the last are 0.
template <class Number>
struct Head {
    Number* from;
    size_t stride;
    int n_tokens;

    template <int PARTS>
    INLINE void fetch_token(int token, int column, Pairs* parts) const {
        for (int p = 0; p < PARTS; p++) parts[p] = _mm512_setzero_si512();
        if (token < n_tokens) fetch<PARTS>(from + token * stride + column, parts);
    }
};

// Rows from `first_token` on as the left side of a product, from row 0 on.
template <int PARTS, class Number>
void pack_rows(const Head<Number>& head, int first_token, int n_rows, const Rows& to) {
    Pairs parts[PARTS];
    for (int i = 0; i < n_rows; i++) {
        for (int column = 0; column < to.width; column += 32) {
            head.template fetch_token<PARTS>(first_token + i, column, parts);
            for (int p = 0; p < PARTS; p++) _mm512_store_si512(to.at(i, column) + p * to.part, parts[p]);
        }
    }
}

// The right side of x K': a tile has 16 pairs of columns x 16 tokens x 2.
template <int PARTS>
struct TokensAcross {
    bf16* data;
    size_t part;
    int n_tokens, width;  // a multiple of 32 each

    TokensAcross(Arena& arena, int n_tokens, int width)
        : data(arena.take<bf16>(PARTS * (size_t)n_tokens * width)),
          part((size_t)n_tokens * width),
          n_tokens(n_tokens),
          width(width) {}

    INLINE bf16* tile(int token, int column) const {
        return data + (size_t)(token / 16 * (width / 32) + column / 32) * TILE;
    }

    template <class Number>
    void pack(const Head<Number>& head) const {
        for (int token = 0; token < n_tokens; token += 16) {
            for (int column = 0; column < width; column += 32) pack_tile(head, token, column);
        }
    }

private:
    template <class Number>
    void pack_tile(const Head<Number>& head, int token, int column) const {
        Pairs rows[PARTS][16], parts[PARTS];
        for (int i = 0; i < 16; i++) {
            head.template fetch_token<PARTS>(token + i, column, parts);
            for (int p = 0; p < PARTS; p++) rows[p][i] = parts[p];
        }
        for (int p = 0; p < PARTS; p++) {
            transpose(rows[p]);
            for (int i = 0; i < 16; i++) _mm512_store_si512(tile(token, column) + p * part + 32 * i, rows[p][i]);
        }
    }
};

// Two rows of 32 numbers as rows of two tiles: number 2i is number i of the first row, 2i + 1 that of the second.
INLINE void interleave(Pairs first, Pairs second, bf16* left, bf16* right) {
    static constexpr uint16_t order[32] = {
        0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
        8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};  // 32 + i: of the second
    const __m512i lower = _mm512_loadu_si512(order), upper = _mm512_add_epi16(lower, _mm512_set1_epi16(16));
    _mm512_store_si512(left, _mm512_permutex2var_epi16(first, lower, second));
    _mm512_store_si512(right, _mm512_permutex2var_epi16(first, upper, second));
}

// The right side of x V: a tile has 16 pairs of tokens x 16 columns x 2.
template <int PARTS>
struct TokensDown {
    bf16* data;
    size_t part;
    int n_tokens, width;  // a multiple of 32 each

    TokensDown(Arena& arena, int n_tokens, int width)
        : data(arena.take<bf16>(PARTS * (size_t)n_tokens * width)),
          part((size_t)n_tokens * width),
          n_tokens(n_tokens),
          width(width) {}

    INLINE bf16* tile(int token, int column) const {
        return data + (size_t)(token / 32 * (width / 16) + column / 16) * TILE;
    }
    // Two tokens' numbers of 32 columns; `token` is even.
    INLINE void put(int token, int column, Pairs even_token, Pairs odd_token, int p = 0) const {
        bf16* left = tile(token, column) + p * part + token % 32 / 2 * 32;
        interleave(even_token, odd_token, left, left + TILE);
    }

    template <class Number>
    void pack(const Head<Number>& head) const {
        Pairs even_token[PARTS], odd_token[PARTS];
        for (int token = 0; token < n_tokens; token += 2) {
            for (int column = 0; column < width; column += 32) {
                head.template fetch_token<PARTS>(token, column, even_token);
                head.template fetch_token<PARTS>(token + 1, column, odd_token);
                for (int p = 0; p < PARTS; p++) put(token, column, even_token[p], odd_token[p], p);
            }
        }
    }
};

}  // namespace rerank
