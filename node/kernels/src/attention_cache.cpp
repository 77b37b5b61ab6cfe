#include "attention_cache.h"

#include <algorithm>
#include <cmath>

namespace covey {
namespace {

// Below it 127 / largest would overflow; such a vector counts as zero.
constexpr float kSmallestVector = 1e-30f;

// x as bytes; returns what to multiply them by: NaN if a number is not finite.
float to_bytes(const float* x, int n, int8_t* bytes) {
    float largest = 0.0f;
    for (int i = 0; i < n; i++) {
        const float magnitude = std::fabs(x[i]);
        if (!(magnitude <= largest)) largest = magnitude;  // a NaN stays, see below
        if (!std::isfinite(largest)) break;
    }
    if (!std::isfinite(largest) || largest < kSmallestVector) {
        std::fill_n(bytes, n, int8_t{0});
        return std::isfinite(largest) ? 0.0f : NAN;
    }
    const float inverse = 127.0f / largest;
    for (int i = 0; i < n; i++) {
        // Adding 1.5 * 2^23 rounds to the nearest whole number, which is then in the low bits.
        const float biased = x[i] * inverse + kWholeBias;
        int32_t bits;
        std::memcpy(&bits, &biased, sizeof bits);
        bytes[i] = static_cast<int8_t>(bits - kWholeBiasBits);
    }
    return largest / 127.0f;
}

template <class Element>
void put(const Element* key, const Element* value, int head_dim, int64_t at, uint8_t* keys,
         uint8_t* values) {
    auto* column = reinterpret_cast<Element*>(keys) + at;
    for (int i = 0; i < head_dim; i++) column[i * kTile] = key[i];
    std::copy_n(value, head_dim, reinterpret_cast<Element*>(values) + at * head_dim);
}

}  // namespace

void HeadCache::write(int64_t position, const float* key, const float* value) const {
    const int head_dim = layout.head_dim;
    const int64_t at = position % kTile;
    uint8_t* key_tile = keys(position / kTile);
    uint8_t* value_tile = values(position / kTile);
    if (layout.is_int8) {
        int8_t bytes[2][kMaxHeadDim];
        scales(key_tile)[at] = to_bytes(key, head_dim, bytes[0]);
        scales(value_tile)[at] = to_bytes(value, head_dim, bytes[1]);
        put(bytes[0], bytes[1], head_dim, at, key_tile, value_tile);
    } else {
        uint16_t halves[2][kMaxHeadDim];
        for (int i = 0; i < head_dim; i += kLanes) {
            store(halves[0] + i, load(key + i));
            store(halves[1] + i, load(value + i));
        }
        put(halves[0], halves[1], head_dim, at, key_tile, value_tile);
    }
}

}  // namespace covey
