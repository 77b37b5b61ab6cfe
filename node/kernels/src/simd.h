// The vocabulary in which all arithmetic is written, one version of it per instruction set.
//
// F32x16 is sixteen floats. Every version rounds every operation alike (IEEE single, fma fused,
// nearest even) and adds lanes up in the same order, so whatever is built on it gives the same bits
// on every instruction set. Compile with -ffp-contract=off: nothing is fused that does not say `fma`.
//
// U8x64 is the weights of 16 rows x 4 columns, a row's four beside each other. `dots` is the one
// operation on them: exact sums of products with signed activation bytes. Beside the types a
// version says how it likes its work cut: kPanelRows, kFloatPanelRows, kUnpackFrom.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <utility>

#define COVEY_INLINE inline __attribute__((always_inline))

namespace covey {

constexpr int kLanes = 16;

// 1.5 * 2^23: a whole number below 2^22 in magnitude added to it, as floats or to its bits as
// integers, gives the same bits; so adding it rounds, and integers become floats for nothing.
constexpr float kWholeBias = 12582912.0f;
constexpr int32_t kWholeBiasBits = 0x4B400000;

// What weights are in an integer product: codes of kBits bits as they are, or, if centred, the
// signed bytes (code << (8 - kBits)) - 128, which are code - 2^(kBits - 1) times a power of two.
template <int kBitsPerCode, bool kIsCentred>
struct Codes {
    static constexpr int kBits = kBitsPerCode;
    static constexpr bool kCentred = kIsCentred;
    static constexpr int kShift = kCentred ? 8 - kBits : 0;
    static constexpr int kLargest = kCentred ? 1 << (kBits - 1) : (1 << kBits) - 1;
    // Products that a sum of 16 bits has room for, activations being 127 at most.
    static constexpr int kFit16 = 32767 / (127 * kLargest);
};

// Sums of the first and the second half of a block of 32 activation bytes.
struct HalfSums {
    int32_t first, second;
};

// body(integral_constant<int, 0>{}), ... body(integral_constant<int, N - 1>{})
template <class Body, int... I>
COVEY_INLINE void unrolled_over(std::integer_sequence<int, I...>, const Body& body) {
    (body(std::integral_constant<int, I>{}), ...);
}
template <int N, class Body>
COVEY_INLINE void unrolled(const Body& body) {
    unrolled_over(std::make_integer_sequence<int, N>{}, body);
}

COVEY_INLINE int32_t four_bytes(const int8_t* p) {
    int32_t bytes;
    std::memcpy(&bytes, p, sizeof bytes);
    return bytes;
}

}  // namespace covey

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && \
    defined(__AVX512DQ__) && defined(__AVX512VNNI__)
#include "simd_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "simd_avx2.h"
#elif defined(__aarch64__) && defined(__ARM_NEON)
#include "simd_neon.h"
#else
#include "simd_portable.h"
#endif

namespace covey {

// e^x to 2e-7 relative, x limited to [-87, 88]; NaN stays NaN. Coefficients: Cephes' expf.
inline F32x16 exp(F32x16 x) {
    x = max(splat(-87.0f), min(splat(88.0f), x));
    const F32x16 biased = fma(x, splat(1.44269504f), splat(kWholeBias));
    const F32x16 n = biased - splat(kWholeBias);
    F32x16 r = fma(n, splat(-0.693359375f), x);
    r = fma(n, splat(2.12194440e-4f), r);
    F32x16 p = splat(1.9875691500e-4f);
    for (float coefficient : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f,
                              1.6666665459e-1f, 5.0000001201e-1f})
        p = fma(p, r, splat(coefficient));
    p = fma(p, r * r, r + splat(1.0f));
    return scale_by_power(p, biased);
}
inline float exp_scalar(float x) {
    float lanes[kLanes];
    store(lanes, exp(splat(x)));
    return lanes[0];
}

}  // namespace covey
