// A fixed group of threads that run the same function side by side and meet at barriers. The caller is member 0.
//
// Work is divided by member number alone, so what a member computes does not depend on timing; and since no sum is ever divided
// between members, results do not depend on their number either.
#pragma once
#include <immintrin.h>
#include <sched.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace segue {

class Team {
 public:
  using Work = void (*)(void* argument, int member, Team& team);

  explicit Team(int size) : size_(size < 1 ? 1 : size) {
    for (int member = 1; member < size_; member++) threads_.emplace_back([this, member] { serve(member); });
  }

  ~Team() {
    {
      std::lock_guard<std::mutex> hold(mutex_);
      closing_ = true;
      turn_++;
    }
    wake_.notify_all();
    for (auto& thread : threads_) thread.join();
  }

  int size() const { return size_; }

  // Returns when all members have returned from `work`.
  void run(Work work, void* argument) {
    if (size_ > 1) {
      {
        std::lock_guard<std::mutex> hold(mutex_);
        work_ = work;
        argument_ = argument;
        turn_++;
      }
      wake_.notify_all();
    }
    work(argument, 0, *this);
    barrier();
  }

  // All members wait here for each other. They spin: what lies between two barriers of a step takes microseconds.
  void barrier() {
    if (size_ == 1) return;
    const unsigned round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; spins++) {
      if (spins < SPINS)
        _mm_pause();
      else
        sched_yield();
    }
  }

  // The part of `count` things that is this member's: [first, last), in whole groups of `group`.
  void share(long count, long group, int member, long& first, long& last) const {
    const long groups = (count + group - 1) / group;
    first = groups * member / size_ * group;
    last = groups * (member + 1) / size_ * group;
    if (last > count) last = count;
    if (first > count) first = count;
  }

 private:
  static constexpr int SPINS = 4000;

  void serve(int member) {
    unsigned seen = 0;
    for (;;) {
      Work work;
      void* argument;
      {
        std::unique_lock<std::mutex> hold(mutex_);
        wake_.wait(hold, [&] { return turn_ != seen; });
        seen = turn_;
        if (closing_) return;
        work = work_;
        argument = argument_;
      }
      work(argument, member, *this);
      barrier();
    }
  }

  const int size_;
  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable wake_;
  unsigned turn_ = 0;
  bool closing_ = false;
  Work work_ = nullptr;
  void* argument_ = nullptr;
  std::atomic<int> arrived_{0};
  std::atomic<unsigned> round_{0};
};

}  // namespace segue
