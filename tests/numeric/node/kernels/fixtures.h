// What the self-test is made of: buffers of an exact length, random matrices, a small model.
#pragma once

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

}  // namespace
