// A mixture of experts: each row goes through the few MLPs that its router gives most weight to.
//
// Rows are sorted by expert, so that the weights of each chosen expert are read once for all rows
// that chose it; a row adds up its experts by their number, so its result depends on no other row.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "activations.h"
#include "memory.h"

struct covey_engine;

namespace covey {

struct Choice {
    int row;
    float weight;
};

// An expert that some row chose.
struct ChosenExpert {
    int expert;
    std::vector<Choice> choices;  // by row
};

struct ExpertScratch {
    Buffer<float> logits;            // [rows][n_experts]
    std::vector<ChosenExpert> chosen;  // by expert
    std::deque<Activations> inputs, gated;  // of each that was chosen
};

// engine.normed -> engine.experts.chosen.
void choose_experts(covey_engine& engine, const covey_shape& shape, const float* router);

// engine.normed -> engine.experts.gated, of all that were chosen.
void run_experts(covey_engine& engine, const covey_shape& shape, const covey_matrix* experts);

// out[n_rows][16] = one group of the weighted sum of what the chosen experts give.
void add_experts(covey_engine& engine, const covey_matrix* experts, int group, int n_rows,
                 int thread, float* out);

}  // namespace covey
