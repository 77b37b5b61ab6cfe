// The span driver: blocks one after another, each a norm, three products, attention, a product,
// a norm, two products and a product; shared out between threads in ranges of matrix rows.
#include <algorithm>
#include <cmath>
#include <new>
#include <system_error>

#include "dot.h"
#include "span.h"

namespace covey {
namespace {

// Ranges of matrix rows per thread: one is fastest for a single row, whose products take
// microseconds; more let the others take over from a thread that was put aside.
constexpr int kRangesOfOneRow = 1, kRangesOfMany = 4;
constexpr int kPositionsPerItem = 16;  // of prefill attention: rows that share a converted tile

bool is_quantized(const covey_matrix& matrix) { return !is_float_type(matrix.type); }

// One pass of up to kMaxRows rows through the blocks of a span.
class Pass {
public:
    Pass(covey_engine& engine, const covey_shape& shape, const covey_cache& cache,
         const float* cosines, const float* sines, int64_t position, int n_rows, float* hidden,
         bool with_residual)
        : engine_(engine),
          pool_(engine.pool),
          shape_(shape),
          cache_(cache),
          cosines_(cosines),
          sines_(sines),
          position_(position),
          n_rows_(n_rows),
          hidden_(hidden),
          with_residual_(with_residual),
          query_columns_(shape.n_heads * shape.head_dim),
          kv_columns_(shape.n_kv_heads * shape.head_dim),
          heads_columns_(query_columns_ + 2 * kv_columns_) {}

    void attention_half(const covey_block& block, int block_idx) {
        normalize(block.attn_norm,
                  is_quantized(block.q) || is_quantized(block.k) || is_quantized(block.v));
        project_heads(block);
        if (n_rows_ == 1) {
            attend_one(block_idx, is_quantized(block.o));
        } else {
            attend_many(block_idx, is_quantized(block.o));
        }
        add_product(block.o, engine_.attended);
    }

    void mlp_half(const covey_block& block) {
        normalize(block.ffn_norm, is_quantized(block.gate) || is_quantized(block.up));
        gate(block);
        add_product(block.down, engine_.gated);
    }

private:
    void normalize(const float* weight, bool quantized) {
        prepare(pool_, engine_.normed, n_rows_, shape_.hidden_size, quantized,
                [&](int row, float* out) {
                    rms_norm(hidden_row(row), weight, shape_.hidden_size, shape_.rms_norm_eps, out);
                });
    }

    // Queries, keys and values of all rows, not yet rotated.
    void project_heads(const covey_block& block) {
        engine_.heads.reserve(static_cast<std::size_t>(n_rows_) * heads_columns_);
        const int q_groups = n_groups(block.q.rows), k_groups = n_groups(block.k.rows);
        pool_.run_ranges(q_groups + 2 * k_groups, ranges(), 1, [&](int begin, int end, int thread) {
            for (int group = begin; group < end; group++) {
                if (group < q_groups) {
                    store_heads(block.q, group, group, thread);
                } else if (group < q_groups + k_groups) {
                    store_heads(block.k, group - q_groups, group, thread);
                } else {
                    store_heads(block.v, group - q_groups - k_groups, group, thread);
                }
            }
        });
    }

    void store_heads(const covey_matrix& matrix, int group, int column_group, int thread) {
        const float* product = multiply(matrix, group, engine_.normed, thread);
        for (int row = 0; row < n_rows_; row++)
            store(heads_row(row) + column_group * kGroupRows, load(product + row * kGroupRows));
    }

    // A decode step: (KV head, segment) is an item, so that few heads still fill many threads.
    void attend_one(int block_idx, bool quantized) {
        const int n_segments_ = n_segments(position_ + 1);
        const int group = shape_.n_heads / shape_.n_kv_heads, head_dim = shape_.head_dim;
        const int64_t each = Softmax::floats(group, head_dim);
        // One more than the items: where the segments of a head are joined.
        float* memory = engine_.softmax.reserve(each * (int64_t{shape_.n_kv_heads} * n_segments_ + 1));
        pool_.run(shape_.n_kv_heads * n_segments_, [&](int item, int thread) {
            const int head = item / n_segments_, segment = item % n_segments_;
            const HeadCache cache = head_cache(block_idx, head);
            // Only the last segment reads the new position, so only its item writes it.
            if (segment == n_segments_ - 1) write_cache(cache, head, 0, thread);
            attend_segment(cache, queries(head, 0, 1, thread), segment,
                           Softmax::in(memory + each * item, group),
                           engine_.scratch[thread].tile_floats);
        });
        const Softmax joined =
            Softmax::in(memory + each * shape_.n_kv_heads * n_segments_, group);
        prepare(pool_, engine_.attended, 1, query_columns_, quantized, [&](int, float* out) {
            for (int head = 0; head < shape_.n_kv_heads; head++) {
                joined.clear(group, head_dim);
                for (int segment = 0; segment < n_segments_; segment++)
                    joined.join(Softmax::in(memory + each * (head * n_segments_ + segment), group),
                                group, head_dim);
                for (int i = 0; i < group; i++)
                    joined.finish(i, head_dim, out + (head * group + i) * head_dim);
            }
        });
    }

    // Many rows: all keys and values first, then (KV head, some positions) is an item.
    void attend_many(int block_idx, bool quantized) {
        pool_.run(shape_.n_kv_heads, [&](int head, int thread) {
            const HeadCache cache = head_cache(block_idx, head);
            for (int row = 0; row < n_rows_; row++) write_cache(cache, head, row, thread);
        });
        engine_.attended.resize(n_rows_, query_columns_);
        const int n_pieces = (n_rows_ + kPositionsPerItem - 1) / kPositionsPerItem;
        pool_.run(n_pieces * shape_.n_kv_heads, [&](int item, int thread) {
            // The last positions see most, so they come first.
            const int piece = n_pieces - 1 - item / shape_.n_kv_heads;
            attend_piece(block_idx, item % shape_.n_kv_heads, piece * kPositionsPerItem, thread);
        });
        if (!quantized) return;
        pool_.run_ranges(n_rows_, 1, 8, [&](int begin, int end, int) {
            for (int row = begin; row < end; row++) engine_.attended.quantize_row(row);
        });
    }

    void attend_piece(int block_idx, int head, int first_row, int thread) {
        const int n_positions = std::min(kPositionsPerItem, n_rows_ - first_row);
        const int group = shape_.n_heads / shape_.n_kv_heads, head_dim = shape_.head_dim;
        const int n_rows = n_positions * group;
        const HeadCache cache = head_cache(block_idx, head);
        const QueryRows rows = queries(head, first_row, n_positions, thread);
        const int64_t each = Softmax::floats(n_rows, head_dim);
        ThreadScratch& scratch = engine_.scratch[thread];
        float* memory = scratch.softmax.reserve(2 * each);
        const Softmax joined = Softmax::in(memory, n_rows);
        const Softmax current = Softmax::in(memory + each, n_rows);
        joined.clear(n_rows, head_dim);
        for (int segment = 0; segment < n_segments(rows.end()); segment++) {
            attend_segment(cache, rows, segment, current, scratch.tile_floats);
            joined.join(current, n_rows, head_dim);
        }
        for (int i = 0; i < n_rows; i++)
            joined.finish(i, head_dim, engine_.attended.row(first_row + i / group) +
                                           (head * group + i % group) * head_dim);
    }

    // Rotated and scaled queries of one KV head, positions [first_row, + n_positions).
    QueryRows queries(int head, int first_row, int n_positions, int thread) {
        const int group = shape_.n_heads / shape_.n_kv_heads, head_dim = shape_.head_dim;
        const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
        float* out = engine_.scratch[thread].queries.reserve(
            static_cast<std::size_t>(n_positions) * group * head_dim);
        for (int i = 0; i < n_positions * group; i++) {
            const int row = first_row + i / group;
            rotate_head(heads_row(row) + (head * group + i % group) * head_dim, shape_,
                        cosines_row(row), sines_row(row), scale, out + i * head_dim);
        }
        return {out, n_positions * group, group, position_ + first_row};
    }

    void write_cache(const HeadCache& cache, int head, int row, int thread) {
        const int head_dim = shape_.head_dim;
        float* key = engine_.scratch[thread].queries.reserve(head_dim);
        const float* from = heads_row(row) + query_columns_ + head * head_dim;
        rotate_head(from, shape_, cosines_row(row), sines_row(row), 1.0f, key);
        cache.write(position_ + row, key, from + kv_columns_);
    }

    // In units of 32 columns, which are quantised while they are at hand.
    void gate(const covey_block& block) {
        constexpr int kUnitGroups = kBlockColumns / kGroupRows;
        Activations& gated = engine_.gated;
        gated.resize(n_rows_, shape_.intermediate_size);
        const bool quantized = is_quantized(block.down);
        const int n_units = shape_.intermediate_size / kBlockColumns;
        pool_.run_ranges(n_units, ranges(), 1, [&](int begin, int end, int thread) {
            for (int unit = begin; unit < end; unit++) {
                for (int i = 0; i < kUnitGroups; i++)
                    gate_group(block, unit * kUnitGroups + i, thread);
                if (!quantized) continue;
                for (int row = 0; row < n_rows_; row++) gated.quantize_blocks(row, unit, 1);
            }
        });
    }

    void gate_group(const covey_block& block, int group, int thread) {
        const float* gates = multiply(block.gate, group, engine_.normed, thread);
        const float* ups = multiply(block.up, group, engine_.normed, thread, kMaxRows);
        for (int row = 0; row < n_rows_; row++)
            silu_times(gates + row * kGroupRows, ups + row * kGroupRows, kGroupRows,
                       engine_.gated.row(row) + group * kGroupRows);
    }

    void add_product(const covey_matrix& matrix, const Activations& x) {
        pool_.run_ranges(n_groups(matrix.rows), ranges(), 1, [&](int begin, int end, int thread) {
            for (int group = begin; group < end; group++) {
                const float* product = multiply(matrix, group, x, thread);
                for (int row = 0; row < n_rows_; row++) {
                    float* out = hidden_row(row) + group * kGroupRows;
                    const F32x16 part = load(product + row * kGroupRows);
                    store(out, with_residual_ ? load(out) + part : part);
                }
            }
        });
    }

    // [n_rows][16] in this thread's memory; `offset` rows into it, to hold two at a time.
    const float* multiply(const covey_matrix& matrix, int group, const Activations& x, int thread,
                          int offset = 0) {
        ThreadScratch& scratch = engine_.scratch[thread];
        float* out = scratch.products.reserve(2 * kMaxRows * kGroupRows) + offset * kGroupRows;
        multiply_group(matrix, group, x, out, scratch.unpacked);
        return out;
    }

    int ranges() const { return n_rows_ == 1 ? kRangesOfOneRow : kRangesOfMany; }
    HeadCache head_cache(int block_idx, int head) const {
        const int64_t at = (int64_t{block_idx} * shape_.n_kv_heads + head) * cache_.capacity *
                           shape_.head_dim;
        return {cache_.keys + at, cache_.values + at, shape_.head_dim};
    }
    float* hidden_row(int row) const { return hidden_ + int64_t{row} * shape_.hidden_size; }
    float* heads_row(int row) const {
        return engine_.heads.reserve(0) + int64_t{row} * heads_columns_;
    }
    const float* cosines_row(int row) const {
        return cosines_ + int64_t{row} * (shape_.rope_dim / 2);
    }
    const float* sines_row(int row) const { return sines_ + int64_t{row} * (shape_.rope_dim / 2); }

    covey_engine& engine_;
    ThreadPool& pool_;
    const covey_shape& shape_;
    const covey_cache& cache_;
    const float* cosines_;
    const float* sines_;
    const int64_t position_;
    const int n_rows_;
    float* hidden_;
    const bool with_residual_;
    const int query_columns_, kv_columns_, heads_columns_;
};

// There is no table where only the MLP half runs.
const float* rows_from(const float* table, int64_t offset) { return table ? table + offset : table; }

bool is_matrix(const covey_matrix& matrix, int rows, int columns) {
    return matrix.data && matrix.rows == rows && matrix.columns == columns &&
           covey_packed_bytes(matrix.type, rows, columns) > 0;
}

bool is_shape(const covey_shape& s) {
    return s.hidden_size > 0 && s.hidden_size % kBlockColumns == 0 && s.n_kv_heads > 0 &&
           s.n_heads > 0 && s.n_heads % s.n_kv_heads == 0 && s.head_dim > 0 &&
           s.head_dim % kLanes == 0 && s.intermediate_size > 0 &&
           s.intermediate_size % kBlockColumns == 0 && s.rope_dim >= 0 && s.rope_dim % 2 == 0 &&
           s.rope_dim <= s.head_dim && (s.n_heads * s.head_dim) % kBlockColumns == 0;
}

bool fits(const covey_block& block, const covey_shape& s, uint32_t parts) {
    const int queries = s.n_heads * s.head_dim, keys = s.n_kv_heads * s.head_dim;
    const bool attention = !(parts & COVEY_ATTENTION) ||
                           (block.attn_norm && is_matrix(block.q, queries, s.hidden_size) &&
                            is_matrix(block.k, keys, s.hidden_size) &&
                            is_matrix(block.v, keys, s.hidden_size) &&
                            is_matrix(block.o, s.hidden_size, queries));
    const bool mlp = !(parts & COVEY_MLP) ||
                     (block.ffn_norm && is_matrix(block.gate, s.intermediate_size, s.hidden_size) &&
                      is_matrix(block.up, s.intermediate_size, s.hidden_size) &&
                      is_matrix(block.down, s.hidden_size, s.intermediate_size));
    return attention && mlp;
}

}  // namespace
}  // namespace covey

using namespace covey;

int32_t covey_span_forward(covey_engine* engine, const covey_shape* shape, const covey_block* blocks,
                           int32_t n_blocks, const covey_cache* cache, const float* cosines,
                           const float* sines, int64_t position, int32_t n_rows, float* hidden,
                           uint32_t parts) {
    const uint32_t halves = parts & (COVEY_ATTENTION | COVEY_MLP);
    const bool is_partial = parts & COVEY_PARTIAL;
    if (!engine || !shape || !blocks || n_blocks < 1 || !hidden || n_rows < 1 || position < 0 ||
        !is_shape(*shape) || !halves || parts > 7 ||
        (is_partial && (n_blocks != 1 || halves == (COVEY_ATTENTION | COVEY_MLP))))
        return COVEY_INVALID;
    if ((halves & COVEY_ATTENTION) &&
        (!cache || !cache->keys || !cache->values || !cosines || !sines ||
         cache->capacity % kTile || cache->capacity < position + n_rows))
        return COVEY_INVALID;
    for (int i = 0; i < n_blocks; i++)
        if (!fits(blocks[i], *shape, parts)) return COVEY_INVALID;
    static const covey_cache kNoCache{};
    try {
        for (int row = 0; row < n_rows; row += kMaxRows) {
            const int64_t angles = int64_t{row} * (shape->rope_dim / 2);
            Pass pass(*engine, *shape, cache ? *cache : kNoCache, rows_from(cosines, angles), rows_from(sines, angles),
                      position + row, std::min(kMaxRows, n_rows - row),
                      hidden + int64_t{row} * shape->hidden_size, !is_partial);
            for (int i = 0; i < n_blocks; i++) {
                if (halves & COVEY_ATTENTION) pass.attention_half(blocks[i], i);
                if (halves & COVEY_MLP) pass.mlp_half(blocks[i]);
            }
        }
    } catch (const std::bad_alloc&) {
        return COVEY_NO_MEMORY;
    }
    return COVEY_OK;
}
