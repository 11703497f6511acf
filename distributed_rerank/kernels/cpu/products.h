// Matrix products of AMX: a tile of 16 x 32 bfloat16 times one of 32 x 16 is added to one of 16 x 16 floats.
//
// Rows to be multiplied lie in tiles one after the other (`Rows`), weights in panels of 32 outputs (`Weights`), so that
// every tile is 1,024 bytes in a row. A panel of weights stays in the first cache while all rows pass by it; rows are
// loaded with the hint that they do not come again, without which they would push the panel out (2.6 instead of
// 3.3 TFLOP/s a core).
#pragma once
#include <algorithm>

#include "vectors.h"

namespace rerank {

constexpr int TILE = 512;  // numbers in a tile
constexpr int BLOCK = 32;  // rows and columns that are computed together: 2 x 2 tiles

constexpr int up_to(int n, int unit) {
    return (n + unit - 1) / unit * unit;
}

// All eight tiles have 16 rows of 64 bytes. (A constant: gcc does not see that loading it reads memory.)
struct alignas(64) TileSizes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileSizes TILE_SIZES;

// This thread may use its tiles while one lives.
class Tiles {
public:
    Tiles() { _tile_loadconfig(&TILE_SIZES); }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
};

// Rows of `width` numbers in parts that lie `part` numbers apart: tiles of 16 rows x 32 columns, those of the same rows
// in order. The number of rows is a multiple of 16 in memory.
struct Rows {
    bf16* data;
    size_t part;
    int width;

    INLINE bf16* tiles(int row) const { return data + (size_t)(row / 16) * (width / 32) * TILE; }
    INLINE bf16* at(int row, int column) const { return tiles(row) + column / 32 * TILE + row % 16 * 32; }
};

// A linear layer: for 32 outputs and 32 inputs two tiles, each of 16 pairs of inputs x 16 outputs x 2.
struct Weights {
    const bf16* data;
    size_t part;
    const float* bias;
    int inputs, outputs;

    INLINE const bf16* panel(int output, int input) const {
        return data + ((size_t)(output / 32) * (inputs / 32) + input / 32) * 2 * TILE;
    }
};

// Nor that loading a tile does: what was written before must not be moved behind it.
INLINE void finish_writing() {
    asm volatile("" ::: "memory");
}

// Tiles 0 to 3 += tiles 4, 5 (rows) x tiles 6, 7 (columns).
INLINE void clear_2x2() {
    finish_writing();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}
INLINE void multiply_2x2() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
}
INLINE void store_2x2(float* to, size_t width) {
    _tile_stored(0, to, width * 4);
    _tile_stored(1, to + 16, width * 4);
    _tile_stored(2, to + 16 * width, width * 4);
    _tile_stored(3, to + 16 * width + 16, width * 4);
}
INLINE void load_pair_4(const bf16* first, const bf16* second) {
    _tile_loadd(4, first, 64);
    _tile_loadd(5, second, 64);
}
INLINE void load_passing_pair_4(const bf16* first, const bf16* second) {
    _tile_stream_loadd(4, first, 64);
    _tile_stream_loadd(5, second, 64);
}
INLINE void load_pair_6(const bf16* first, const bf16* second) {
    _tile_loadd(6, first, 64);
    _tile_loadd(7, second, 64);
}
INLINE void load_passing_pair_6(const bf16* first, const bf16* second) {
    _tile_stream_loadd(6, first, 64);
    _tile_stream_loadd(7, second, 64);
}

// 32 rows x 32 outputs into `sums`; `meanwhile(step)` is called after each of the steps of 32 inputs, its vector
// instructions run beside the tiles'.
template <int A_PARTS, int W_PARTS, class Meanwhile>
INLINE void multiply_32_rows(const bf16* upper, const bf16* lower, size_t a_part, const bf16* panel, size_t w_part,
                             int steps, float* sums, const Meanwhile& meanwhile) {
    clear_2x2();
    for (int step = 0; step < steps; step++, upper += TILE, lower += TILE, panel += 2 * TILE) {
        load_passing_pair_4(upper, lower);
        if (W_PARTS == 2) {
            load_pair_6(panel + w_part, panel + w_part + TILE);
            multiply_2x2();
        }
        load_pair_6(panel, panel + TILE);
        multiply_2x2();
        if (A_PARTS == 2) {
            load_passing_pair_4(upper + a_part, lower + a_part);
            multiply_2x2();
        }
        meanwhile(step);
    }
    store_2x2(sums, BLOCK);
}

// The same for the last rows where they are 16 or fewer: each sum has the same terms in the same order.
template <int A_PARTS, int W_PARTS>
INLINE void multiply_16_rows(const bf16* rows, size_t a_part, const bf16* panel, size_t w_part, int steps,
                             float* sums) {
    finish_writing();
    _tile_zero(0);
    _tile_zero(1);
    for (int step = 0; step < steps; step++, rows += TILE, panel += 2 * TILE) {
        _tile_loadd(4, rows, 64);
        if (W_PARTS == 2) {
            load_pair_6(panel + w_part, panel + w_part + TILE);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
        }
        load_pair_6(panel, panel + TILE);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (A_PARTS == 2) {
            _tile_loadd(4, rows + a_part, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
        }
    }
    _tile_stored(0, sums, BLOCK * 4);
    _tile_stored(1, sums + 16, BLOCK * 4);
}

// Asks for the panel that comes next, a piece at a time, so that it is in the second cache when its turn comes.
template <int W_PARTS>
class Prefetch {
public:
    Prefetch(const bf16* panel, size_t part, int steps, int n_pieces)
        : panel_((const char*)panel), part_(part * sizeof(bf16)), lines_(steps * 2 * TILE / 32), n_pieces_(n_pieces) {}

    INLINE void piece() {
        const int end = (int)((int64_t)lines_ * ++pieces_ / n_pieces_);
        for (; line_ < end; line_++) {
            for (int p = 0; p < W_PARTS; p++) _mm_prefetch(panel_ + p * part_ + (size_t)line_ * 64, _MM_HINT_T1);
        }
    }

private:
    const char* panel_;
    size_t part_;
    int lines_, n_pieces_, pieces_ = 0, line_ = 0;
};

struct Range {
    int begin, end;
};

// For each output of the range (multiples of 32) and each row: row x weights over `inputs`, a range as well, of which
// the rows hold the numbers from column 0 on. `finish(row, output, sums)` gets 32 outputs of one row and writes
// them: those of one block while the next one is multiplied.
template <int A_PARTS, int W_PARTS, class Finish>
void multiply(const Rows& a, int n_rows, const Weights& weights, Range outputs, Range inputs, const Finish& finish) {
    alignas(64) float sums[2][BLOCK * BLOCK];
    const int steps = (inputs.end - inputs.begin) / 32, n_blocks = (n_rows + BLOCK - 1) / BLOCK;
    struct {
        int row, output, n_rows;
    } last = {0, 0, 0};
    int turn = 0;
    for (int output = outputs.begin; output < outputs.end; output += BLOCK) {
        const bf16* panel = weights.panel(output, inputs.begin);
        const int next = output + BLOCK < outputs.end ? output + BLOCK : outputs.begin;
        Prefetch<W_PARTS> prefetch(weights.panel(next, inputs.begin), weights.part, steps, n_blocks * steps);
        for (int row = 0; row < n_rows; row += BLOCK) {
            const float* finished = sums[turn ^ 1];
            int done = 0;
            const auto meanwhile = [&](int step) __attribute__((always_inline)) {
                prefetch.piece();
                for (const int end = last.n_rows * (step + 1) / steps; done < end; done++) {
                    finish(last.row + done, last.output, finished + BLOCK * done);
                }
            };
            if (n_rows - row > 16) {
                multiply_32_rows<A_PARTS, W_PARTS>(a.tiles(row), a.tiles(row + 16), a.part, panel, weights.part, steps,
                                                   sums[turn], meanwhile);
            } else {
                multiply_16_rows<A_PARTS, W_PARTS>(a.tiles(row), a.part, panel, weights.part, steps, sums[turn]);
                for (int step = 0; step < steps; step++) meanwhile(step);
            }
            last = {row, output, std::min(BLOCK, n_rows - row)};
            turn ^= 1;
        }
    }
    for (int row = 0; row < last.n_rows; row++) {
        finish(last.row + row, last.output, sums[turn ^ 1] + BLOCK * row);
    }
}

}  // namespace rerank
