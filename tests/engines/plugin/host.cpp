// The kernels compiled for the host, with what it reads and writes counted, and threads run forwards or backwards.

static long long moved;
static bool backwards;
#define GOC_MOVED(bytes) (moved += (bytes))
#define GOC_ORDER(thread, threads) (backwards ? (threads) - 1 - (thread) : (thread))
#include "update.cu"
#include "accumulate.cu"
#include "moves.cu"

extern "C" {
long long stack_size() { return sizeof(GocStack); }
long long taps_size() { return sizeof(GocTaps); }
long long moves_size() { return sizeof(GocMoves); }
long long threads_per_block() { return GOC_THREADS; }

void run_backwards(bool value) { backwards = value; }

long long bytes_moved() {
    const long long bytes = moved;
    moved = 0;
    return bytes;
}

void widen_float16(const unsigned short* from, float* to, long long count) {
    for (long long i = 0; i < count; ++i) to[i] = Half::widen(from[i]);
}
void narrow_float16(const float* from, unsigned short* to, long long count) {
    for (long long i = 0; i < count; ++i) to[i] = Half::narrow(from[i]);
}
void widen_bfloat16(const unsigned short* from, float* to, long long count) {
    for (long long i = 0; i < count; ++i) to[i] = Bfloat16::widen(from[i]);
}
void narrow_bfloat16(const float* from, unsigned short* to, long long count) {
    for (long long i = 0; i < count; ++i) to[i] = Bfloat16::narrow(from[i]);
}
}
