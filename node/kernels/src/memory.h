// Growable scratch memory, aligned to a cache line. Its content is lost when it grows.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>

namespace covey {

template <class T>
class Buffer {
public:
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { std::free(data_); }

    // Room for n elements; throws std::bad_alloc.
    T* reserve(std::size_t n) {
        if (n > size_) {
            std::free(data_);
            data_ = nullptr;
            size_ = 0;
            const std::size_t bytes = (n * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
            data_ = static_cast<T*>(std::aligned_alloc(kAlignment, bytes));
            if (!data_) throw std::bad_alloc();
            size_ = n;
        }
        return data_;
    }

private:
    static constexpr std::size_t kAlignment = 64;
    T* data_ = nullptr;
    std::size_t size_ = 0;
};

}  // namespace covey
