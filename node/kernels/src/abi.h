/* The C ABI of Covey's kernels: a span of decoder blocks, or half a block, in one call.
 *
 * One shared library per instruction set exports these functions. Callers check every pointer and
 * length (packed.py, library.py); the library checks again that shapes fit each
 * other, and trusts that buffers are as long as those shapes say. An engine serves one caller
 * thread at a time. Results do not depend on the number of threads, on how rows are grouped into
 * calls and batches, on where pages lie, or on the instruction set: every float operation and its
 * order is fixed (simd.h).
 */
#ifndef COVEY_KERNELS_ABI_H
#define COVEY_KERNELS_ABI_H

#include <stdint.h>

#if defined(__GNUC__)
#define COVEY_EXPORT __attribute__((visibility("default")))
#else
#define COVEY_EXPORT
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define COVEY_ABI_VERSION 5

/* Matrix formats, by their numbers in GGUF. */
enum {
    COVEY_F32 = 0,
    COVEY_F16 = 1,
    COVEY_Q4_0 = 2,
    COVEY_Q4_1 = 3,
    COVEY_Q5_0 = 6,
    COVEY_Q5_1 = 7,
    COVEY_Q8_0 = 8,
    COVEY_Q2_K = 10,
    COVEY_Q3_K = 11,
    COVEY_Q4_K = 12,
    COVEY_Q5_K = 13,
    COVEY_Q6_K = 14,
    COVEY_IQ4_NL = 20,
    COVEY_BF16 = 30
};

/* What of a block to run. PARTIAL leaves the residual out: hidden becomes the half's own
 * contribution, which is what a tensor-parallel group adds up; with exactly one half. */
enum { COVEY_ATTENTION = 1, COVEY_MLP = 2, COVEY_PARTIAL = 4 };

enum { COVEY_OK = 0, COVEY_INVALID = 1, COVEY_NO_MEMORY = 2 };

/* Positions in one page of the KV cache. */
enum { COVEY_TILE = 64 };

/* Keys and values as halves, or as bytes with one float scale per position, KV head and kind. */
enum { COVEY_KV_FP16 = 0, COVEY_KV_INT8 = 1 };

/* What the gate goes through; GELU by its tanh form. */
enum { COVEY_SILU = 0, COVEY_GELU_TANH = 1 };

/* Which table a block rotates queries and keys by, other than tables 0 and 1. */
enum { COVEY_NO_ROPE = -1 };

typedef struct covey_engine covey_engine; /* threads and scratch memory */

typedef struct {
    int32_t type;
    int32_t rows;
    int32_t columns; /* a multiple of 32; of 256 for the types with a K */
    int32_t reserved;
    const uint8_t* data; /* packed by covey_pack, aligned to 64 bytes */
} covey_matrix;

/* All zeros behind `down` is a block of Llama; NULL is a part that the model does not have. */
typedef struct {
    const float* attn_norm; /* [hidden] */
    const float* ffn_norm;
    covey_matrix q, k, v, o, gate, up, down;
    const float* q_bias; /* [heads * head_dim], as many as the matrix has rows */
    const float* k_bias;
    const float* v_bias;
    const float* q_norm; /* [head_dim], of each head before it is rotated */
    const float* k_norm;
    const float* post_attn_norm; /* [hidden], of what is then added; not with PARTIAL */
    const float* post_ffn_norm;
    const float* router;         /* [n_experts][hidden]; with it there is no gate, up and down but */
    const covey_matrix* experts; /* [n_experts][3]: gate, up, down */
    int32_t window;              /* positions that a row sees, its own included; 0 is all */
    int32_t rope;                /* 0 or 1, a table, or COVEY_NO_ROPE */
} covey_block;

typedef struct {
    int32_t hidden_size; /* a multiple of 32 */
    int32_t n_heads;
    int32_t n_kv_heads; /* divides n_heads */
    int32_t head_dim;   /* a multiple of 16 */
    int32_t intermediate_size; /* of one expert, if there are experts */
    int32_t rope_dim; /* leading dimensions of a head that are rotated; even */
    int32_t rope_interleaved;
    float rms_norm_eps;
    int32_t kv_type;       /* COVEY_KV_FP16 or COVEY_KV_INT8 */
    float attention_scale; /* what scores are multiplied by, commonly head_dim ^ -0.5 */
    int32_t activation;    /* COVEY_SILU or COVEY_GELU_TANH */
    int32_t n_experts;     /* 0 in a model without */
    int32_t n_experts_used;
    int32_t renormalize_experts; /* weights of those used are divided by their sum */
} covey_shape;

/* Cosines and sines [n_positions][rope_dim/2] from position 0 on. */
typedef struct {
    const float* cosines;
    const float* sines;
    int64_t n_positions;
} covey_rope;

/* Consecutive rows of one session. Page i holds positions [64 i, 64 (i + 1)) of every block of the
 * span, covey_page_bytes long and aligned to 64; attention_cache.h says how. Pages before that of
 * `position` are only read, so sessions may share them. */
typedef struct {
    uint8_t* const* pages;
    int32_t n_pages;
    int32_t n_rows;
    int64_t position; /* of the first row */
} covey_run;

COVEY_EXPORT int32_t covey_abi_version(void);

/* The instruction sets with libraries of their own that this CPU can run, best first: their names by
 * index, then NULL. The last is "portable", which every CPU of its kind runs. */
COVEY_EXPORT const char* covey_isa(int32_t index);

/* NULL if threads cannot be started. n_threads counts the caller; helper_cores is where the other
 * n_threads - 1 stay, or NULL. */
COVEY_EXPORT covey_engine* covey_engine_new(int32_t n_threads, const int32_t* helper_cores);
COVEY_EXPORT void covey_engine_free(covey_engine* engine);

/* Bytes of a packed matrix (rows rounded up to 16); -1 for a type or shape that is not supported. */
COVEY_EXPORT int64_t covey_packed_bytes(int32_t type, int32_t rows, int32_t columns);

/* Rows of GGUF blocks -> packed; the same bits in another order. */
COVEY_EXPORT int32_t covey_pack(int32_t type, int32_t rows, int32_t columns, const uint8_t* blocks,
                                uint8_t* packed);

/* Bytes of one page of a span of n_blocks blocks; -1 for a shape that is not supported. */
COVEY_EXPORT int64_t covey_page_bytes(const covey_shape* shape, int32_t n_blocks);

/* Run `parts` of each block on the rows of all runs, in place: hidden [rows of run 0, rows of run
 * 1, ...][hidden_size]. Every run is of another session, and each result is the same as that of
 * the run alone. `first_block` is the place of the first of `blocks` within the pages, so that a
 * span whose pages hold more blocks can be run piece by piece. */
COVEY_EXPORT int32_t covey_span_forward(covey_engine* engine, const covey_shape* shape,
                                        const covey_block* blocks, int32_t n_blocks,
                                        int32_t first_block, const covey_run* runs, int32_t n_runs,
                                        const covey_rope* ropes, int32_t n_ropes, float* hidden,
                                        uint32_t parts);

/* Rows `ids` of an embedding matrix [V][D], decoded and multiplied by `scale`: hidden [n_ids][D]. */
COVEY_EXPORT int32_t covey_embed(const covey_matrix* embedding, const int32_t* ids, int32_t n_ids,
                                 float scale, float* hidden);

/* Final norm and output matrix [V][D]: hidden [n_rows][D] -> logits [n_rows][V]. */
COVEY_EXPORT int32_t covey_head_logits(covey_engine* engine, const covey_matrix* output,
                                       const float* norm, float eps, const float* hidden,
                                       int32_t n_rows, float* logits);

/* The plain product of the engine, for tests and measurements: x [n_rows][columns] -> y [n_rows][rows]. */
COVEY_EXPORT int32_t covey_multiply(covey_engine* engine, const covey_matrix* matrix, const float* x,
                                    int32_t n_rows, float* y);

/* values [n] -> halves [n], rounded to the nearest, ties to even. COVEY_INVALID, and nothing is said
 * about the halves, if one is beyond the largest half or no number. */
COVEY_EXPORT int32_t covey_halves_narrow(const float* values, int64_t n, uint16_t* halves);

/* halves [n] -> values [n]; and added to total [n]. They need not be aligned. */
COVEY_EXPORT void covey_halves_widen(const uint16_t* halves, int64_t n, float* values);
COVEY_EXPORT void covey_halves_add(const uint16_t* halves, int64_t n, float* total);

#ifdef __cplusplus
}
#endif
#endif
