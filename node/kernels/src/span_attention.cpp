#include "span_attention.h"

#include <cmath>

namespace covey {

SpanAttention::SpanAttention(covey_engine& engine, const covey_shape& shape, const PassRows& rows)
    : engine_(engine),
      shape_(shape),
      rows_(rows),
      layout_(shape),
      group_(shape.n_heads / shape.n_kv_heads),
      query_columns_(shape.n_heads * shape.head_dim),
      kv_columns_(shape.n_kv_heads * shape.head_dim),
      heads_columns_(query_columns_ + 2 * kv_columns_) {
    const auto n_rows = static_cast<std::size_t>(rows.count());
    engine.heads.reserve(n_rows * heads_columns_);
    engine.queries.reserve(n_rows * query_columns_);
}

void SpanAttention::run(const covey_block&, int block_idx, bool quantized) {
    constexpr int kShortest = 8;  // rows that are worth a thread's while
    ThreadPool& pool = engine_.pool;
    const auto by_rows = [&](auto body) {
        pool.run_ranges(rows_.count(), 1, kShortest, [&](int begin, int end, int thread) {
            for (int row = begin; row < end; row++) body(row, thread);
        });
    };
    if (plan_.window != 0) plan_.make(shape_, rows_.runs, 0, pool.size());
    engine_.softmax.reserve(static_cast<std::size_t>(plan_.kept_floats));
    engine_.attended.resize(rows_.count(), query_columns_);
    by_rows([&](int row, int thread) { place_row(block_idx, row, thread); });
    pool.run(static_cast<int>(plan_.items.size()), [&](int item, int thread) {
        attend_item(plan_, plan_.items[item], block_idx, thread);
    });
    pool.run_ranges(static_cast<int>(plan_.cut_units.size()), 1, kShortest,
                    [&](int begin, int end, int thread) {
                        for (int i = begin; i < end; i++)
                            join_unit(plan_, plan_.units[plan_.cut_units[i]], thread);
                    });
    if (quantized) by_rows([&](int row, int) { engine_.attended.quantize_row(row); });
}

// Rotates and scales a row's queries, and writes its keys and values to the cache.
void SpanAttention::place_row(int block_idx, int row, int thread) {
    const int head_dim = shape_.head_dim;
    const int64_t position = rows_.position(row), angle = position * (shape_.rope_dim / 2);
    const float* cosines = rows_.rope->cosines + angle;
    const float* sines = rows_.rope->sines + angle;
    const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
    const float* from = heads_row(row);
    for (int head = 0; head < shape_.n_heads; head++)
        rotate_head(from + head * head_dim, shape_, cosines, sines, scale,
                    query(head / group_, row) + head % group_ * head_dim);
    float* key = engine_.scratch[thread].key.reserve(static_cast<std::size_t>(head_dim));
    for (int head = 0; head < shape_.n_kv_heads; head++) {
        rotate_head(from + query_columns_ + head * head_dim, shape_, cosines, sines, 1.0f, key);
        HeadCache(layout_, rows_.pages[rows_.run_of_row[row]], block_idx, head)
            .write(position, key, from + query_columns_ + kv_columns_ + head * head_dim);
    }
}

QueryRows SpanAttention::queries(const AttentionUnit& unit, int64_t window) const {
    return {query(unit.head, unit.first_row), unit.n_positions * group_, group_,
            rows_.position(unit.first_row), window};
}

void SpanAttention::attend_item(const AttentionPlan& plan, const AttentionItem& item, int block_idx,
                                int thread) {
    const AttentionUnit& unit = plan.units[item.unit];
    const HeadCache cache(layout_, rows_.pages[unit.run], block_idx, unit.head);
    const QueryRows rows = queries(unit, plan.window);
    const int64_t each = Softmax::floats(rows.n_rows, shape_.head_dim);
    ThreadScratch& scratch = engine_.scratch[thread];
    const auto attend = [&](int segment, const Softmax& out) {
        attend_segment(cache, rows, segment, segment + 1 < item.end_segment, out, scratch.attention);
    };
    if (unit.kept >= 0) {
        float* kept = engine_.softmax.reserve(0) + unit.kept;
        for (int segment = item.first_segment; segment < item.end_segment; segment++)
            attend(segment, Softmax::in(kept + each * (segment - unit.first_segment), rows.n_rows));
        return;
    }
    float* memory = scratch.softmax.reserve(static_cast<std::size_t>(2 * each));
    const Softmax joined = Softmax::in(memory, rows.n_rows);
    const Softmax next = Softmax::in(memory + each, rows.n_rows);
    attend(item.first_segment, joined);
    for (int segment = item.first_segment + 1; segment < item.end_segment; segment++) {
        attend(segment, next);
        joined.join(next, rows.n_rows, shape_.head_dim);
    }
    finish_unit(unit, joined);
}

// The same as the end of `attend_item`, from results that were kept.
void SpanAttention::join_unit(const AttentionPlan&, const AttentionUnit& unit, int) {
    const int n_rows = unit.n_positions * group_;
    const int64_t each = Softmax::floats(n_rows, shape_.head_dim);
    float* kept = engine_.softmax.reserve(0) + unit.kept;
    const Softmax joined = Softmax::in(kept, n_rows);
    for (int i = 1; i < unit.end_segment - unit.first_segment; i++)
        joined.join(Softmax::in(kept + each * i, n_rows), n_rows, shape_.head_dim);
    finish_unit(unit, joined);
}

void SpanAttention::finish_unit(const AttentionUnit& unit, const Softmax& softmax) {
    const int head_dim = shape_.head_dim;
    for (int i = 0; i < unit.n_positions * group_; i++)
        softmax.finish(i, head_dim, engine_.attended.row(unit.first_row + i / group_) +
                                        (unit.head * group_ + i % group_) * head_dim);
}

}  // namespace covey
