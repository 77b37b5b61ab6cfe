// Matrices of floats. As with quantised ones, few rows read them as they are and many share a piece
// that was converted once.
#include <algorithm>

#include "dot.h"
#include "simd.h"

namespace covey {
namespace {

constexpr int kPieceColumns = 256;

struct Half {
    static constexpr std::size_t kBytes = 2 * kGroupRows;  // of a column
    static COVEY_INLINE F32x16 load16(const uint8_t* p) {
        return load(reinterpret_cast<const uint16_t*>(p));
    }
};
struct BFloat {
    static constexpr std::size_t kBytes = 2 * kGroupRows;
    static COVEY_INLINE F32x16 load16(const uint8_t* p) {
        return load_bf16(reinterpret_cast<const uint16_t*>(p));
    }
};
struct Single {
    static constexpr std::size_t kBytes = 4 * kGroupRows;
    static COVEY_INLINE F32x16 load16(const uint8_t* p) {
        return load(reinterpret_cast<const float*>(p));
    }
};

// One piece of n columns times W rows; out[W][16] is added to.
template <class Number, int W>
void multiply_panel(const uint8_t* weights, int n, const float* x, int64_t stride, float* out) {
    F32x16 even[W], odd[W];
#pragma GCC unroll 12
    for (int row = 0; row < W; row++) even[row] = odd[row] = splat(0.0f);
    for (int c = 0; c < n; c += 2) {
        if (c % 4 == 0) prefetch(weights, 4 * Number::kBytes);
        const F32x16 first = Number::load16(weights);
        const F32x16 second = Number::load16(weights + Number::kBytes);
#pragma GCC unroll 12
        for (int row = 0; row < W; row++) {
            even[row] = fma(splat(x[row * stride + c]), first, even[row]);
            odd[row] = fma(splat(x[row * stride + c + 1]), second, odd[row]);
        }
        weights += 2 * Number::kBytes;
    }
#pragma GCC unroll 12
    for (int row = 0; row < W; row++)
        store(out + row * kGroupRows, load(out + row * kGroupRows) + (even[row] + odd[row]));
}

template <class Number, int W = kFloatPanelRows>
void multiply_width(int width, const uint8_t* weights, int n, const float* x, int64_t stride,
                    float* out) {
    if constexpr (W > 1) {
        if (width < W) return multiply_width<Number, W - 1>(width, weights, n, x, stride, out);
    }
    multiply_panel<Number, W>(weights, n, x, stride, out);
}

template <class Number>
void multiply(const uint8_t* weights, const Activations& x, float* out, Buffer<uint8_t>& scratch) {
    std::fill(out, out + static_cast<int64_t>(x.n_rows) * kGroupRows, 0.0f);
    for (int first = 0; first < x.columns; first += kPieceColumns) {
        const int n = std::min(kPieceColumns, x.columns - first);
        const uint8_t* piece = weights + first * Number::kBytes;
        const float* values = x.values + first;
        if (x.n_rows <= kFloatPanelRows) {
            multiply_width<Number>(x.n_rows, piece, n, values, x.columns, out);
            continue;
        }
        auto* converted = reinterpret_cast<float*>(scratch.reserve(kPieceColumns * Single::kBytes));
        for (int c = 0; c < n; c++)
            store(converted + c * kGroupRows, Number::load16(piece + c * Number::kBytes));
        for (int row = 0; row < x.n_rows; row += kFloatPanelRows)
            multiply_width<Single>(std::min(kFloatPanelRows, x.n_rows - row),
                                   reinterpret_cast<const uint8_t*>(converted), n,
                                   values + static_cast<int64_t>(row) * x.columns, x.columns,
                                   out + static_cast<int64_t>(row) * kGroupRows);
    }
}

}  // namespace

void multiply_group_float(const covey_matrix& matrix, int group, const Activations& x, float* out,
                          Buffer<uint8_t>& scratch) {
    const uint8_t* weights = group_data(matrix, group);
    switch (matrix.type) {
        case COVEY_F16: return multiply<Half>(weights, x, out, scratch);
        case COVEY_BF16: return multiply<BFloat>(weights, x, out, scratch);
        default: return multiply<Single>(weights, x, out, scratch);
    }
}

}  // namespace covey
