// 64-bit ARM: NEON, which every such CPU has, and the dot product and matrix product instructions
// where the compiler is told that there are.
//
// A F32x16 or U8x64 is four registers, of four rows each.
#pragma once

#include <arm_neon.h>

namespace covey {

#if defined(__ARM_FEATURE_MATMUL_INT8)
constexpr int kPanelRows = 6;
#elif defined(__ARM_FEATURE_DOTPROD)
constexpr int kPanelRows = 4;
#else
constexpr int kPanelRows = 2;
#endif
constexpr int kFloatPanelRows = 3;
constexpr int kUnpackFrom = 8;

struct F32x16 {
    float32x4_t v[4];
};

// One operation on all four registers.
template <class Operation, class... Operands>
COVEY_INLINE F32x16 on_all(Operation operation, const Operands&... operands) {
    return {{operation(operands.v[0]...), operation(operands.v[1]...), operation(operands.v[2]...),
             operation(operands.v[3]...)}};
}
// make(i) for each register.
template <class Make>
COVEY_INLINE F32x16 each_quarter(Make make) {
    return {{make(0), make(1), make(2), make(3)}};
}
inline F32x16 splat(float x) {
    return each_quarter([&](int) { return vdupq_n_f32(x); });
}
inline F32x16 load(const float* p) {
    return each_quarter([&](int i) { return vld1q_f32(p + 4 * i); });
}
inline void store(float* p, F32x16 a) {
    for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, a.v[i]);
}
inline F32x16 load(const uint16_t* half) {
    return each_quarter(
        [&](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(half + 4 * i))); });
}
inline void store(uint16_t* half, F32x16 a) {
    for (int i = 0; i < 4; i++)
        vst1_u16(half + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(a.v[i])));
}
inline F32x16 operator+(F32x16 a, F32x16 b) {
    return on_all([](float32x4_t x, float32x4_t y) { return vaddq_f32(x, y); }, a, b);
}
inline F32x16 operator-(F32x16 a, F32x16 b) {
    return on_all([](float32x4_t x, float32x4_t y) { return vsubq_f32(x, y); }, a, b);
}
inline F32x16 operator*(F32x16 a, F32x16 b) {
    return on_all([](float32x4_t x, float32x4_t y) { return vmulq_f32(x, y); }, a, b);
}
inline F32x16 operator/(F32x16 a, F32x16 b) {
    return on_all([](float32x4_t x, float32x4_t y) { return vdivq_f32(x, y); }, a, b);
}
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
    return on_all([](float32x4_t x, float32x4_t y, float32x4_t z) { return vfmaq_f32(z, x, y); }, a,
                  b, c);
}
// The second operand if either is NaN, so `min(constant, x)` keeps a NaN in x.
inline float32x4_t smaller(float32x4_t x, float32x4_t y) { return vbslq_f32(vcltq_f32(x, y), x, y); }
inline float32x4_t larger(float32x4_t x, float32x4_t y) { return vbslq_f32(vcgtq_f32(x, y), x, y); }
inline F32x16 min(F32x16 a, F32x16 b) { return on_all(smaller, a, b); }
inline F32x16 max(F32x16 a, F32x16 b) { return on_all(larger, a, b); }

// The first n lanes of a, `other` in the rest.
inline F32x16 keep_first(F32x16 a, int n, F32x16 other) {
    constexpr int32_t kFirst[4] = {0, 1, 2, 3};
    const int32x4_t lane = vld1q_s32(kFirst);
    return each_quarter([&](int i) {
        return vbslq_f32(vcltq_s32(lane, vdupq_n_s32(n - 4 * i)), a.v[i], other.v[i]);
    });
}

// a * 2^n where n is the whole number that was added to kWholeBias to make `biased`.
inline F32x16 scale_by_power(F32x16 a, F32x16 biased) {
    return on_all(
        [](float32x4_t x, float32x4_t y) {
            const int32x4_t exponent = vaddq_s32(vreinterpretq_s32_f32(y), vdupq_n_s32(127));
            return vmulq_f32(x, vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)));
        },
        a, biased);
}

inline float sum(F32x16 a) {
    const float32x4_t by4 = vaddq_f32(vaddq_f32(a.v[0], a.v[2]), vaddq_f32(a.v[1], a.v[3]));
    const float32x2_t by2 = vadd_f32(vget_low_f32(by4), vget_high_f32(by4));
    return vget_lane_f32(by2, 0) + vget_lane_f32(by2, 1);
}
inline float max_lane(F32x16 a) {
    const float32x4_t by4 = larger(larger(a.v[0], a.v[2]), larger(a.v[1], a.v[3]));
    const float32x4_t by2 = larger(by4, vextq_f32(by4, by4, 2));
    return vgetq_lane_f32(larger(by2, vextq_f32(by2, by2, 1)), 0);
}

inline F32x16 load_bf16(const uint16_t* p) {
    return each_quarter(
        [&](int i) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16)); });
}
inline F32x16 to_floats(int8x16_t bytes) {
    const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_s8(vget_high_s8(bytes));
    const auto floats = [](int16x4_t x) { return vcvtq_f32_s32(vmovl_s16(x)); };
    return {{floats(vget_low_s16(low)), floats(vget_high_s16(low)), floats(vget_low_s16(high)),
             floats(vget_high_s16(high))}};
}
inline F32x16 load(const int8_t* p) { return to_floats(vld1q_s8(p)); }
// The low and the high four bits of each byte, as floats.
inline F32x16 load_low_nibbles(const uint8_t* p) {
    return to_floats(vreinterpretq_s8_u8(vandq_u8(vld1q_u8(p), vdupq_n_u8(15))));
}
inline F32x16 load_high_nibbles(const uint8_t* p) {
    return to_floats(vreinterpretq_s8_u8(vshrq_n_u8(vld1q_u8(p), 4)));
}

struct U8x64 {
    uint8x16_t v[4];
};

COVEY_INLINE U8x64 load_bytes(const uint8_t* p) {
    return {{vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)}};
}
COVEY_INLINE void store_bytes(uint8_t* p, U8x64 a) {
    for (int i = 0; i < 4; i++) vst1q_u8(p + 16 * i, a.v[i]);
}
COVEY_INLINE U8x64 operator|(U8x64 a, U8x64 b) {
    for (int i = 0; i < 4; i++) a.v[i] = vorrq_u8(a.v[i], b.v[i]);
    return a;
}

// Bits [from, from + n) of each byte moved to [to, to + n), zeros elsewhere.
template <int from, int n, int to>
COVEY_INLINE U8x64 move_bits(U8x64 a) {
    if constexpr (n < 8) {
        for (uint8x16_t& v : a.v) {
            if constexpr (to > from) v = vshlq_n_u8(v, to - from);
            if constexpr (to < from) v = vshrq_n_u8(v, from - to);
            v = vandq_u8(v, vdupq_n_u8(((1 << n) - 1) << to));
        }
    }
    return a;
}

// table[code] of each byte, which is below 16.
COVEY_INLINE U8x64 lookup(const uint8_t* table, U8x64 codes) {
    const uint8x16_t entries = vld1q_u8(table);
    for (uint8x16_t& v : codes.v) v = vqtbl1q_u8(entries, v);
    return codes;
}

inline float centred_start(int32_t) { return kWholeBias; }

COVEY_INLINE int8x16_t signed_quarter(const U8x64& a, int i) { return vreinterpretq_s8_u8(a.v[i]); }

#if defined(__ARM_FEATURE_DOTPROD)

// Products are of signed bytes: codes go as they are, centred ones shifted up, - 128.
template <class C>
constexpr int kCodesAt = C::kShift;
template <class C>
COVEY_INLINE U8x64 weights_of(U8x64 codes) {
    if constexpr (C::kCentred)
        for (uint8x16_t& v : codes.v) v = veorq_u8(v, vdupq_n_u8(0x80));
    return codes;
}

// One instruction multiplies 4 rows x 4 columns with one row of activations.
template <int W, int N, class Weights>
COVEY_INLINE void dots_by_row(const Weights& weights, const int8_t* bytes, F32x16* out) {
    int32x4_t sums[W][4];
    for (int row = 0; row < W; row++)
        for (int i = 0; i < 4; i++) sums[row][i] = vdupq_n_s32(kWholeBiasBits);
    unrolled<N>([&](auto j) __attribute__((always_inline)) {
        const U8x64 w = weights(j);
#pragma GCC unroll 12
        for (int row = 0; row < W; row++) {
            const int8x16_t x =
                vreinterpretq_s8_s32(vdupq_n_s32(four_bytes(bytes + 32 * row + 4 * j)));
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++)
                sums[row][i] = vdotq_s32(sums[row][i], signed_quarter(w, i), x);
        }
    });
    for (int row = 0; row < W; row++)
        out[row] = each_quarter([&](int i) { return vreinterpretq_f32_s32(sums[row][i]); });
}

#if defined(__ARM_FEATURE_MATMUL_INT8)

// One instruction multiplies 2 rows x 8 columns with two rows of activations.
template <int W, int N, class Weights>
COVEY_INLINE void dots_by_pair(const Weights& weights, const int8_t* bytes, F32x16* out) {
    constexpr int kPairs = W / 2;
    int32x4_t sums[kPairs][4][2];
    for (auto& pair : sums)
        for (auto& quarter : pair) quarter[0] = quarter[1] = vdupq_n_s32(kWholeBiasBits);
    unrolled<N / 2>([&](auto h) __attribute__((always_inline)) {
        const U8x64 first = weights(std::integral_constant<int, 2 * h>{});
        const U8x64 second = weights(std::integral_constant<int, 2 * h + 1>{});
        int8x16_t x[kPairs];
#pragma GCC unroll 4
        for (int pair = 0; pair < kPairs; pair++) {
            const int8_t* at = bytes + 64 * pair + 8 * h;
            x[pair] = vcombine_s8(vld1_s8(at), vld1_s8(at + 32));
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            const uint32x4_t a = vreinterpretq_u32_u8(first.v[i]);
            const uint32x4_t b = vreinterpretq_u32_u8(second.v[i]);
            const int8x16_t low = vreinterpretq_s8_u32(vzip1q_u32(a, b));
            const int8x16_t high = vreinterpretq_s8_u32(vzip2q_u32(a, b));
#pragma GCC unroll 4
            for (int pair = 0; pair < kPairs; pair++) {
                sums[pair][i][0] = vmmlaq_s32(sums[pair][i][0], low, x[pair]);
                sums[pair][i][1] = vmmlaq_s32(sums[pair][i][1], high, x[pair]);
            }
        }
    });
    for (int pair = 0; pair < kPairs; pair++) {
        const auto& all = sums[pair];
        out[2 * pair] = each_quarter(
            [&](int i) { return vreinterpretq_f32_s32(vuzp1q_s32(all[i][0], all[i][1])); });
        out[2 * pair + 1] = each_quarter(
            [&](int i) { return vreinterpretq_f32_s32(vuzp2q_s32(all[i][0], all[i][1])); });
    }
}

#endif

// out[row] = kWholeBias + the sum over 4 * N columns of weight times activation: weights(j) are
// those of columns 4j to 4j + 3, activations are at bytes + 32 * row.
template <class C, int W, int N, class Weights>
COVEY_INLINE void dots(const Weights& weights, const int8_t* bytes, const float*, F32x16* out) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
    if constexpr (W % 2 == 0) return dots_by_pair<W, N>(weights, bytes, out);
#endif
    dots_by_row<W, N>(weights, bytes, out);
}

#else

// Products are of signed bytes, added up in 16 bits as long as those have room: centred codes as
// code - 2^(kBits - 1), the others as they are.
template <class C>
constexpr int kCodesAt = 0;
template <class C>
COVEY_INLINE U8x64 weights_of(U8x64 codes) {
    if constexpr (C::kCentred)
        for (uint8x16_t& v : codes.v) v = vsubq_u8(v, vdupq_n_u8(C::kLargest));
    return codes;
}

// out[row] = kWholeBias + the sum over 4 * N columns of weight times activation: weights(j) are
// those of columns 4j to 4j + 3, activations are at bytes + 32 * row.
template <class C, int W, int N, class Weights>
COVEY_INLINE void dots(const Weights& weights, const int8_t* bytes, const float*, F32x16* out) {
    constexpr int kTogether = C::kFit16 < N ? C::kFit16 : N;
    // A register of `products` has those of two rows; one of `sums` two sums of each.
    int16x8_t products[W][8];
    int32x4_t sums[W][8];
    unrolled<N>([&](auto j) __attribute__((always_inline)) {
        const U8x64 w = weights(j);
#pragma GCC unroll 12
        for (int row = 0; row < W; row++) {
            const int8x8_t x =
                vreinterpret_s8_s32(vdup_n_s32(four_bytes(bytes + 32 * row + 4 * j)));
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) {
                const int8x16_t quarter = signed_quarter(w, i / 2);
                const int8x8_t two = i % 2 ? vget_high_s8(quarter) : vget_low_s8(quarter);
                int16x8_t& all = products[row][i];
                int32x4_t& sum = sums[row][i];
                all = j % kTogether == 0 ? vmull_s8(two, x) : vmlal_s8(all, two, x);
                if (j % kTogether != kTogether - 1 && j != N - 1) continue;
                sum = j < kTogether ? vpaddlq_s16(all) : vpadalq_s16(sum, all);
            }
        }
    });
    for (int row = 0; row < W; row++)
        out[row] = each_quarter([&](int i) {
            const int32x4_t total = vpaddq_s32(sums[row][2 * i], sums[row][2 * i + 1]);
            return vreinterpretq_f32_s32(
                vaddq_s32(vshlq_n_s32(total, C::kShift), vdupq_n_s32(kWholeBiasBits)));
        });
}

#endif

// dot, which has kWholeBias added, times scale: offset is -kWholeBias * scale, which is exact.
inline F32x16 scale_dot(F32x16 dot, float scale, float offset) {
    return fma(dot, splat(scale), splat(offset));
}

// Bits of the largest magnitude of 32 floats; those of a NaN are larger than any other's.
inline uint32_t largest_magnitude(const float* x) {
    uint32x4_t largest = vdupq_n_u32(0);
    for (int i = 0; i < 8; i++) {
        const uint32x4_t bits = vreinterpretq_u32_f32(vld1q_f32(x + 4 * i));
        largest = vmaxq_u32(largest, vandq_u32(bits, vdupq_n_u32(0x7FFFFFFF)));
    }
    return vmaxvq_u32(largest);
}

// bytes = round(x * factor), 32 of them, none beyond 127.
inline HalfSums round_to_bytes(const float* x, float factor, int8_t* bytes) {
    int32_t sums[2];
    for (int half = 0; half < 2; half++, x += 16, bytes += 16) {
        const auto whole = [&](int at) {
            return vmovn_s32(vcvtnq_s32_f32(vmulq_f32(vld1q_f32(x + at), vdupq_n_f32(factor))));
        };
        const int16x8_t low = vcombine_s16(whole(0), whole(4));
        const int16x8_t high = vcombine_s16(whole(8), whole(12));
        vst1q_s8(bytes, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
        sums[half] = vaddvq_s16(vaddq_s16(low, high));
    }
    return {sums[0], sums[1]};
}

}  // namespace covey
