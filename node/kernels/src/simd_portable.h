// Plain C++: GCC's and Clang's vector extension becomes whatever the target has. What runs where no
// faster version was built, and the reference that those are compared with, bit for bit.
#pragma once

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace covey {

constexpr int kPanelRows = 2;
constexpr int kFloatPanelRows = 1;
constexpr int kUnpackFrom = 4;

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
inline F32x16 half_to_float(U32x16 half) {
    U32x16 bits = (half & 0x7FFF) << 13;
    const U32x16 not_finite = reinterpret_cast<U32x16>(bits >= 0x0F800000);
    const U32x16 nan = reinterpret_cast<U32x16>(bits > 0x0F800000);
    F32x16 value;
    std::memcpy(&value, &bits, sizeof value);
    value.v *= 5.192296858534828e33f;  // 2^112, exact: moves the exponent's bias
    U32x16 scaled;
    std::memcpy(&scaled, &value, sizeof scaled);
    bits |= 0x7F800000 | (nan & 0x00400000);
    bits = (not_finite & bits) | (~not_finite & scaled) | (half & 0x8000) << 16;
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
inline U32x16 load_u16(const uint16_t* p) {
    typedef uint16_t U16x16 __attribute__((vector_size(32)));
    U16x16 narrow;
    std::memcpy(&narrow, p, sizeof narrow);
    return __builtin_convertvector(narrow, U32x16);
}
inline F32x16 load(const uint16_t* half) { return half_to_float(load_u16(half)); }
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

inline F32x16 load_bf16(const uint16_t* p) {
    const U32x16 bits = load_u16(p) << 16;
    F32x16 a;
    std::memcpy(&a, &bits, sizeof a);
    return a;
}
inline F32x16 load(const int8_t* p) {
    F32x16 a;
    for (int i = 0; i < kLanes; i++) a.v[i] = static_cast<float>(p[i]);
    return a;
}
// The low and the high four bits of each byte, as floats.
inline F32x16 load_low_nibbles(const uint8_t* p) {
    F32x16 a;
    for (int i = 0; i < kLanes; i++) a.v[i] = static_cast<float>(p[i] & 15);
    return a;
}
inline F32x16 load_high_nibbles(const uint8_t* p) {
    F32x16 a;
    for (int i = 0; i < kLanes; i++) a.v[i] = static_cast<float>(p[i] >> 4);
    return a;
}

struct U8x64 {
    typedef uint8_t Vector __attribute__((vector_size(64)));
    Vector v;
};

inline U8x64 load_bytes(const uint8_t* p) {
    U8x64 a;
    std::memcpy(&a, p, sizeof a);
    return a;
}
inline void store_bytes(uint8_t* p, U8x64 a) { std::memcpy(p, &a, sizeof a); }
inline U8x64 operator|(U8x64 a, U8x64 b) { return {a.v | b.v}; }

// Bits [from, from + n) of each byte moved to [to, to + n), zeros elsewhere.
template <int from, int n, int to>
inline U8x64 move_bits(U8x64 a) {
    if constexpr (n == 8) return a;
    // Shifts of wider numbers: what comes from the neighbouring byte is masked away.
    typedef uint16_t Pairs __attribute__((vector_size(64)));
    Pairs pairs;
    std::memcpy(&pairs, &a, sizeof pairs);
    if constexpr (to > from) pairs <<= to - from;
    if constexpr (to < from) pairs >>= from - to;
    std::memcpy(&a, &pairs, sizeof a);
    return {a.v & static_cast<uint8_t>(((1 << n) - 1) << to)};
}

// table[code] of each byte, which is below 16.
inline U8x64 lookup(const uint8_t* table, U8x64 codes) {
    uint8_t bytes[64];
    store_bytes(bytes, codes);
    for (uint8_t& byte : bytes) byte = table[byte];
    return load_bytes(bytes);
}

// Weights are multiplied as signed bytes: centred ones as code - 2^(kBits - 1), codes as they are.
template <class C>
constexpr int kCodesAt = 0;
template <class C>
inline U8x64 weights_of(U8x64 codes) {
    if constexpr (C::kCentred) codes.v -= static_cast<uint8_t>(C::kLargest);
    return codes;
}
inline float centred_start(int32_t) { return kWholeBias; }

// Four activations as numbers of 16 bits, twice: four, four.
struct Four {
#ifdef __SSE2__
    __m128i v;
    static Four at(const int8_t* bytes) {
        const __m128i twice = _mm_cvtsi32_si128(four_bytes(bytes));
        const __m128i wide = _mm_srai_epi16(_mm_unpacklo_epi8(twice, twice), 8);
        return {_mm_unpacklo_epi64(wide, wide)};
    }
#else
    int16_t v[8];
    static Four at(const int8_t* bytes) {
        return {{bytes[0], bytes[1], bytes[2], bytes[3], bytes[0], bytes[1], bytes[2], bytes[3]}};
    }
#endif
};

// sums[i] = products of weights 2i and 2i + 1 of 16 bytes with two of the four activations, added up
// over n times 16 bytes, 64 apart.
inline void sum_products(const int8_t* weights, const Four* x, int n, int32_t* sums) {
#ifdef __SSE2__
    __m128i low = _mm_setzero_si128(), high = low;
    for (int j = 0; j < n; j++) {
        const __m128i w = _mm_loadu_si128(reinterpret_cast<const __m128i*>(weights + 64 * j));
        const auto products = [&](__m128i twice) {  // a byte in the upper half of 16 bits
            return _mm_madd_epi16(_mm_srai_epi16(twice, 8), x[j].v);
        };
        low = _mm_add_epi32(low, products(_mm_unpacklo_epi8(w, w)));
        high = _mm_add_epi32(high, products(_mm_unpackhi_epi8(w, w)));
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(sums), low);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(sums + 4), high);
#else
    for (int i = 0; i < 8; i++) {
        sums[i] = 0;
        for (int j = 0; j < n; j++)
            sums[i] += weights[64 * j + 2 * i] * x[j].v[2 * i % 8] +
                       weights[64 * j + 2 * i + 1] * x[j].v[2 * i % 8 + 1];
    }
#endif
}

// out[row] = kWholeBias + the sum over 4 * N columns of weight times activation: weights(j) are
// those of columns 4j to 4j + 3, activations are at bytes + 32 * row.
template <class C, int W, int N, class Weights>
inline void dots(const Weights& weights, const int8_t* bytes, const float*, F32x16* out) {
    uint8_t all[64 * N];
    unrolled<N>([&](auto j) { store_bytes(all + 64 * j, weights(j)); });
    for (int row = 0; row < W; row++) {
        Four x[N];
        for (int j = 0; j < N; j++) x[j] = Four::at(bytes + 32 * row + 4 * j);
        int32_t sums[2 * kLanes];
        for (int i = 0; i < 64; i += 16)
            sum_products(reinterpret_cast<const int8_t*>(all) + i, x, N, sums + i / 2);
        for (int i = 0; i < kLanes; i++)
            out[row].v[i] = kWholeBias + static_cast<float>((sums[2 * i] + sums[2 * i + 1]) *
                                                            (1 << C::kShift));
    }
}
// Where fma is a computation of its own, this is the same and cheaper.
inline F32x16 scale_dot(F32x16 dot, float scale, float) {
    return (dot - splat(kWholeBias)) * splat(scale);
}

// Bits of the largest magnitude of 32 floats; those of a NaN are larger than any other's.
inline uint32_t largest_magnitude(const float* x) {
    uint32_t largest = 0;
    for (int i = 0; i < 2 * kLanes; i++) {
        uint32_t bits;
        std::memcpy(&bits, x + i, sizeof bits);
        bits &= 0x7FFFFFFF;
        largest = bits > largest ? bits : largest;
    }
    return largest;
}

// bytes = round(x * factor), 32 of them, none beyond 127.
inline HalfSums round_to_bytes(const float* x, float factor, int8_t* bytes) {
    int32_t sums[2] = {};
    for (int i = 0; i < 2 * kLanes; i++) {
        // The sum is rounded to a whole number, which is then in its low bits.
        const float biased = x[i] * factor + kWholeBias;
        int32_t bits;
        std::memcpy(&bits, &biased, sizeof bits);
        bytes[i] = static_cast<int8_t>(bits - kWholeBiasBits);
        sums[i / kLanes] += bits - kWholeBiasBits;
    }
    return {sums[0], sums[1]};
}

}  // namespace covey
