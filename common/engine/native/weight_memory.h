// Where packed weights lie: a model's matrices behind each other in one run of large pages, in the order in which a step reads
// them. In pages of their own, the gaps and the small pages of the smaller matrices cost a step a third of its bandwidth.
#pragma once
#include <atomic>

#include "scratch.h"

namespace segue {

class WeightMemory {
 public:
  // Address space for `bytes`; memory is taken as it is written. nullptr where there is none.
  static WeightMemory* reserve(size_t bytes) {
    const size_t whole = (bytes + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE, mapped = whole + LARGE_PAGE;
    void* at = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) return nullptr;
    char* first = (char*)((uintptr_t(at) + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE);
    madvise(first, whole, MADV_HUGEPAGE);
    return new WeightMemory(at, mapped, first, whole);
  }

  // Zeroed and aligned for vectors, or nullptr where it is full.
  void* take(size_t bytes) {
    const size_t from = (taken_ + 63) / 64 * 64;
    if (from + bytes > size_) return nullptr;
    taken_ = from + bytes;
    return first_ + from;
  }

  // It goes with the last of its users.
  void acquire() { users_.fetch_add(1); }
  void release() {
    if (users_.fetch_sub(1) == 1) delete this;
  }

 private:
  WeightMemory(void* mapping, size_t mapped, char* first, size_t size) : mapping_(mapping), mapped_(mapped), first_(first), size_(size) {}
  ~WeightMemory() { munmap(mapping_, mapped_); }

  void* mapping_;
  size_t mapped_;
  char* first_;
  size_t size_, taken_ = 0;
  std::atomic<int> users_{1};
};

}  // namespace segue
