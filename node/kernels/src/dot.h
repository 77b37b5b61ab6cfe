// Products of one group of 16 matrix rows with many rows of activations, written once over the
// vocabulary of simd.h: the same bits on every instruction set.
//
// Quantised: for each block of 32 columns, in order, and for each scale in it: the integer dot
// product of weights and activation bytes, exact; total = fma(minimum, activation sum, total) if the
// format has minima; and total = fma(float(dot) * activation scale, weight scale, total). The
// conversion costs nothing: the dot product comes with kWholeBias added, and
// fma(biased dot, scale, -kWholeBias * scale) is float(dot) * scale, rounded once, because the offset
// is exact. Floats: even and odd columns are added up apart in each piece of 256 columns, so that a
// product does not wait for the one before.
#pragma once

#include <cstdint>

#include "activations.h"
#include "memory.h"
#include "packing.h"
#include "simd.h"

namespace covey {

// out[x.n_rows][16] = x * (rows 16 * group .. of matrix); `scratch` is this thread's.
void multiply_group(const covey_matrix& matrix, int group, const Activations& x, float* out,
                    Buffer<uint8_t>& scratch);

// The case of F32, F16 and BF16, whose activations stay floats.
void multiply_group_float(const covey_matrix& matrix, int group, const Activations& x, float* out,
                          Buffer<uint8_t>& scratch);

// Packed weights come from memory in one stream, of which the hardware's prefetcher sees no further
// than the end of a 4 KB page: asking this far ahead makes decode 1.4 to 2.4 times as fast where
// the weights do not stay in the last-level cache. Measured: 2,560 to 10,240 are alike.
constexpr std::size_t kAhead = 5120;

// Always inlined: GCC 12 drops calls of a function that does nothing but prefetch.
COVEY_INLINE void prefetch(const uint8_t* p, std::size_t bytes) {
    for (std::size_t line = 0; line < bytes; line += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(p) + kAhead + line);
}

}  // namespace covey
