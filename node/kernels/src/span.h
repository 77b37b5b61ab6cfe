// What a call needs beside its arguments: the threads and the scratch memory between two products.
#pragma once

#include <vector>

#include "activations.h"
#include "attention.h"
#include "attention_plan.h"
#include "dot.h"
#include "experts.h"
#include "memory.h"
#include "threads.h"

namespace covey {

// Rows that pass through the blocks together; longer inputs are cut into pieces of it, which
// changes no bit. It bounds scratch memory and keeps the activations in the second-level cache.
constexpr int kMaxRows = 192;

struct ThreadScratch {
    Buffer<uint8_t> unpacked;
    Buffer<float> products;  // [2][kMaxRows][16]
    Buffer<float> sums;      // of experts [kMaxRows][16]
    Buffer<float> softmax;
    AttentionScratch attention;
};

}  // namespace covey

struct covey_engine {
    covey_engine(int n_threads, const int32_t* helper_cores)
        : pool(n_threads, helper_cores), scratch(n_threads) {}

    covey::ThreadPool pool;
    std::vector<covey::ThreadScratch> scratch;  // [thread]
    covey::Activations normed, attended, gated;
    covey::Buffer<float> heads;    // queries, keys and values [rows][(H + 2K) * E]
    covey::Buffer<float> queries;  // rotated and scaled [K][rows][H / K][E]
    covey::Buffer<float> softmax;  // of units of attention that were cut
    covey::Buffer<float> added;    // what a norm comes before adding [rows][hidden]
    covey::ExpertScratch experts;
};

namespace covey {

// Make rows of x with `fill(row, out)`, and their bytes if `quantized`; shared out if many.
template <class Fill>
void prepare(ThreadPool& pool, Activations& x, int n_rows, int columns, bool quantized, Fill fill) {
    x.resize(n_rows, columns);
    constexpr int kShortest = 8;  // rows that are worth a thread's while
    pool.run_ranges(n_rows, 1, kShortest, [&](int begin, int end, int) {
        for (int row = begin; row < end; row++) {
            fill(row, x.row(row));
            if (quantized) x.quantize_row(row);
        }
    });
}

// A group's product [n_rows][16] in this thread's memory; `offset` rows into it, to hold two.
inline float* multiply(covey_engine& engine, const covey_matrix& matrix, int group,
                       const Activations& x, int thread, int offset = 0) {
    ThreadScratch& scratch = engine.scratch[thread];
    float* out = scratch.products.reserve(2 * kMaxRows * kGroupRows) + offset * kGroupRows;
    multiply_group(matrix, group, x, out, scratch.unpacked);
    return out;
}

// Ranges of matrix rows per thread: one is fastest for a single row, whose products take
// microseconds; more let the others take over from a thread that was put aside.
inline int ranges_per_thread(int n_rows) { return n_rows == 1 ? 1 : 4; }

inline bool is_quantized(const covey_matrix& matrix) { return !is_float_type(matrix.type); }

}  // namespace covey
