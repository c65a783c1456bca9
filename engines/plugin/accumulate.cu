// One computed feature, added to sums of later steps in one pass over memory:
//
//     after_t = before_t + c_t * gate_t * g     for every tap t; without before_t, the sum starts
//
// g, before and after (B, T, D) and gates (B, D) are float, half or bfloat16; coefficients are float; sums are float. after_t
// may lie on before_t. Compiled after update.cu, as one program.

const int GOC_MAX_TAPS = 4;

struct GocTaps {
    const void* feature;
    const float* coefficients;
    long long rows, tokens, hidden;
    int taps, reserved;
    const void* gates[GOC_MAX_TAPS];
    const void* before[GOC_MAX_TAPS];  // null where the sum starts
    void* after[GOC_MAX_TAPS];
};

// One thread serves VECTOR neighbouring elements of one token. It fetches all that it reads before it stores anything.
template <class Type, int VECTOR>
GOC_FUNCTION void goc_accumulate_thread(const GocTaps& launch, long long thread) {
    typedef Access<Type, VECTOR> Elements;
    typedef typename Elements::Raw Raw;
    const long long vectors = launch.hidden / VECTOR, row = thread / vectors / launch.tokens;
    if (row >= launch.rows) return;
    const long long place = thread * VECTOR, gate = row * launch.hidden + thread % vectors * VECTOR;

    const Raw feature = Elements::read(launch.feature, place);
    Raw gates[GOC_MAX_TAPS] = {}, before[GOC_MAX_TAPS] = {};
    GOC_UNROLL
    for (int tap = 0; tap < GOC_MAX_TAPS; ++tap)
        if (tap < launch.taps) {
            gates[tap] = Elements::read(launch.gates[tap], gate);
            if (launch.before[tap]) before[tap] = Elements::read(launch.before[tap], place);
        }
    float g[VECTOR];
    Elements::widen(g, feature);
    GOC_UNROLL
    for (int tap = 0; tap < GOC_MAX_TAPS; ++tap)
        if (tap < launch.taps) {
            const float coefficient = launch.coefficients[tap];
            float weight[VECTOR], sum[VECTOR];
            Elements::widen(weight, gates[tap]);
            Elements::widen(sum, before[tap]);  // zeros where it starts
            GOC_UNROLL
            for (int i = 0; i < VECTOR; ++i) sum[i] += coefficient * weight[i] * g[i];
            Elements::write(sum, launch.after[tap], place);
        }
}

#define GOC_ACCUMULATE_KERNELS(dtype, Type, vector)                                             \
    GOC_KERNEL(goc_accumulate_##dtype##_vector, GocTaps, goc_accumulate_thread<Type, vector>)   \
    GOC_KERNEL(goc_accumulate_##dtype##_single, GocTaps, goc_accumulate_thread<Type, 1>)
GOC_ACCUMULATE_KERNELS(float32, Float, 4)
GOC_ACCUMULATE_KERNELS(float16, Half, 8)
GOC_ACCUMULATE_KERNELS(bfloat16, Bfloat16, 8)
