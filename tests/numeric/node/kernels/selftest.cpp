// Runs every entry point of the library on exactly sized buffers, for AddressSanitizer and UBSan:
// odd row counts, both rope layouts, partial halves, rewinds, bad arguments, several threads.
// It also holds the results of many rows against one at a time. Exits 1 at the first failure.
#include "fixtures.h"

namespace {

// Runs rows [0, n) in calls of the given sizes, repeated; returns all hidden states.
std::vector<float> run(Model& model, Engine& engine, Session& session, const std::vector<float>& x,
                       const std::vector<int>& sizes) {
    const covey_shape& s = model.shape;
    std::vector<covey_block> blocks(2, model.block);
    std::vector<float> out = x;
    const Angles angles(s);
    const int n = static_cast<int>(x.size()) / s.hidden_size;
    for (int at = 0, call = 0; at < n; call++) {
        const int rows = std::min(sizes[call % sizes.size()], n - at);
        Exact<float> hidden(static_cast<std::size_t>(rows) * s.hidden_size);
        std::memcpy(hidden.get(), &x[static_cast<std::size_t>(at) * s.hidden_size], hidden.size * 4);
        const covey_run part = session.run(at, rows);
        CHECK(covey_span_forward(engine.handle, &s, blocks.data(), 2, 0, &part, 1, &angles.rope, 1,
                                 hidden.get(), COVEY_ATTENTION | COVEY_MLP) == COVEY_OK);
        std::memcpy(&out[static_cast<std::size_t>(at) * s.hidden_size], hidden.get(), hidden.size * 4);
        at += rows;
    }
    for (float value : out) CHECK(std::isfinite(value));
    return out;
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
    return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// Sessions of different lengths, decoding and prefilling in one call, equal those alone.
void check_batch(Model& model, Engine& engine, const std::vector<float>& x,
                 const std::vector<float>& expected) {
    const covey_shape& s = model.shape;
    const Angles angles(s);
    const std::vector<covey_block> blocks(2, model.block);
    const int lengths[] = {0, 299, 63, 150}, added[] = {250, 1, 2, 1};
    std::vector<std::unique_ptr<Session>> sessions;
    std::vector<covey_run> runs;
    std::vector<float> hidden;
    for (int i = 0; i < 4; i++) {
        sessions.push_back(std::make_unique<Session>(s, 2, kPositions));
        const std::size_t begin = static_cast<std::size_t>(lengths[i]) * s.hidden_size;
        run(model, engine, *sessions[i], {x.begin(), x.begin() + begin}, {kPositions});
        runs.push_back(sessions[i]->run(lengths[i], added[i]));
        hidden.insert(hidden.end(), &x[begin], &x[begin] + added[i] * s.hidden_size);
    }
    CHECK(covey_span_forward(engine.handle, &s, blocks.data(), 2, 0, runs.data(), 4, &angles.rope, 1,
                             hidden.data(), COVEY_ATTENTION | COVEY_MLP) == COVEY_OK);
    const float* result = hidden.data();
    for (int i = 0; i < 4; i++) {
        const std::size_t n = static_cast<std::size_t>(added[i]) * s.hidden_size;
        CHECK(std::memcmp(result, &expected[static_cast<std::size_t>(lengths[i]) * s.hidden_size],
                          n * sizeof(float)) == 0);
        result += n;
    }
}

void check_model(const covey_shape& shape, int type, bool extras = false) {
    Model model(shape, type, extras);
    Engine one(1), three(3);
    std::vector<float> x(static_cast<std::size_t>(kPositions) * shape.hidden_size);
    for (float& value : x) value = uniform(-2, 2);
    Session single(shape, 2, kPositions), chunked(shape, 2, kPositions), whole(shape, 2, kPositions);
    const std::vector<float> expected = run(model, one, single, x, {1});
    CHECK(same(expected, run(model, three, chunked, x, {1, 2, 3, 5, 8, 17, 31})));
    CHECK(same(expected, run(model, three, whole, x, {kPositions})));
    print_digest("hidden states", type, expected.data(), expected.size() * 4);
    for (int i = 0; i < single.n_pages; i++) {
        const std::size_t bytes = single.memory[i]->size;
        CHECK(std::memcmp(single.pages[i], whole.pages[i], bytes) == 0);
        CHECK(std::memcmp(single.pages[i], chunked.pages[i], bytes) == 0);
    }
    check_batch(model, three, x, expected);

    // Halves add up to a block: hidden + attention part, then + MLP part.
    Session halves(shape, 1, 1), block(shape, 1, 1);
    const Angles angles(shape);
    std::vector<float> together(x.begin(), x.begin() + shape.hidden_size), sum = together;
    const auto forward = [&](Session& session, std::vector<float>& hidden, uint32_t parts) {
        const covey_run run = session.run(0, 1);
        return covey_span_forward(one.handle, &shape, &model.block, 1, 0, &run, 1, &angles.rope, 1,
                                  hidden.data(), parts);
    };
    CHECK(forward(block, together, COVEY_ATTENTION | COVEY_MLP) == COVEY_OK);
    for (uint32_t half : {COVEY_ATTENTION, COVEY_MLP}) {
        std::vector<float> part = sum;
        CHECK(forward(halves, part, half | COVEY_PARTIAL) == COVEY_OK);
        for (std::size_t i = 0; i < sum.size(); i++) sum[i] += part[i];
    }
    CHECK(same(together, sum));
    CHECK(forward(block, together, 7) == COVEY_INVALID);
    CHECK(forward(block, together, 0) == COVEY_INVALID);
    covey_shape wrong = shape;
    wrong.intermediate_size += 32;
    const auto refused = [&](const covey_shape& s, const covey_run& run) {
        CHECK(covey_span_forward(one.handle, &s, &model.block, 1, 0, &run, 1, &angles.rope, 1,
                                 together.data(), 3) == COVEY_INVALID);
    };
    refused(wrong, block.run(0, 1));
    refused(shape, block.run(COVEY_TILE, 1));
    refused(shape, block.run(-1, 1));
    refused(shape, block.run(INT64_MAX, 1));
    refused(shape, block.run(0, 0));
    uint8_t* const none[1] = {nullptr};
    refused(shape, {none, 1, 1, 0});
}

void check_head(int type, int vocabulary, int columns) {
    Packed matrix(type, vocabulary, columns);
    Engine two(2);
    Exact<float> norm(columns), hidden(3 * columns), logits(3 * vocabulary), single(vocabulary);
    for (int i = 0; i < columns; i++) norm.get()[i] = 1;
    const int32_t ids[3] = {0, vocabulary - 1, vocabulary / 2};
    CHECK(covey_embed(&matrix.matrix, ids, 3, 2.0f, hidden.get()) == COVEY_OK);
    const int32_t unknown[1] = {vocabulary};
    CHECK(covey_embed(&matrix.matrix, unknown, 1, 1.0f, hidden.get()) == COVEY_INVALID);
    CHECK(covey_head_logits(two.handle, &matrix.matrix, norm.get(), 1e-5f, hidden.get(), 3,
                            logits.get()) == COVEY_OK);
    print_digest("embeddings", type, hidden.get(), hidden.size * 4);
    print_digest("logits", type, logits.get(), logits.size * 4);
    for (int row = 0; row < 3; row++) {
        CHECK(covey_head_logits(two.handle, &matrix.matrix, norm.get(), 1e-5f,
                                hidden.get() + row * columns, 1, single.get()) == COVEY_OK);
        CHECK(std::memcmp(single.get(), logits.get() + row * vocabulary, vocabulary * 4) == 0);
    }
}

// Rows one at a time and all together, of a matrix with an odd number of rows.
void check_product(int type) {
    constexpr int kRows = 37, kColumns = 512, kMost = 33;
    Packed matrix(type, kRows, kColumns);
    Engine two(2);
    Exact<float> x(kMost * kColumns), y(kMost * kRows), single(kRows);
    for (std::size_t i = 0; i < x.size; i++) x.get()[i] = uniform(-2, 2);
    for (int n_rows : {1, 2, 3, 5, 11, 12, 14, kMost}) {
        CHECK(covey_multiply(two.handle, &matrix.matrix, x.get(), n_rows, y.get()) == COVEY_OK);
        for (int row = 0; row < n_rows; row++) {
            CHECK(covey_multiply(two.handle, &matrix.matrix, x.get() + row * kColumns, 1,
                                 single.get()) == COVEY_OK);
            CHECK(std::memcmp(single.get(), y.get() + row * kRows, kRows * 4) == 0);
        }
    }
    print_digest("products", type, y.get(), y.size * 4);
}

void check_strange_numbers() {
    Packed matrix(COVEY_Q4_1, 16, 64);
    Engine one(1);
    Exact<float> x(64), y(16);
    for (float value : {NAN, INFINITY, -INFINITY}) {
        x.get()[40] = value;
        CHECK(covey_multiply(one.handle, &matrix.matrix, x.get(), 1, y.get()) == COVEY_OK);
        for (int i = 0; i < 16; i++) CHECK(!std::isfinite(y.get()[i]));
    }
    for (float value : {0.0f, 1e-38f, 1e-44f, 3e38f}) {
        x.get()[40] = value;
        CHECK(covey_multiply(one.handle, &matrix.matrix, x.get(), 1, y.get()) == COVEY_OK);
    }
}

}  // namespace

// Any bytes as a matrix of any type and size, each buffer exactly as long as the library is told.
void fuzz_packers() {
    Engine two(2);
    for (int round = 0; round < 400; round++) {
        const int type = static_cast<int>(random_bits() % 32), rows = 1 + random_bits() % 40;
        const int columns = (round % 2 ? 256 : 32) * (1 + static_cast<int>(random_bits() % 3));
        const int64_t packed_bytes = covey_packed_bytes(type, rows, columns);
        const covey::Format* format = covey::find_format(type);
        if (packed_bytes < 0) {  // unknown, or a K type and 32 columns
            CHECK(!covey::is_float_type(type) && (!format || columns % format->columns));
            continue;
        }
        const int64_t row_bytes = format ? columns / format->columns * format->file_bytes
                                         : columns * (type == COVEY_F32 ? 4 : 2);
        Exact<uint8_t> blocks(static_cast<std::size_t>(row_bytes * rows));
        Exact<uint8_t> packed(static_cast<std::size_t>(packed_bytes));
        for (std::size_t i = 0; i < blocks.size; i++)
            blocks.get()[i] = static_cast<uint8_t>(random_bits());
        CHECK(covey_pack(type, rows, columns, blocks.get(), packed.get()) == COVEY_OK);
        const covey_matrix matrix{type, rows, columns, 0, packed.get()};
        const int n_rows = 1 + static_cast<int>(random_bits() % 14);
        Exact<float> x(static_cast<std::size_t>(n_rows) * columns), row(columns);
        Exact<float> y(static_cast<std::size_t>(n_rows) * rows);
        for (std::size_t i = 0; i < x.size; i++) x.get()[i] = uniform(-2, 2);
        const int32_t last[1] = {rows - 1};
        CHECK(covey_embed(&matrix, last, 1, 1.0f, row.get()) == COVEY_OK);
        CHECK(covey_multiply(two.handle, &matrix, x.get(), n_rows, y.get()) == COVEY_OK);
    }
}

int main() {
    CHECK(covey_abi_version() == COVEY_ABI_VERSION);
    CHECK(covey_packed_bytes(COVEY_Q4_1, 16, 31) < 0 && covey_packed_bytes(99, 16, 32) < 0);
    CHECK(covey_packed_bytes(COVEY_Q8_0, 0, 32) < 0 && covey_packed_bytes(COVEY_F16, 1, -32) < 0);
    CHECK(covey_packed_bytes(COVEY_Q4_K, 16, 128) < 0 && covey_packed_bytes(COVEY_Q6_K, 1, 257) < 0);
    CHECK(covey_engine_new(0, nullptr) == nullptr);
    const int32_t no_core = -1;
    CHECK(covey_engine_new(2, &no_core) == nullptr);
    check_model({64, 4, 2, 16, 96, 16, 1, 1e-5f, COVEY_KV_FP16, 0.25f, COVEY_SILU, 0, 0, 0}, COVEY_Q4_1);
    check_model({96, 9, 3, 32, 64, 32, 0, 1e-5f, COVEY_KV_FP16, 0.25f, COVEY_SILU, 0, 0, 0}, COVEY_Q8_0);
    check_model({64, 8, 1, 80, 32, 64, 1, 1e-5f, COVEY_KV_INT8, 0.25f, COVEY_SILU, 0, 0, 0}, COVEY_Q4_1);
    check_model({64, 14, 1, 32, 32, 32, 1, 1e-5f, COVEY_KV_FP16, 0.25f, COVEY_SILU, 0, 0, 0}, COVEY_Q8_0);
    check_model({32, 2, 2, 16, 32, 0, 1, 1e-5f, COVEY_KV_FP16, 0.25f, COVEY_SILU, 0, 0, 0}, COVEY_F16);
    check_model({64, 4, 2, 16, 32, 16, 0, 1e-5f, COVEY_KV_INT8, 0.1f, COVEY_GELU_TANH, 5, 3, 1},
                COVEY_Q4_1, true);
    check_model({64, 2, 2, 32, 32, 32, 0, 1e-5f, COVEY_KV_FP16, 0.3f, COVEY_SILU, 3, 1, 0},
                COVEY_F16, true);
    std::vector<int> types = {COVEY_F32, COVEY_F16, COVEY_BF16};
    for (const covey::Format& format : covey::kFormats) types.push_back(format.type);
    for (int type : types) {
        check_head(type, 33, 256);
        check_product(type);
    }
    check_strange_numbers();
    fuzz_packers();
    std::printf("self-test passed\n");
}
