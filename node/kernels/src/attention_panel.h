// The float product of attention: C = A * B, or C += A * B if kAdds, with B as the cache stores it.
//
// Each element of C adds its terms one by one in the order of B's rows, whatever the blocking.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention_cache.h"

namespace covey {

constexpr int kPanelQueries = 6;  // 6 rows x 4 vectors of sums fill the 32 registers of AVX-512

// Loaded and not splat(0), at which GCC 12 breaks down when it compiles for plain SSE2.
alignas(64) constexpr float kZeros[kLanes] = {};

inline __attribute__((always_inline)) void prefetch(const void* p, std::size_t bytes) {
    for (std::size_t line = 0; line < bytes; line += 64)
        __builtin_prefetch(static_cast<const char*>(p) + line, 0, 2);
}

// C[R][16 * N] (+)= A[R][n] * B[n][16 * N]; meanwhile fetches as much from `ahead` as is read of B.
template <bool kAdds, int R, int N, class B>
inline void panel(const float* a, int64_t a_stride, const B* b, const B* ahead, int64_t b_stride,
                  float* c, int64_t c_stride, int n) {
    F32x16 sums[R][N];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < N; v++)
            sums[r][v] = load(kAdds ? c + r * c_stride + v * kLanes : kZeros);
    for (int i = 0; i < n; i++) {
        if (ahead) prefetch(ahead + i * b_stride, N * kLanes * sizeof(B));
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

template <bool kAdds, int N, class B>
inline void panel_rows(int n_rows, const float* a, int64_t a_stride, const B* b, const B* ahead,
                       int64_t b_stride, float* c, int64_t c_stride, int n) {
    switch (n_rows) {
        case 6: return panel<kAdds, 6, N>(a, a_stride, b, ahead, b_stride, c, c_stride, n);
        case 5: return panel<kAdds, 5, N>(a, a_stride, b, ahead, b_stride, c, c_stride, n);
        case 4: return panel<kAdds, 4, N>(a, a_stride, b, ahead, b_stride, c, c_stride, n);
        case 3: return panel<kAdds, 3, N>(a, a_stride, b, ahead, b_stride, c, c_stride, n);
        case 2: return panel<kAdds, 2, N>(a, a_stride, b, ahead, b_stride, c, c_stride, n);
        default: return panel<kAdds, 1, N>(a, a_stride, b, ahead, b_stride, c, c_stride, n);
    }
}

// C[n_rows][width] (+)= A[n_rows][n] * B[n][width]; n_rows at most 6, width a multiple of 16.
template <bool kAdds, class B>
inline void attention_product(int n_rows, int width, const float* a, int64_t a_stride, const B* b,
                              const B* ahead, int64_t b_stride, float* c, int64_t c_stride, int n) {
    const auto fetched = [&](int at) { return ahead ? ahead + at : nullptr; };
    int at = 0;
    for (; at + 4 * kLanes <= width; at += 4 * kLanes)
        panel_rows<kAdds, 4>(n_rows, a, a_stride, b + at, fetched(at), b_stride, c + at, c_stride, n);
    for (; at + 2 * kLanes <= width; at += 2 * kLanes)
        panel_rows<kAdds, 2>(n_rows, a, a_stride, b + at, fetched(at), b_stride, c + at, c_stride, n);
    for (; at < width; at += kLanes)
        panel_rows<kAdds, 1>(n_rows, a, a_stride, b + at, fetched(at), b_stride, c + at, c_stride, n);
}

}  // namespace covey
