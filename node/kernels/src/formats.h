// Every quantised format in one table: where its parts are in the file, and so how it is packed.
//
// A format has blocks of 32 columns, or of 256 with scales of their own for each 32 or 16. A weight
// is scale * (code - centre) or scale * code + minimum; codes come in planes of bits, of which a
// format has one or two. All of this is data, and the code that uses it is written once: packing.cpp
// reads it at run time, dot.cpp at compile time.
#pragma once

#include <cstddef>
#include <cstdint>

#include "abi.h"

namespace covey {

constexpr int kGroupRows = 16;
constexpr int kBlockColumns = 32;

// Some bits of each code of a file's block. Each byte holds 8 / bits codes, `run` columns apart from
// each other: the first `run` columns are in the lowest bits of `run` bytes.
struct Plane {
    int bits;
    int offset;
    int run;
};

// How scales beside the block's fp16 ones are stored: none; scale and minimum as the two halves of
// a byte (Q2_K); 6 bits of each in 12 bytes (Q4_K, Q5_K); 6 bits, 32 too high, in 12 bytes (Q3_K);
// signed bytes (Q6_K).
enum class Scales { kNone, kNibbles, kSixBitPairs, kSixBit, kBytes };

struct Format {
    int type;
    int columns;        // of a block in the file
    int file_bytes;     // of a block in the file
    bool is_centred;    // else there are minima
    int scale_columns;  // that share a scale: 32 or 16
    Plane low, high;    // high.bits may be 0
    int scale_offset;    // of the fp16 scale, in the file's block
    int minimum_offset;  // of the fp16 minimum, which is subtracted if there are scales beside it
    Scales scales;
    int scales_offset;
    bool has_table = false;  // codes stand for the bytes of kIq4Values, around 128

    constexpr int code_bits() const { return low.bits + high.bits; }
    constexpr int n_blocks() const { return columns / kBlockColumns; }  // of 32 columns
    constexpr int n_scales() const { return kBlockColumns / scale_columns; }  // in 32 columns
    constexpr bool has_scales() const { return scales != Scales::kNone; }

    // Packed, per 16 rows: codes of each 32 columns, plane by plane; fp16 scales, and minima if not
    // centred; the scales beside them, of each 32 columns those of 16 rows, then the minima.
    constexpr std::size_t code_bytes() const { return static_cast<std::size_t>(code_bits()) * 64; }
    constexpr std::size_t scale_at() const { return code_bytes() * n_blocks(); }
    constexpr std::size_t minimum_at() const { return scale_at() + 2 * kGroupRows; }
    constexpr std::size_t scales_at() const {
        return scale_at() + (is_centred ? 2 : 4) * kGroupRows;
    }
    constexpr bool has_byte_minima() const { return has_scales() && !is_centred && !is_nibbles(); }
    constexpr bool is_nibbles() const { return scales == Scales::kNibbles; }
    constexpr std::size_t scales_bytes() const {  // of 32 columns
        return has_scales() ? n_scales() * (has_byte_minima() ? 2 : 1) * kGroupRows : 0;
    }
    constexpr std::size_t packed_bytes() const { return scales_at() + scales_bytes() * n_blocks(); }
};

// The 16 values of IQ4_NL, + 128.
constexpr uint8_t kIq4Values[16] = {1,   24,  45,  63,  79,  93,  106, 118,
                                    129, 141, 153, 166, 181, 197, 217, 241};

constexpr Plane kNoPlane{0, 0, 1};
constexpr Format kFormats[] = {
    {COVEY_Q4_0, 32, 18, true, 32, {4, 2, 16}, kNoPlane, 0, 0, Scales::kNone, 0},
    {COVEY_Q4_1, 32, 20, false, 32, {4, 4, 16}, kNoPlane, 0, 2, Scales::kNone, 0},
    {COVEY_Q5_0, 32, 22, true, 32, {4, 6, 16}, {1, 2, 1}, 0, 0, Scales::kNone, 0},
    {COVEY_Q5_1, 32, 24, false, 32, {4, 8, 16}, {1, 4, 1}, 0, 2, Scales::kNone, 0},
    {COVEY_Q8_0, 32, 34, true, 32, {8, 2, 32}, kNoPlane, 0, 0, Scales::kNone, 0},
    {COVEY_IQ4_NL, 32, 18, true, 32, {4, 2, 16}, kNoPlane, 0, 0, Scales::kNone, 0, true},
    {COVEY_Q2_K, 256, 84, false, 16, {2, 16, 32}, kNoPlane, 80, 82, Scales::kNibbles, 0},
    {COVEY_Q3_K, 256, 110, true, 16, {2, 32, 32}, {1, 0, 32}, 108, 0, Scales::kSixBit, 96},
    {COVEY_Q4_K, 256, 144, false, 32, {4, 16, 32}, kNoPlane, 0, 2, Scales::kSixBitPairs, 4},
    {COVEY_Q5_K, 256, 176, false, 32, {4, 48, 32}, {1, 16, 32}, 0, 2, Scales::kSixBitPairs, 4},
    {COVEY_Q6_K, 256, 210, true, 16, {4, 0, 64}, {2, 128, 32}, 208, 0, Scales::kBytes, 192},
};

// Null for a type that is not quantised or not supported.
constexpr const Format* find_format(int type) {
    for (const Format& format : kFormats)
        if (format.type == type) return &format;
    return nullptr;
}

constexpr bool is_float_type(int type) {
    return type == COVEY_F32 || type == COVEY_F16 || type == COVEY_BF16;
}

}  // namespace covey
