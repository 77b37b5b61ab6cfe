#include "threads.h"

#include <cerrno>
#include <chrono>
#include <system_error>

#ifdef __linux__
#include <pthread.h>
#include <sched.h>
#endif

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace covey {
namespace {

// A wake-up takes 50 us or more here, the serial parts between two jobs 1 to 10 us; spinning for
// longer only takes a core from other programs.
constexpr std::chrono::microseconds kSpin{60};

void pause_briefly() {
#if defined(__x86_64__) || defined(__i386__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("isb");
#endif
}

// Spins until `condition` or for kSpin; returns the condition.
template <class Condition>
bool spin_for(Condition condition) {
    const auto deadline = std::chrono::steady_clock::now() + kSpin;
    do {
        for (int i = 0; i < 32; i++) {
            if (condition()) return true;
            pause_briefly();
        }
    } while (std::chrono::steady_clock::now() < deadline);
    return condition();
}

// Throws std::system_error; does nothing where the system has no such call.
void stay_on(std::thread& thread, int core) {
#ifdef __linux__
    cpu_set_t cores;
    CPU_ZERO(&cores);
    int error = EINVAL;
    if (core >= 0 && core < CPU_SETSIZE) {
        CPU_SET(core, &cores);
        error = pthread_setaffinity_np(thread.native_handle(), sizeof cores, &cores);
    }
    if (error) throw std::system_error(error, std::generic_category());
#else
    (void)thread;
    (void)core;
#endif
}

}  // namespace

ThreadPool::ThreadPool(int n_threads, const int32_t* helper_cores) {
    try {
        for (int thread = 1; thread < n_threads; thread++) {
            helpers_.emplace_back([this, thread] { help(thread); });
            if (helper_cores) stay_on(helpers_.back(), helper_cores[thread - 1]);
        }
    } catch (...) {
        stop();
        throw;
    }
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        stopping_.store(true);
    }
    work_came_.notify_all();
    for (std::thread& helper : helpers_) helper.join();
}

void ThreadPool::share(Job job, int n_items) {
    job_ = job;  // nobody reads it: the last job has no items left to claim
    done_by_helpers_.store(0, std::memory_order_relaxed);
    job_number_++;
    // Sequentially consistent against `sleepers_`: either the sleeper sees the items or we see it.
    // Item 0 is claimed already, by the caller.
    board_.store(job_number_ << (2 * kItemBits) | static_cast<uint64_t>(n_items) << kItemBits | 1);
    if (sleepers_.load() > 0) {
        { const std::lock_guard<std::mutex> lock(mutex_); }
        work_came_.notify_all();
    }
    job.call(job.context, 0, 0);
    const int left = n_items - 1 - work(0);
    const auto is_done = [&] { return done_by_helpers_.load() == left; };
    if (spin_for(is_done)) return;
    std::unique_lock<std::mutex> lock(mutex_);
    caller_sleeps_.store(true);
    work_done_.wait(lock, is_done);
    caller_sleeps_.store(false);
}

int ThreadPool::work(int thread) {
    int n_done = 0;
    while (has_items(board_.load(std::memory_order_relaxed))) {
        const uint64_t claimed = board_.fetch_add(1);
        if (!has_items(claimed)) break;
        const Job job = job_;  // stays as it is while an item of it is unfinished
        job.call(job.context, next_item(claimed), thread);
        n_done++;
        if (thread == 0) continue;
        done_by_helpers_.fetch_add(1);
        if (caller_sleeps_.load()) {
            { const std::lock_guard<std::mutex> lock(mutex_); }
            work_done_.notify_one();
        }
    }
    return n_done;
}

void ThreadPool::help(int thread) {
    while (!stopping_.load()) {
        work(thread);
        if (spin_for([this] { return is_wanted(); })) continue;
        std::unique_lock<std::mutex> lock(mutex_);
        sleepers_.fetch_add(1);
        work_came_.wait(lock, [this] { return is_wanted(); });
        sleepers_.fetch_sub(1);
    }
}

}  // namespace covey
