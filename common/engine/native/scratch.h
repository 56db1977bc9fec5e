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
  const size_t alignment = bytes >= LARGE_PAGE ? LARGE_PAGE : 64;
  const size_t whole = (bytes + alignment - 1) / alignment * alignment;
  void* memory = aligned_alloc(alignment, whole ? whole : alignment);
  if (memory == nullptr) return nullptr;
  if (alignment == LARGE_PAGE) madvise(memory, whole, MADV_HUGEPAGE);
  memset(memory, 0, whole);
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
