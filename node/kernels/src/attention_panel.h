// The float product of attention: C += A * B with B as the cache stores it.
//
// Each element of C adds its terms one by one in the order of B's rows, whatever the blocking.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention_cache.h"

namespace covey {

constexpr int kPanelQueries = 6;  // 6 rows x 4 vectors of sums fill the 32 registers of AVX-512

inline __attribute__((always_inline)) void prefetch(const void* p, std::size_t bytes) {
    for (std::size_t line = 0; line < bytes; line += 64)
        __builtin_prefetch(static_cast<const char*>(p) + line);
}

// C[R][16 * N] += A[R][n] * B[n][16 * N]; meanwhile fetches as much from `ahead` as is read of B.
template <int R, int N, class B>
inline void panel(const float* a, int64_t a_stride, const B* b, const B* ahead, int64_t b_stride,
                  float* c, int64_t c_stride, int n) {
    F32x16 sums[R][N];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < N; v++)
            sums[r][v] = load(c + r * c_stride + v * kLanes);
    for (int i = 0; i < n; i++) {
        if (ahead) prefetch(ahead + i * b_stride, N * kLanes * sizeof(B));
        F32x16 row[N];
        for (int v = 0; v < N; v++) row[v] = widen(b + i * b_stride + v * kLanes);
        for (int r = 0; r < R; r++) {
            const F32x16 x = splat(a[r * a_stride + i]);
            for (int v = 0; v < N; v++) sums[r][v] = fma(x, row[v], sums[r][v]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < N; v++) store(c + r * c_stride + v * kLanes, sums[r][v]);
}

template <int N, class B>
inline void panel_rows(int n_rows, const float* a, int64_t a_stride, const B* b, const B* ahead,
                       int64_t b_stride, float* c, int64_t c_stride, int n) {
    switch (n_rows) {
        case 6: return panel<6, N>(a, a_stride, b, ahead, b_stride, c, c_stride, n);
        case 5: return panel<5, N>(a, a_stride, b, ahead, b_stride, c, c_stride, n);
        case 4: return panel<4, N>(a, a_stride, b, ahead, b_stride, c, c_stride, n);
        case 3: return panel<3, N>(a, a_stride, b, ahead, b_stride, c, c_stride, n);
        case 2: return panel<2, N>(a, a_stride, b, ahead, b_stride, c, c_stride, n);
        default: return panel<1, N>(a, a_stride, b, ahead, b_stride, c, c_stride, n);
    }
}

// C[n_rows][width] += A[n_rows][n] * B[n][width]; n_rows at most 6, width a multiple of 16.
template <class B>
inline void attention_product(int n_rows, int width, const float* a, int64_t a_stride, const B* b,
                              const B* ahead, int64_t b_stride, float* c, int64_t c_stride, int n) {
    const auto fetched = [&](int at) { return ahead ? ahead + at : nullptr; };
    int at = 0;
    for (; at + 4 * kLanes <= width; at += 4 * kLanes)
        panel_rows<4>(n_rows, a, a_stride, b + at, fetched(at), b_stride, c + at, c_stride, n);
    for (; at + 2 * kLanes <= width; at += 2 * kLanes)
        panel_rows<2>(n_rows, a, a_stride, b + at, fetched(at), b_stride, c + at, c_stride, n);
    for (; at < width; at += kLanes)
        panel_rows<1>(n_rows, a, a_stride, b + at, fetched(at), b_stride, c + at, c_stride, n);
}

}  // namespace covey
