#include "activations.h"

#include <cmath>
#include <cstring>

namespace covey {
namespace {

// Below it 127 / largest would overflow; such a block counts as zero.
constexpr float kSmallestBlock = 1e-30f;

// x without the last two bits of its fraction, so that 1.5 * 2^23 * x is exact.
float with_short_fraction(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    bits &= ~uint32_t{3};
    std::memcpy(&x, &bits, sizeof bits);
    return x;
}

}  // namespace

void Activations::resize(int rows, int width) {
    n_rows = rows;
    columns = width;
    const std::size_t n = static_cast<std::size_t>(rows) * width;
    values = value_memory_.reserve(n);
    bytes = byte_memory_.reserve(n);
    factors = factor_memory_.reserve(n / kBlockColumns * Factors::kCount);
    half_factors = half_memory_.reserve(n / kBlockColumns * HalfFactors::kCount);
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
    float* half = half_factors + block * HalfFactors::kCount + lane;
    for (int b = 0; b < n_blocks; b++) {
        const uint32_t bits = largest_magnitude(x);
        float largest;
        std::memcpy(&largest, &bits, sizeof largest);
        float scale = 0.0f;
        HalfSums sums{0, 0};
        if (std::isfinite(largest) && largest >= kSmallestBlock) {
            scale = with_short_fraction(largest / 127.0f);
            sums = round_to_bytes(x, 127.0f / largest, out);
        } else {
            if (!std::isfinite(largest)) scale = NAN;
            std::memset(out, 0, kBlockColumns);
        }
        factor[Factors::kScale * width] = scale;
        factor[Factors::kOffset * width] = -kWholeBias * scale;
        const int32_t sum = sums.first + sums.second;
        factor[Factors::kSum * width] = scale * static_cast<float>(sum);
        factor[Factors::kStart * width] = centred_start(sum);
        half[HalfFactors::kSum * width] = scale * static_cast<float>(sums.first);
        half[(HalfFactors::kSum + 1) * width] = scale * static_cast<float>(sums.second);
        half[HalfFactors::kStart * width] = centred_start(sums.first);
        half[(HalfFactors::kStart + 1) * width] = centred_start(sums.second);
        x += kBlockColumns;
        out += width * kBlockColumns;
        factor += width * Factors::kCount;
        half += width * HalfFactors::kCount;
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

void Activations::quantize_pair(int i) {
    quantize_row(i);
    quantization_error(i, row(i + 1));
    quantize_row(i + 1);
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
