// Runs the instructions of AMX that the kernels use on a CPU without them: each raises SIGILL, and the handler does what
// Intel defines (Software Developer's Manual, volume 2: LDTILECFG, TDPBF16PS, TILELOADD, TILERELEASE, TILESTORED,
// TILEZERO). What the CPU would refuse or leave undefined (no configuration, no palette 1, other reserved bytes than
// zero, rows or bytes beyond a tile, factors that do not fit) ends the process with a line that says so.
#include <immintrin.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

namespace {

constexpr int N_TILES = 8, ROWS = 16, ROW_BYTES = 64;

struct State {
    alignas(64) uint8_t tile[N_TILES][ROWS][ROW_BYTES];
    int rows[N_TILES], bytes[N_TILES];
    bool configured;
};
// Every thread has its own, from its first instruction until the end of the process. (A handler must not wait for a lock:
// therefore this model of thread-local memory, which has room for a pointer only, and no malloc.)
__attribute__((tls_model("initial-exec"))) thread_local State* state = nullptr;
uint64_t n_products = 0, n_loads = 0, n_stores = 0;

[[noreturn]] void refuse(const char* why) {
    fprintf(stderr, "AMX by definition: %s\n", why);
    abort();
}

void require(bool holds, const char* why) {
    if (!holds) refuse(why);
}

struct Instruction {
    int opcode, prefix, reg, rm, vvvv, length;
    bool in_memory, by_row;  // by_row: the index register is the distance of rows, not part of the address
    uint64_t address, stride;
};

uint64_t register_of(const ucontext_t* context, int number) {
    static constexpr int PLACE[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                      REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return context->uc_mcontext.gregs[PLACE[number]];
}

// The instruction at the instruction pointer, if it is in VEX.128.0F38.W0 with an opcode of AMX.
bool decode(const ucontext_t* context, Instruction& found) {
    const uint64_t begin = context->uc_mcontext.gregs[REG_RIP];
    const uint8_t* code = reinterpret_cast<const uint8_t*>(begin);
    if (code[0] != 0xC4 || (code[1] & 0x1F) != 2 || (code[2] & 0x84) != 0) return false;
    const int r = (~code[1] >> 7 & 1) * 8, x = (~code[1] >> 6 & 1) * 8, b = (~code[1] >> 5 & 1) * 8;
    found.prefix = code[2] & 3;
    found.vvvv = ~code[2] >> 3 & 15;
    found.opcode = code[3];
    if (found.opcode != 0x49 && found.opcode != 0x4B && found.opcode != 0x5C) return false;
    const int mode = code[4] >> 6;
    found.reg = (code[4] >> 3 & 7) + r;
    found.rm = code[4] & 7;
    found.in_memory = mode != 3;
    found.stride = 0;
    found.by_row = false;
    int at = 5;
    if (!found.in_memory) {
        found.rm += b;
    } else {
        bool has_base = true;
        int base = found.rm + b;
        if (found.rm == 4) {
            const int scale = code[at] >> 6, index = (code[at] >> 3 & 7) + x;
            base = (code[at] & 7) + b;
            has_base = !((code[at] & 7) == 5 && mode == 0);
            if (index != 4) found.stride = register_of(context, index) << scale;
            found.by_row = true;
            at += 1;
        } else if (found.rm == 5 && mode == 0) {
            has_base = false;  // relative to the next instruction; there is no immediate behind the displacement
        }
        int64_t displacement = 0;
        if (mode == 1) {
            displacement = static_cast<int8_t>(code[at]);
            at += 1;
        } else if (mode == 2 || !has_base) {
            int32_t wide;
            memcpy(&wide, code + at, 4);
            displacement = wide;
            at += 4;
        }
        found.address = displacement + (has_base ? register_of(context, base) : found.by_row ? 0 : begin + at);
    }
    found.length = at;
    return true;
}

void configure(const uint8_t* from) {
    require(from[0] == 1, "LDTILECFG of another palette than 1");
    require(from[1] == 0, "LDTILECFG with a start row");
    for (int i = 2; i < 16; i++) require(from[i] == 0, "LDTILECFG with a reserved byte that is not zero");
    for (int i = 32; i < 48; i++) require(from[i] == 0, "LDTILECFG with a reserved byte that is not zero");
    for (int i = 56; i < 64; i++) require(from[i] == 0, "LDTILECFG with a reserved byte that is not zero");
    for (int i = 0; i < N_TILES; i++) {
        state->bytes[i] = from[16 + 2 * i] + 256 * from[17 + 2 * i];
        state->rows[i] = from[48 + i];
        require(state->bytes[i] <= ROW_BYTES && state->rows[i] <= ROWS, "LDTILECFG of a tile of more than 16 x 64 bytes");
        require((state->bytes[i] == 0) == (state->rows[i] == 0), "LDTILECFG of a tile with rows or bytes, not both");
    }
    memset(state->tile, 0, sizeof state->tile);
    state->configured = true;
}

void load(int tile, const uint8_t* from, uint64_t stride) {
    memset(state->tile[tile], 0, ROWS * ROW_BYTES);
    for (int row = 0; row < state->rows[tile]; row++) memcpy(state->tile[tile][row], from + row * stride, state->bytes[tile]);
    __atomic_fetch_add(&n_loads, 1, __ATOMIC_RELAXED);
}

void store(int tile, uint8_t* to, uint64_t stride) {
    for (int row = 0; row < state->rows[tile]; row++) memcpy(to + row * stride, state->tile[tile][row], state->bytes[tile]);
    __atomic_fetch_add(&n_stores, 1, __ATOMIC_RELAXED);
}

// sums += left x right. The even numbers of a row and the odd ones are added up apart from zero on, in order; their sum
// is added to what was there. Numbers below the normal ones count as zero, before and after; rounding is to nearest even.
void multiply(int sums, int left, int right) {
    require(sums != left && sums != right && left != right, "TDPBF16PS of a tile with itself");
    require(state->bytes[sums] == state->bytes[right] && state->rows[sums] == state->rows[left] &&
                state->bytes[left] == 4 * state->rows[right] && state->bytes[sums] % 4 == 0,
            "TDPBF16PS of tiles that do not fit");
    _mm_setcsr(0x9FC0);
    const __m512i upper_half = _mm512_set1_epi32(0xFFFF0000);
    for (int row = 0; row < state->rows[sums]; row++) {
        __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
        for (int k = 0; k < state->rows[right]; k++) {
            int pair;
            memcpy(&pair, state->tile[left][row] + 4 * k, 4);
            const __m512i factors = _mm512_set1_epi32(pair), columns = _mm512_load_si512(state->tile[right][k]);
            even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(factors, 16)),
                                   _mm512_castsi512_ps(_mm512_slli_epi32(columns, 16)), even);
            odd = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(factors, upper_half)),
                                  _mm512_castsi512_ps(_mm512_and_si512(columns, upper_half)), odd);
        }
        float* to = reinterpret_cast<float*>(state->tile[sums][row]);
        const __mmask16 columns = (1u << state->bytes[sums] / 4) - 1;
        _mm512_mask_storeu_ps(to, columns, _mm512_add_ps(_mm512_loadu_ps(to), _mm512_add_ps(even, odd)));
    }
    __atomic_fetch_add(&n_products, 1, __ATOMIC_RELAXED);
}

bool run(const Instruction& found) {
    if (state == nullptr) {
        void* zeros = mmap(nullptr, sizeof(State), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        require(zeros != MAP_FAILED, "no memory for tiles");
        state = static_cast<State*>(zeros);
    }
    constexpr int NONE = 0, X66 = 1, XF3 = 2, XF2 = 3;
    const int opcode = found.opcode, prefix = found.prefix;
    const uint8_t* from = reinterpret_cast<const uint8_t*>(found.address);
    if (opcode == 0x49 && prefix == NONE && found.in_memory && found.reg == 0) {
        // An index is part of this instruction's address, not a distance of rows.
        configure(from + found.stride);
        return true;
    }
    require(state->configured, "an instruction before LDTILECFG, or after TILERELEASE");
    if (opcode == 0x49 && prefix == NONE && !found.in_memory && found.reg == 0 && found.rm == 0) {
        state->configured = false;
    } else if (opcode == 0x49 && prefix == XF2 && !found.in_memory && found.rm == 0) {
        memset(state->tile[found.reg], 0, ROWS * ROW_BYTES);
    } else if (opcode == 0x4B && (prefix == XF2 || prefix == X66) && found.by_row) {
        load(found.reg, from, found.stride);
    } else if (opcode == 0x4B && prefix == XF3 && found.by_row) {
        store(found.reg, const_cast<uint8_t*>(from), found.stride);
    } else if (opcode == 0x5C && prefix == XF3 && !found.in_memory) {
        multiply(found.reg, found.rm, found.vvvv);
    } else {
        return false;
    }
    return true;
}

struct sigaction previous;

void handle(int number, siginfo_t* info, void* of_thread) {
    ucontext_t* context = static_cast<ucontext_t*>(of_thread);
    Instruction found = {};
    bool is_first = true;
    // Those that follow at once need no signal of their own, which takes most of the time.
    while (decode(context, found) && run(found)) {
        context->uc_mcontext.gregs[REG_RIP] += found.length;
        is_first = false;
    }
    if (!is_first) return;
    if (previous.sa_flags & SA_SIGINFO) {
        previous.sa_sigaction(number, info, of_thread);
    } else {
        sigaction(SIGILL, &previous, nullptr);  // what does not belong here meets it when it is run again
    }
}

}  // namespace

extern "C" {

// From now on, in all threads of this process.
int install() {
    struct sigaction action = {};
    action.sa_sigaction = handle;
    action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_RESTART;
    return sigaction(SIGILL, &action, &previous);
}

// Products, loads and stores of tiles until now.
void counts(uint64_t* to) {
    to[0] = n_products;
    to[1] = n_loads;
    to[2] = n_stores;
}
}
