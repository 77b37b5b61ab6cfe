#include "attention.h"

#include <algorithm>

#include "attention_panel.h"

namespace covey {
namespace {

constexpr float kNoScore = -1e30f;  // finite, so that differences of two are 0 and not NaN
// Query rows from which it pays to widen a tile once through memory.
constexpr int kWidenFrom = 2 * kPanelQueries + 1;

// Positions of a segment, counted from its start.
struct Range {
    int begin, end;
    bool is_empty() const { return begin >= end; }
};

// The part of one tile, counted from the tile's start.
Range in_tile(const Range& range, int tile) {
    return {std::max(range.begin - tile * kTile, 0), std::min(range.end - tile * kTile, kTile)};
}

class SegmentWork {
public:
    SegmentWork(const HeadCache& cache, const QueryRows& rows, int segment, bool is_followed,
                const Softmax& out, AttentionScratch& scratch)
        : cache_(cache),
          rows_(rows),
          out_(out),
          scratch_(scratch),
          head_dim_(cache.layout.head_dim),
          first_tile_(int64_t{segment} * kSegmentTiles),
          seen_(seen(0, rows.n_rows - 1)),
          is_followed_(is_followed),
          // Panels of equal height: 4 and 3 rows are faster than 6 and 1.
          panel_height_(panel_height(rows.n_rows)),
          scores_(scratch.scores.reserve(static_cast<std::size_t>(rows.n_rows) * kSegment)) {}

    template <class Element>
    void run() {
        out_.clear(rows_.n_rows, head_dim_);
        if (seen_.is_empty()) return;
        const int begin = seen_.begin / kTile, end = (seen_.end + kTile - 1) / kTile;
        const auto* after_keys = reinterpret_cast<const Element*>(cache_.values(first_tile_ + begin));
        for (int tile = begin; tile < end; tile++) {
            const auto* keys = keys_of<Element>(tile);
            const auto* ahead = tile + 1 < end ? keys_of<Element>(tile + 1) : after_keys;
            each_panel(keys, ahead, [&](auto* from, auto* next, int row, int n_rows) {
                add_scores(from, next, tile, row, n_rows);
            });
        }
        for (int row = 0; row < rows_.n_rows; row += panel_height_) {
            const int n_rows = std::min(panel_height_, rows_.n_rows - row);
            for (int r = row; r < row + n_rows; r++) soften(r, seen(row, row + n_rows - 1));
        }
        const auto* after = is_followed_ ? keys_of<Element>(kSegmentTiles) : nullptr;
        for (int tile = begin; tile < end; tile++) {
            const auto* values = values_of<Element>(tile);
            const auto* ahead = tile + 1 < end ? values_of<Element>(tile + 1) : after;
            each_panel(values, ahead, [&](auto* from, auto* next, int row, int n_rows) {
                add_values(from, next, tile, row, n_rows);
            });
        }
    }

private:
    static int panel_height(int n_rows) {
        const int n_panels = (n_rows + kPanelQueries - 1) / kPanelQueries;
        return (n_rows + n_panels - 1) / n_panels;
    }

    // What rows [first, last] see of the segment together.
    Range seen(int first, int last) const {
        const int64_t start = first_tile_ * kTile;
        const auto clamped = [&](int64_t position) {
            return static_cast<int>(std::clamp<int64_t>(position - start, 0, kSegment));
        };
        return {clamped(rows_.first_seen(first)), clamped(rows_.end_seen(last))};
    }

    template <class Element>
    const Element* keys_of(int tile) const {
        return reinterpret_cast<const Element*>(cache_.keys(first_tile_ + tile));
    }
    template <class Element>
    const Element* values_of(int tile) const {
        return reinterpret_cast<const Element*>(cache_.values(first_tile_ + tile));
    }

    // Calls body(elements, what to fetch meanwhile, first row, rows) for a few rows at a time; the
    // elements are widened first if there are many.
    template <class Element, class Body>
    void each_panel(const Element* elements, const Element* ahead, Body body) {
        const float* widened = nullptr;
        if (rows_.n_rows >= kWidenFrom) {
            const int n = kTile * head_dim_;
            float* floats = scratch_.tile.reserve(static_cast<std::size_t>(n));
            for (int i = 0; i < n; i += kLanes) store(floats + i, load(elements + i));
            widened = floats;
        }
        for (int row = 0; row < rows_.n_rows; row += panel_height_) {
            const int n_rows = std::min(panel_height_, rows_.n_rows - row);
            if (widened) {
                body(widened, static_cast<const float*>(nullptr), row, n_rows);
            } else {
                body(elements, row == 0 ? ahead : nullptr, row, n_rows);
            }
        }
    }

    template <class Element>
    void add_scores(const Element* keys, const Element* ahead, int tile, int row, int n_rows) {
        const Range range = in_tile(seen(row, row + n_rows - 1), tile);
        if (range.is_empty()) return;
        const int width = (range.end + kLanes - 1) / kLanes * kLanes;
        float* scores = scores_ + int64_t{row} * kSegment + tile * kTile;
        attention_product<false>(n_rows, width, rows_.values + int64_t{row} * head_dim_, head_dim_, keys,
                          ahead, kTile, scores, kSegment, head_dim_);
    }

    template <class Element>
    void add_values(const Element* values, const Element* ahead, int tile, int row, int n_rows) {
        const Range range = in_tile(seen(row, row + n_rows - 1), tile);
        if (range.is_empty()) return;
        const int64_t skipped = int64_t{range.begin} * head_dim_;
        attention_product<true>(n_rows, head_dim_,
                          scores_ + int64_t{row} * kSegment + tile * kTile + range.begin, kSegment,
                          values + skipped, ahead ? ahead + skipped : nullptr, head_dim_,
                          out_.values + int64_t{row} * head_dim_, head_dim_,
                          range.end - range.begin);
    }

    // Turn a row's scores into weights, 0 wherever its panel sees more than the row does.
    void soften(int row, const Range& panel) {
        const Range own = seen(row, row);
        float* scores = scores_ + int64_t{row} * kSegment;
        const int first = own.begin / kLanes, last = (own.end + kLanes - 1) / kLanes;
        F32x16 top = splat(kNoScore);
        for (int v = first; v < last; v++) {
            const F32x16 score = masked(scaled_score(scores, v), own, v, kNoScore);
            store(scores + v * kLanes, score);
            top = max(top, score);
        }
        const float largest = max_lane(top);
        F32x16 total = splat(0.0f);
        for (int v = panel.begin / kLanes; v * kLanes < panel.end; v++) {
            F32x16 weight = splat(0.0f);
            if (v >= first && v < last) {
                weight = masked(exp(load(scores + v * kLanes) - splat(largest)), own, v, 0.0f);
                total = total + weight;
                if (const float* scales = value_scales(v)) weight = weight * load(scales);
                weight = masked(weight, own, v, 0.0f);  // scales of what is not seen may be NaN
            }
            store(scores + v * kLanes, weight);
        }
        out_.largest[row] = largest;
        out_.sums[row] = sum(total);
    }

    F32x16 scaled_score(const float* scores, int v) const {
        const F32x16 score = load(scores + v * kLanes);
        uint8_t* keys = cache_.layout.is_int8 ? cache_.keys(first_tile_ + v * kLanes / kTile) : nullptr;
        return keys ? score * load(cache_.scales(keys) + v * kLanes % kTile) : score;
    }
    const float* value_scales(int v) const {
        if (!cache_.layout.is_int8) return nullptr;
        return cache_.scales(cache_.values(first_tile_ + v * kLanes / kTile)) + v * kLanes % kTile;
    }

    // Lanes of vector v that are outside of `seen` become `other`.
    static F32x16 masked(F32x16 x, const Range& seen, int v, float other) {
        const int skipped = seen.begin - v * kLanes, kept = seen.end - v * kLanes;
        if (kept < kLanes) x = keep_first(x, kept, splat(other));
        if (skipped > 0) x = keep_first(splat(other), skipped, x);
        return x;
    }

    const HeadCache& cache_;
    const QueryRows& rows_;
    const Softmax& out_;
    AttentionScratch& scratch_;
    const int head_dim_;
    const int64_t first_tile_;
    const Range seen_;
    const bool is_followed_;
    const int panel_height_;
    float* const scores_;
};

}  // namespace

void Softmax::clear(int n_rows, int head_dim) const {
    std::fill_n(largest, padded(n_rows), kNoScore);
    std::fill_n(sums, padded(n_rows), 0.0f);
    std::fill_n(values, int64_t{n_rows} * head_dim, 0.0f);
}

void Softmax::join(const Softmax& other, int n_rows, int head_dim) const {
    for (int first = 0; first < n_rows; first += kLanes) {
        const F32x16 mine = load(largest + first), theirs = load(other.largest + first);
        const F32x16 top = max(mine, theirs);
        float shrink[kLanes], share[kLanes];
        store(shrink, exp(mine - top));
        store(share, exp(theirs - top));
        store(largest + first, top);
        store(sums + first,
              fma(load(other.sums + first), load(share), load(sums + first) * load(shrink)));
        for (int row = first; row < std::min(first + kLanes, n_rows); row++) {
            const F32x16 kept = splat(shrink[row - first]), added = splat(share[row - first]);
            float* to = values + int64_t{row} * head_dim;
            const float* from = other.values + int64_t{row} * head_dim;
            for (int i = 0; i < head_dim; i += kLanes)
                store(to + i, fma(load(from + i), added, load(to + i) * kept));
        }
    }
}

void Softmax::finish(int row, int head_dim, float* out) const {
    const F32x16 factor = splat(1.0f / sums[row]);
    const float* from = values + int64_t{row} * head_dim;
    for (int i = 0; i < head_dim; i += kLanes) store(out + i, load(from + i) * factor);
}

void attend_segment(const HeadCache& cache, const QueryRows& rows, int segment, bool is_followed,
                    const Softmax& out, AttentionScratch& scratch) {
    SegmentWork work(cache, rows, segment, is_followed, out, scratch);
    if (cache.layout.is_int8) {
        work.run<int8_t>();
    } else {
        work.run<uint16_t>();
    }
}

}  // namespace covey
