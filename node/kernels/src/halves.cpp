// Floats as halves and back: what partial sums travel as.
#include <cmath>

#include "abi.h"
#include "simd.h"

using namespace covey;

namespace {

constexpr float kLargestHalf = 65504.0f;

// Calls work(first value) for whole groups of lanes, then rest(value) for what is left.
template <class Work, class Rest>
void in_groups(int64_t n, Work work, Rest rest) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) work(i);
    for (; i < n; i++) rest(i);
}

uint16_t narrowed(float value) {
    float group[kLanes] = {value};
    uint16_t halves[kLanes];
    store(halves, load(group));
    return halves[0];
}

float widened(uint16_t half) {
    const uint16_t halves[kLanes] = {half};
    float group[kLanes];
    store(group, load(halves));
    return group[0];
}

}  // namespace

int32_t covey_halves_narrow(const float* values, int64_t n, uint16_t* halves) {
    int fits = 1;
    for (int64_t i = 0; i < n; i++) fits &= std::fabs(values[i]) <= kLargestHalf;  // not for a NaN
    if (!fits) return COVEY_INVALID;
    in_groups(
        n, [&](int64_t i) { store(halves + i, load(values + i)); },
        [&](int64_t i) { halves[i] = narrowed(values[i]); });
    return COVEY_OK;
}

void covey_halves_widen(const uint16_t* halves, int64_t n, float* values) {
    in_groups(
        n, [&](int64_t i) { store(values + i, load(halves + i)); },
        [&](int64_t i) { values[i] = widened(halves[i]); });
}

void covey_halves_add(const uint16_t* halves, int64_t n, float* total) {
    in_groups(
        n, [&](int64_t i) { store(total + i, load(total + i) + load(halves + i)); },
        [&](int64_t i) { total[i] += widened(halves[i]); });
}
