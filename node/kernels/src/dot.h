// Products of one group of 16 matrix rows with many rows of activations: the part that differs
// per instruction set. dot_avx512vnni.cpp and dot_portable.cpp give the same bits.
//
// For each block of 32 columns, in order: the integer dot product of unsigned weight bytes and
// signed activation bytes, exact; total = fma(minimum, activation sum, total); and
// total = fma(float(dot) * activation scale, weight scale, total). Q8_0's weights are stored + 128,
// so their minimum is -128 * scale. The conversion costs nothing: the dot product starts from the
// bits of kWholeBias, and fma(biased dot, scale, -kWholeBias * scale) is float(dot) * scale, rounded
// once, because the offset is exact.
#pragma once

#include <cstdint>

#include "activations.h"
#include "memory.h"
#include "packing.h"

namespace covey {

// out[x.n_rows][16] = x * (rows 16 * group .. of matrix); `scratch` is this thread's.
void multiply_group(const covey_matrix& matrix, int group, const Activations& x, float* out,
                    Buffer<uint8_t>& scratch);

// The F16 case of multiply_group, in floats.
void multiply_group_f16(const covey_matrix& matrix, int group, const Activations& x, float* out);

}  // namespace covey
