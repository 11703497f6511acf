// Inference of a vision transformer's blocks on a CPU with AMX (timm's `Block` with plain attention and MLP), and its
// patch embedding. Called from kernels/transformer.py, which explains the arguments.
//
// The residual stream is float32. Linear layers and attention multiply bfloat16 numbers, one to three parts of each float
// (`parts`), and sum in float32; class tokens have two parts at least.
#include <cstring>
#include <type_traits>

#include "class_token.h"

namespace rerank {

constexpr int HIDDEN_PIECE =
    384;  // hidden units computed and consumed at a time, so that they stay in the second cache

template <int PARTS>
class Block {
public:
    Block(const BlockArguments& arguments, int images, int n_tokens, void* scratch)
        : b_(arguments),
          images_(images),
          n_(n_tokens),
          dim_(arguments.dim),
          arena_(scratch),
          rows_(take_rows(arena_, PARTS, n_tokens, dim_)),
          hidden_(take_rows(arena_, PARTS, n_tokens, HIDDEN_PIECE)),
          projected_(arena_.take<Number>((size_t)n_tokens * 3 * dim_)),
          statistics_(arena_.take<Statistics>(n_tokens)),
          attention_(arena_, n_tokens, dim_ / arguments.heads),
          class_tokens_(arena_, arguments, images, n_tokens) {}

    size_t scratch_bytes() const { return arena_.used(); }

    // `tokens` [image, token, dim], in place; if `is_last`, only the class tokens are computed and written.
    void run(float* tokens, bool is_last) {
        Tiles tiles;
        class_tokens_.project_queries(tokens);
        for (int image = 0; image < images_; image++) {
            float* x = tokens + (size_t)image * n_ * dim_;
            project(x, is_last);
            attend(x, image, is_last);
            if (!is_last) finish(x);
        }
        class_tokens_.finish(tokens);
    }

private:
    using Number = typename std::conditional<PARTS == 1, bf16, float>::type;

    const BlockArguments& b_;
    const int images_, n_, dim_;
    Arena arena_;
    const Rows rows_, hidden_;
    Number* const projected_;  // queries, keys and values of an image [token, 3, head, head_dim]
    Statistics* const statistics_;
    Attention<PARTS, Number> attention_;
    ClassTokens<PARTS == 3 ? 3 : 2> class_tokens_;

    // Of the last block only the keys are needed.
    void project(const float* x, bool is_last) {
        normalise<PARTS>(x, dim_, n_, b_.norm1, b_.eps, rows_, statistics_);
        const Range outputs = is_last ? Range{dim_, 2 * dim_} : Range{0, 3 * dim_};
        multiply<PARTS, PARTS>(rows_, n_, weights_of(b_.qkv, dim_, 3 * dim_), outputs, {0, dim_},
                               write_to(projected_, 3 * dim_, b_.qkv.bias));
    }

    void attend(const float* x, int image, bool is_last) {
        const int head_dim = dim_ / b_.heads;
        for (int head = 0; head < b_.heads; head++) {
            const int column = head * head_dim;
            const auto of_head = Projected<Number>::of(projected_, n_, dim_, column);
            attention_.set_keys(of_head);
            class_tokens_.attend(image, head, attention_);
            if (!is_last) {
                attention_.set_values(of_head);
                attention_.attend_all(
                    of_head, [&](int token, int d, Floats first, Floats second) __attribute__((always_inline)) {
                        store_parts<PARTS>(rows_.at(token, column + d), rows_.part, first, second);
                    });
            }
        }
        class_tokens_.average(image, x, statistics_);
    }

    // The rest of the block for all tokens but the class token.
    void finish(float* x) {
        multiply<PARTS, PARTS>(rows_, n_, weights_of(b_.proj, dim_, dim_), {0, dim_}, {0, dim_},
                               add_to(x, dim_, b_.proj.bias, 1));
        normalise<PARTS>(x, dim_, n_, b_.norm2, b_.eps, rows_);
        const Weights fc1 = weights_of(b_.fc1, dim_, b_.hidden), fc2 = weights_of(b_.fc2, b_.hidden, dim_);
        for (int begin = 0; begin < b_.hidden; begin += HIDDEN_PIECE) {
            const Range piece = {begin, std::min(begin + HIDDEN_PIECE, b_.hidden)};
            const Rows part = {hidden_.data, hidden_.part, piece.end - piece.begin};
            multiply<PARTS, PARTS>(rows_, n_, fc1, piece, {0, dim_}, gelu_to<PARTS>(part, b_.fc1.bias, begin));
            multiply<PARTS, PARTS>(part, n_, fc2, {0, dim_}, piece, add_to(x, dim_, begin ? nullptr : b_.fc2.bias, 1));
        }
    }
};

// Patches of `size` x `size` pixels, each a row of 3 x size x size bytes, which bfloat16 holds exactly, times weights
// of two or three parts.
class Patches {
public:
    Patches(int height, int width, int size, int dim, void* scratch)
        : height_(height),
          width_(width),
          size_(size),
          n_rows_(height / size),
          n_columns_(width / size),
          n_inputs_(up_to(3 * size * size, 32)),
          dim_(dim),
          arena_(scratch),
          part_((size_t)up_to(n_rows_ * n_columns_, BLOCK) * n_inputs_),
          patches_{arena_.take<bf16>(part_), part_, n_inputs_},
          bytes_(arena_.take<uint8_t>(n_inputs_)) {}

    size_t scratch_bytes() const { return arena_.used(); }

    // `out` [patch, dim], row by row.
    template <int PARTS>
    void embed(const uint8_t* pixels, const Linear& linear, float* out) {
        memset(bytes_, 0, n_inputs_);
        for (int row = 0; row < n_rows_; row++) {
            for (int column = 0; column < n_columns_; column++) pack(pixels, row, column);
        }
        const Weights weights = {linear.weights, (size_t)n_inputs_ * dim_, linear.bias, n_inputs_, dim_};
        multiply<1, PARTS>(patches_, n_rows_ * n_columns_, weights, {0, dim_}, {0, n_inputs_},
                           write_to(out, dim_, linear.bias));
    }

private:
    const int height_, width_, size_, n_rows_, n_columns_, n_inputs_, dim_;
    Arena arena_;
    const size_t part_;
    const Rows patches_;
    uint8_t* const bytes_;

    void pack(const uint8_t* pixels, int row, int column) {
        uint8_t* to = bytes_;
        for (int channel = 0; channel < 3; channel++) {
            const uint8_t* from = pixels + ((size_t)channel * height_ + row * size_) * width_ + column * size_;
            for (int y = 0; y < size_; y++, to += size_) memcpy(to, from + (size_t)y * width_, size_);
        }
        const auto sixteen = [&](int at) __attribute__((always_inline)) {
            return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(bytes_ + at))));
        };
        for (int i = 0; i < n_inputs_; i += 32) {
            store_parts<1>(patches_.at(row * n_columns_ + column, i), 0, sixteen(i), sixteen(i + 16));
        }
    }
};

}  // namespace rerank

using namespace rerank;

namespace {

// `run` with the number of parts as a type.
template <class Run>
auto with_parts(int parts, const Run& run) {
    if (parts == 1) return run(std::integral_constant<int, 1>());
    if (parts == 2) return run(std::integral_constant<int, 2>());
    return run(std::integral_constant<int, 3>());
}

}  // namespace

extern "C" {

// By setup.py, of all files in this folder.
const char* sources_digest() { return SOURCES_DIGEST; }

int request_tiles() {
    return rerank::request_tiles();
}

size_t block_scratch(const BlockArguments* block, int images, int n_tokens) {
    const auto bytes = [&](auto parts) {
        return Block<decltype(parts)::value>(*block, images, n_tokens, nullptr).scratch_bytes();
    };
    return with_parts(block->parts, bytes);
}

void run_block(const BlockArguments* block, float* tokens, int images, int n_tokens, int is_last, void* scratch) {
    with_parts(block->parts, [&](auto parts) {
        Block<decltype(parts)::value>(*block, images, n_tokens, scratch).run(tokens, is_last);
    });
}

size_t patches_scratch(int height, int width, int size, int dim) {
    return Patches(height, width, size, dim, nullptr).scratch_bytes();
}

void embed_patches(const uint8_t* pixels, int images, int height, int width, int size, int dim, const Linear* linear,
                   int parts, float* out, void* scratch) {
    Tiles tiles;
    Patches patches(height, width, size, dim, scratch);
    const size_t out_stride = (size_t)(height / size) * (width / size) * dim;
    for (int image = 0; image < images; image++) {
        const uint8_t* from = pixels + (size_t)image * 3 * height * width;
        if (parts == 3) {
            patches.embed<3>(from, *linear, out + image * out_stride);
        } else {
            patches.embed<2>(from, *linear, out + image * out_stride);
        }
    }
}
}
