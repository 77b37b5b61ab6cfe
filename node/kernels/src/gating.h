// What one MLP does between its products: act(gate) * up, for a group of 16 columns.
#pragma once

#include "span.h"

namespace covey {

// out = gelu(gate) * up, n a multiple of 16: x * sigmoid(2 y) is x/2 * (1 + tanh y).
inline void gelu_times(const float* gate, const float* up, int n, float* out) {
    for (int i = 0; i < n; i += kLanes) {
        const F32x16 g = load(gate + i);
        // 2 * sqrt(2 / pi) * (g + 0.044715 g^3)
        const F32x16 doubled = g * fma(g * g, splat(0.0713548162726f), splat(1.59576912161f));
        const F32x16 gelu = g / (splat(1.0f) + exp(splat(0.0f) - doubled));
        store(out + i, gelu * load(up + i));
    }
}

// Columns [32 * unit, + 32) of act(gate * x) * (up * x), in floats and, if `quantized`, bytes.
inline void gate_unit(covey_engine& engine, const covey_shape& shape, const covey_matrix& gate,
                      const covey_matrix& up, int unit, const Activations& x, int thread,
                      bool quantized, Activations& gated) {
    constexpr int kUnitGroups = kBlockColumns / kGroupRows;
    const auto act = shape.activation == COVEY_GELU_TANH ? gelu_times : silu_times;
    for (int group = unit * kUnitGroups; group < (unit + 1) * kUnitGroups; group++) {
        const float* gates = multiply(engine, gate, group, x, thread);
        const float* ups = multiply(engine, up, group, x, thread, kMaxRows);
        for (int row = 0; row < x.n_rows; row++)
            act(gates + row * kGroupRows, ups + row * kGroupRows, kGroupRows,
                gated.row(row) + group * kGroupRows);
    }
    if (!quantized) return;
    for (int row = 0; row < x.n_rows; row++) gated.quantize_blocks(row, unit, 1);
}

}  // namespace covey
