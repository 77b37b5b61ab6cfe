// Attention of all rows of a pass: from projected heads to what the output matrix is applied to.
#pragma once

#include <vector>

#include "attention_plan.h"
#include "span.h"

namespace covey {

// The rows of one pass: where they stand and where their pages are.
struct PassRows {
    std::vector<RowRun> runs;
    std::vector<uint8_t* const*> pages;  // [run]
    std::vector<int> run_of_row;
    const covey_rope* ropes;

    int count() const { return static_cast<int>(run_of_row.size()); }
    int64_t position(int row) const {
        const RowRun& run = runs[run_of_row[row]];
        return run.position + row - run.first_row;
    }
};

class SpanAttention {
public:
    SpanAttention(covey_engine& engine, const covey_shape& shape, const PassRows& rows);

    int heads_columns() const { return heads_columns_; }
    float* heads_row(int row) const {
        return engine_.heads.reserve(0) + int64_t{row} * heads_columns_;
    }

    // engine.heads -> cache and engine.attended, with its bytes if `quantized`.
    void run(const covey_block& block, int block_idx, bool quantized);

private:
    void place_row(const covey_block& block, int block_idx, int row);
    const AttentionPlan& plan_for(int64_t window);
    void attend_item(const AttentionPlan& plan, const AttentionItem& item, int block_idx, int thread);
    void join_unit(const AttentionUnit& unit);
    void finish_unit(const AttentionUnit& unit, const Softmax& softmax);
    QueryRows queries(const AttentionUnit& unit, int64_t window) const;
    float* query(int head, int row) const {
        return engine_.queries.reserve(0) +
               (int64_t{head} * rows_.count() + row) * group_ * shape_.head_dim;
    }

    covey_engine& engine_;
    const covey_shape& shape_;
    const PassRows& rows_;
    const CacheLayout layout_;
    const int group_, query_columns_, kv_columns_, heads_columns_;
    AttentionPlan plans_[2];  // for the last two windows: blocks commonly take turns
};

}  // namespace covey
