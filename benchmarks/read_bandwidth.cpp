// How fast this machine reads memory: threads sum a buffer that was written once.
//
// Compiled on the fly for this very CPU. Plain loops, so that the compiler takes its widest vectors
// and the prefetchers see what they were made for; huge pages where the system gives them.

#include <sys/mman.h>

#include <cstdint>
#include <thread>
#include <vector>

namespace {

constexpr std::size_t kPage = std::size_t{2} << 20;

std::uint64_t sum(const std::uint64_t* words, std::size_t n) {
  std::uint64_t total = 0;
  for (std::size_t i = 0; i < n; ++i) total += words[i];
  return total;
}

}  // namespace

// Memory of `n_bytes`, each page of it written; null if there is none.
extern "C" void* read_buffer_new(std::int64_t n_bytes) {
  const std::size_t size = (static_cast<std::size_t>(n_bytes) + kPage - 1) / kPage * kPage;
  void* memory =
      mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
#ifdef MADV_HUGEPAGE
  madvise(memory, size, MADV_HUGEPAGE);
#endif
  auto* words = static_cast<std::uint64_t*>(memory);
  for (std::size_t i = 0; i < size / sizeof *words; ++i) words[i] = i;
  return memory;
}

// Read the buffer `n_passes` times with `n_threads`, each its own part; returns the sum.
extern "C" std::uint64_t read_buffer(const void* memory, std::int64_t n_bytes, int n_passes,
                                     int n_threads) {
  const auto* words = static_cast<const std::uint64_t*>(memory);
  const std::size_t part = static_cast<std::size_t>(n_bytes) / sizeof *words / n_threads;
  std::vector<std::uint64_t> totals(n_threads);
  auto work = [&](int thread) {
    std::uint64_t total = 0;
    for (int pass = 0; pass < n_passes; ++pass) {
      // The sum of a pass moves the next one's start by nothing, but the compiler cannot know.
      total += sum(words + part * thread + (total == 1), part - 1);
    }
    totals[thread] = total;
  };
  std::vector<std::thread> threads;
  for (int thread = 1; thread < n_threads; ++thread) threads.emplace_back(work, thread);
  work(0);
  for (auto& thread : threads) thread.join();
  std::uint64_t total = 0;
  for (std::uint64_t each : totals) total += each;
  return total;
}
