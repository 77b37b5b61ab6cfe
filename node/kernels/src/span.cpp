// The span driver: blocks one after another, each a norm, three products, attention, a product,
// a norm, two products and a product; shared out between threads in ranges of matrix rows.
#include <algorithm>
#include <new>
#include <vector>

#include "experts.h"
#include "gating.h"
#include "span_attention.h"
#include "span_check.h"

namespace covey {
namespace {

// One pass of up to kMaxRows rows through the blocks of a span.
class Pass {
public:
    Pass(covey_engine& engine, const covey_shape& shape, const PassRows& rows, float* hidden,
         uint32_t parts)
        : engine_(engine),
          pool_(engine.pool),
          shape_(shape),
          n_rows_(rows.count()),
          hidden_(hidden),
          parts_(parts),
          attention_(engine, shape, rows) {
        // Here and not in a thread, which could not throw.
        for (ThreadScratch& scratch : engine.scratch) {
            scratch.products.reserve(2 * kMaxRows * kGroupRows);
            if (shape.n_experts) scratch.sums.reserve(kMaxRows * kGroupRows);
        }
    }

    void run(const covey_block& block, int block_idx) {
        if (parts_ & COVEY_ATTENTION) attention_half(block, block_idx);
        if (parts_ & COVEY_MLP) mlp_half(block);
    }

private:
    void attention_half(const covey_block& block, int block_idx) {
        normalize_for_heads(block);
        project_heads(block);
        attention_.run(block, block_idx, is_quantized(block.o));
        add(block.post_attn_norm, [&](int group, int thread) {
            return multiply(engine_, block.o, group, engine_.attended, thread);
        });
    }

    void mlp_half(const covey_block& block) {
        if (block.router) return expert_half(block);
        normalize(block.ffn_norm, is_quantized(block.gate) || is_quantized(block.up));
        engine_.gated.resize(n_rows_, shape_.intermediate_size);
        const int n_units = shape_.intermediate_size / kBlockColumns;
        // In units of 32 columns, which are quantised while they are at hand.
        pool_.run_ranges(n_units, ranges(), 1, [&](int begin, int end, int thread) {
            for (int unit = begin; unit < end; unit++)
                gate_unit(engine_, shape_, block.gate, block.up, unit, engine_.normed, thread,
                          is_quantized(block.down), engine_.gated);
        });
        add(block.post_ffn_norm, [&](int group, int thread) {
            return multiply(engine_, block.down, group, engine_.gated, thread);
        });
    }

    void expert_half(const covey_block& block) {
        normalize(block.ffn_norm, false);
        choose_experts(engine_, shape_, block.router);
        run_experts(engine_, shape_, block.experts);
        add(block.post_ffn_norm, [&](int group, int thread) {
            float* sum = engine_.scratch[thread].sums.reserve(kMaxRows * kGroupRows);
            add_experts(engine_, block.experts, group, n_rows_, thread, sum);
            return sum;
        });
    }

    void normalize(const float* weight, bool quantized) {
        prepare(pool_, engine_.normed, n_rows_, shape_.hidden_size, quantized,
                [&](int row, float* out) {
                    rms_norm(hidden_row(row), weight, shape_.hidden_size, shape_.rms_norm_eps, out);
                });
    }

    // Two bytes per activation here: what attention looks at depends on small differences, and of
    // the error that bytes make in the end two fifths are made here, in a sixth of the weights.
    void normalize_for_heads(const covey_block& block) {
        const bool quantized = is_quantized(block.q) && is_quantized(block.k) && is_quantized(block.v);
        if (!quantized)
            return normalize(block.attn_norm, is_quantized(block.q) || is_quantized(block.k) ||
                                                  is_quantized(block.v));
        const int width = shape_.hidden_size;
        engine_.normed.resize(2 * n_rows_, width);
        pool_.run_ranges(n_rows_, 1, 8, [&](int begin, int end, int) {
            for (int row = begin; row < end; row++) {
                rms_norm(hidden_row(row), block.attn_norm, width, shape_.rms_norm_eps,
                         engine_.normed.row(2 * row));
                engine_.normed.quantize_pair(2 * row);
            }
        });
    }

    // Queries, keys and values of all rows, not yet rotated.
    void project_heads(const covey_block& block) {
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
        const float* product = multiply(engine_, matrix, group, engine_.normed, thread);
        const bool in_pairs = engine_.normed.n_rows == 2 * n_rows_;
        for (int row = 0; row < n_rows_; row++) {
            float* out = attention_.heads_row(row) + column_group * kGroupRows;
            if (in_pairs) {
                const float* pair = product + 2 * row * kGroupRows;
                store(out, load(pair) + load(pair + kGroupRows));
            } else {
                store(out, load(product + row * kGroupRows));
            }
        }
    }

    // Add to the hidden states what product(group, thread) gives, [n_rows][16], by way of a norm if
    // there is one; or put it in their place.
    template <class Product>
    void add(const float* norm, Product product) {
        const int width = shape_.hidden_size;
        const bool is_added = !norm && !(parts_ & COVEY_PARTIAL);
        float* to = norm ? engine_.added.reserve(static_cast<std::size_t>(n_rows_) * width) : hidden_;
        pool_.run_ranges(width / kGroupRows, ranges(), 1, [&](int begin, int end, int thread) {
            for (int group = begin; group < end; group++) {
                const float* part = product(group, thread);
                for (int row = 0; row < n_rows_; row++) {
                    float* out = to + int64_t{row} * width + group * kGroupRows;
                    const F32x16 more = load(part + row * kGroupRows);
                    store(out, is_added ? load(out) + more : more);
                }
            }
        });
        if (norm) add_normed(norm);
    }

    void add_normed(const float* weight) {
        const int width = shape_.hidden_size;
        float* added = engine_.added.reserve(0);
        pool_.run_ranges(n_rows_, 1, 8, [&](int begin, int end, int) {
            for (int row = begin; row < end; row++) {
                float* part = added + int64_t{row} * width;
                rms_norm(part, weight, width, shape_.rms_norm_eps, part);
                float* out = hidden_row(row);
                for (int i = 0; i < width; i += kLanes) store(out + i, load(out + i) + load(part + i));
            }
        });
    }

    int ranges() const { return ranges_per_thread(n_rows_); }
    float* hidden_row(int row) const { return hidden_ + int64_t{row} * shape_.hidden_size; }

    covey_engine& engine_;
    ThreadPool& pool_;
    const covey_shape& shape_;
    const int n_rows_;
    float* const hidden_;
    const uint32_t parts_;
    SpanAttention attention_;
};

// Cuts the rows of all runs, in order, into passes.
class PassCutter {
public:
    PassCutter(const covey_run* runs, int n_runs, const covey_rope* ropes)
        : runs_(runs), n_runs_(n_runs) {
        rows_.ropes = ropes;
    }

    // The next rows; null at the end.
    const PassRows* next() {
        rows_.runs.clear();
        rows_.pages.clear();
        rows_.run_of_row.clear();
        while (run_ < n_runs_ && rows_.count() < kMaxRows) {
            const covey_run& run = runs_[run_];
            const int n = std::min(kMaxRows - rows_.count(), run.n_rows - done_);
            rows_.runs.push_back({run.position + done_, rows_.count(), n});
            rows_.pages.push_back(run.pages);
            rows_.run_of_row.insert(rows_.run_of_row.end(), n,
                                    static_cast<int>(rows_.runs.size()) - 1);
            done_ += n;
            if (done_ == run.n_rows) {
                run_++;
                done_ = 0;
            }
        }
        return rows_.count() ? &rows_ : nullptr;
    }

private:
    const covey_run* const runs_;
    const int n_runs_;
    int run_ = 0, done_ = 0;  // rows of runs_[run_] that are behind us
    PassRows rows_;
};

}  // namespace
}  // namespace covey

using namespace covey;

int64_t covey_page_bytes(const covey_shape* shape, int32_t n_blocks) {
    if (!shape || !is_shape(*shape) || n_blocks < 1) return -1;
    return CacheLayout(*shape).block_bytes() * n_blocks;
}

int32_t covey_span_forward(covey_engine* engine, const covey_shape* shape, const covey_block* blocks,
                           int32_t n_blocks, int32_t first_block, const covey_run* runs, int32_t n_runs,
                           const covey_rope* ropes, int32_t n_ropes, float* hidden,
                           uint32_t parts) {
    constexpr uint32_t kBoth = COVEY_ATTENTION | COVEY_MLP;
    const uint32_t halves = parts & kBoth;
    if (!engine || !shape || !blocks || n_blocks < 1 || first_block < 0 || !runs || n_runs < 1 || !hidden ||
        !is_shape(*shape) || !halves || parts > (kBoth | COVEY_PARTIAL) ||
        (parts & COVEY_PARTIAL && (n_blocks != 1 || halves == kBoth)))
        return COVEY_INVALID;
    for (int i = 0; i < n_blocks; i++)
        if (!fits(blocks[i], *shape, parts, n_ropes)) return COVEY_INVALID;
    for (int i = 0; i < n_runs; i++)
        if (runs[i].n_rows < 1 || (parts & COVEY_ATTENTION && !fits(runs[i], ropes, n_ropes)))
            return COVEY_INVALID;
    try {
        PassCutter cutter(runs, n_runs, ropes);
        while (const PassRows* rows = cutter.next()) {
            Pass pass(*engine, *shape, *rows, hidden, parts);
            for (int i = 0; i < n_blocks; i++) pass.run(blocks[i], first_block + i);
            hidden += int64_t{rows->count()} * shape->hidden_size;
        }
    } catch (const std::bad_alloc&) {
        return COVEY_NO_MEMORY;
    }
    return COVEY_OK;
}
