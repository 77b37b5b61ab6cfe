#include "experts.h"

#include <algorithm>
#include <numeric>

#include "gating.h"
#include "span.h"

namespace covey {
namespace {

float dot(const float* a, const float* b, int n) {
    F32x16 total = splat(0.0f);
    for (int i = 0; i < n; i += kLanes) total = fma(load(a + i), load(b + i), total);
    return sum(total);
}

// The `n` experts of largest logits, by number, with their shares of the softmax over all.
void choose(const float* logits, int n_experts, int n, bool renormalized, int row,
            std::vector<std::vector<Choice>>& choices) {
    std::vector<int> order(static_cast<std::size_t>(n_experts));
    std::iota(order.begin(), order.end(), 0);
    // A NaN is larger than all, so that the order is a strict one; the row is lost anyway.
    const auto before = [&](int a, int b) {
        const bool a_nan = logits[a] != logits[a], b_nan = logits[b] != logits[b];
        if (a_nan || b_nan) return a_nan != b_nan ? a_nan : a < b;
        return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
    };
    std::partial_sort(order.begin(), order.begin() + n, order.end(), before);
    const float largest = logits[order[0]];
    float total = 0.0f;
    for (int i = 0; i < (renormalized ? n : n_experts); i++)
        total += exp_scalar(logits[renormalized ? order[i] : i] - largest);
    for (int i = 0; i < n; i++)
        choices[order[i]].push_back({row, exp_scalar(logits[order[i]] - largest) / total});
}

// Rows of x that chose an expert, one below the other, with their bytes if `quantized`.
void gather(const Activations& x, const std::vector<Choice>& choices, bool quantized,
            Activations& out) {
    out.resize(static_cast<int>(choices.size()), x.columns);
    for (std::size_t i = 0; i < choices.size(); i++) {
        std::copy_n(x.row(choices[i].row), x.columns, out.row(static_cast<int>(i)));
        if (quantized) out.quantize_row(static_cast<int>(i));
    }
}

}  // namespace

void choose_experts(covey_engine& engine, const covey_shape& shape, const float* router) {
    const Activations& x = engine.normed;
    ExpertScratch& scratch = engine.experts;
    const int n_experts = shape.n_experts;
    float* logits = scratch.logits.reserve(static_cast<std::size_t>(x.n_rows) * n_experts);
    engine.pool.run_ranges(n_experts, 2, 4, [&](int begin, int end, int) {
        for (int expert = begin; expert < end; expert++)
            for (int row = 0; row < x.n_rows; row++)
                logits[int64_t{row} * n_experts + expert] =
                    dot(x.row(row), router + int64_t{expert} * x.columns, x.columns);
    });
    std::vector<std::vector<Choice>> choices(static_cast<std::size_t>(n_experts));
    for (int row = 0; row < x.n_rows; row++)
        choose(logits + int64_t{row} * n_experts, n_experts, shape.n_experts_used,
               shape.renormalize_experts, row, choices);
    scratch.chosen.clear();
    for (int expert = 0; expert < n_experts; expert++)
        if (!choices[expert].empty()) scratch.chosen.push_back({expert, std::move(choices[expert])});
}

void run_experts(covey_engine& engine, const covey_shape& shape, const covey_matrix* experts) {
    ExpertScratch& scratch = engine.experts;
    const int n_chosen = static_cast<int>(scratch.chosen.size());
    while (static_cast<int>(scratch.inputs.size()) < n_chosen) {
        scratch.inputs.emplace_back();
        scratch.gated.emplace_back();
    }
    for (int i = 0; i < n_chosen; i++) {
        const ChosenExpert& chosen = scratch.chosen[i];
        const covey_matrix* matrices = experts + 3 * chosen.expert;
        gather(engine.normed, chosen.choices, is_quantized(matrices[0]) || is_quantized(matrices[1]),
               scratch.inputs[i]);
        scratch.gated[i].resize(static_cast<int>(chosen.choices.size()), shape.intermediate_size);
    }
    const int n_units = shape.intermediate_size / kBlockColumns;
    const int ranges = ranges_per_thread(engine.normed.n_rows);
    engine.pool.run_ranges(n_chosen * n_units, ranges, 1, [&](int begin, int end, int thread) {
        for (int item = begin; item < end; item++) {
            const int i = item / n_units;
            const covey_matrix* matrices = experts + 3 * scratch.chosen[i].expert;
            gate_unit(engine, shape, matrices[0], matrices[1], item % n_units, scratch.inputs[i],
                      thread, is_quantized(matrices[2]), scratch.gated[i]);
        }
    });
}

void add_experts(covey_engine& engine, const covey_matrix* experts, int group, int n_rows,
                 int thread, float* out) {
    const ExpertScratch& scratch = engine.experts;
    std::fill_n(out, n_rows * kGroupRows, 0.0f);
    for (std::size_t i = 0; i < scratch.chosen.size(); i++) {
        const ChosenExpert& chosen = scratch.chosen[i];
        const float* product =
            multiply(engine, experts[3 * chosen.expert + 2], group, scratch.gated[i], thread);
        for (std::size_t j = 0; j < chosen.choices.size(); j++) {
            float* to = out + chosen.choices[j].row * kGroupRows;
            store(to, fma(load(product + j * kGroupRows), splat(chosen.choices[j].weight), load(to)));
        }
    }
}

}  // namespace covey
