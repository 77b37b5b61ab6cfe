// Packed matrices: groups of 16 rows, interleaved so that one vector holds all 16.
//
// Quantised formats are described in formats.h. In a plane of b bits, of 32 columns, byte r of
// vector v holds, lowest bits first, the codes of row r / 4 and columns 4j + r % 4 for j = v, v + b,
// v + 2b ... F32, F16 and BF16: per column 16 numbers. Rows that fill up the last group are zero.
#pragma once

#include <cstddef>
#include <cstdint>

#include "abi.h"
#include "formats.h"

namespace covey {

inline int n_groups(int rows) { return (rows + kGroupRows - 1) / kGroupRows; }

// Bytes of one group of 16 rows; 0 for a type that is not supported or columns that do not fit it.
std::size_t group_bytes(int type, int columns);

inline const uint8_t* group_data(const covey_matrix& matrix, int group) {
    return matrix.data + group_bytes(matrix.type, matrix.columns) * group;
}

// Decode one row to floats, bit for bit as GGUF's own Python package does.
void decode_row(const covey_matrix& matrix, int row, float* out);

}  // namespace covey
