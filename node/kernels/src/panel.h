// The float product that attention and F16 matrices share: C += A * B, B as wide as four vectors.
//
// Each element of C adds its terms one by one in the order of B's rows, whatever the blocking.
#pragma once

#include <cstdint>

#include "simd.h"

namespace covey {

constexpr int kFloatRows = 6;     // 6 rows x 4 vectors of sums fill the 32 registers of AVX-512
constexpr int kFloatVectors = 4;

// C[R][16 * N] += A[R][n] * B[n][16 * N]; B is float or half.
template <int R, int N, class B>
inline void float_panel(const float* a, int64_t a_stride, const B* b, int64_t b_stride, float* c,
                        int64_t c_stride, int n) {
    F32x16 sums[R][N];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < N; v++) sums[r][v] = load(c + r * c_stride + v * kLanes);
    for (int i = 0; i < n; i++) {
        F32x16 row[N];
        for (int v = 0; v < N; v++) row[v] = load(b + i * b_stride + v * kLanes);
        for (int r = 0; r < R; r++) {
            const F32x16 x = splat(a[r * a_stride + i]);
            for (int v = 0; v < N; v++) sums[r][v] = fma(x, row[v], sums[r][v]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < N; v++) store(c + r * c_stride + v * kLanes, sums[r][v]);
}

template <int N, class B>
inline void float_panel_rows(int n_rows, const float* a, int64_t a_stride, const B* b,
                             int64_t b_stride, float* c, int64_t c_stride, int n) {
    switch (n_rows) {
        case 6: return float_panel<6, N>(a, a_stride, b, b_stride, c, c_stride, n);
        case 5: return float_panel<5, N>(a, a_stride, b, b_stride, c, c_stride, n);
        case 4: return float_panel<4, N>(a, a_stride, b, b_stride, c, c_stride, n);
        case 3: return float_panel<3, N>(a, a_stride, b, b_stride, c, c_stride, n);
        case 2: return float_panel<2, N>(a, a_stride, b, b_stride, c, c_stride, n);
        default: return float_panel<1, N>(a, a_stride, b, b_stride, c, c_stride, n);
    }
}

// C[n_rows][width] += A[n_rows][n] * B[n][width]; n_rows at most 6, width a multiple of 16.
template <class B>
inline void float_product(int n_rows, int width, const float* a, int64_t a_stride, const B* b,
                          int64_t b_stride, float* c, int64_t c_stride, int n) {
    int at = 0;
    for (; at + kFloatVectors * kLanes <= width; at += kFloatVectors * kLanes)
        float_panel_rows<kFloatVectors>(n_rows, a, a_stride, b + at, b_stride, c + at, c_stride, n);
    for (; at + 2 * kLanes <= width; at += 2 * kLanes)
        float_panel_rows<2>(n_rows, a, a_stride, b + at, b_stride, c + at, c_stride, n);
    for (; at < width; at += kLanes)
        float_panel_rows<1>(n_rows, a, a_stride, b + at, b_stride, c + at, c_stride, n);
}

}  // namespace covey
