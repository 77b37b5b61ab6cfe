// Keys and values of one KV head in pages of 64 positions (a tile), as halves or as bytes.
//
// A page holds, for each block and each KV head in it, the tile's keys [head_dim][64] and then its
// values [64][head_dim]. Bytes have one float scale per position behind them, keys and values each.
#pragma once

#include <cstdint>
#include <cstring>

#include "abi.h"
#include "simd.h"

namespace covey {

constexpr int kTile = COVEY_TILE;
constexpr int kMaxHeadDim = 1024;

struct CacheLayout {
    int n_kv_heads;
    int head_dim;
    bool is_int8;

    explicit CacheLayout(const covey_shape& shape)
        : n_kv_heads(shape.n_kv_heads),
          head_dim(shape.head_dim),
          is_int8(shape.kv_type == COVEY_KV_INT8) {}

    int64_t element_bytes() const { return int64_t{kTile} * head_dim * (is_int8 ? 1 : 2); }
    // Of the keys, and of the values, of one head.
    int64_t tile_bytes() const {
        return element_bytes() + (is_int8 ? kTile * static_cast<int64_t>(sizeof(float)) : 0);
    }
    int64_t block_bytes() const { return 2 * n_kv_heads * tile_bytes(); }
};

// One KV head of one block in a session's pages.
struct HeadCache {
    CacheLayout layout;
    uint8_t* const* pages;
    int64_t offset;  // in each page

    HeadCache(const CacheLayout& cache, uint8_t* const* table, int block_idx, int head)
        : layout(cache),
          pages(table),
          offset(cache.block_bytes() * block_idx + 2 * cache.tile_bytes() * head) {}

    uint8_t* keys(int64_t tile) const { return pages[tile] + offset; }
    uint8_t* values(int64_t tile) const { return keys(tile) + layout.tile_bytes(); }
    // The scales behind one tile's keys or values; null if they have none.
    float* scales(uint8_t* elements) const {
        return layout.is_int8 ? reinterpret_cast<float*>(elements + layout.element_bytes())
                              : nullptr;
    }

    void write(int64_t position, const float* key, const float* value) const;
};

}  // namespace covey
