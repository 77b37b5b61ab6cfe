// Rows between two products: norm, rotation, gating, and their int8 form that products take.
#pragma once

#include <cstdint>

#include "memory.h"
#include "packing.h"
#include "simd.h"

namespace covey {

// Rows are multiplied in panels, of as many as the registers hold sums for: kPanelRows of them, and
// what is left in powers of two.
constexpr int panel_rows(int n_rows_left) {
    if (n_rows_left >= kPanelRows) return kPanelRows;
    int width = 8;
    while (width > n_rows_left) width /= 2;
    return width;
}

// What a block's integer dot product is multiplied with; one array of each per panel and block.
struct Factors {
    static constexpr int kCount = 4;
    // scale; -1.5 * 2^23 * scale, exact, see `dot.h`; scale * sum of the bytes, which a weight's
    // minimum is multiplied by; what the product of centred weights starts from, see simd_*.h.
    enum { kScale, kOffset, kSum, kStart };
};

// The same for weights with a scale for each 16 columns: of the first 16, then of the others.
struct HalfFactors {
    static constexpr int kCount = 4;
    enum { kSum = 0, kStart = 2 };
};

// Rows [n_rows][columns], as floats and as signed bytes with one scale per 32 columns (what ggml
// calls Q8_1). The bytes of a panel of w rows are [columns/32][w][32], its factors
// and half_factors [columns/32][4][w]; panels follow each other.
struct Activations {
    int n_rows = 0;
    int columns = 0;
    float* values = nullptr;
    int8_t* bytes = nullptr;
    float* factors = nullptr;
    float* half_factors = nullptr;

    void resize(int rows, int width);
    float* row(int i) const { return values + static_cast<int64_t>(i) * columns; }

    // Make bytes and factors of one row, or of some blocks of it. A block with NaN or infinity
    // becomes NaN.
    void quantize_row(int i) { quantize_blocks(i, 0, columns / kBlockColumns); }
    void quantize_blocks(int i, int first_block, int n_blocks);

    // Two bytes for each value of row i: row i + 1 becomes what the bytes of row i leave out, and
    // its bytes too. A product of both rows adds up to one of activations 128 times as fine.
    void quantize_pair(int i);

private:
    // What the bytes of row i leave out: out = values - scale * bytes.
    void quantization_error(int i, float* out) const;
    // Where the bytes and factors of a row's blocks are.
    struct Place {
        int64_t block;  // counted over all panels before, and this one
        int lane, width;
    };
    Place place(int i, int first_block) const;

    Buffer<float> value_memory_, factor_memory_, half_memory_;
    Buffer<int8_t> byte_memory_;
};

// out = x / rms(x) * weight, n a multiple of 16.
void rms_norm(const float* x, const float* weight, int n, float eps, float* out);

// out = silu(gate) * up, n a multiple of 16.
void silu_times(const float* gate, const float* up, int n, float* out);

// Rotate the leading rope_dim values of one head, then multiply all head_dim of them by `scale`.
void rotate_head(const float* head, const covey_shape& shape, const float* cosines,
                 const float* sines, float scale, float* out);

}  // namespace covey
