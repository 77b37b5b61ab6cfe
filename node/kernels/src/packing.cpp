// GGUF blocks to packed groups, the same bits in another order, and rows of them to floats.
#include "packing.h"

#include <algorithm>
#include <cstring>

#include "simd.h"

namespace covey {
namespace {

std::size_t float_bytes(int type) { return type == COVEY_F32 ? 4 : 2; }

// Bytes of one row in the file.
std::size_t row_bytes(int type, int columns) {
    const Format* format = find_format(type);
    if (!format) return columns * float_bytes(type);
    return static_cast<std::size_t>(columns / format->columns) * format->file_bytes;
}

// Bits `plane.bits` of one number in a plane of the file.
uint8_t bits_at(const Plane& plane, const uint8_t* block, int i) {
    const int per_run = plane.run * 8 / plane.bits, within = i % per_run;
    const uint8_t byte = block[plane.offset + i / per_run * plane.run + within % plane.run];
    return byte >> (plane.bits * (within / plane.run)) & ((1 << plane.bits) - 1);
}

// The same of numbers i to i + 3, a byte each.
uint32_t four_at(const Plane& plane, const uint8_t* block, int i) {
    uint8_t four[4];
    for (int k = 0; k < 4; k++) four[k] = bits_at(plane, block, i + k);
    uint32_t word;
    std::memcpy(&word, four, sizeof word);
    return word;
}

// Put the bits that a plane has of 32 columns of one row where the vectors of that row are.
void pack_plane(const Plane& plane, const uint8_t* block, int first_column, uint8_t flip, int row,
                uint8_t* packed) {
    const int bits = plane.bits;
    for (int v = 0; v < bits; v++) {
        uint32_t word = 0;
        for (int j = v; j < 8; j += bits)
            word |= four_at(plane, block, first_column + 4 * j) << (bits * (j / bits));
        word ^= flip * 0x01010101u;
        std::memcpy(packed + 64 * v + 4 * row, &word, sizeof word);
    }
}

struct ScalePair {
    uint8_t scale, minimum;
};

// Scale and minimum i of a block as they are packed: signed bytes, or Q2_K's two in one.
ScalePair scales_at(const Format& format, const uint8_t* block, int i) {
    const uint8_t* p = block + format.scales_offset;
    switch (format.scales) {
        case Scales::kSixBitPairs:
            if (i < 4) return {static_cast<uint8_t>(p[i] & 63), static_cast<uint8_t>(p[i + 4] & 63)};
            return {static_cast<uint8_t>((p[i + 4] & 15) | (p[i - 4] >> 6) << 4),
                    static_cast<uint8_t>((p[i + 4] >> 4) | (p[i] >> 6) << 4)};
        case Scales::kSixBit:
            return {static_cast<uint8_t>((bits_at({4, 0, 8}, p, i) | bits_at({2, 8, 4}, p, i) << 4) -
                                         32),
                    0};
        default: return {p[i], 0};
    }
}

// One block of one row.
void pack_block(const Format& format, const uint8_t* block, int row, uint8_t* packed) {
    for (int b = 0; b < format.n_blocks(); b++) {
        uint8_t* codes = packed + b * format.code_bytes();
        // Signed bytes are stored as codes, 128 too high.
        const uint8_t flip = format.low.bits == 8 ? 0x80 : 0;
        pack_plane(format.low, block, b * kBlockColumns, flip, row, codes);
        if (format.high.bits)
            pack_plane(format.high, block, b * kBlockColumns, 0, row, codes + 64 * format.low.bits);
        uint8_t* scales = packed + format.scales_at() + b * format.scales_bytes() + row;
        for (int s = 0; format.has_scales() && s < format.n_scales(); s++) {
            const ScalePair pair = scales_at(format, block, b * format.n_scales() + s);
            scales[s * kGroupRows] = pair.scale;
            if (format.has_byte_minima())
                scales[(format.n_scales() + s) * kGroupRows] = pair.minimum;
        }
    }
    std::memcpy(packed + format.scale_at() + 2 * row, block + format.scale_offset, 2);
    if (format.is_centred) return;
    uint8_t* minimum = packed + format.minimum_at() + 2 * row;
    std::memcpy(minimum, block + format.minimum_offset, 2);
    if (format.has_scales()) minimum[1] ^= 0x80;  // subtracted in the file, added here
}

void pack_row(int type, int columns, const uint8_t* file, int row, uint8_t* group) {
    if (const Format* format = find_format(type)) {
        for (int i = 0; i < columns / format->columns; i++)
            pack_block(*format, file + static_cast<std::size_t>(i) * format->file_bytes, row,
                       group + i * format->packed_bytes());
        return;
    }
    const std::size_t size = float_bytes(type);
    for (std::size_t c = 0; c < static_cast<std::size_t>(columns); c++)
        std::memcpy(group + size * (c * kGroupRows + row), file + size * c, size);
}

bool is_supported(int type, int rows, int columns) {
    return rows > 0 && columns > 0 && group_bytes(type, columns) != 0;
}

float first_lane(F32x16 a) {
    float lanes[kLanes];
    store(lanes, a);
    return lanes[0];
}

float half_at(const uint8_t* p) {
    uint16_t halves[kLanes] = {};
    std::memcpy(halves, p, 2);
    return first_lane(load(halves));
}

float float_at(int type, const uint8_t* group, std::size_t i) {
    if (type == COVEY_F16) return half_at(group + 2 * i);
    uint32_t bits = 0;
    if (type == COVEY_F32) {
        std::memcpy(&bits, group + 4 * i, 4);
    } else {
        uint16_t upper;
        std::memcpy(&upper, group + 2 * i, 2);
        bits = static_cast<uint32_t>(upper) << 16;
    }
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Bits of column `column` of 32, of a plane that is packed at `plane`.
int packed_bits(const uint8_t* plane, int bits, int row, int column) {
    const int j = column / 4;
    const uint8_t byte = plane[64 * (j % bits) + 4 * row + column % 4];
    return byte >> (bits * (j / bits)) & ((1 << bits) - 1);
}

// A weight is scale * code + minimum; 32 columns from block b of a packed block.
void decode_columns(const Format& format, const uint8_t* packed, int b, int row, float* out) {
    const uint8_t* codes = packed + b * format.code_bytes();
    const uint8_t* scales = packed + format.scales_at() + b * format.scales_bytes() + row;
    for (int column = 0; column < kBlockColumns; column++) {
        float scale = half_at(packed + format.scale_at() + 2 * row), minimum = 0;
        if (!format.is_centred) minimum = half_at(packed + format.minimum_at() + 2 * row);
        const uint8_t* at = scales + column / format.scale_columns * kGroupRows;
        if (format.is_nibbles()) {
            scale *= static_cast<float>(*at & 15);
            minimum *= static_cast<float>(*at >> 4);
        } else if (format.has_scales()) {
            scale *= static_cast<float>(static_cast<int8_t>(*at));
            if (format.has_byte_minima())
                minimum *= static_cast<float>(at[format.n_scales() * kGroupRows]);
        }
        int code = packed_bits(codes, format.low.bits, row, column);
        if (format.high.bits)
            code |= packed_bits(codes + 64 * format.low.bits, format.high.bits, row, column)
                    << format.low.bits;
        if (format.has_table) code = kIq4Values[code];
        const int centre = format.has_table ? 128 : 1 << (format.code_bits() - 1);
        *out++ = format.is_centred ? scale * static_cast<float>(code - centre)
                                   : scale * static_cast<float>(code) + minimum;
    }
}

}  // namespace

std::size_t group_bytes(int type, int columns) {
    if (columns % kBlockColumns) return 0;
    if (is_float_type(type)) return static_cast<std::size_t>(columns) * kGroupRows * float_bytes(type);
    const Format* format = find_format(type);
    if (!format || columns % format->columns) return 0;
    return columns / format->columns * format->packed_bytes();
}

void decode_row(const covey_matrix& matrix, int row, float* out) {
    const uint8_t* group = group_data(matrix, row / kGroupRows);
    const int r = row % kGroupRows;
    if (const Format* format = find_format(matrix.type)) {
        for (int at = 0; at < matrix.columns; at += kBlockColumns)
            decode_columns(*format, group + at / format->columns * format->packed_bytes(),
                           at % format->columns / kBlockColumns, r, out + at);
        return;
    }
    for (int c = 0; c < matrix.columns; c++)
        out[c] = float_at(matrix.type, group, static_cast<std::size_t>(c) * kGroupRows + r);
}

}  // namespace covey

using namespace covey;

int64_t covey_packed_bytes(int32_t type, int32_t rows, int32_t columns) {
    if (!is_supported(type, rows, columns)) return -1;
    return static_cast<int64_t>(group_bytes(type, columns)) * n_groups(rows);
}

int32_t covey_pack(int32_t type, int32_t rows, int32_t columns, const uint8_t* blocks,
                   uint8_t* packed) {
    if (!is_supported(type, rows, columns) || !blocks || !packed) return COVEY_INVALID;
    const std::size_t per_group = group_bytes(type, columns);
    if (rows % kGroupRows) std::memset(packed + per_group * (n_groups(rows) - 1), 0, per_group);
    for (int row = 0; row < rows; row++)
        pack_row(type, columns, blocks + row_bytes(type, columns) * row, row % kGroupRows,
                 packed + per_group * (row / kGroupRows));
    return COVEY_OK;
}
