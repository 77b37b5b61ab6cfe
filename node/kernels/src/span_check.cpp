#include "span_check.h"

#include <algorithm>

#include "attention_cache.h"
#include "packing.h"

namespace covey {
namespace {

constexpr int kMaxExperts = 4096;

bool is_matrix(const covey_matrix& matrix, int rows, int columns) {
    return matrix.data && matrix.rows == rows && matrix.columns == columns &&
           covey_packed_bytes(matrix.type, rows, columns) > 0;
}

bool is_mlp(const covey_matrix& gate, const covey_matrix& up, const covey_matrix& down,
            const covey_shape& s) {
    return is_matrix(gate, s.intermediate_size, s.hidden_size) &&
           is_matrix(up, s.intermediate_size, s.hidden_size) &&
           is_matrix(down, s.hidden_size, s.intermediate_size);
}

bool fits_attention(const covey_block& block, const covey_shape& s, int n_ropes) {
    const int queries = s.n_heads * s.head_dim, keys = s.n_kv_heads * s.head_dim;
    return block.attn_norm && is_matrix(block.q, queries, s.hidden_size) &&
           is_matrix(block.k, keys, s.hidden_size) && is_matrix(block.v, keys, s.hidden_size) &&
           is_matrix(block.o, s.hidden_size, queries) && block.window >= 0 &&
           block.rope >= COVEY_NO_ROPE && block.rope < n_ropes;
}

bool fits_mlp(const covey_block& block, const covey_shape& s) {
    if (!block.ffn_norm) return false;
    if (!block.router) return is_mlp(block.gate, block.up, block.down, s);
    if (s.n_experts < 1 || !block.experts) return false;
    for (int i = 0; i < s.n_experts; i++) {
        const covey_matrix* expert = block.experts + 3 * i;
        if (!is_mlp(expert[0], expert[1], expert[2], s)) return false;
    }
    return true;
}

}  // namespace

bool is_shape(const covey_shape& s) {
    const bool sizes = s.hidden_size > 0 && s.hidden_size % kBlockColumns == 0 &&
                       s.intermediate_size > 0 && s.intermediate_size % kBlockColumns == 0;
    const bool heads = s.n_kv_heads > 0 && s.n_heads > 0 && s.n_heads % s.n_kv_heads == 0 &&
                       s.head_dim > 0 && s.head_dim % kLanes == 0 && s.head_dim <= kMaxHeadDim &&
                       s.n_heads <= INT32_MAX / 4 / s.head_dim &&
                       s.n_heads * s.head_dim % kBlockColumns == 0;
    const bool rope = s.rope_dim >= 0 && s.rope_dim % 2 == 0 && s.rope_dim <= s.head_dim;
    const bool kinds = (s.kv_type == COVEY_KV_FP16 || s.kv_type == COVEY_KV_INT8) &&
                       (s.activation == COVEY_SILU || s.activation == COVEY_GELU_TANH);
    const bool experts = s.n_experts >= 0 && s.n_experts <= kMaxExperts &&
                         (s.n_experts == 0 ||
                          (s.n_experts_used > 0 && s.n_experts_used <= s.n_experts));
    return sizes && heads && rope && kinds && experts && s.attention_scale > 0;
}

bool fits(const covey_block& block, const covey_shape& s, uint32_t parts, int n_ropes) {
    if (parts & COVEY_PARTIAL && (block.post_attn_norm || block.post_ffn_norm)) return false;
    return (!(parts & COVEY_ATTENTION) || fits_attention(block, s, n_ropes)) &&
           (!(parts & COVEY_MLP) || fits_mlp(block, s));
}

bool fits(const covey_run& run, const covey_rope* ropes, int n_ropes) {
    if (!ropes) return false;
    int64_t room = int64_t{run.n_pages} * kTile;
    for (int i = 0; i < n_ropes; i++) {
        if (!ropes[i].cosines || !ropes[i].sines) return false;
        room = std::min(room, ropes[i].n_positions);
    }
    if (!run.pages || run.n_rows < 1 || run.position < 0 || run.position > room - run.n_rows)
        return false;
    for (int64_t page = 0; page * kTile < run.position + run.n_rows; page++)
        if (!run.pages[page]) return false;
    return true;
}

}  // namespace covey
