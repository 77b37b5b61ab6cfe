// AVX2 with FMA and F16C, and AVX-VNNI where the compiler is told that there is.
//
// A F32x16 or U8x64 is two registers: rows 0 to 7 and rows 8 to 15.
#pragma once

#include <immintrin.h>

namespace covey {

#ifdef __AVXVNNI__
constexpr int kPanelRows = 6;
#else
constexpr int kPanelRows = 4;
#endif
constexpr int kFloatPanelRows = 3;
constexpr int kUnpackFrom = 8;

struct F32x16 {
    __m256 v[2];
};

// One operation on both registers.
template <class Operation, class... Operands>
COVEY_INLINE F32x16 on_both(Operation operation, const Operands&... operands) {
    return {{operation(operands.v[0]...), operation(operands.v[1]...)}};
}
inline F32x16 splat(float x) { return {{_mm256_set1_ps(x), _mm256_set1_ps(x)}}; }
inline F32x16 load(const float* p) { return {{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}}; }
inline void store(float* p, F32x16 a) {
    _mm256_storeu_ps(p, a.v[0]);
    _mm256_storeu_ps(p + 8, a.v[1]);
}
inline __m128i load_128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline F32x16 load(const uint16_t* half) {
    return {{_mm256_cvtph_ps(load_128(half)), _mm256_cvtph_ps(load_128(half + 8))}};
}
inline void store(uint16_t* half, F32x16 a) {
    for (int i = 0; i < 2; i++)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(half + 8 * i),
                         _mm256_cvtps_ph(a.v[i], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline F32x16 operator+(F32x16 a, F32x16 b) {
    return on_both([](__m256 x, __m256 y) { return _mm256_add_ps(x, y); }, a, b);
}
inline F32x16 operator-(F32x16 a, F32x16 b) {
    return on_both([](__m256 x, __m256 y) { return _mm256_sub_ps(x, y); }, a, b);
}
inline F32x16 operator*(F32x16 a, F32x16 b) {
    return on_both([](__m256 x, __m256 y) { return _mm256_mul_ps(x, y); }, a, b);
}
inline F32x16 operator/(F32x16 a, F32x16 b) {
    return on_both([](__m256 x, __m256 y) { return _mm256_div_ps(x, y); }, a, b);
}
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
    return on_both([](__m256 x, __m256 y, __m256 z) { return _mm256_fmadd_ps(x, y, z); }, a, b, c);
}
// The second operand if either is NaN, so `min(constant, x)` keeps a NaN in x.
inline F32x16 min(F32x16 a, F32x16 b) {
    return on_both([](__m256 x, __m256 y) { return _mm256_min_ps(x, y); }, a, b);
}
inline F32x16 max(F32x16 a, F32x16 b) {
    return on_both([](__m256 x, __m256 y) { return _mm256_max_ps(x, y); }, a, b);
}

// The first n lanes of a, `other` in the rest.
inline F32x16 keep_first(F32x16 a, int n, F32x16 other) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const auto half = [&](int i) {
        const __m256i kept = _mm256_cmpgt_epi32(_mm256_set1_epi32(n - 8 * i), lane);
        return _mm256_blendv_ps(other.v[i], a.v[i], _mm256_castsi256_ps(kept));
    };
    return {{half(0), half(1)}};
}

// a * 2^n where n is the whole number that was added to kWholeBias to make `biased`.
inline F32x16 scale_by_power(F32x16 a, F32x16 biased) {
    return on_both(
        [](__m256 x, __m256 y) {
            const __m256i exponent =
                _mm256_add_epi32(_mm256_castps_si256(y), _mm256_set1_epi32(127));
            return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
        },
        a, biased);
}

template <class Reduce>
inline float reduce_quarters(__m256 by8, Reduce reduce) {
    const __m128 by4 = reduce(_mm256_castps256_ps128(by8), _mm256_extractf128_ps(by8, 1));
    const __m128 by2 = reduce(by4, _mm_movehl_ps(by4, by4));
    return _mm_cvtss_f32(reduce(by2, _mm_movehdup_ps(by2)));
}
inline float sum(F32x16 a) {
    return reduce_quarters(_mm256_add_ps(a.v[0], a.v[1]),
                           [](__m128 x, __m128 y) { return _mm_add_ps(x, y); });
}
inline float max_lane(F32x16 a) {
    return reduce_quarters(_mm256_max_ps(a.v[0], a.v[1]),
                           [](__m128 x, __m128 y) { return _mm_max_ps(x, y); });
}

inline F32x16 load_bf16(const uint16_t* p) {
    const auto half = [&](int i) {
        const __m256i wide = _mm256_cvtepu16_epi32(load_128(p + 8 * i));
        return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
    };
    return {{half(0), half(1)}};
}
inline __m128i load_64(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }
inline F32x16 load(const int8_t* p) {
    const auto half = [&](int i) {
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(load_64(p + 8 * i)));
    };
    return {{half(0), half(1)}};
}
// The low and the high four bits of each byte, as floats.
inline F32x16 load_low_nibbles(const uint8_t* p) {
    const auto half = [&](int i) {
        const __m256i bytes = _mm256_cvtepu8_epi32(load_64(p + 8 * i));
        return _mm256_cvtepi32_ps(_mm256_and_si256(bytes, _mm256_set1_epi32(15)));
    };
    return {{half(0), half(1)}};
}
inline F32x16 load_high_nibbles(const uint8_t* p) {
    const auto half = [&](int i) {
        const __m256i bytes = _mm256_cvtepu8_epi32(load_64(p + 8 * i));
        return _mm256_cvtepi32_ps(_mm256_srli_epi32(bytes, 4));
    };
    return {{half(0), half(1)}};
}

struct U8x64 {
    __m256i v[2];
};

COVEY_INLINE U8x64 load_bytes(const uint8_t* p) {
    const auto* at = reinterpret_cast<const __m256i*>(p);
    return {{_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1)}};
}
COVEY_INLINE void store_bytes(uint8_t* p, U8x64 a) {
    auto* at = reinterpret_cast<__m256i*>(p);
    _mm256_storeu_si256(at, a.v[0]);
    _mm256_storeu_si256(at + 1, a.v[1]);
}
COVEY_INLINE U8x64 operator|(U8x64 a, U8x64 b) {
    return {{_mm256_or_si256(a.v[0], b.v[0]), _mm256_or_si256(a.v[1], b.v[1])}};
}

// Bits [from, from + n) of each byte moved to [to, to + n), zeros elsewhere.
template <int from, int n, int to>
COVEY_INLINE U8x64 move_bits(U8x64 a) {
    if constexpr (n < 8) {
        for (__m256i& v : a.v) {
            if constexpr (to > from) v = _mm256_slli_epi16(v, to - from);
            if constexpr (to < from) v = _mm256_srli_epi16(v, from - to);
            v = _mm256_and_si256(v, _mm256_set1_epi8(static_cast<char>(((1 << n) - 1) << to)));
        }
    }
    return a;
}

// table[code] of each byte, which is below 16.
COVEY_INLINE U8x64 lookup(const uint8_t* table, U8x64 codes) {
    const __m256i entries = _mm256_broadcastsi128_si256(load_128(table));
    for (__m256i& v : codes.v) v = _mm256_shuffle_epi8(entries, v);
    return codes;
}

#ifdef __AVXVNNI__

// As with AVX-512: `vpdpbusd` takes unsigned weights, so centred ones are shifted up to be bytes
// around 128, and their sums start from less: -128 times the sum of the activations.
template <class C>
constexpr int kCodesAt = C::kShift;
template <class C>
COVEY_INLINE U8x64 weights_of(U8x64 codes) {
    return codes;
}
inline float centred_start(int32_t sum) { return kWholeBias - 128.0f * static_cast<float>(sum); }

template <class C, int W, int N, class Weights>
COVEY_INLINE void dots(const Weights& weights, const int8_t* bytes, const float* starts,
                       F32x16* out) {
    __m256i sums[W][2];
#pragma GCC unroll 12
    for (int row = 0; row < W; row++)
        sums[row][0] = sums[row][1] = C::kCentred
                                          ? _mm256_castps_si256(_mm256_set1_ps(starts[row]))
                                          : _mm256_set1_epi32(kWholeBiasBits);
    unrolled<N>([&](auto j) __attribute__((always_inline)) {
        const U8x64 w = weights(j);
#pragma GCC unroll 12
        for (int row = 0; row < W; row++) {
            const __m256i x = _mm256_set1_epi32(four_bytes(bytes + 32 * row + 4 * j));
            sums[row][0] = _mm256_dpbusd_avx_epi32(sums[row][0], w.v[0], x);
            sums[row][1] = _mm256_dpbusd_avx_epi32(sums[row][1], w.v[1], x);
        }
    });
#pragma GCC unroll 12
    for (int row = 0; row < W; row++)
        out[row] = {{_mm256_castsi256_ps(sums[row][0]), _mm256_castsi256_ps(sums[row][1])}};
}

#else

// `vpmaddubsw` takes unsigned weights and adds two products in 16 bits: codes go as they are;
// centred ones, as code - 2^(kBits - 1), give their signs to the activations.
template <class C>
constexpr int kCodesAt = 0;
template <class C>
COVEY_INLINE U8x64 weights_of(U8x64 codes) {
    if constexpr (C::kCentred)
        for (__m256i& v : codes.v)
            v = _mm256_sub_epi8(v, _mm256_set1_epi8(static_cast<char>(C::kLargest)));
    return codes;
}
inline float centred_start(int32_t) { return kWholeBias; }

// out[row] = kWholeBias + the sum over 4 * N columns of weight times activation: weights(j) are
// those of columns 4j to 4j + 3, activations are at bytes + 32 * row.
template <class C, int W, int N, class Weights>
COVEY_INLINE void dots(const Weights& weights, const int8_t* bytes, const float*, F32x16* out) {
    // So many pairs of products are added up in 16 bits; widening shifts centred ones up.
    constexpr int kTogether = C::kFit16 / 2 < N ? C::kFit16 / 2 : N;
    const __m256i widen = _mm256_set1_epi16(1 << C::kShift);
    __m256i pairs[W][2], sums[W][2];
    unrolled<N>([&](auto j) __attribute__((always_inline)) {
        const U8x64 w = weights(j);
        __m256i magnitude[2] = {w.v[0], w.v[1]};
        if constexpr (C::kCentred)
            for (__m256i& v : magnitude) v = _mm256_abs_epi8(v);
#pragma GCC unroll 12
        for (int row = 0; row < W; row++) {
            const __m256i x = _mm256_set1_epi32(four_bytes(bytes + 32 * row + 4 * j));
#pragma GCC unroll 2
            for (int i = 0; i < 2; i++) {
                const __m256i products = _mm256_maddubs_epi16(
                    magnitude[i], C::kCentred ? _mm256_sign_epi8(x, w.v[i]) : x);
                __m256i& pair = pairs[row][i];
                __m256i& sum = sums[row][i];
                pair = j % kTogether == 0 ? products : _mm256_add_epi16(pair, products);
                if (j % kTogether != kTogether - 1 && j != N - 1) continue;
                const __m256i wide = _mm256_madd_epi16(pair, widen);
                sum = _mm256_add_epi32(
                    j < kTogether ? _mm256_set1_epi32(kWholeBiasBits) : sum, wide);
            }
        }
    });
#pragma GCC unroll 12
    for (int row = 0; row < W; row++)
        out[row] = {{_mm256_castsi256_ps(sums[row][0]), _mm256_castsi256_ps(sums[row][1])}};
}

#endif

// dot, which has kWholeBias added, times scale: offset is -kWholeBias * scale, which is exact.
inline F32x16 scale_dot(F32x16 dot, float scale, float offset) {
    return fma(dot, splat(scale), splat(offset));
}

// Bits of the largest magnitude of 32 floats; those of a NaN are larger than any other's.
inline uint32_t largest_magnitude(const float* x) {
    __m256i largest = _mm256_setzero_si256();
    for (int i = 0; i < 4; i++) {
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 8 * i));
        largest = _mm256_max_epi32(largest,
                                   _mm256_and_si256(bits, _mm256_set1_epi32(0x7FFFFFFF)));
    }
    __m128i by4 = _mm_max_epi32(_mm256_castsi256_si128(largest),
                                _mm256_extracti128_si256(largest, 1));
    by4 = _mm_max_epi32(by4, _mm_shuffle_epi32(by4, 0x4E));
    by4 = _mm_max_epi32(by4, _mm_shuffle_epi32(by4, 0xB1));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(by4));
}

// bytes = round(x * factor), 32 of them, none beyond 127.
inline HalfSums round_to_bytes(const float* x, float factor, int8_t* bytes) {
    const auto whole = [&](int at) {
        return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + at), _mm256_set1_ps(factor)));
    };
    // Packing works within 128 bits: the first half's quarters come out as 0 2 | 1 3.
    const auto sixteen = [&](int at) {
        const __m256i words = _mm256_packs_epi32(whole(at), whole(at + 8));
        return _mm256_permute4x64_epi64(words, 0xD8);
    };
    const __m256i low = sixteen(0), high = sixteen(16);
    const __m256i all = _mm256_permute4x64_epi64(_mm256_packs_epi16(low, high), 0xD8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(bytes), all);
    __m256i sums = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), all),
                                     _mm256_set1_epi16(1));
    sums = _mm256_add_epi32(sums, _mm256_shuffle_epi32(sums, 0x4E));
    sums = _mm256_add_epi32(sums, _mm256_shuffle_epi32(sums, 0xB1));
    return {_mm256_extract_epi32(sums, 0), _mm256_extract_epi32(sums, 4)};
}

}  // namespace covey
