#include "activations.h"

#include <cmath>
#include <cstring>

namespace covey {
namespace {

// Below it 127 / largest would overflow; such a block counts as zero.
constexpr float kSmallestBlock = 1e-30f;

// Bits of the largest magnitude; those of a NaN are larger than any other's.
uint32_t largest_magnitude(const float* x) {
    constexpr uint32_t kNoSign = 0x7FFFFFFF;
#ifdef COVEY_SIMD_AVX512
    const __m512i mask = _mm512_set1_epi32(kNoSign);
    const __m512i low = _mm512_and_si512(_mm512_loadu_si512(x), mask);
    const __m512i high = _mm512_and_si512(_mm512_loadu_si512(x + kLanes), mask);
    return _mm512_reduce_max_epu32(_mm512_max_epu32(low, high));
#else
    uint32_t largest = 0;
    for (int i = 0; i < kBlockColumns; i++) {
        uint32_t bits;
        std::memcpy(&bits, x + i, sizeof bits);
        bits &= kNoSign;
        largest = bits > largest ? bits : largest;
    }
    return largest;
#endif
}

// x without the last two bits of its fraction, so that 1.5 * 2^23 * x is exact.
float with_short_fraction(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    bits &= ~uint32_t{3};
    std::memcpy(&x, &bits, sizeof bits);
    return x;
}

// Bytes round(x * inverse); returns their sum.
int32_t round_to_bytes(const float* x, float inverse, int8_t* bytes) {
#ifdef COVEY_SIMD_AVX512
    const __m512 factor = _mm512_set1_ps(inverse);
    const __m512i low = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x), factor));
    const __m512i high = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + 16), factor));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes), _mm512_cvtepi32_epi8(low));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes + 16), _mm512_cvtepi32_epi8(high));
    return _mm512_reduce_add_epi32(_mm512_add_epi32(low, high));
#else
    int32_t total = 0;
    for (int i = 0; i < kBlockColumns; i++) {
        // Adding 1.5 * 2^23 rounds to the nearest whole number, which is then in the low bits.
        const float biased = x[i] * inverse + kWholeBias;
        int32_t bits;
        std::memcpy(&bits, &biased, sizeof bits);
        const int32_t whole = bits - kWholeBiasBits;
        bytes[i] = static_cast<int8_t>(whole);
        total += whole;
    }
    return total;
#endif
}

}  // namespace

void Activations::resize(int rows, int width) {
    n_rows = rows;
    columns = width;
    const std::size_t n = static_cast<std::size_t>(rows) * width;
    values = value_memory_.reserve(n);
    bytes = byte_memory_.reserve(n);
    factors = factor_memory_.reserve(n / kBlockColumns * Factors::kCount);
}

Activations::Place Activations::place(int i, int first_block) const {
    int first = i / kPanelRows * kPanelRows;  // of the panel that row i is in
    int width = panel_rows(n_rows - first);
    while (i >= first + width) {
        first += width;
        width = panel_rows(n_rows - first);
    }
    const int64_t before = static_cast<int64_t>(first) * (columns / kBlockColumns);
    return {before + static_cast<int64_t>(first_block) * width, i - first, width};
}

void Activations::quantize_blocks(int i, int first_block, int n_blocks) {
    const auto [block, lane, width] = place(i, first_block);
    const float* x = row(i) + first_block * kBlockColumns;
    int8_t* out = bytes + (block + lane) * kBlockColumns;
    float* factor = factors + block * Factors::kCount + lane;
    for (int b = 0; b < n_blocks; b++) {
        const uint32_t bits = largest_magnitude(x);
        float largest;
        std::memcpy(&largest, &bits, sizeof largest);
        float scale = 0.0f;
        int32_t total = 0;
        if (std::isfinite(largest) && largest >= kSmallestBlock) {
            scale = with_short_fraction(largest / 127.0f);
            total = round_to_bytes(x, 127.0f / largest, out);
        } else {
            if (!std::isfinite(largest)) scale = NAN;
            std::memset(out, 0, kBlockColumns);
        }
        factor[Factors::kScale * width] = scale;
        factor[Factors::kOffset * width] = -kWholeBias * scale;
        factor[Factors::kSum * width] = scale * static_cast<float>(total);
        x += kBlockColumns;
        out += width * kBlockColumns;
        factor += width * Factors::kCount;
    }
}

void Activations::quantization_error(int i, float* out) const {
    const auto [block, lane, width] = place(i, 0);
    const float* x = row(i);
    const int8_t* from = bytes + (block + lane) * kBlockColumns;
    const float* factor = factors + block * Factors::kCount + lane;
    for (int b = 0; b < columns / kBlockColumns; b++) {
        const float scale = factor[Factors::kScale * width];
        for (int k = 0; k < kBlockColumns; k++) out[k] = x[k] - scale * static_cast<float>(from[k]);
        x += kBlockColumns;
        out += kBlockColumns;
        from += width * kBlockColumns;
        factor += width * Factors::kCount;
    }
}

void rms_norm(const float* x, const float* weight, int n, float eps, float* out) {
    F32x16 squares = splat(0.0f);
    for (int i = 0; i < n; i += kLanes) squares = fma(load(x + i), load(x + i), squares);
    const F32x16 factor = splat(1.0f / std::sqrt(sum(squares) / static_cast<float>(n) + eps));
    for (int i = 0; i < n; i += kLanes) store(out + i, load(x + i) * factor * load(weight + i));
}

void silu_times(const float* gate, const float* up, int n, float* out) {
    for (int i = 0; i < n; i += kLanes) {
        const F32x16 g = load(gate + i);
        const F32x16 silu = g / (splat(1.0f) + exp(splat(0.0f) - g));
        store(out + i, silu * load(up + i));
    }
}

void rotate_head(const float* head, const covey_shape& shape, const float* cosines,
                 const float* sines, float scale, float* out) {
    const int n_pairs = shape.rope_dim / 2;
    const int step = shape.rope_interleaved ? 1 : n_pairs;
    const int stride = shape.rope_interleaved ? 2 : 1;
    for (int i = 0; i < n_pairs; i++) {
        const float a = head[stride * i], b = head[stride * i + step];
        out[stride * i] = (a * cosines[i] - b * sines[i]) * scale;
        out[stride * i + step] = (b * cosines[i] + a * sines[i]) * scale;
    }
    for (int i = shape.rope_dim; i < shape.head_dim; i++) out[i] = head[i] * scale;
}

}  // namespace covey
