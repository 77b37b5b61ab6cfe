#include "attention.h"

#include <algorithm>

#include "panel.h"

namespace covey {
namespace {

constexpr float kNoScore = -1e30f;  // finite, so that differences of two are 0 and not NaN
constexpr int kTileVectors = kTile / kLanes;

// Turn a row's 64 scores into weights and rescale what it has so far. Only the first n_visible
// positions count; with none of them every step leaves the row as it was.
void soften(float* scores, int64_t n_visible, const Softmax& state, int row, int head_dim) {
    const int n = static_cast<int>(std::clamp<int64_t>(n_visible, 0, kTile));
    F32x16 score[kTileVectors];
    F32x16 top = splat(kNoScore);
    for (int v = 0; v < kTileVectors; v++) {
        const int kept = std::clamp(n - v * kLanes, 0, kLanes);
        score[v] = keep_first(load(scores + v * kLanes), kept, splat(kNoScore));
        top = max(top, score[v]);
    }
    const float before = state.largest[row];
    const float largest = std::max(before, max_lane(top));
    F32x16 total = splat(0.0f);
    for (int v = 0; v < kTileVectors; v++) {
        const int kept = std::clamp(n - v * kLanes, 0, kLanes);
        const F32x16 weight = keep_first(exp(score[v] - splat(largest)), kept, splat(0.0f));
        store(scores + v * kLanes, weight);
        total = total + weight;
    }
    const F32x16 shrink = exp(splat(before - largest));
    float* sums = state.sums + row * kLanes;
    store(sums, fma(load(sums), shrink, total));
    float* values = state.values + static_cast<int64_t>(row) * head_dim;
    for (int i = 0; i < head_dim; i += kLanes) store(values + i, load(values + i) * shrink);
    state.largest[row] = largest;
}

// All query rows against one tile; keys [head_dim][64], values [64][head_dim] as floats or halves.
template <class Element>
void attend_tile(const Element* keys, const Element* values, int64_t tile_start, int head_dim,
                 const QueryRows& rows, const Softmax& state) {
    alignas(64) float scores[kFloatRows * kTile];
    for (int row = 0; row < rows.n_rows; row += kFloatRows) {
        const int n_rows = std::min(kFloatRows, rows.n_rows - row);
        const int64_t last = rows.position(row + n_rows - 1);
        if (last < tile_start) continue;
        const int n_visible = static_cast<int>(std::min<int64_t>(kTile, last + 1 - tile_start));
        const int width = (n_visible + kLanes - 1) / kLanes * kLanes;
        std::fill(scores, scores + n_rows * kTile, 0.0f);
        float_product(n_rows, width, rows.values + static_cast<int64_t>(row) * head_dim, head_dim,
                      keys, kTile, scores, kTile, head_dim);
        for (int r = 0; r < n_rows; r++)
            soften(scores + r * kTile, rows.position(row + r) + 1 - tile_start, state, row + r,
                   head_dim);
        float_product(n_rows, head_dim, scores, kTile, values, head_dim,
                      state.values + static_cast<int64_t>(row) * head_dim, head_dim, n_visible);
    }
}

void to_floats(const uint16_t* halves, int n, float* out) {
    for (int i = 0; i < n; i += kLanes) store(out + i, load(halves + i));
}

}  // namespace

void HeadCache::write(int64_t position, const float* key, const float* value) const {
    uint16_t halves[kLanes];
    uint16_t* column = keys + position / kTile * kTile * head_dim + position % kTile;
    for (int i = 0; i < head_dim; i += kLanes) {
        store(halves, load(key + i));
        for (int j = 0; j < kLanes; j++) column[(i + j) * kTile] = halves[j];
        store(values + position * head_dim + i, load(value + i));
    }
}

void Softmax::clear(int n_rows, int head_dim) const {
    std::fill(largest, largest + n_rows, kNoScore);
    std::fill(sums, sums + static_cast<int64_t>(n_rows) * kLanes, 0.0f);
    std::fill(values, values + static_cast<int64_t>(n_rows) * head_dim, 0.0f);
}

void Softmax::join(const Softmax& other, int n_rows, int head_dim) const {
    for (int row = 0; row < n_rows; row++) {
        const float top = std::max(largest[row], other.largest[row]);
        const F32x16 shrink = exp(splat(largest[row] - top));
        const F32x16 share = exp(splat(other.largest[row] - top));
        const auto mix = [&](float* mine, const float* theirs) {
            store(mine, fma(load(theirs), share, load(mine) * shrink));
        };
        mix(sums + row * kLanes, other.sums + row * kLanes);
        const int64_t at = static_cast<int64_t>(row) * head_dim;
        for (int i = 0; i < head_dim; i += kLanes) mix(values + at + i, other.values + at + i);
        largest[row] = top;
    }
}

void Softmax::finish(int row, int head_dim, float* out) const {
    const F32x16 factor = splat(1.0f / sum(load(sums + row * kLanes)));
    const float* from = values + static_cast<int64_t>(row) * head_dim;
    for (int i = 0; i < head_dim; i += kLanes) store(out + i, load(from + i) * factor);
}

void attend_segment(const HeadCache& cache, const QueryRows& rows, int segment, const Softmax& out,
                    Buffer<float>& scratch) {
    const int head_dim = cache.head_dim, tile_size = kTile * head_dim;
    out.clear(rows.n_rows, head_dim);
    for (int i = 0; i < kSegmentTiles; i++) {
        const int64_t tile = static_cast<int64_t>(segment) * kSegmentTiles + i;
        if (tile * kTile >= rows.end()) break;
        const uint16_t* keys = cache.keys + tile * tile_size;
        const uint16_t* values = cache.values + tile * tile_size;
        if (rows.n_rows <= kFloatRows) {
            attend_tile(keys, values, tile * kTile, head_dim, rows, out);
            continue;
        }
        float* as_floats = scratch.reserve(2 * static_cast<std::size_t>(tile_size));
        to_floats(keys, tile_size, as_floats);
        to_floats(values, tile_size, as_floats + tile_size);
        attend_tile<float>(as_floats, as_floats + tile_size, tile * kTile, head_dim, rows, out);
    }
}

}  // namespace covey
