// Runs every entry point of the library on exactly sized buffers, for AddressSanitizer and UBSan:
// odd row counts, both rope layouts, partial halves, rewinds, bad arguments, several threads.
// It also holds the results of many rows against one at a time. Exits 1 at the first failure.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "abi.h"
#include "formats.h"

namespace {

std::mt19937 random_bits(7);

#define CHECK(condition)                                                          \
    do {                                                                          \
        if (!(condition)) {                                                       \
            std::printf("%s:%d: failed: %s\n", __FILE__, __LINE__, #condition);   \
            std::exit(1);                                                         \
        }                                                                         \
    } while (0)

// For comparison with what another machine prints: every result is the same there, bit for bit.
void print_digest(const char* what, int type, const void* data, std::size_t n_bytes) {
    uint64_t digest = 0xCBF29CE484222325;  // FNV-1a
    for (std::size_t i = 0; i < n_bytes; i++)
        digest = (digest ^ static_cast<const uint8_t*>(data)[i]) * 0x100000001B3;
    std::printf("%s of type %d: %016llx\n", what, type, static_cast<unsigned long long>(digest));
}

// A buffer of exactly n elements, so that one byte too far is seen.
template <class T>
struct Exact {
    explicit Exact(std::size_t n) : memory(nullptr, std::free), size(n) {
        void* p = nullptr;
        if (posix_memalign(&p, 64, n * sizeof(T)) != 0) std::abort();
        memory.reset(static_cast<T*>(p));
        std::memset(p, 0, n * sizeof(T));
    }
    T* get() { return memory.get(); }
    std::unique_ptr<T, decltype(&std::free)> memory;
    std::size_t size;
};

float uniform(float low, float high) {
    return std::uniform_real_distribution<float>(low, high)(random_bits);
}

uint16_t small_half() {  // between 2^-9 and 2^-6, either sign
    const uint16_t sign = random_bits() & 1 ? 0x8000 : 0;
    return static_cast<uint16_t>(sign | (6 + random_bits() % 3) << 10 | (random_bits() & 0x3FF));
}

// Any codes; scales and weights of the size of `small_half`.
std::vector<uint8_t> random_blocks(int type, int rows, int columns) {
    std::vector<uint8_t> blocks;
    const auto put_half = [&](std::size_t at) {
        const uint16_t half = small_half();
        std::memcpy(&blocks[at], &half, 2);
    };
    const std::size_t n = static_cast<std::size_t>(rows) * columns;
    if (const covey::Format* format = covey::find_format(type)) {
        blocks.resize(n / format->columns * format->file_bytes);
        for (uint8_t& byte : blocks) byte = static_cast<uint8_t>(random_bits());
        for (std::size_t at = 0; at < blocks.size(); at += format->file_bytes) {
            put_half(at + format->scale_offset);
            if (!format->is_centred) put_half(at + format->minimum_offset);
        }
        return blocks;
    }
    blocks.resize(n * (type == COVEY_F32 ? 4 : 2));
    for (std::size_t i = 0; i < n; i++) {
        const float weight = uniform(-0.01f, 0.01f);
        if (type == COVEY_F32) std::memcpy(&blocks[4 * i], &weight, 4);
        if (type == COVEY_BF16)  // the upper half, in little-endian order
            std::memcpy(&blocks[2 * i], reinterpret_cast<const uint8_t*>(&weight) + 2, 2);
        if (type == COVEY_F16) put_half(2 * i);
    }
    return blocks;
}

struct Packed {
    Packed(int type, int rows, int columns)
        : bytes(static_cast<std::size_t>(covey_packed_bytes(type, rows, columns))),
          matrix{type, rows, columns, 0, bytes.get()} {
        const std::vector<uint8_t> blocks = random_blocks(type, rows, columns);
        CHECK(covey_pack(type, rows, columns, blocks.data(), bytes.get()) == COVEY_OK);
    }
    Exact<uint8_t> bytes;
    covey_matrix matrix;
};

struct Engine {
    explicit Engine(int threads) : handle(covey_engine_new(threads, nullptr)) { CHECK(handle); }
    ~Engine() { covey_engine_free(handle); }
    covey_engine* handle;
};

struct Model {
    // `extras`: what other architectures have beside Llama's parts.
    Model(covey_shape s, int type, bool extras)
        : shape(s),
          norm(s.hidden_size),
          biases(extras ? s.n_heads * s.head_dim : 0),
          router(static_cast<std::size_t>(s.n_experts) * s.hidden_size),
          q(type, s.n_heads * s.head_dim, s.hidden_size),
          k(type, s.n_kv_heads * s.head_dim, s.hidden_size),
          v(COVEY_Q8_0, s.n_kv_heads * s.head_dim, s.hidden_size),
          o(type, s.hidden_size, s.n_heads * s.head_dim),
          gate(type, s.intermediate_size, s.hidden_size),
          up(type, s.intermediate_size, s.hidden_size),
          down(type, s.hidden_size, s.intermediate_size) {
        for (int i = 0; i < s.hidden_size; i++) norm.get()[i] = uniform(0.5f, 1.5f);
        block.attn_norm = block.ffn_norm = norm.get();
        block.q = q.matrix;
        block.k = k.matrix;
        block.v = v.matrix;
        block.o = o.matrix;
        block.gate = gate.matrix;
        block.up = up.matrix;
        block.down = down.matrix;
        for (std::size_t i = 0; i < biases.size; i++) biases.get()[i] = uniform(0.5f, 1.5f);
        for (std::size_t i = 0; i < router.size; i++) router.get()[i] = uniform(-1, 1);
        if (s.n_experts) {
            for (int i = 0; i < s.n_experts; i++)
                experts.insert(experts.end(), {gate.matrix, up.matrix, down.matrix});
            block.router = router.get();
            block.experts = experts.data();
            block.gate = block.up = block.down = covey_matrix{};
        }
        if (!extras) return;
        block.q_bias = block.k_bias = block.v_bias = biases.get();
        block.q_norm = block.k_norm = biases.get();
        block.window = 70;
        block.rope = COVEY_NO_ROPE;
    }
    covey_shape shape;
    Exact<float> norm, biases, router;
    std::vector<covey_matrix> experts;
    Packed q, k, v, o, gate, up, down;
    covey_block block{};
};

struct Session {
    Session(const covey_shape& s, int n_blocks, int64_t positions)
        : n_pages(static_cast<int>((positions + COVEY_TILE - 1) / COVEY_TILE)) {
        const auto bytes = static_cast<std::size_t>(covey_page_bytes(&s, n_blocks));
        for (int i = 0; i < n_pages; i++) {
            memory.push_back(std::make_unique<Exact<uint8_t>>(bytes));
            // What a page held before must not matter.
            std::memset(memory.back()->get(), 0xFF, bytes);
            pages.push_back(memory.back()->get());
        }
    }
    covey_run run(int64_t position, int n_rows) const {
        return {pages.data(), n_pages, n_rows, position};
    }
    int n_pages;
    std::vector<std::unique_ptr<Exact<uint8_t>>> memory;
    std::vector<uint8_t*> pages;
};

constexpr int kPositions = 300;

// Angles of all positions.
struct Angles {
    explicit Angles(const covey_shape& s)
        : cosines(static_cast<std::size_t>(kPositions) * (s.rope_dim / 2)),
          sines(cosines.size),
          rope{cosines.get(), sines.get(), kPositions} {
        const int width = s.rope_dim / 2;
        for (int row = 0; row < kPositions; row++)
            for (int i = 0; i < width; i++) {
                // A point on the circle without a sine, which differs from machine to machine.
                const float t = static_cast<float>(row) / static_cast<float>(9 + i * i);
                cosines.get()[row * width + i] = (1 - t * t) / (1 + t * t);
                sines.get()[row * width + i] = 2 * t / (1 + t * t);
            }
    }
    Exact<float> cosines, sines;
    covey_rope rope;
};

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
        CHECK(covey_span_forward(engine.handle, &s, blocks.data(), 2, &part, 1, &angles.rope, 1,
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
    CHECK(covey_span_forward(engine.handle, &s, blocks.data(), 2, runs.data(), 4, &angles.rope, 1,
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
        return covey_span_forward(one.handle, &shape, &model.block, 1, &run, 1, &angles.rope, 1,
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
        CHECK(covey_span_forward(one.handle, &s, &model.block, 1, &run, 1, &angles.rope, 1,
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
