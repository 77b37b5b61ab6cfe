// Packed matrices: groups of 16 rows, interleaved so that one vector holds all 16.
//
// Per group and 32 columns: Q4_1, 320 bytes: 4 x (16 rows x 4 bytes of nibbles), 16 scales, 16
// minima; byte j*64 + r*4 + k has column 4j+k of row r in its low and 16+4j+k in its high nibble.
// Q8_0, 544 bytes: 8 x (16 rows x 4 weights + 128), 16 scales. F16: per column 16 halves.
// Rows that fill up the last group have scale 0.
#pragma once

#include <cstddef>
#include <cstdint>

#include "abi.h"

namespace covey {

constexpr int kGroupRows = 16;
constexpr int kBlockColumns = 32;

constexpr std::size_t kQ41Nibbles = 256, kQ41Bytes = 320;
constexpr std::size_t kQ80Weights = 512, kQ80Bytes = 544;

inline int n_groups(int rows) { return (rows + kGroupRows - 1) / kGroupRows; }

// Bytes of one group of 16 rows; 0 for a type that is not supported.
std::size_t group_bytes(int type, int columns);

inline const uint8_t* group_data(const covey_matrix& matrix, int group) {
    return matrix.data + group_bytes(matrix.type, matrix.columns) * group;
}

// Decode one row to floats, as GGUF defines them.
void decode_row(const covey_matrix& matrix, int row, float* out);

}  // namespace covey
