// Both ends of a model, and what an engine is made of.
#include <algorithm>
#include <new>
#include <system_error>

#include "dot.h"
#include "span.h"

using namespace covey;

namespace {

// y[n][matrix.rows]: each row the sum of the products of `parts` following rows of x.
void product_rows(covey_engine& engine, const covey_matrix& matrix, const Activations& x, int parts,
                  float* y) {
    constexpr int kRangesPerThread = 8, kShortest = 4;
    const auto work = [&](int begin, int end, int thread) {
        ThreadScratch& scratch = engine.scratch[thread];
        float* product = scratch.products.reserve(2 * kMaxRows * kGroupRows);
        for (int group = begin; group < end; group++) {
            multiply_group(matrix, group, x, product, scratch.unpacked);
            const int width = std::min(kGroupRows, matrix.rows - group * kGroupRows);
            for (int row = 0; row < x.n_rows; row += parts) {
                float* total = product + row * kGroupRows;
                if (parts == 2) store(total, load(total) + load(total + kGroupRows));
                std::copy_n(total, width,
                            y + int64_t{row / parts} * matrix.rows + group * kGroupRows);
            }
        }
    };
    engine.pool.run_ranges(n_groups(matrix.rows), kRangesPerThread, kShortest, work);
}

bool is_matrix(const covey_matrix* matrix) {
    return matrix && matrix->data &&
           covey_packed_bytes(matrix->type, matrix->rows, matrix->columns) > 0;
}

}  // namespace

int32_t covey_embed(const covey_matrix* embedding, const int32_t* ids, int32_t n_ids, float scale,
                    float* hidden) {
    if (!is_matrix(embedding) || !ids || n_ids < 1 || !hidden) return COVEY_INVALID;
    for (int i = 0; i < n_ids; i++) {
        if (ids[i] < 0 || ids[i] >= embedding->rows) return COVEY_INVALID;
        float* row = hidden + int64_t{i} * embedding->columns;
        decode_row(*embedding, ids[i], row);
        for (int j = 0; j < embedding->columns; j++) row[j] *= scale;
    }
    return COVEY_OK;
}

int32_t covey_head_logits(covey_engine* engine, const covey_matrix* output, const float* norm,
                          float eps, const float* hidden, int32_t n_rows, float* logits) {
    if (!engine || !is_matrix(output) || !norm || !hidden || n_rows < 1 || !logits)
        return COVEY_INVALID;
    // Two bytes per activation, as two rows: the error of single bytes in logits costs 0.6 % of the
    // greedy tokens, and the second row is free where reading the matrix is what takes the time.
    const int columns = output->columns, parts = is_float_type(output->type) ? 1 : 2;
    Activations& x = engine->normed;
    try {
        for (int first = 0; first < n_rows; first += kMaxRows / parts) {
            const int n = std::min(kMaxRows / parts, n_rows - first);
            x.resize(n * parts, columns);
            engine->pool.run(n, [&](int i, int) {
                const float* from = hidden + int64_t{first + i} * columns;
                rms_norm(from, norm, columns, eps, x.row(i * parts));
                if (parts == 2) x.quantize_pair(2 * i);
            });
            product_rows(*engine, *output, x, parts, logits + int64_t{first} * output->rows);
        }
    } catch (const std::bad_alloc&) {
        return COVEY_NO_MEMORY;
    }
    return COVEY_OK;
}

int32_t covey_multiply(covey_engine* engine, const covey_matrix* matrix, const float* x,
                       int32_t n_rows, float* y) {
    if (!engine || !is_matrix(matrix) || !x || n_rows < 1 || !y) return COVEY_INVALID;
    const int columns = matrix->columns;
    try {
        for (int first = 0; first < n_rows; first += kMaxRows) {
            prepare(engine->pool, engine->normed, std::min(kMaxRows, n_rows - first), columns,
                    !is_float_type(matrix->type), [&](int row, float* out) {
                        std::copy_n(x + int64_t{first + row} * columns, columns, out);
                    });
            product_rows(*engine, *matrix, engine->normed, 1, y + int64_t{first} * matrix->rows);
        }
    } catch (const std::bad_alloc&) {
        return COVEY_NO_MEMORY;
    }
    return COVEY_OK;
}

int32_t covey_abi_version(void) { return COVEY_ABI_VERSION; }

covey_engine* covey_engine_new(int32_t n_threads, const int32_t* helper_cores) {
    if (n_threads < 1 || n_threads > 1024) return nullptr;
    try {
        return new covey_engine(n_threads, helper_cores);
    } catch (const std::bad_alloc&) {
        return nullptr;
    } catch (const std::system_error&) {
        return nullptr;
    }
}

void covey_engine_free(covey_engine* engine) { delete engine; }
