// Few activation rows: weights go straight from memory into registers (decode is bound by memory).
// Many: a piece of the group is unpacked once to bytes and used for all of them.
#include "dot.h"

#include <algorithm>

#include "simd.h"

namespace covey {
namespace {

constexpr int kVectors = kBlockColumns / 4;  // of 16 rows x 4 columns
constexpr int kPieceBlocks = 24;  // 24 x 640 bytes stay in the first-level cache; measured

constexpr float power_of_half(int n) { return n == 0 ? 1.0f : 0.5f * power_of_half(n - 1); }

// What products need to know of a format at compile time.
template <int kType>
struct Traits {
    static constexpr Format kFormat = *find_format(kType);
    using Weights = Codes<kFormat.has_table ? 8 : kFormat.code_bits(), kFormat.is_centred>;
    static constexpr int kScales = kFormat.n_scales();  // in a block of 32 columns
};

// Scales of 16 rows, and what they are multiplied with where each block has more of its own.
template <class T>
struct BlockScales {
    F32x16 scale[T::kScales], minimum[T::kScales];
};

// Weights as packed.
template <int kType>
struct Packed : Traits<kType> {
    using T = Traits<kType>;
    static constexpr Format kFormat = T::kFormat;
    static constexpr int kWidest = panel_rows(kUnpackFrom - 1);
    static constexpr int kBlocks = kFormat.n_blocks();
    static constexpr std::size_t kBytes = kFormat.packed_bytes();  // of kBlocks blocks

    struct Header {
        F32x16 scale, minimum;
    };

    static COVEY_INLINE void fetch(const uint8_t* p, int block) {
        prefetch(p + block * (kBytes / kBlocks), kBytes / kBlocks);
    }

    static COVEY_INLINE Header header(const uint8_t* p) {
        Header header;
        header.scale = load(reinterpret_cast<const uint16_t*>(p + kFormat.scale_at()));
        constexpr int kShift = T::Weights::kShift;  // centred weights are this much larger
        if constexpr (kShift > 0) header.scale = header.scale * splat(power_of_half(kShift));
        if constexpr (!kFormat.is_centred)
            header.minimum = load(reinterpret_cast<const uint16_t*>(p + kFormat.minimum_at()));
        return header;
    }

    static COVEY_INLINE BlockScales<T> scales(const uint8_t* p, const Header& header, int block) {
        BlockScales<T> out;
        const uint8_t* at = p + kFormat.scales_at() + block * kFormat.scales_bytes();
        unrolled<T::kScales>([&](auto s) __attribute__((always_inline)) {
            const uint8_t* bytes = at + s * kGroupRows;
            if constexpr (kFormat.is_nibbles()) {
                out.scale[s] = header.scale * load_low_nibbles(bytes);
                out.minimum[s] = header.minimum * load_high_nibbles(bytes);
            } else if constexpr (kFormat.has_scales()) {
                out.scale[s] = header.scale * load(reinterpret_cast<const int8_t*>(bytes));
                if constexpr (kFormat.has_byte_minima())
                    out.minimum[s] = header.minimum * load(reinterpret_cast<const int8_t*>(
                                                          bytes + T::kScales * kGroupRows));
            } else {
                out.scale[s] = header.scale;
                if constexpr (!kFormat.is_centred) out.minimum[s] = header.minimum;
            }
        });
        return out;
    }

    // Bits of vector j from a plane, moved up to bit `to`.
    template <int bits, int j, int to>
    static COVEY_INLINE U8x64 plane(const uint8_t* p) {
        return move_bits<bits * (j / bits), bits, to>(load_bytes(p + 64 * (j % bits)));
    }

    template <int j>
    static COVEY_INLINE U8x64 weights(const uint8_t* p, int block) {
        constexpr int kLow = kFormat.low.bits, kHigh = kFormat.high.bits;
        constexpr int kAt = kFormat.has_table ? 0 : kCodesAt<typename T::Weights>;
        const uint8_t* codes = p + block * kFormat.code_bytes();
        U8x64 vector = plane<kLow, j, kAt>(codes);
        if constexpr (kHigh > 0) vector = vector | plane<kHigh, j, kAt + kLow>(codes + 64 * kLow);
        if constexpr (kFormat.has_table) vector = lookup(kIq4Values, vector);
        return weights_of<typename T::Weights>(vector);
    }
};

// Weights as products take them.
template <int kType>
struct Unpacked : Traits<kType> {
    using T = Traits<kType>;
    static constexpr int kWidest = kPanelRows;
    static constexpr int kBlocks = 1;
    static constexpr int kScaleVectors = (T::Weights::kCentred ? 1 : 2) * T::kScales;
    static constexpr std::size_t kBytes = (kVectors + kScaleVectors) * 64;

    struct Header {};

    static COVEY_INLINE void fetch(const uint8_t*, int) {}
    static COVEY_INLINE Header header(const uint8_t*) { return {}; }
    static COVEY_INLINE BlockScales<T> scales(const uint8_t* p, Header, int) {
        BlockScales<T> out;
        const auto* floats = reinterpret_cast<const float*>(p + kVectors * 64);
        for (int s = 0; s < T::kScales; s++) {
            out.scale[s] = load(floats + s * kLanes);
            if constexpr (!T::Weights::kCentred)
                out.minimum[s] = load(floats + (T::kScales + s) * kLanes);
        }
        return out;
    }
    template <int j>
    static COVEY_INLINE U8x64 weights(const uint8_t* p, int) {
        return load_bytes(p + 64 * j);
    }

    // n_blocks blocks of `packed` to `out`.
    static void unpack(const uint8_t* packed, int n_blocks, uint8_t* out) {
        using From = Packed<kType>;
        for (int b = 0; b < n_blocks; b += From::kBlocks, packed += From::kBytes) {
            const auto header = From::header(packed);
            for (int i = 0; i < From::kBlocks; i++, out += kBytes) {
                From::fetch(packed, i);
                unrolled<kVectors>([&](auto j) __attribute__((always_inline)) {
                    store_bytes(out + 64 * j, From::template weights<j>(packed, i));
                });
                const BlockScales<T> scales = From::scales(packed, header, i);
                auto* floats = reinterpret_cast<float*>(out + kVectors * 64);
                for (int s = 0; s < T::kScales; s++) {
                    store(floats + s * kLanes, scales.scale[s]);
                    if constexpr (!T::Weights::kCentred)
                        store(floats + (T::kScales + s) * kLanes, scales.minimum[s]);
                }
            }
        }
    }
};

// Where the bytes and factors of a panel's block are.
struct PanelBlock {
    const int8_t* bytes;
    const float* factors;
    const float* half_factors;
};

// One block times a panel of W rows, added to total[W].
template <class Source, int W>
COVEY_INLINE void multiply_block(const uint8_t* weights, const typename Source::Header& header,
                                 int block, const PanelBlock& x, F32x16* total) {
    using Weights = typename Source::Weights;
    constexpr int kScales = Source::kScales, kEach = kVectors / kScales;
    const auto scales = Source::scales(weights, header, block);
    unrolled<kScales>([&](auto s) __attribute__((always_inline)) {
        const float* starts = kScales == 1 ? x.factors + Factors::kStart * W
                                           : x.half_factors + (HalfFactors::kStart + s) * W;
        const float* sums = kScales == 1 ? x.factors + Factors::kSum * W
                                         : x.half_factors + (HalfFactors::kSum + s) * W;
        F32x16 dot[W];
        dots<Weights, W, kEach>(
            [&](auto j) __attribute__((always_inline)) {
                return Source::template weights<s * kEach + j>(weights, block);
            },
            x.bytes + s * kEach * 4, starts, dot);
#pragma GCC unroll 12
        for (int row = 0; row < W; row++) {
            if constexpr (!Weights::kCentred)
                total[row] = fma(scales.minimum[s], splat(sums[row]), total[row]);
            const F32x16 scaled = scale_dot(dot[row], x.factors[Factors::kScale * W + row],
                                            x.factors[Factors::kOffset * W + row]);
            total[row] = fma(scaled, scales.scale[s], total[row]);
        }
    });
}

// n_blocks blocks of one group times a panel of W rows; out[W][16] is added to.
template <class Source, int W>
void multiply_panel(const uint8_t* weights, int n_blocks, PanelBlock x, float* out) {
    F32x16 total[W];
#pragma GCC unroll 12
    for (int row = 0; row < W; row++) total[row] = load(out + row * kGroupRows);
    for (int b = 0; b < n_blocks; b += Source::kBlocks) {
        const auto header = Source::header(weights);
        for (int i = 0; i < Source::kBlocks; i++) {
            Source::fetch(weights, i);
            multiply_block<Source, W>(weights, header, i, x, total);
            x.bytes += W * kBlockColumns;
            x.factors += W * Factors::kCount;
            x.half_factors += W * HalfFactors::kCount;
        }
        weights += Source::kBytes;
    }
#pragma GCC unroll 12
    for (int row = 0; row < W; row++) store(out + row * kGroupRows, total[row]);
}

// The panel of `width` rows, by trying the widths there are.
template <class Source, int W = Source::kWidest>
void multiply_width(int width, const uint8_t* weights, int n_blocks, const PanelBlock& x,
                    float* out) {
    if constexpr (W > 1) {
        if (width < W)
            return multiply_width<Source, panel_rows(W - 1)>(width, weights, n_blocks, x, out);
    }
    multiply_panel<Source, W>(weights, n_blocks, x, out);
}

// Blocks [first_block, first_block + n_blocks) of a group times all rows of x.
template <class Source>
void multiply_blocks(const uint8_t* weights, int first_block, int n_blocks, const Activations& x,
                     float* out) {
    const int64_t all_blocks = x.columns / kBlockColumns;
    for (int row = 0; row < x.n_rows;) {
        const int width = panel_rows(x.n_rows - row);
        const int64_t at = row * all_blocks + static_cast<int64_t>(first_block) * width;
        const PanelBlock panel{x.bytes + at * kBlockColumns, x.factors + at * Factors::kCount,
                               x.half_factors + at * HalfFactors::kCount};
        multiply_width<Source>(width, weights, n_blocks, panel, out + row * kGroupRows);
        row += width;
    }
}

template <int kType>
void multiply(const uint8_t* weights, const Activations& x, float* out, Buffer<uint8_t>& scratch) {
    using From = Packed<kType>;
    using To = Unpacked<kType>;
    const int n_blocks = x.columns / kBlockColumns;
    std::fill(out, out + static_cast<int64_t>(x.n_rows) * kGroupRows, 0.0f);
    if (x.n_rows < kUnpackFrom) return multiply_blocks<From>(weights, 0, n_blocks, x, out);
    uint8_t* unpacked = scratch.reserve(kPieceBlocks * To::kBytes);
    for (int first = 0; first < n_blocks; first += kPieceBlocks) {
        const int n = std::min(kPieceBlocks, n_blocks - first);
        To::unpack(weights + first / From::kBlocks * From::kBytes, n, unpacked);
        multiply_blocks<To>(unpacked, first, n, x, out);
    }
}

}  // namespace

void multiply_group(const covey_matrix& matrix, int group, const Activations& x, float* out,
                    Buffer<uint8_t>& scratch) {
    const uint8_t* weights = group_data(matrix, group);
    switch (matrix.type) {
        case COVEY_Q4_0: return multiply<COVEY_Q4_0>(weights, x, out, scratch);
        case COVEY_Q4_1: return multiply<COVEY_Q4_1>(weights, x, out, scratch);
        case COVEY_Q5_0: return multiply<COVEY_Q5_0>(weights, x, out, scratch);
        case COVEY_Q5_1: return multiply<COVEY_Q5_1>(weights, x, out, scratch);
        case COVEY_Q8_0: return multiply<COVEY_Q8_0>(weights, x, out, scratch);
        case COVEY_Q2_K: return multiply<COVEY_Q2_K>(weights, x, out, scratch);
        case COVEY_Q3_K: return multiply<COVEY_Q3_K>(weights, x, out, scratch);
        case COVEY_Q4_K: return multiply<COVEY_Q4_K>(weights, x, out, scratch);
        case COVEY_Q5_K: return multiply<COVEY_Q5_K>(weights, x, out, scratch);
        case COVEY_Q6_K: return multiply<COVEY_Q6_K>(weights, x, out, scratch);
        case COVEY_IQ4_NL: return multiply<COVEY_IQ4_NL>(weights, x, out, scratch);
        default: return multiply_group_float(matrix, group, x, out, scratch);
    }
}

}  // namespace covey
