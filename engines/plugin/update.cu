// The cache update of a stack of units in one pass over memory:
//
//     g_u   = g_u0 + c_u1 * g_u1 + c_u2 * g_u2 + c_u3 * g_u3     (stored where somebody reads it later)
//     x_out = x + sum over u of c_u0 * gate_u * g_u
//
// x, x_out, g (B, T, D) and gates (units, B, D) are float, half or bfloat16; coefficients are float; sums are float. Every
// tensor is read once, whatever the number of units, and nothing else is written. All that a thread reads of an element it
// has read before it writes it, so g_u may lie on an entry of its own history, and x_out on x.
//
// One thread serves VECTOR neighbouring elements of TOKENS neighbouring tokens, so that a gate is fetched once for all of
// them. The same source compiles with NVRTC for GPUs, and with any C++ compiler for tests on the host.

#ifdef __CUDACC__
#define GOC_FUNCTION static __device__ __forceinline__
#define GOC_UNROLL _Pragma("unroll")
#else
#define GOC_FUNCTION static inline
#define GOC_UNROLL
#endif
#ifndef GOC_MOVED
#define GOC_MOVED(bytes)  // a test counts here
#define GOC_ORDER(thread, threads) (thread)  // and changes the order in which the host runs threads
#endif

const int GOC_THREADS = 128;   // per block
const int GOC_MAX_UNITS = 88;  // what fits into the 4 KB of kernel parameters that every driver takes
const int GOC_MAX_ENTRIES = 4;
const int GOC_TOKENS = 4;

struct GocStack {
    const void* x;
    void* x_out;
    const void* gates;
    const float* coefficients;
    long long rows, tokens, hidden;
    int units, reserved;
    const void* history[GOC_MAX_UNITS][GOC_MAX_ENTRIES];  // newest first
    void* stored[GOC_MAX_UNITS];                          // null where g is not kept
    unsigned short coefficient[GOC_MAX_UNITS];            // where the unit's coefficients start
    unsigned char entries[GOC_MAX_UNITS];
};

struct Float {
    typedef unsigned int bits;
    union Word {
        unsigned int bits;
        float value;
    };
    GOC_FUNCTION float widen(unsigned int bits) {
        Word word;
        word.bits = bits;
        return word.value;
    }
    GOC_FUNCTION unsigned int narrow(float value) {
        Word word;
        word.value = value;
        return word.bits;
    }
};

struct Bfloat16 {
    typedef unsigned short bits;
    GOC_FUNCTION float widen(unsigned short bits) { return Float::widen((unsigned int)bits << 16); }
    GOC_FUNCTION unsigned short narrow(float value) {
#ifdef __CUDACC__
        unsigned short bits;
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
        return bits;
#else
        const unsigned int wide = Float::narrow(value);
        if ((wide & 0x7fffffffu) > 0x7f800000u) return (unsigned short)((wide >> 16) | 0x40u);  // stays a NaN
        return (unsigned short)((wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16);                 // nearest, ties to even
#endif
    }
};

struct Half {
    typedef unsigned short bits;
    GOC_FUNCTION float widen(unsigned short bits) {
#ifdef __CUDACC__
        float value;
        asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
        return value;
#else
        const unsigned int sign = (bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
        if (magnitude >= 0x7c00u) return Float::widen(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
        // Shifted into place the exponent is 112 too small; multiplying sets it right, also where the half is subnormal.
        return Float::widen(sign | Float::narrow(Float::widen(magnitude << 13) * Float::widen(0x77800000u)));
#endif
    }
    GOC_FUNCTION unsigned short narrow(float value) {
#ifdef __CUDACC__
        unsigned short bits;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
        return bits;
#else
        const unsigned int wide = Float::narrow(value), sign = wide >> 16 & 0x8000u, magnitude = wide & 0x7fffffffu;
        if (magnitude > 0x7f800000u) return (unsigned short)(sign | 0x7e00u);   // a NaN
        if (magnitude >= 0x477ff000u) return (unsigned short)(sign | 0x7c00u);  // rounds to infinity
        if (magnitude < 0x38800000u) {  // subnormal: adding one half lets the adder round at the last bit that is left
            const unsigned int rounded = Float::narrow(Float::widen(magnitude) + 0.5f);
            return (unsigned short)(sign | (rounded - 0x3f000000u));
        }
        return (unsigned short)(sign | ((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13));
#endif
    }
};

struct alignas(16) GocPacked {
    unsigned int word[4];
};

// One store instruction; left to itself the compiler writes the four words one by one.
GOC_FUNCTION void goc_write(void* address, const GocPacked& packed) {
#ifdef __CUDACC__
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(address)),
                 "r"(packed.word[0]), "r"(packed.word[1]), "r"(packed.word[2]), "r"(packed.word[3])
                 : "memory");
#else
    *(GocPacked*)address = packed;
#endif
}

// Reads and writes of COUNT elements: sixteen bytes at once, or one element.
template <class Type, int COUNT>
struct Access {
    static const int PER_WORD = 4 / sizeof(typename Type::bits);

    GOC_FUNCTION void read(float (&values)[COUNT], const void* tensor, long long at) {
        GOC_MOVED(16);
        const GocPacked packed = *(const GocPacked*)((const typename Type::bits*)tensor + at);
        GOC_UNROLL
        for (int i = 0; i < COUNT; ++i)
            values[i] = Type::widen((typename Type::bits)(packed.word[i / PER_WORD] >> 16 * (i % PER_WORD)));
    }
    GOC_FUNCTION void write(const float (&values)[COUNT], void* tensor, long long at) {
        GOC_MOVED(16);
        GocPacked packed = {{0, 0, 0, 0}};
        GOC_UNROLL
        for (int i = 0; i < COUNT; ++i)
            packed.word[i / PER_WORD] |= (unsigned int)Type::narrow(values[i]) << 16 * (i % PER_WORD);
        goc_write((typename Type::bits*)tensor + at, packed);
    }
};

template <class Type>
struct Access<Type, 1> {
    GOC_FUNCTION void read(float (&values)[1], const void* tensor, long long at) {
        GOC_MOVED(sizeof(typename Type::bits));
        values[0] = Type::widen(((const typename Type::bits*)tensor)[at]);
    }
    GOC_FUNCTION void write(const float (&values)[1], void* tensor, long long at) {
        GOC_MOVED(sizeof(typename Type::bits));
        ((typename Type::bits*)tensor)[at] = Type::narrow(values[0]);
    }
};

template <class Type, int VECTOR>
GOC_FUNCTION void goc_stack_thread(const GocStack& stack, long long thread) {
    typedef Access<Type, VECTOR> Elements;
    const long long vectors = stack.hidden / VECTOR, groups = (stack.tokens + GOC_TOKENS - 1) / GOC_TOKENS;
    const long long row = thread / vectors / groups;
    if (row >= stack.rows) return;
    const long long column = thread % vectors * VECTOR, token = thread / vectors % groups * GOC_TOKENS;
    const long long start = (row * stack.tokens + token) * stack.hidden + column;
    const int tokens = stack.tokens - token < GOC_TOKENS ? (int)(stack.tokens - token) : GOC_TOKENS;

    float x[GOC_TOKENS][VECTOR], g[GOC_TOKENS][VECTOR];
    GOC_UNROLL
    for (int t = 0; t < GOC_TOKENS; ++t)
        if (t < tokens) Elements::read(x[t], stack.x, start + t * stack.hidden);

    for (int unit = 0; unit < stack.units; ++unit) {
        const float* coefficients = stack.coefficients + stack.coefficient[unit];
        GOC_UNROLL
        for (int t = 0; t < GOC_TOKENS; ++t)
            if (t < tokens) Elements::read(g[t], stack.history[unit][0], start + t * stack.hidden);
        for (int entry = 1; entry < stack.entries[unit]; ++entry) {
            GOC_UNROLL
            for (int t = 0; t < GOC_TOKENS; ++t)
                if (t < tokens) {
                    float older[VECTOR];
                    Elements::read(older, stack.history[unit][entry], start + t * stack.hidden);
                    GOC_UNROLL
                    for (int i = 0; i < VECTOR; ++i) g[t][i] += coefficients[entry] * older[i];
                }
        }
        float gate[VECTOR];
        Elements::read(gate, stack.gates, (unit * stack.rows + row) * stack.hidden + column);
        GOC_UNROLL
        for (int t = 0; t < GOC_TOKENS; ++t)
            if (t < tokens) {
                if (stack.stored[unit]) Elements::write(g[t], stack.stored[unit], start + t * stack.hidden);
                GOC_UNROLL
                for (int i = 0; i < VECTOR; ++i) x[t][i] += coefficients[0] * gate[i] * g[t][i];
            }
    }

    GOC_UNROLL
    for (int t = 0; t < GOC_TOKENS; ++t)
        if (t < tokens) Elements::write(x[t], stack.x_out, start + t * stack.hidden);
}

// What a step needs at its start, so that one recorded graph serves every step of a kind: the number of the step is counted
// on the device, and everything that depends on it is moved to where the graph reads it.
struct GocCounter {
    int* step;
};

// target[m][b] = source[step % period][m][rows[b]], rows of row_bytes bytes; without rows, row b is row b.
struct GocMove {
    const void* source;
    void* target;
    const long long* rows;
    long long step_bytes;  // from the source's values for a step to those for the next
    int period, outer, table_rows, batch_rows, row_bytes, access_bytes;
    int first_block, blocks;  // which blocks make the move
};

const int GOC_MAX_MOVES = 16;

struct GocMoves {
    const int* step;
    int moves, reserved;
    GocMove move[GOC_MAX_MOVES];
};

GOC_FUNCTION void goc_next_step_thread(const GocCounter& counter, long long thread) {
    if (thread == 0) ++*counter.step;
}

template <class Chunk>
GOC_FUNCTION void goc_move_chunks(const GocMove& move, unsigned int thread) {
    const unsigned int row_chunks = move.row_bytes / sizeof(Chunk), stride = move.blocks * GOC_THREADS;
    const unsigned int chunks = (long long)move.outer * move.batch_rows * move.row_bytes / sizeof(Chunk);
    for (unsigned int chunk = thread; chunk < chunks; chunk += stride) {
        long long from = chunk;
        if (move.rows) {
            const unsigned int row = chunk / row_chunks;
            const long long table_row = row / move.batch_rows * (long long)move.table_rows + move.rows[row % move.batch_rows];
            from = table_row * row_chunks + chunk % row_chunks;
        }
        GOC_MOVED(2 * sizeof(Chunk));
        ((Chunk*)move.target)[chunk] = ((const Chunk*)move.source)[from];
    }
}

// Chunk c of a move belongs to the same thread for all moves with the same blocks, and a thread makes its moves in order.
// So moves without rows may hand values on (b to c, then a to b) where they use the same addresses, accesses and blocks.
GOC_FUNCTION void goc_step_moves_thread(const GocMoves& moves, long long thread) {
    const int block = thread / GOC_THREADS, step = *moves.step;
    for (int m = 0; m < moves.moves; ++m) {
        GocMove move = moves.move[m];
        if (block < move.first_block || block >= move.first_block + move.blocks) continue;
        move.source = (const char*)move.source + step % move.period * move.step_bytes;
        const unsigned int own = thread - (long long)move.first_block * GOC_THREADS;
        if (move.access_bytes == 16) goc_move_chunks<GocPacked>(move, own);
        if (move.access_bytes == 4) goc_move_chunks<unsigned int>(move, own);
        if (move.access_bytes == 2) goc_move_chunks<unsigned short>(move, own);
        if (move.access_bytes == 1) goc_move_chunks<unsigned char>(move, own);
    }
}

// name(parameters): a kernel whose threads call the function that comes last.
#ifdef __CUDACC__
#define GOC_KERNEL(name, Parameters, ...)                                                                     \
    extern "C" __global__ void __launch_bounds__(GOC_THREADS) name(const __grid_constant__ Parameters parameters) { \
        __VA_ARGS__(parameters, blockIdx.x * (long long)GOC_THREADS + threadIdx.x);                           \
    }
#else
#define GOC_KERNEL(name, Parameters, ...)                                                                     \
    extern "C" void name(const Parameters* parameters, long long threads) {                                   \
        for (long long thread = 0; thread < threads; ++thread) __VA_ARGS__(*parameters, GOC_ORDER(thread, threads)); \
    }
#endif
GOC_KERNEL(goc_next_step, GocCounter, goc_next_step_thread)
GOC_KERNEL(goc_step_moves, GocMoves, goc_step_moves_thread)
GOC_KERNEL(goc_stack_float32, GocStack, goc_stack_thread<Float, 4>)
GOC_KERNEL(goc_stack_float16, GocStack, goc_stack_thread<Half, 8>)
GOC_KERNEL(goc_stack_bfloat16, GocStack, goc_stack_thread<Bfloat16, 8>)
GOC_KERNEL(goc_stack_float32_single, GocStack, goc_stack_thread<Float, 1>)
GOC_KERNEL(goc_stack_float16_single, GocStack, goc_stack_thread<Half, 1>)
GOC_KERNEL(goc_stack_bfloat16_single, GocStack, goc_stack_thread<Bfloat16, 1>)
