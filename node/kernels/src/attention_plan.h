// How the attention of one pass is cut into items that keep all threads busy to the end.
//
// A unit is a KV head with a few neighbouring positions of one session. Units of much work, such as
// one row at a great depth, are cut further into ranges of segments, whose results are kept and
// joined in order afterwards. Knows no addresses; how it cuts changes no bit of a result.
#pragma once

#include <cstdint>
#include <vector>

#include "attention.h"

namespace covey {

// Rows of one session in a pass.
struct RowRun {
    int64_t position;  // of the first row
    int first_row;     // in the pass
    int n_rows;
};

struct AttentionUnit {
    int run;
    int head;
    int first_row;  // in the pass
    int n_positions;
    int first_segment, end_segment;
    int64_t kept;  // floats before this unit's kept results; -1 if its one item finishes it
};

struct AttentionItem {
    int unit;
    int first_segment, end_segment;
};

struct AttentionPlan {
    int64_t window = -1;  // that it was made for
    std::vector<AttentionUnit> units;
    std::vector<AttentionItem> items;  // large ones first
    std::vector<int> cut_units;
    int64_t kept_floats = 0;

    void make(const covey_shape& shape, const std::vector<RowRun>& runs, int64_t new_window,
              int n_threads);
};

}  // namespace covey
