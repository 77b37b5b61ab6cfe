// Whether a call's shapes fit each other: what is refused before any row is touched.
#pragma once

#include <cstdint>

#include "abi.h"

namespace covey {

bool is_shape(const covey_shape& shape);
bool fits(const covey_block& block, const covey_shape& shape, uint32_t parts, int n_ropes);
bool fits(const covey_run& run, const covey_rope* ropes, int n_ropes);

}  // namespace covey
