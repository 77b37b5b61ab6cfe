// AVX-512 with VNNI: one `vpdpbusd` multiplies 16 rows x 4 columns.
#pragma once

#include <immintrin.h>

namespace covey {

constexpr int kPanelRows = 12;       // 12 totals and 12 sums fill the registers, and 12 chains hide
                                     // the latency of the products
constexpr int kFloatPanelRows = 12;  // of two sums each
constexpr int kUnpackFrom = 25;      // activation rows from which unpacking weights pays; measured

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

inline F32x16 load_bf16(const uint16_t* p) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16))};
}
inline F32x16 load(const int8_t* p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))};
}
// The low and the high four bits of each byte, as floats.
inline F32x16 load_low_nibbles(const uint8_t* p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm512_cvtepi32_ps(
        _mm512_and_si512(_mm512_cvtepu8_epi32(bytes), _mm512_set1_epi32(15)))};
}
inline F32x16 load_high_nibbles(const uint8_t* p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm512_cvtepi32_ps(_mm512_srli_epi32(_mm512_cvtepu8_epi32(bytes), 4))};
}

struct U8x64 {
    __m512i v;
};

COVEY_INLINE U8x64 load_bytes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
COVEY_INLINE void store_bytes(uint8_t* p, U8x64 a) { _mm512_storeu_si512(p, a.v); }
COVEY_INLINE U8x64 operator|(U8x64 a, U8x64 b) { return {_mm512_or_si512(a.v, b.v)}; }

// Bits [from, from + n) of each byte moved to [to, to + n), zeros elsewhere.
template <int from, int n, int to>
COVEY_INLINE U8x64 move_bits(U8x64 a) {
    if constexpr (n == 8) return a;
    if constexpr (to > from) a.v = _mm512_slli_epi16(a.v, to - from);
    if constexpr (to < from) a.v = _mm512_srli_epi16(a.v, from - to);
    return {_mm512_and_si512(a.v, _mm512_set1_epi8(static_cast<char>(((1 << n) - 1) << to)))};
}

// table[code] of each byte, which is below 16.
COVEY_INLINE U8x64 lookup(const uint8_t* table, U8x64 codes) {
    const __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
    return {_mm512_shuffle_epi8(_mm512_broadcast_i32x4(entries), codes.v)};
}

// `vpdpbusd` takes unsigned weights, so centred ones are shifted up to be bytes around 128, and
// their sums start from less: -128 times the sum of the activations.
template <class C>
constexpr int kCodesAt = C::kShift;
template <class C>
COVEY_INLINE U8x64 weights_of(U8x64 codes) {
    return codes;
}
inline float centred_start(int32_t sum) { return kWholeBias - 128.0f * static_cast<float>(sum); }

// out[row] = kWholeBias + the sum over 4 * N columns of weight times activation: weights(j) are
// those of columns 4j to 4j + 3, activations are at bytes + 32 * row. starts[row] is
// centred_start of the row's sum; read for centred weights only.
template <class C, int W, int N, class Weights>
COVEY_INLINE void dots(const Weights& weights, const int8_t* bytes, const float* starts,
                       F32x16* out) {
    __m512i sums[W];
#pragma GCC unroll 12
    for (int row = 0; row < W; row++)
        sums[row] = C::kCentred ? _mm512_castps_si512(_mm512_set1_ps(starts[row]))
                                : _mm512_set1_epi32(kWholeBiasBits);
    // Column by column over all rows: a row's products depend on each other.
    unrolled<N>([&](auto j) __attribute__((always_inline)) {
        const __m512i four_columns = weights(j).v;
#pragma GCC unroll 12
        for (int row = 0; row < W; row++)
            sums[row] = _mm512_dpbusd_epi32(
                sums[row], four_columns, _mm512_set1_epi32(four_bytes(bytes + 32 * row + 4 * j)));
    });
#pragma GCC unroll 12
    for (int row = 0; row < W; row++) out[row] = {_mm512_castsi512_ps(sums[row])};
}

// dot, which has kWholeBias added, times scale: offset is -kWholeBias * scale, which is exact.
inline F32x16 scale_dot(F32x16 dot, float scale, float offset) {
    return fma(dot, splat(scale), splat(offset));
}

// Bits of the largest magnitude of 32 floats; those of a NaN are larger than any other's.
inline uint32_t largest_magnitude(const float* x) {
    const __m512i mask = _mm512_set1_epi32(0x7FFFFFFF);
    const __m512i low = _mm512_and_si512(_mm512_loadu_si512(x), mask);
    const __m512i high = _mm512_and_si512(_mm512_loadu_si512(x + kLanes), mask);
    return _mm512_reduce_max_epu32(_mm512_max_epu32(low, high));
}

// bytes = round(x * factor), 32 of them, none beyond 127.
inline HalfSums round_to_bytes(const float* x, float factor, int8_t* bytes) {
    const auto whole = [&](int at) {
        return _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + at), _mm512_set1_ps(factor)));
    };
    const __m256i all = _mm256_set_m128i(_mm512_cvtepi32_epi8(whole(kLanes)),
                                         _mm512_cvtepi32_epi8(whole(0)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(bytes), all);
    __m256i sums = _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(1), all);
    sums = _mm256_add_epi32(sums, _mm256_shuffle_epi32(sums, 0x4E));
    sums = _mm256_add_epi32(sums, _mm256_shuffle_epi32(sums, 0xB1));
    return {_mm256_extract_epi32(sums, 0), _mm256_extract_epi32(sums, 4)};
}

}  // namespace covey
