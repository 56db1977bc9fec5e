// Memory that grows and is kept: fresh pages cost more than what is computed in them. Aligned for vectors and large pages.
#pragma once
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace segue {

constexpr size_t LARGE_PAGE = size_t(2) << 20;

// Zeroed; nullptr where there is no memory. Large blocks ask for large pages: weights are read faster through them.
inline void* new_memory(size_t bytes) {
  const bool large = bytes >= LARGE_PAGE;
  void* memory = nullptr;
  if (posix_memalign(&memory, large ? LARGE_PAGE : 64, bytes ? bytes : 64) != 0) return nullptr;
  if (large) madvise(memory, bytes, MADV_HUGEPAGE);
  memset(memory, 0, bytes);
  return memory;
}

template <class T>
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { free(data_); }

  // At least `count` items; what was there before is lost where it has to grow.
  T* at_least(size_t count) {
    if (count > count_) {
      free(data_);
      data_ = static_cast<T*>(new_memory(count * sizeof(T)));
      if (data_ == nullptr) abort();
      count_ = count;
    }
    return data_;
  }

 private:
  T* data_ = nullptr;
  size_t count_ = 0;
};

}  // namespace segue
