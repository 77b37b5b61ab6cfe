#include "attention_plan.h"

#include <algorithm>

namespace covey {
namespace {

constexpr int kItemsPerThread = 8;   // at least, of equal work, where there is enough of it
constexpr int kMostPositions = 32;   // of a unit: rows that share a tile widened once
constexpr int kLeastPositions = 4;   // fewer make reading the tiles the larger part
// What reading a segment costs in rows of arithmetic on it.
constexpr int64_t kReadingCost = 2;

int64_t cost(const AttentionUnit& unit, int n_segments) {
    return n_segments * (unit.n_positions + kReadingCost);
}

int positions_per_unit(const covey_shape& shape, const std::vector<RowRun>& runs, int n_threads) {
    int64_t n_rows = 0;
    for (const RowRun& run : runs) n_rows += run.n_rows;
    const int64_t wanted = n_rows * shape.n_kv_heads / (int64_t{kItemsPerThread} * n_threads);
    return static_cast<int>(std::clamp<int64_t>(wanted, kLeastPositions, kMostPositions));
}

}  // namespace

void AttentionPlan::make(const covey_shape& shape, const std::vector<RowRun>& runs,
                         int64_t new_window, int n_threads) {
    window = new_window;
    units.clear();
    items.clear();
    cut_units.clear();
    kept_floats = 0;
    const int group = shape.n_heads / shape.n_kv_heads;
    const int most = positions_per_unit(shape, runs, n_threads);
    int64_t total = 0;
    for (std::size_t r = 0; r < runs.size(); r++) {
        const RowRun& run = runs[r];
        // The last positions see most, so they come first.
        for (int end = run.n_rows; end > 0; end -= most) {
            const int begin = std::max(end - most, 0);
            const int64_t first = run.position + begin;
            const int64_t seen = window && first >= window ? first + 1 - window : 0;
            for (int head = 0; head < shape.n_kv_heads; head++) {
                units.push_back({static_cast<int>(r), head, run.first_row + begin, end - begin,
                                 static_cast<int>(seen / kSegment),
                                 static_cast<int>((run.position + end - 1) / kSegment + 1), -1});
                total += cost(units.back(), units.back().end_segment - units.back().first_segment);
            }
        }
    }
    const int64_t fair = total / (int64_t{kItemsPerThread} * n_threads) + 1;
    for (std::size_t u = 0; u < units.size(); u++) {
        AttentionUnit& unit = units[u];
        const int n_segments = unit.end_segment - unit.first_segment;
        const int each = std::max<int>(static_cast<int>(fair / cost(unit, 1)), 1);
        if (n_threads > 1 && each < n_segments) {
            unit.kept = kept_floats;
            kept_floats += n_segments * Softmax::floats(unit.n_positions * group, shape.head_dim);
            cut_units.push_back(static_cast<int>(u));
        }
        const int step = unit.kept < 0 ? n_segments : each;
        for (int first = unit.first_segment; first < unit.end_segment; first += step)
            items.push_back({static_cast<int>(u), first, std::min(first + step, unit.end_segment)});
    }
    std::stable_sort(items.begin(), items.end(), [&](const auto& a, const auto& b) {
        return cost(units[a.unit], a.end_segment - a.first_segment) >
               cost(units[b.unit], b.end_segment - b.first_segment);
    });
}

}  // namespace covey
