// GGUF blocks to packed groups and back; see packing.h for the layout.
#include "packing.h"

#include <algorithm>
#include <cstring>

#include "simd.h"

namespace covey {
namespace {

constexpr std::size_t kFileQ41Bytes = 20;  // fp16 scale, fp16 minimum, 16 bytes of nibbles
constexpr std::size_t kFileQ80Bytes = 34;  // fp16 scale, 32 signed weights

// Bytes of one row in the file.
std::size_t row_bytes(int type, int columns) {
    const std::size_t n_blocks = columns / kBlockColumns;
    if (type == COVEY_Q4_1) return n_blocks * kFileQ41Bytes;
    if (type == COVEY_Q8_0) return n_blocks * kFileQ80Bytes;
    return static_cast<std::size_t>(columns) * 2;
}

// Copies between the file's place and the packed place of a few bytes, one way or the other.
struct ToPacked {
    using File = const uint8_t;
    using Packed = uint8_t;
    static void copy(File* file, Packed* packed, int n) { std::memcpy(packed, file, n); }
    static void copy_biased(File* file, Packed* packed) {
        for (int k = 0; k < 4; k++) packed[k] = file[k] ^ 0x80;  // + 128 of a signed byte
    }
};
struct ToFile {
    using File = uint8_t;
    using Packed = const uint8_t;
    static void copy(File* file, Packed* packed, int n) { std::memcpy(file, packed, n); }
    static void copy_biased(File* file, Packed* packed) {
        for (int k = 0; k < 4; k++) file[k] = packed[k] ^ 0x80;
    }
};

template <class Way>
void move_q41(typename Way::File* file, typename Way::Packed* packed, int r) {
    Way::copy(file, packed + kQ41Nibbles + 2 * r, 2);
    Way::copy(file + 2, packed + kQ41Nibbles + 2 * kGroupRows + 2 * r, 2);
    for (int j = 0; j < 4; j++) Way::copy(file + 4 + 4 * j, packed + 64 * j + 4 * r, 4);
}

template <class Way>
void move_q80(typename Way::File* file, typename Way::Packed* packed, int r) {
    Way::copy(file, packed + kQ80Weights + 2 * r, 2);
    for (int j = 0; j < 8; j++) Way::copy_biased(file + 2 + 4 * j, packed + 64 * j + 4 * r);
}

template <class Way>
void move_row(int type, int columns, typename Way::File* file, typename Way::Packed* group, int r) {
    const int n_blocks = columns / kBlockColumns;
    if (type == COVEY_Q4_1) {
        for (int b = 0; b < n_blocks; b++)
            move_q41<Way>(file + b * kFileQ41Bytes, group + b * kQ41Bytes, r);
    } else if (type == COVEY_Q8_0) {
        for (int b = 0; b < n_blocks; b++)
            move_q80<Way>(file + b * kFileQ80Bytes, group + b * kQ80Bytes, r);
    } else {
        for (std::size_t c = 0; c < static_cast<std::size_t>(columns); c++)
            Way::copy(file + 2 * c, group + 2 * (c * kGroupRows + r), 2);
    }
}

bool is_supported(int type, int rows, int columns) {
    return rows > 0 && columns > 0 && columns % kBlockColumns == 0 &&
           group_bytes(type, columns) != 0;
}

float half_at(const uint8_t* p) {
    uint16_t halves[kLanes] = {};
    std::memcpy(halves, p, 2);
    float lanes[kLanes];
    store(lanes, load(halves));
    return lanes[0];
}

}  // namespace

std::size_t group_bytes(int type, int columns) {
    const std::size_t n_blocks = columns / kBlockColumns;
    switch (type) {
        case COVEY_Q4_1: return n_blocks * kQ41Bytes;
        case COVEY_Q8_0: return n_blocks * kQ80Bytes;
        case COVEY_F16: return static_cast<std::size_t>(columns) * kGroupRows * 2;
        default: return 0;
    }
}

void decode_row(const covey_matrix& matrix, int row, float* out) {
    const uint8_t* group = group_data(matrix, row / kGroupRows);
    const int r = row % kGroupRows;
    const int n_blocks = matrix.columns / kBlockColumns;
    for (int b = 0; b < n_blocks; b++, out += kBlockColumns) {
        if (matrix.type == COVEY_Q4_1) {
            const uint8_t* block = group + b * kQ41Bytes;
            const float scale = half_at(block + kQ41Nibbles + 2 * r);
            const float minimum = half_at(block + kQ41Nibbles + 2 * kGroupRows + 2 * r);
            for (int i = 0; i < 16; i++) {
                const uint8_t pair = block[64 * (i / 4) + 4 * r + i % 4];
                out[i] = scale * static_cast<float>(pair & 15) + minimum;
                out[16 + i] = scale * static_cast<float>(pair >> 4) + minimum;
            }
        } else if (matrix.type == COVEY_Q8_0) {
            const uint8_t* block = group + b * kQ80Bytes;
            const float scale = half_at(block + kQ80Weights + 2 * r);
            for (int i = 0; i < kBlockColumns; i++)
                out[i] = scale * static_cast<float>(block[64 * (i / 4) + 4 * r + i % 4] - 128);
        } else {
            for (int i = 0; i < kBlockColumns; i++)
                out[i] = half_at(group + 2 * ((b * kBlockColumns + i) * kGroupRows + r));
        }
    }
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
        move_row<ToPacked>(type, columns, blocks + row_bytes(type, columns) * row,
                           packed + per_group * (row / kGroupRows), row % kGroupRows);
    return COVEY_OK;
}

int32_t covey_unpack(int32_t type, int32_t rows, int32_t columns, const uint8_t* packed,
                     uint8_t* blocks) {
    if (!is_supported(type, rows, columns) || !blocks || !packed) return COVEY_INVALID;
    const std::size_t per_group = group_bytes(type, columns);
    for (int row = 0; row < rows; row++)
        move_row<ToFile>(type, columns, blocks + row_bytes(type, columns) * row,
                         packed + per_group * (row / kGroupRows), row % kGroupRows);
    return COVEY_OK;
}
