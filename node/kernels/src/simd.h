// Sixteen floats at a time: the one vocabulary in which all float arithmetic is written.
//
// Both versions below round every operation alike (IEEE single, fma fused, nearest even) and add
// lanes up in the same order, so whatever is built on them gives the same bits on every
// instruction set. Compile with -ffp-contract=off: nothing is fused that does not say `fma`.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include <immintrin.h>
#define COVEY_SIMD_AVX512 1
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace covey {

constexpr int kLanes = 16;

// 1.5 * 2^23: a whole number below 2^22 in magnitude added to it, as floats or to its bits as
// integers, gives the same bits; so adding it rounds, and integers become floats for nothing.
constexpr float kWholeBias = 12582912.0f;
constexpr int32_t kWholeBiasBits = 0x4B400000;

#ifdef COVEY_SIMD_AVX512

struct F32x16 {
    __m512 v;
};

inline F32x16 splat(float x) { return {_mm512_set1_ps(x)}; }
inline F32x16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, F32x16 a) { _mm512_storeu_ps(p, a.v); }
inline F32x16 load(const uint16_t* half) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(half)))};
}
inline void store(uint16_t* half, F32x16 a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(half),
                        _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline F32x16 operator+(F32x16 a, F32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F32x16 operator-(F32x16 a, F32x16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F32x16 operator*(F32x16 a, F32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F32x16 operator/(F32x16 a, F32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// The second operand if either is NaN, so `min(constant, x)` keeps a NaN in x.
inline F32x16 min(F32x16 a, F32x16 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F32x16 max(F32x16 a, F32x16 b) { return {_mm512_max_ps(a.v, b.v)}; }

// The first n lanes of a, `other` in the rest.
inline F32x16 keep_first(F32x16 a, int n, F32x16 other) {
    const __mmask16 kept = n >= kLanes ? 0xFFFF : static_cast<__mmask16>((1u << n) - 1);
    return {_mm512_mask_blend_ps(kept, other.v, a.v)};
}

// a * 2^n where n is the whole number that was added to kWholeBias to make `biased`.
inline F32x16 scale_by_power(F32x16 a, F32x16 biased) {
    const __m512i bits = _mm512_castps_si512(biased.v);  // the low bits of the fraction are n
    const __m512i exponent =
        _mm512_slli_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(127)), 23);
    return {_mm512_mul_ps(a.v, _mm512_castsi512_ps(exponent))};
}

template <class Reduce256, class Reduce128>
inline float reduce_halves(__m512 v, Reduce256 r256, Reduce128 r128) {
    const __m256 by8 = r256(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    const __m128 by4 = r128(_mm256_castps256_ps128(by8), _mm256_extractf128_ps(by8, 1));
    const __m128 by2 = r128(by4, _mm_movehl_ps(by4, by4));
    return _mm_cvtss_f32(r128(by2, _mm_movehdup_ps(by2)));
}
inline float sum(F32x16 a) {
    return reduce_halves(
        a.v, [](__m256 x, __m256 y) { return _mm256_add_ps(x, y); },
        [](__m128 x, __m128 y) { return _mm_add_ps(x, y); });
}
inline float max_lane(F32x16 a) {
    return reduce_halves(
        a.v, [](__m256 x, __m256 y) { return _mm256_max_ps(x, y); },
        [](__m128 x, __m128 y) { return _mm_max_ps(x, y); });
}

#else  // portable: GCC's and Clang's vector extension becomes whatever the target has

struct F32x16 {
    typedef float Vector __attribute__((vector_size(64)));
    Vector v;
};
typedef int32_t I32x16 __attribute__((vector_size(64)));
typedef uint32_t U32x16 __attribute__((vector_size(64)));

#if defined(__FP_FAST_FMAF) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)

inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
    for (int i = 0; i < kLanes; i++) a.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
    return a;
}

#else

// a * b + c rounded once: the product is exact in double, the sum is rounded to odd there, and so
// the last rounding is right (Boldo and Melquiond, "Emulation of FMA", 2008).
inline float fused(float a, float b, float c) {
    const double product = static_cast<double>(a) * b;
    const double total = product + c;
    const double virtual_c = total - product;
    const double error = (product - (total - virtual_c)) + (c - virtual_c);
    uint64_t bits;
    std::memcpy(&bits, &total, sizeof bits);
    if (error != 0 && (bits & 1) == 0) bits += (error > 0) == (total > 0) ? 1 : -1;
    double odd;
    std::memcpy(&odd, &bits, sizeof odd);
    return static_cast<float>(odd);
}

inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
#ifdef __SSE2__
    // Only a total half way between two floats, or one below the normal floats, can go wrong.
    const __m128i fraction = _mm_set_epi32(0, 0x1FFFFFFF, 0, 0x1FFFFFFF);
    const __m128i half_way = _mm_set_epi32(-1, 0x10000000, -1, 0x10000000);
    const __m128d magnitude = _mm_castsi128_pd(_mm_set1_epi64x(0x7FFFFFFFFFFFFFFF));
    const __m128d smallest_normal = _mm_set1_pd(1.17549435082228751e-38);
    __m128i doubtful = _mm_setzero_si128();
    const auto total_of = [&](__m128 x, __m128 y, __m128 z) {  // of the two low lanes
        const __m128d total =
            _mm_add_pd(_mm_mul_pd(_mm_cvtps_pd(x), _mm_cvtps_pd(y)), _mm_cvtps_pd(z));
        const __m128d tiny = _mm_and_pd(_mm_cmplt_pd(_mm_and_pd(total, magnitude), smallest_normal),
                                        _mm_cmpneq_pd(total, _mm_setzero_pd()));
        const __m128i tie =
            _mm_cmpeq_epi32(_mm_and_si128(_mm_castpd_si128(total), fraction), half_way);
        doubtful = _mm_or_si128(doubtful, _mm_or_si128(_mm_castpd_si128(tiny), tie));
        return _mm_cvtpd_ps(total);
    };
    float x[kLanes], y[kLanes], z[kLanes], out[kLanes];
    std::memcpy(x, &a, sizeof x);
    std::memcpy(y, &b, sizeof y);
    std::memcpy(z, &c, sizeof z);
    for (int i = 0; i < kLanes; i += 4) {
        const __m128 p = _mm_loadu_ps(x + i), q = _mm_loadu_ps(y + i), r = _mm_loadu_ps(z + i);
        const __m128 low = total_of(p, q, r);
        const __m128 high =
            total_of(_mm_movehl_ps(p, p), _mm_movehl_ps(q, q), _mm_movehl_ps(r, r));
        _mm_storeu_ps(out + i, _mm_movelh_ps(low, high));
    }
    if (__builtin_expect(_mm_movemask_epi8(doubtful) == 0, 1)) {
        std::memcpy(&a, out, sizeof a);
        return a;
    }
#endif
    for (int i = 0; i < kLanes; i++) a.v[i] = fused(a.v[i], b.v[i], c.v[i]);
    return a;
}

#endif

// fp16 <-> fp32 as the F16C instructions do it: nearest even, subnormals kept.
inline float half_to_float(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
    uint32_t bits = static_cast<uint32_t>(half & 0x7FFF) << 13;
    float value;
    if (bits >= 0x0F800000) {  // infinity or NaN
        bits |= 0x7F800000 | (bits > 0x0F800000 ? 0x00400000 : 0);
        std::memcpy(&value, &bits, sizeof value);
    } else {
        std::memcpy(&value, &bits, sizeof value);
        value *= 5.192296858534828e33f;  // 2^112, exact: moves the exponent's bias
    }
    std::memcpy(&bits, &value, sizeof bits);
    bits |= sign;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline uint16_t float_to_half(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    bits &= 0x7FFFFFFF;
    if (bits > 0x7F800000) return sign | 0x7E00 | (bits >> 13 & 0x3FF);
    if (bits >= 0x477FF000) return sign | 0x7C00;  // rounds to 65536 or more
    if (bits < 0x38800000) {                       // below the normal halves: counts of 2^-24
        float magnitude;
        std::memcpy(&magnitude, &bits, sizeof magnitude);
        magnitude += 0.5f;  // the adder rounds to 2^-24
        std::memcpy(&bits, &magnitude, sizeof bits);
        return sign | static_cast<uint16_t>(bits - 0x3F000000);
    }
    const uint32_t rounded = bits - 0x38000000 + 0xFFF + (bits >> 13 & 1);
    return sign | static_cast<uint16_t>(rounded >> 13);
}

inline F32x16 splat(float x) { return {F32x16::Vector{} + x}; }
inline F32x16 load(const float* p) {
    F32x16 a;
    std::memcpy(&a, p, sizeof a);
    return a;
}
inline void store(float* p, F32x16 a) { std::memcpy(p, &a, sizeof a); }
inline F32x16 load(const uint16_t* half) {
    F32x16 a;
    for (int i = 0; i < kLanes; i++) a.v[i] = half_to_float(half[i]);
    return a;
}
inline void store(uint16_t* half, F32x16 a) {
    for (int i = 0; i < kLanes; i++) half[i] = float_to_half(a.v[i]);
}
inline F32x16 operator+(F32x16 a, F32x16 b) { return {a.v + b.v}; }
inline F32x16 operator-(F32x16 a, F32x16 b) { return {a.v - b.v}; }
inline F32x16 operator*(F32x16 a, F32x16 b) { return {a.v * b.v}; }
inline F32x16 operator/(F32x16 a, F32x16 b) { return {a.v / b.v}; }
inline F32x16 min(F32x16 a, F32x16 b) { return {a.v < b.v ? a.v : b.v}; }
inline F32x16 max(F32x16 a, F32x16 b) { return {a.v > b.v ? a.v : b.v}; }
inline F32x16 keep_first(F32x16 a, int n, F32x16 other) {
    const I32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return {lane < n ? a.v : other.v};
}
inline F32x16 scale_by_power(F32x16 a, F32x16 biased) {
    U32x16 bits;
    std::memcpy(&bits, &biased, sizeof bits);
    bits = (bits + 127) << 23;
    F32x16 power;
    std::memcpy(&power, &bits, sizeof power);
    return a * power;
}
inline float sum(F32x16 a) {
    float lanes[kLanes];
    store(lanes, a);
    for (int half = kLanes / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}
inline float max_lane(F32x16 a) {
    float lanes[kLanes];
    store(lanes, a);
    for (int half = kLanes / 2; half; half /= 2)
        for (int i = 0; i < half; i++)
            lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
    return lanes[0];
}

#endif

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
