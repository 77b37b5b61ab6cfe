#include "span_attention.h"

#include <utility>

namespace covey {
namespace {

void add_bias(const float* bias, int n, float* x) {
    if (!bias) return;
    for (int i = 0; i < n; i += kLanes) store(x + i, load(x + i) + load(bias + i));
}

}  // namespace

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

void SpanAttention::run(const covey_block& block, int block_idx, bool quantized) {
    constexpr int kShortest = 8;  // rows that are worth a thread's while
    ThreadPool& pool = engine_.pool;
    const auto by_rows = [&](auto body) {
        pool.run_ranges(rows_.count(), 1, kShortest, [&](int begin, int end, int) {
            for (int row = begin; row < end; row++) body(row);
        });
    };
    const AttentionPlan& plan = plan_for(block.window);
    engine_.softmax.reserve(static_cast<std::size_t>(plan.kept_floats));
    engine_.attended.resize(rows_.count(), query_columns_);
    by_rows([&](int row) { place_row(block, block_idx, row); });
    pool.run(static_cast<int>(plan.items.size()), [&](int item, int thread) {
        attend_item(plan, plan.items[item], block_idx, thread);
    });
    pool.run_ranges(static_cast<int>(plan.cut_units.size()), 1, kShortest,
                    [&](int begin, int end, int) {
                        for (int i = begin; i < end; i++)
                            join_unit(plan.units[plan.cut_units[i]]);
                    });
    if (quantized) by_rows([&](int row) { engine_.attended.quantize_row(row); });
}

const AttentionPlan& SpanAttention::plan_for(int64_t window) {
    if (plans_[0].window != window) std::swap(plans_[0], plans_[1]);
    if (plans_[0].window != window) plans_[0].make(shape_, rows_.runs, window, engine_.pool.size());
    return plans_[0];
}

// Biases, norms and rotations of a row's heads; then its keys and values go to the cache.
void SpanAttention::place_row(const covey_block& block, int block_idx, int row) {
    const int head_dim = shape_.head_dim;
    const int64_t position = rows_.position(row), angle = position * (shape_.rope_dim / 2);
    covey_shape shape = shape_;
    const float *cosines = nullptr, *sines = nullptr;
    if (block.rope == COVEY_NO_ROPE) {
        shape.rope_dim = 0;
    } else {
        cosines = rows_.ropes[block.rope].cosines + angle;
        sines = rows_.ropes[block.rope].sines + angle;
    }
    float* queries = heads_row(row);
    float* keys = queries + query_columns_;
    float* values = keys + kv_columns_;
    add_bias(block.q_bias, query_columns_, queries);
    add_bias(block.k_bias, kv_columns_, keys);
    add_bias(block.v_bias, kv_columns_, values);
    const auto turn = [&](float* head, const float* norm, float scale, float* out) {
        if (norm) rms_norm(head, norm, head_dim, shape.rms_norm_eps, head);
        rotate_head(head, shape, cosines, sines, scale, out);
    };
    for (int head = 0; head < shape.n_heads; head++)
        turn(queries + head * head_dim, block.q_norm, shape.attention_scale,
             query(head / group_, row) + head % group_ * head_dim);
    for (int head = 0; head < shape.n_kv_heads; head++) {
        float* key = keys + head * head_dim;
        turn(key, block.k_norm, 1.0f, key);
        HeadCache(layout_, rows_.pages[rows_.run_of_row[row]], block_idx, head)
            .write(position, key, values + head * head_dim);
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
void SpanAttention::join_unit(const AttentionUnit& unit) {
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
