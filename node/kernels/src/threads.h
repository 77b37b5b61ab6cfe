// A pool of threads that share out the items of one job after another.
//
// Items are claimed one by one from a counter, so a thread that the system has put aside delays a
// job only by the item it holds: the others do the rest, and nobody waits for it to arrive. Who
// finds nothing to do spins for a bounded time and then sleeps (D6). Knows nothing of the work.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace covey {

class ThreadPool {
public:
    // n_threads counts the caller of `run`; helper_cores, one for each other thread, may be null.
    // Throws std::system_error, also for a core that there is not.
    ThreadPool(int n_threads, const int32_t* helper_cores);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    int size() const { return static_cast<int>(helpers_.size()) + 1; }

    // Call body(item, thread) once for each item in [0, n_items) and return when all are done.
    // body must not throw; thread is in [0, size()).
    template <class Body>
    void run(int n_items, Body&& body) {
        if (n_items <= 1 || helpers_.empty()) {
            for (int item = 0; item < n_items; item++) body(item, 0);
            return;
        }
        share({[](void* context, int item, int thread) {
                   (*static_cast<std::remove_reference_t<Body>*>(context))(item, thread);
               },
               &body},
              n_items);
    }

    // Like `run` over contiguous ranges of [0, n): body(begin, end, thread), about
    // `ranges_per_thread` for each thread and none shorter than `shortest`, except one.
    template <class Body>
    void run_ranges(int n, int ranges_per_thread, int shortest, Body&& body) {
        const int wanted = size() == 1 ? 1 : size() * ranges_per_thread;
        const int possible = (n + shortest - 1) / shortest;
        const int n_ranges = wanted < possible ? wanted : possible;
        run(n_ranges, [&](int range, int thread) {
            const int64_t begin = static_cast<int64_t>(n) * range / n_ranges;
            const int64_t end = static_cast<int64_t>(n) * (range + 1) / n_ranges;
            body(static_cast<int>(begin), static_cast<int>(end), thread);
        });
    }

private:
    struct Job {
        void (*call)(void* context, int item, int thread);
        void* context;
    };

    // One word holds job number (24 bits), items (20) and next item (20): adding 1 claims an item
    // of exactly the job whose number and length come back with it.
    static constexpr int kItemBits = 20;
    static constexpr uint64_t kItemMask = (uint64_t{1} << kItemBits) - 1;
    static int next_item(uint64_t board) { return static_cast<int>(board & kItemMask); }
    static int item_count(uint64_t board) {
        return static_cast<int>(board >> kItemBits & kItemMask);
    }
    static bool has_items(uint64_t board) { return next_item(board) < item_count(board); }

    void stop();
    void share(Job job, int n_items);
    int work(int thread);  // until nothing is left to claim; returns the items done
    void help(int thread);
    bool is_wanted() const { return stopping_.load() || has_items(board_.load()); }

    // By cache line: what a helper fetches to begin, what the caller waits for, what rarely changes.
    alignas(64) std::atomic<uint64_t> board_{0};
    Job job_{};
    alignas(64) std::atomic<int> done_by_helpers_{0};
    alignas(64) std::atomic<int> sleepers_{0};
    std::atomic<bool> caller_sleeps_{false};
    std::atomic<bool> stopping_{false};
    uint64_t job_number_ = 0;
    std::mutex mutex_;
    std::condition_variable work_came_, work_done_;
    std::vector<std::thread> helpers_;
};

}  // namespace covey
