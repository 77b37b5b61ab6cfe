// The products with AVX-512 VNNI: one `vpdpbusd` serves 16 rows x 4 columns.
//
// Few activation rows: weights go straight from memory into registers (decode is bound by memory).
// Many: a piece of the group is unpacked once to bytes and used for all of them.
#include "simd.h"
#ifdef COVEY_SIMD_AVX512
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "dot.h"

namespace covey {
namespace {

constexpr int kVectors = 8;           // of 64 bytes: 16 rows x 32 columns
constexpr int kUnpackFrom = 12;       // activation rows from which unpacking pays; measured
constexpr int kPieceBlocks = 24;      // 24 x 640 bytes stay in the first-level cache; measured
constexpr std::size_t kUnpackedBytes = kVectors * 64 + 2 * 64;

// One block in registers.
struct Block {
    __m512i weights[kVectors];
    __m512 scale, minimum;
};

// Packed weights come from memory in one stream, of which the hardware's prefetcher sees no further
// than the end of a 4 KB page: asking this far ahead makes decode 1.4 to 2.4 times as fast where
// the weights do not stay in the last-level cache. Measured: 2,560 to 10,240 are alike.
constexpr std::size_t kAhead = 5120;

// Always inlined: GCC 12 drops calls of a function that does nothing but prefetch.
inline __attribute__((always_inline)) void prefetch(const uint8_t* p, std::size_t bytes) {
    for (std::size_t line = 0; line < bytes; line += 64)
        _mm_prefetch(reinterpret_cast<const char*>(p + kAhead + line), _MM_HINT_T0);
}

__m512 halves(const uint8_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

struct Q41 {
    static constexpr std::size_t kBytes = kQ41Bytes;
    static inline __attribute__((always_inline)) Block load(const uint8_t* p) {
        prefetch(p, kBytes);
        const __m512i low_nibble = _mm512_set1_epi8(15);
        Block block;
        for (int j = 0; j < 4; j++) {
            const __m512i pairs = _mm512_loadu_si512(p + 64 * j);
            block.weights[j] = _mm512_and_si512(pairs, low_nibble);
            block.weights[4 + j] = _mm512_and_si512(_mm512_srli_epi16(pairs, 4), low_nibble);
        }
        block.scale = halves(p + kQ41Nibbles);
        block.minimum = halves(p + kQ41Nibbles + 2 * kGroupRows);
        return block;
    }
};

struct Q80 {
    static constexpr std::size_t kBytes = kQ80Bytes;
    static inline __attribute__((always_inline)) Block load(const uint8_t* p) {
        prefetch(p, kBytes);
        Block block;
        for (int j = 0; j < kVectors; j++) block.weights[j] = _mm512_loadu_si512(p + 64 * j);
        block.scale = halves(p + kQ80Weights);
        block.minimum = _mm512_mul_ps(block.scale, _mm512_set1_ps(-128.0f));
        return block;
    }
};

struct Unpacked {
    static constexpr std::size_t kBytes = kUnpackedBytes;
    static inline __attribute__((always_inline)) Block load(const uint8_t* p) {
        Block block;
        for (int j = 0; j < kVectors; j++) block.weights[j] = _mm512_load_si512(p + 64 * j);
        block.scale = _mm512_load_ps(p + 64 * kVectors);
        block.minimum = _mm512_load_ps(p + 64 * (kVectors + 1));
        return block;
    }
    static void store(const Block& block, uint8_t* p) {
        for (int j = 0; j < kVectors; j++) _mm512_store_si512(p + 64 * j, block.weights[j]);
        _mm512_store_ps(p + 64 * kVectors, block.scale);
        _mm512_store_ps(p + 64 * (kVectors + 1), block.minimum);
    }
};

__m512i four_bytes(const int8_t* p) {
    int32_t bytes;
    std::memcpy(&bytes, p, sizeof bytes);
    return _mm512_set1_epi32(bytes);
}

// n_blocks blocks of one group times a panel of W rows; out[W][16] is added to.
template <class Source, int W>
void multiply_panel(const uint8_t* weights, int n_blocks, const int8_t* bytes, const float* factors,
                    float* out) {
    const __m512i bias = _mm512_set1_epi32(kWholeBiasBits);
    __m512 total[W];
#pragma GCC unroll 12
    for (int row = 0; row < W; row++) total[row] = _mm512_loadu_ps(out + row * kGroupRows);
    for (int b = 0; b < n_blocks; b++) {
        const Block block = Source::load(weights);
        __m512i dot[W];
#pragma GCC unroll 12
        for (int row = 0; row < W; row++) dot[row] = bias;
        // Column by column over all rows: a row's eight products depend on each other.
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; j++)
#pragma GCC unroll 12
            for (int row = 0; row < W; row++)
                dot[row] = _mm512_dpbusd_epi32(dot[row], block.weights[j],
                                               four_bytes(bytes + row * kBlockColumns + 4 * j));
#pragma GCC unroll 12
        for (int row = 0; row < W; row++) {
            const auto factor = [&](int which) { return _mm512_set1_ps(factors[which * W + row]); };
            total[row] = _mm512_fmadd_ps(block.minimum, factor(Factors::kSum), total[row]);
            const __m512 scaled = _mm512_fmadd_ps(
                _mm512_castsi512_ps(dot[row]), factor(Factors::kScale), factor(Factors::kOffset));
            total[row] = _mm512_fmadd_ps(scaled, block.scale, total[row]);
        }
        weights += Source::kBytes;
        bytes += W * kBlockColumns;
        factors += W * Factors::kCount;
    }
#pragma GCC unroll 12
    for (int row = 0; row < W; row++) _mm512_storeu_ps(out + row * kGroupRows, total[row]);
}

// Blocks [first_block, first_block + n_blocks) of a group times all rows of x.
template <class Source>
void multiply_blocks(const uint8_t* weights, int first_block, int n_blocks, const Activations& x,
                     float* out) {
    const int64_t all_blocks = x.columns / kBlockColumns;
    for (int row = 0; row < x.n_rows;) {
        const int width = panel_rows(x.n_rows - row);
        const int64_t at = row * all_blocks + static_cast<int64_t>(first_block) * width;
        const int8_t* bytes = x.bytes + at * kBlockColumns;
        const float* factors = x.factors + at * Factors::kCount;
        float* to = out + row * kGroupRows;
        switch (width) {
            case 12: multiply_panel<Source, 12>(weights, n_blocks, bytes, factors, to); break;
            case 8: multiply_panel<Source, 8>(weights, n_blocks, bytes, factors, to); break;
            case 4: multiply_panel<Source, 4>(weights, n_blocks, bytes, factors, to); break;
            case 2: multiply_panel<Source, 2>(weights, n_blocks, bytes, factors, to); break;
            default: multiply_panel<Source, 1>(weights, n_blocks, bytes, factors, to);
        }
        row += width;
    }
}

template <class Source>
void multiply(const uint8_t* weights, const Activations& x, float* out, Buffer<uint8_t>& scratch) {
    const int n_blocks = x.columns / kBlockColumns;
    std::fill(out, out + static_cast<int64_t>(x.n_rows) * kGroupRows, 0.0f);
    if (x.n_rows < kUnpackFrom) return multiply_blocks<Source>(weights, 0, n_blocks, x, out);
    uint8_t* unpacked = scratch.reserve(kPieceBlocks * kUnpackedBytes);
    for (int first = 0; first < n_blocks; first += kPieceBlocks) {
        const int n = std::min(kPieceBlocks, n_blocks - first);
        for (int b = 0; b < n; b++)
            Unpacked::store(Source::load(weights + (first + b) * Source::kBytes),
                            unpacked + b * kUnpackedBytes);
        multiply_blocks<Unpacked>(unpacked, first, n, x, out);
    }
}

}  // namespace

void multiply_group(const covey_matrix& matrix, int group, const Activations& x, float* out,
                    Buffer<uint8_t>& scratch) {
    const uint8_t* weights = group_data(matrix, group);
    switch (matrix.type) {
        case COVEY_Q4_1: return multiply<Q41>(weights, x, out, scratch);
        case COVEY_Q8_0: return multiply<Q80>(weights, x, out, scratch);
        default: return multiply_group_f16(matrix, group, x, out);
    }
}

}  // namespace covey
#endif
