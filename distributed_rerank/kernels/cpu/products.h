// Matrix products of bfloat16 numbers, by AMX or, where the library is compiled without it, by the vector units.
//
// Rows to be multiplied lie in tiles one after the other (`Rows`), weights in panels of 32 outputs (`Weights`), so that
// every tile is 1,024 bytes in a row. A panel of weights stays in the nearest caches while all rows pass by it.
#pragma once
#include <algorithm>

#ifdef __AMX_BF16__
#include "tiles_amx.h"
#else
#include "tiles_avx512.h"
#endif

namespace rerank {

constexpr int TILE = 512;  // numbers in a tile
constexpr int BLOCK = 32;  // rows and columns that are computed together: 2 x 2 tiles

constexpr int up_to(int n, int unit) {
    return (n + unit - 1) / unit * unit;
}

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

// Adds the products of numbers in parts (vectors.h), small ones first; with three parts those of orders 0 to 2, which
// leaves out 2^-25 of each. `rows(part)` and `columns(part)` give the sums their next operands.
template <int ROW_PARTS, int COLUMN_PARTS, int N, class GiveRows, class GiveColumns>
INLINE void multiply_parts(Sums<N>& sums, const GiveRows& rows, const GiveColumns& columns) {
    static_assert(ROW_PARTS == 1 || ROW_PARTS == COLUMN_PARTS, "rows have one part, or as many as the columns");
    rows(0);
    if (COLUMN_PARTS == 3) {
        columns(2);
        sums.multiply();
    }
    if (COLUMN_PARTS >= 2) {
        columns(1);
        sums.multiply();
    }
    if (ROW_PARTS == 3) {  // each step gives one side only
        rows(1);
        sums.multiply();
        columns(0);
        sums.multiply();
        rows(2);
        sums.multiply();
        rows(0);
        sums.multiply();
        return;
    }
    columns(0);
    sums.multiply();
    if (ROW_PARTS == 2) {
        rows(1);
        sums.multiply();
    }
}

// N rows x 32 outputs into `out`; `meanwhile(step)` is called after each of the steps of 32 inputs, its vector
// instructions run beside the tiles'. For the last 16 rows or fewer each sum has the same terms in the same order.
template <int N, int A_PARTS, int W_PARTS, class Meanwhile>
INLINE void multiply_rows(const bf16* upper, const bf16* lower, size_t a_part, const bf16* panel, size_t w_part,
                          int steps, float* out, const Meanwhile& meanwhile) {
    Sums<N> sums;
    for (int step = 0; step < steps; step++, upper += TILE, lower += TILE, panel += 2 * TILE) {
        const auto rows = [&](int p) __attribute__((always_inline)) {
            sums.passing_rows(upper + p * a_part, lower + p * a_part);
        };
        const auto columns = [&](int p) __attribute__((always_inline)) {
            sums.columns(panel + p * w_part, panel + p * w_part + TILE);
        };
        multiply_parts<A_PARTS, W_PARTS>(sums, rows, columns);
        meanwhile(step);
    }
    sums.store(out, BLOCK);
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
            const bf16 *upper = a.tiles(row), *lower = a.tiles(row + 16);
            if (n_rows - row > 16) {
                multiply_rows<32, A_PARTS, W_PARTS>(upper, lower, a.part, panel, weights.part, steps, sums[turn],
                                                    meanwhile);
            } else {
                multiply_rows<16, A_PARTS, W_PARTS>(upper, lower, a.part, panel, weights.part, steps, sums[turn],
                                                    meanwhile);
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
