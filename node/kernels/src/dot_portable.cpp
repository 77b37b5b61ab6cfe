// The products in plain C++: what runs where no faster version was built, and the reference that
// those are compared with, bit for bit.
//
// A block is widened to 16-bit numbers once for all activation rows, in the order it is packed in,
// so the inner loops run over neighbours and compilers make vector code of them for any target.
#include "simd.h"
#ifndef COVEY_SIMD_AVX512
#include <algorithm>

#include "dot.h"

namespace covey {
namespace {

constexpr int kQuads = kBlockColumns / 4;   // groups of four columns
constexpr int kQuadLanes = kGroupRows * 4;  // 16 rows x 4 columns
constexpr int kSums = kQuadLanes / 2;       // of two neighbouring products

struct Block {
    int16_t weights[kQuads][kQuadLanes];
    F32x16 scale, minimum;
};

F32x16 halves(const uint8_t* p) {
    uint16_t aligned[kGroupRows];
    std::memcpy(aligned, p, sizeof aligned);
    return load(aligned);
}

void unpack_q41(const uint8_t* p, Block& block) {
    for (int j = 0; j < kQuads / 2; j++)
        for (int i = 0; i < kQuadLanes; i++) {
            block.weights[j][i] = p[kQuadLanes * j + i] & 15;
            block.weights[j + kQuads / 2][i] = p[kQuadLanes * j + i] >> 4;
        }
    block.scale = halves(p + kQ41Nibbles);
    block.minimum = halves(p + kQ41Nibbles + 2 * kGroupRows);
}

void unpack_q80(const uint8_t* p, Block& block) {
    for (int j = 0; j < kQuads; j++)
        for (int i = 0; i < kQuadLanes; i++) block.weights[j][i] = p[kQuadLanes * j + i];
    block.scale = halves(p + kQ80Weights);
    block.minimum = block.scale * splat(-128.0f);
}

// sums[i] += products of weights 2i and 2i + 1 with the four activations, repeated.
void add_quad(const int16_t* weights, const int8_t* four, int32_t* sums) {
    int16_t repeated[8];
    for (int k = 0; k < 8; k++) repeated[k] = four[k % 4];
#ifdef __SSE2__
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(repeated));
    for (int i = 0; i < kSums; i += 4) {
        auto* to = reinterpret_cast<__m128i*>(sums + i);
        const __m128i w = _mm_loadu_si128(reinterpret_cast<const __m128i*>(weights + 2 * i));
        _mm_storeu_si128(to, _mm_add_epi32(_mm_loadu_si128(to), _mm_madd_epi16(w, x)));
    }
#else
    for (int i = 0; i < kSums; i++)
        sums[i] += weights[2 * i] * repeated[2 * (i % 4)] +
                   weights[2 * i + 1] * repeated[2 * (i % 4) + 1];
#endif
}

// Add one block times one activation row to out[16].
void add_product(const Block& block, const int8_t* bytes, float scale, float sum, float* out) {
    int32_t sums[kSums] = {};
    for (int j = 0; j < kQuads; j++) add_quad(block.weights[j], bytes + 4 * j, sums);
    float as_floats[kGroupRows];
    for (int r = 0; r < kGroupRows; r++)
        as_floats[r] = static_cast<float>(sums[2 * r] + sums[2 * r + 1]);
    F32x16 total = fma(block.minimum, splat(sum), load(out));
    total = fma(load(as_floats) * splat(scale), block.scale, total);
    store(out, total);
}

}  // namespace

void multiply_group(const covey_matrix& matrix, int group, const Activations& x, float* out,
                    Buffer<uint8_t>&) {
    if (matrix.type == COVEY_F16) return multiply_group_f16(matrix, group, x, out);
    const bool is_q41 = matrix.type == COVEY_Q4_1;
    const uint8_t* weights = group_data(matrix, group);
    const int64_t n_blocks = x.columns / kBlockColumns;
    std::fill(out, out + static_cast<int64_t>(x.n_rows) * kGroupRows, 0.0f);
    Block block;
    for (int64_t b = 0; b < n_blocks; b++) {
        if (is_q41) {
            unpack_q41(weights + b * kQ41Bytes, block);
        } else {
            unpack_q80(weights + b * kQ80Bytes, block);
        }
        for (int first = 0; first < x.n_rows;) {
            const int width = panel_rows(x.n_rows - first);
            const int64_t at = first * n_blocks + b * width;
            const float* factors = x.factors + at * Factors::kCount;
            for (int i = 0; i < width; i++)
                add_product(block, x.bytes + (at + i) * kBlockColumns,
                            factors[Factors::kScale * width + i],
                            factors[Factors::kSum * width + i], out + (first + i) * kGroupRows);
            first += width;
        }
    }
}

}  // namespace covey
#endif
