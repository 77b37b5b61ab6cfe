// Grouped-query attention over tiles of 64 positions, with an online softmax.
//
// A KV head's keys and values are read once for all query rows that share it. Positions are cut
// into segments of 256; each segment has its own softmax, and segments are joined in order. That
// makes the work of one decode step divisible, and since prefill does the same arithmetic, a
// result never depends on how many rows or threads there were.
#pragma once

#include <cstdint>

#include "abi.h"
#include "memory.h"
#include "simd.h"

namespace covey {

constexpr int kTile = COVEY_TILE;
constexpr int kSegmentTiles = 4;
constexpr int kSegment = kTile * kSegmentTiles;

inline int n_segments(int64_t n_positions) {
    return static_cast<int>((n_positions + kSegment - 1) / kSegment);
}

// The cache of one KV head in one block: keys [tiles][head_dim][64], values [positions][head_dim].
struct HeadCache {
    uint16_t* keys;
    uint16_t* values;
    int head_dim;

    void write(int64_t position, const float* key, const float* value) const;
};

// Query rows of one KV head: [n_rows][head_dim], rotated and scaled; rows of one position follow
// each other.
struct QueryRows {
    const float* values;
    int n_rows;
    int rows_per_position;
    int64_t first_position;

    int64_t position(int row) const { return first_position + row / rows_per_position; }
    int64_t end() const { return position(n_rows - 1) + 1; }
};

// A softmax under way: per row the largest score, sums of weights [16] and weighted values.
struct Softmax {
    float* largest;  // [n_rows]
    float* sums;     // [n_rows][16]
    float* values;   // [n_rows][head_dim]

    static int64_t floats(int n_rows, int head_dim) {
        return static_cast<int64_t>(n_rows) * (1 + kLanes + head_dim);
    }
    static Softmax in(float* memory, int n_rows) {
        return {memory + static_cast<int64_t>(n_rows) * kLanes, memory,
                memory + static_cast<int64_t>(n_rows) * (kLanes + 1)};
    }
    void clear(int n_rows, int head_dim) const;
    // Join another segment's result, row by row.
    void join(const Softmax& other, int n_rows, int head_dim) const;
    // out[head_dim] = weighted values / sum of weights of one row.
    void finish(int row, int head_dim, float* out) const;
};

// The softmax of all rows over one segment, causal. `scratch` is this thread's.
void attend_segment(const HeadCache& cache, const QueryRows& rows, int segment, const Softmax& out,
                    Buffer<float>& scratch);

}  // namespace covey
