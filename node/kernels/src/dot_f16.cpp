#include <algorithm>

#include "dot.h"
#include "panel.h"

namespace covey {

void multiply_group_f16(const covey_matrix& matrix, int group, const Activations& x, float* out) {
    const auto* weights = reinterpret_cast<const uint16_t*>(group_data(matrix, group));
    std::fill(out, out + static_cast<int64_t>(x.n_rows) * kGroupRows, 0.0f);
    for (int row = 0; row < x.n_rows; row += kFloatRows)
        float_product(std::min(kFloatRows, x.n_rows - row), kGroupRows,
                      x.values + static_cast<int64_t>(row) * x.columns, x.columns, weights,
                      kGroupRows, out + static_cast<int64_t>(row) * kGroupRows, kGroupRows,
                      x.columns);
}

}  // namespace covey
