// Sums of products by AMX: a tile of 16 x 32 bfloat16 times one of 32 x 16 is added to one of 16 x 16 floats.
//
// Loads of numbers that pass by are made with the hint that they do not come again. Without it they would push those out
// of the first cache that do come again (2.6 instead of 3.3 TFLOP/s a core).
#pragma once
#include <sys/syscall.h>
#include <unistd.h>

#include "vectors.h"

namespace rerank {

// Asks the system for the tiles' state, once for all threads of the process; whether it is granted.
inline bool request_tiles() {
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
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

// Sums of ROWS (16 or 32) x 32 floats: tiles 0 to 3. Tiles 4 and 5 hold rows, 6 and 7 columns. One at a time.
template <int ROWS>
class Sums {
public:
    INLINE Sums() {
        // gcc does not see that loading a tile reads memory: what was written before must not be moved behind it.
        asm volatile("" ::: "memory");
        _tile_zero(0);
        _tile_zero(1);
        if (ROWS == 32) {
            _tile_zero(2);
            _tile_zero(3);
        }
    }
    INLINE void rows(const bf16* upper, const bf16* lower) {
        _tile_loadd(4, upper, 64);
        if (ROWS == 32) _tile_loadd(5, lower, 64);
    }
    INLINE void passing_rows(const bf16* upper, const bf16* lower) {
        _tile_stream_loadd(4, upper, 64);
        if (ROWS == 32) _tile_stream_loadd(5, lower, 64);
    }
    INLINE void columns(const bf16* left, const bf16* right) {
        _tile_loadd(6, left, 64);
        _tile_loadd(7, right, 64);
    }
    INLINE void passing_columns(const bf16* left, const bf16* right) {
        _tile_stream_loadd(6, left, 64);
        _tile_stream_loadd(7, right, 64);
    }
    // Adds rows x columns, as they were given last.
    INLINE void multiply() {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (ROWS == 32) {
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    // Rows lie `width` floats apart.
    INLINE void store(float* to, size_t width) const {
        _tile_stored(0, to, width * 4);
        _tile_stored(1, to + 16, width * 4);
        if (ROWS == 32) {
            _tile_stored(2, to + 16 * width, width * 4);
            _tile_stored(3, to + 16 * width + 16, width * 4);
        }
    }
};

}  // namespace rerank
