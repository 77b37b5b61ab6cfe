// Grouped-query attention over segments of 256 positions, joined by their softmax sums.
//
// A KV head's keys and values are read once for all query rows that share it. Each segment has
// its own softmax, and segments are joined in order. That makes the work of one decode step
// divisible, and since prefill does the same arithmetic, a result never depends on how many rows,
// sessions or threads there were, nor on where pages lie.
#pragma once

#include <cstdint>

#include "abi.h"
#include "attention_cache.h"
#include "memory.h"

namespace covey {

constexpr int kSegmentTiles = 4;
constexpr int kSegment = kTile * kSegmentTiles;

// Query rows of one KV head: [n_rows][head_dim], rotated and scaled; rows of one position follow
// each other.
struct QueryRows {
    const float* values;
    int n_rows;
    int rows_per_position;
    int64_t first_position;
    int64_t window;  // positions that a row sees, its own included; 0 is all

    int64_t position(int row) const { return first_position + row / rows_per_position; }
    // The positions that a row sees: [first_seen, end_seen).
    int64_t first_seen(int row) const {
        return window && position(row) >= window ? position(row) + 1 - window : 0;
    }
    int64_t end_seen(int row) const { return position(row) + 1; }
};

// A softmax under way: per row the largest score, the sum of weights, and weighted values.
struct Softmax {
    float* largest;  // [n_rows], rounded up to whole vectors, as are the sums
    float* sums;
    float* values;   // [n_rows][head_dim]

    static int64_t padded(int n_rows) { return (int64_t{n_rows} + kLanes - 1) / kLanes * kLanes; }
    static int64_t floats(int n_rows, int head_dim) {
        return 2 * padded(n_rows) + int64_t{n_rows} * head_dim;
    }
    static Softmax in(float* memory, int n_rows) {
        return {memory, memory + padded(n_rows), memory + 2 * padded(n_rows)};
    }
    void clear(int n_rows, int head_dim) const;
    // Join a later segment's result, row by row.
    void join(const Softmax& other, int n_rows, int head_dim) const;
    // out[head_dim] = weighted values / sum of weights of one row.
    void finish(int row, int head_dim, float* out) const;
};

struct AttentionScratch {
    Buffer<float> scores;  // [n_rows][256]
    Buffer<float> tile;    // keys or values of one tile, widened
};

// The softmax of all rows over one segment. `is_followed`: the caller will take the next one too.
void attend_segment(const HeadCache& cache, const QueryRows& rows, int segment, bool is_followed,
                    const Softmax& out, AttentionScratch& scratch);

}  // namespace covey
