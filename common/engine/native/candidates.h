// The tokens among which one is chosen: those from a threshold on, found without sorting. They fall into buckets by value, and only
// the buckets in which a cut or the drawn token lies are put in order: by value, descending, then by id.
#pragma once
#include "logit_row.h"
#include "scratch.h"

namespace segue {

constexpr int BUCKETS = 256;

struct Candidate {
  float value;
  int32_t id;
  int64_t mass;
};

inline bool before(const Candidate& a, const Candidate& b) { return a.value != b.value ? a.value > b.value : a.id < b.id; }

// The first `count` candidates in order.
struct Prefix {
  long count;
  int64_t mass;
};

class Candidates {
 public:
  long size() const { return size_; }
  int64_t mass() const { return whole_; }

  void gather(const Row& row, const Scale& scale, float least) {
    least = std::max(least, -std::numeric_limits<float>::max());
    ids_ = id_space_.at_least(size_t(row.size) + LANES);
    values_ = value_space_.at_least(size_t(row.size) + LANES);
    size_ = row.copy_from(least, ids_, values_);
    weigh(scale);
    distribute(float(scale.best), least);
  }

  // The first prefix of this many candidates; all where there are fewer.
  Prefix by_count(long count) {
    if (count >= size_) return {size_, whole_};
    Prefix found{0, 0};
    const Candidate* next = ordered(skip(found, [&](const Prefix& whole) { return whole.count <= count; }));
    for (; found.count < count; found.count++) found.mass += (next++)->mass;
    return found;
  }

  // The shortest prefix of at least this mass, which is more than 0; all where they have less.
  Prefix by_mass(int64_t mass) {
    if (mass > whole_) return {size_, whole_};
    Prefix found{0, 0};
    last_ = ordered(skip(found, [&](const Prefix& whole) { return whole.mass < mass; }));
    for (;; last_++) {
      found = {found.count + 1, found.mass + last_->mass};
      if (found.mass >= mass) return found;
    }
  }

  Prefix by_value(const Scale& scale, double least) const {
    Prefix found{0, 0};
    for (long i = 0; i < size_; i++)
      if (scale.of(values_[i]) >= least) found = {found.count + 1, found.mass + masses_[i]};
    return found;
  }

  // The token in whose mass the number falls; it is less than the mass of all.
  int32_t at(int64_t number) {
    by_mass(number + 1);
    return last_->id;
  }

  // Calls `take` with each of the first `count`, in order.
  template <class F>
  void first(long count, F take) {
    for (int b = 0; b < BUCKETS && count > 0; b++) {
      const Candidate* next = ordered(b);
      for (long i = 0; i < buckets_[b].count && count > 0; i++, count--) take(*next++);
    }
  }

 private:
  // Adds whole buckets to the prefix while that fits, and says which one no longer does.
  template <class F>
  int skip(Prefix& found, F fits) const {
    for (int b = 0;; b++) {
      const Prefix whole{found.count + buckets_[b].count, found.mass + buckets_[b].mass};
      if (b == BUCKETS - 1 || !fits(whole)) return b;
      found = whole;
    }
  }

  void weigh(const Scale& scale) {
    masses_ = mass_space_.at_least(size_t(size_) + LANES);
    std::fill(values_ + size_, values_ + size_ + PER_VECTOR, float(scale.best));
    for (long i = 0; i < size_; i += PER_VECTOR) store(masses_ + i, masses(scale.of(widened(values_ + i))));
  }

  // Buckets in turns over four sets of sums, because neighbours often fall into the same one.
  void distribute(float best, float least) {
    in_bucket_ = bucket_space_.at_least(size_t(size_) + 32);
    const float span = best - least, step = span > 0 ? float(BUCKETS - 1) / span : 0.0f;
    for (long i = 0; i < size_; i++) in_bucket_[i] = uint8_t(std::min(float(BUCKETS - 1), (best - values_[i]) * step));
    Prefix sums[4][BUCKETS] = {};
    for (long i = 0; i < size_; i++) {
      Prefix& bucket = sums[i % 4][in_bucket_[i]];
      bucket = {bucket.count + 1, bucket.mass + masses_[i]};
    }
    whole_ = 0;
    for (int b = 0; b < BUCKETS; b++) {
      buckets_[b] = {};
      for (const auto& part : sums) buckets_[b] = {buckets_[b].count + part[b].count, buckets_[b].mass + part[b].mass};
      whole_ += buckets_[b].mass;
    }
  }

  const Candidate* ordered(int b) {
    Candidate* members = member_space_.at_least(size_t(buckets_[b].count) + 1);
    long found = 0;
    const __m256i wanted = _mm256_set1_epi8(char(b));
    for (long i = 0; found < buckets_[b].count; i += 32) {
      const __m256i bytes = _mm256_loadu_si256((const __m256i*)(in_bucket_ + i));
      unsigned same_bucket = unsigned(_mm256_movemask_epi8(_mm256_cmpeq_epi8(bytes, wanted)));
      for (; same_bucket && found < buckets_[b].count; same_bucket &= same_bucket - 1) {
        const long at = i + __builtin_ctz(same_bucket);
        members[found++] = {values_[at], ids_[at], masses_[at]};
      }
    }
    std::sort(members, members + found, before);
    return members;
  }

  long size_ = 0;
  int64_t whole_ = 0;
  int32_t* ids_ = nullptr;
  float* values_ = nullptr;
  int64_t* masses_ = nullptr;
  uint8_t* in_bucket_ = nullptr;
  const Candidate* last_ = nullptr;
  Prefix buckets_[BUCKETS];
  Scratch<int32_t> id_space_;
  Scratch<float> value_space_;
  Scratch<uint8_t> bucket_space_;
  Scratch<int64_t> mass_space_;
  Scratch<Candidate> member_space_;
};

}  // namespace segue
