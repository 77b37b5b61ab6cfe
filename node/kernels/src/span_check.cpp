#include "span_check.h"

#include <algorithm>

#include "attention_cache.h"
#include "packing.h"

namespace covey {
namespace {

bool is_matrix(const covey_matrix& matrix, int rows, int columns) {
    return matrix.data && matrix.rows == rows && matrix.columns == columns &&
           covey_packed_bytes(matrix.type, rows, columns) > 0;
}

}  // namespace

bool is_shape(const covey_shape& s) {
    return s.hidden_size > 0 && s.hidden_size % kBlockColumns == 0 && s.n_kv_heads > 0 &&
           s.n_heads > 0 && s.n_heads % s.n_kv_heads == 0 && s.head_dim > 0 &&
           s.head_dim % kLanes == 0 && s.intermediate_size > 0 &&
           s.intermediate_size % kBlockColumns == 0 && s.rope_dim >= 0 && s.rope_dim % 2 == 0 &&
           s.rope_dim <= s.head_dim && s.head_dim <= kMaxHeadDim &&
           (s.kv_type == COVEY_KV_FP16 || s.kv_type == COVEY_KV_INT8) && (s.n_heads * s.head_dim) % kBlockColumns == 0;
}

bool fits(const covey_block& block, const covey_shape& s, uint32_t parts) {
    const int queries = s.n_heads * s.head_dim, keys = s.n_kv_heads * s.head_dim;
    const bool attention = !(parts & COVEY_ATTENTION) ||
                           (block.attn_norm && is_matrix(block.q, queries, s.hidden_size) &&
                            is_matrix(block.k, keys, s.hidden_size) &&
                            is_matrix(block.v, keys, s.hidden_size) &&
                            is_matrix(block.o, s.hidden_size, queries));
    const bool mlp = !(parts & COVEY_MLP) ||
                     (block.ffn_norm && is_matrix(block.gate, s.intermediate_size, s.hidden_size) &&
                      is_matrix(block.up, s.intermediate_size, s.hidden_size) &&
                      is_matrix(block.down, s.hidden_size, s.intermediate_size));
    return attention && mlp;
}

bool fits(const covey_run& run, const covey_rope& rope) {
    const int64_t room = std::min(int64_t{run.n_pages} * kTile, rope.n_positions);
    if (!run.pages || run.n_rows < 1 || run.position < 0 || run.position > room - run.n_rows ||
        !rope.cosines || !rope.sines)
        return false;
    const int64_t end = run.position + run.n_rows;
    for (int64_t page = 0; page * kTile < end; page++)
        if (!run.pages[page]) return false;
    return true;
}

}  // namespace covey
