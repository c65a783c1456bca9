// What a step needs at its start, so that one recorded graph serves every step of a kind: the number of the step is counted
// on the device, and everything that depends on it is moved to where the graph reads it. Compiled after update.cu, as one
// program.

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

// Chunk c of a target belongs to the same thread for all moves with the same blocks, and a thread makes its moves in order.
// So moves may hand values on (b to c, then a to b) where they read without rows, at the same addresses and accesses.
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

GOC_KERNEL(goc_next_step, GocCounter, goc_next_step_thread)
GOC_KERNEL(goc_step_moves, GocMoves, goc_step_moves_thread)
