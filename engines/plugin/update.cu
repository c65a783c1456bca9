// The cache update of a stack of units in one pass over memory:
//
//     g_u   = g_u0 + c_u1 * g_u1 + c_u2 * g_u2 + c_u3 * g_u3     (stored where somebody reads it later)
//     x_out = x + sum over u of c_u0 * gate_u * g_u
//
// x, x_out, g (B, T, D) and gates (units, B, D) are float, half or bfloat16; coefficients are float; sums are float. Every
// tensor is read once, whatever the number of units, and nothing else is written.
//
// One thread serves VECTOR neighbouring elements of TOKENS neighbouring tokens (a divisor of T), so that a gate is fetched
// once for all of them. It fetches the next unit before it stores anything of this one, so that the memory always has
// requests to serve. Therefore g_u may lie on an entry of unit u or of an earlier unit, all of whose reads come before the
// store; it must not lie on an entry of a later unit. x_out may lie on x.
//
// The same source compiles with NVRTC for GPUs, and with any C++ compiler for tests on the host.

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
// Accesses to histories that a thread makes ahead. More, or four tokens (155 registers with nvcc 13.0), and ptxas moves the
// arithmetic of this unit before the fetch of the next one.
const int GOC_AHEAD = 4;

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
    unsigned char entries[GOC_MAX_UNITS + 1];             // 0 after the last unit, of which nothing is fetched
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

// Reads and writes of COUNT elements: sixteen bytes at once, or one element. Raw is what was read, not widened yet.
template <class Type, int COUNT>
struct Access {
    typedef GocPacked Raw;
    static const int PER_WORD = 4 / sizeof(typename Type::bits);

    GOC_FUNCTION Raw read(const void* tensor, long long at) {
        GOC_MOVED(16);
        return *(const GocPacked*)((const typename Type::bits*)tensor + at);
    }
    GOC_FUNCTION void widen(float (&values)[COUNT], const Raw& raw) {
        GOC_UNROLL
        for (int i = 0; i < COUNT; ++i)
            values[i] = Type::widen((typename Type::bits)(raw.word[i / PER_WORD] >> 16 * (i % PER_WORD)));
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
    typedef typename Type::bits Raw;

    GOC_FUNCTION Raw read(const void* tensor, long long at) {
        GOC_MOVED(sizeof(Raw));
        return ((const Raw*)tensor)[at];
    }
    GOC_FUNCTION void widen(float (&values)[1], Raw raw) { values[0] = Type::widen(raw); }
    GOC_FUNCTION void write(const float (&values)[1], void* tensor, long long at) {
        GOC_MOVED(sizeof(Raw));
        ((Raw*)tensor)[at] = Type::narrow(values[0]);
    }
};

// Where a thread works: the first element of its tokens, and of its gates.
struct GocPlace {
    long long start, gate;
};

template <class Type, int VECTOR, int TOKENS>
struct StackUnit {
    typedef Access<Type, VECTOR> Elements;
    typedef typename Elements::Raw Raw;
    static const int ENTRIES = GOC_AHEAD / TOKENS;  // that are fetched ahead

    Raw gate, entry[ENTRIES][TOKENS];

    GOC_FUNCTION void fetch(StackUnit& ahead, const GocStack& stack, const GocPlace& place, int unit) {
        GOC_UNROLL
        for (int entry = 0; entry < ENTRIES; ++entry)
            if (entry < stack.entries[unit]) {
                GOC_UNROLL
                for (int t = 0; t < TOKENS; ++t)
                    ahead.entry[entry][t] = Elements::read(stack.history[unit][entry], place.start + t * stack.hidden);
                if (entry == 0) ahead.gate = Elements::read(stack.gates, unit * stack.rows * stack.hidden + place.gate);
            }
    }

    GOC_FUNCTION void apply(
        float (&x)[TOKENS][VECTOR], const StackUnit& ahead, const GocStack& stack, const GocPlace& place, int unit) {
        const float* coefficients = stack.coefficients + stack.coefficient[unit];
        const float own = coefficients[0];
        float g[TOKENS][VECTOR], gate[VECTOR];
        GOC_UNROLL
        for (int t = 0; t < TOKENS; ++t) Elements::widen(g[t], ahead.entry[0][t]);
        GOC_UNROLL
        for (int entry = 1; entry < GOC_MAX_ENTRIES; ++entry)
            if (entry < stack.entries[unit]) {
                const float coefficient = coefficients[entry];
                Raw older[TOKENS];
                GOC_UNROLL
                for (int t = 0; t < TOKENS; ++t)
                    older[t] = entry < ENTRIES ? ahead.entry[entry % ENTRIES][t]
                                               : Elements::read(stack.history[unit][entry], place.start + t * stack.hidden);
                GOC_UNROLL
                for (int t = 0; t < TOKENS; ++t) {
                    float wide[VECTOR];
                    Elements::widen(wide, older[t]);
                    GOC_UNROLL
                    for (int i = 0; i < VECTOR; ++i) g[t][i] += coefficient * wide[i];
                }
            }
        Elements::widen(gate, ahead.gate);
        GOC_UNROLL
        for (int t = 0; t < TOKENS; ++t) {
            if (stack.stored[unit]) Elements::write(g[t], stack.stored[unit], place.start + t * stack.hidden);
            GOC_UNROLL
            for (int i = 0; i < VECTOR; ++i) x[t][i] += own * gate[i] * g[t][i];
        }
    }
};

template <class Type, int VECTOR, int TOKENS>
GOC_FUNCTION void goc_stack_thread(const GocStack& stack, long long thread) {
    typedef StackUnit<Type, VECTOR, TOKENS> Unit;
    const long long vectors = stack.hidden / VECTOR, groups = stack.tokens / TOKENS;
    const long long row = thread / vectors / groups;
    if (row >= stack.rows) return;
    const long long column = thread % vectors * VECTOR, token = thread / vectors % groups * TOKENS;
    const GocPlace place = {(row * stack.tokens + token) * stack.hidden + column, row * stack.hidden + column};

    typename Unit::Raw raw[TOKENS];
    GOC_UNROLL
    for (int t = 0; t < TOKENS; ++t) raw[t] = Unit::Elements::read(stack.x, place.start + t * stack.hidden);
    Unit even = {}, odd = {};  // by turns, because copying what is being fetched would wait for it
    Unit::fetch(even, stack, place, 0);
    float x[TOKENS][VECTOR];
    GOC_UNROLL
    for (int t = 0; t < TOKENS; ++t) Unit::Elements::widen(x[t], raw[t]);
    for (int unit = 0; unit < stack.units; unit += 2) {
        Unit::fetch(odd, stack, place, unit + 1);
        Unit::apply(x, even, stack, place, unit);
        if (unit + 1 == stack.units) break;
        Unit::fetch(even, stack, place, unit + 2);
        Unit::apply(x, odd, stack, place, unit + 1);
    }

    GOC_UNROLL
    for (int t = 0; t < TOKENS; ++t) Unit::Elements::write(x[t], stack.x_out, place.start + t * stack.hidden);
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

#define GOC_STACK_KERNELS(dtype, Type, vector)                                          \
    GOC_KERNEL(goc_stack_##dtype##_1, GocStack, goc_stack_thread<Type, vector, 1>)      \
    GOC_KERNEL(goc_stack_##dtype##_2, GocStack, goc_stack_thread<Type, vector, 2>)      \
    GOC_KERNEL(goc_stack_##dtype##_single, GocStack, goc_stack_thread<Type, 1, 1>)
GOC_STACK_KERNELS(float32, Float, 4)
GOC_STACK_KERNELS(float16, Half, 8)
GOC_STACK_KERNELS(bfloat16, Bfloat16, 8)
