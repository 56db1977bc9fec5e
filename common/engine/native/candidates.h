// The tokens among which one is chosen: those from a threshold on, found without sorting. They fall into buckets by value, and only
// the buckets in which a cut or the drawn token lies are put in order: by value, descending, then by id.
#pragma once
#include <algorithm>
#include <functional>
#include <limits>

#include "scratch.h"
#include "token_mass.h"

namespace segue {

constexpr long GROUP = 64;
constexpr int BUCKETS = 256;

#if defined(__AVX512F__)
inline unsigned at_least(Vec x, Vec least) { return _mm512_cmp_ps_mask(x.v, least.v, _CMP_GE_OQ); }
#else
inline unsigned at_least(Vec x, Vec least) {
  const int low = _mm256_movemask_ps(_mm256_cmp_ps(x.a, least.a, _CMP_GE_OQ));
  return unsigned(low | _mm256_movemask_ps(_mm256_cmp_ps(x.b, least.b, _CMP_GE_OQ)) << 8);
}
#endif

// A row of logits with the largest of each group of tokens: what a threshold excludes is passed over by groups.
struct Row {
  float* logits;
  long size;
  float* largest_of;  // [groups()]
  float best;

  long groups() const { return (size + GROUP - 1) / GROUP; }
  long end_of(long group) const { return std::min(size, (group + 1) * GROUP); }

  // Finds the largest of each group and of all; false where a logit is not finite.
  bool survey() {
    Vec nought = zero();
    bool finite = true;
    best = -std::numeric_limits<float>::infinity();
    for (long g = 0; g < groups(); g++) {
      const float* x = logits + g * GROUP;
      float most;
      if (g * GROUP + GROUP <= size) {
        const Vec a = load(x), b = load(x + 16), c = load(x + 32), d = load(x + 48);
        nought = add(nought, add(add(sub(a, a), sub(b, b)), add(sub(c, c), sub(d, d))));
        most = largest(max(max(a, b), max(c, d)));
      } else {
        most = *x;
        for (long i = g * GROUP; i < size; i++) {
          finite = finite && logits[i] - logits[i] == 0.0f;
          most = std::max(most, logits[i]);
        }
      }
      largest_of[g] = most;
      best = std::max(best, most);
    }
    return finite && sum(nought) == 0.0f;
  }

  // The lowest id of those with this value, which one of them has.
  int32_t first_with(float value) const {
    for (long g = 0; g < groups(); g++)
      if (largest_of[g] >= value)
        for (long i = g * GROUP; i < end_of(g); i++)
          if (logits[i] == value) return int32_t(i);
    return 0;
  }

  // Calls `take(id)` for each logit that is at least `least`, in the order of ids.
  template <class F>
  void each_from(float least, F take) const {
    for (long g = 0; g < groups(); g++) {
      if (!(largest_of[g] >= least)) continue;
      long i = g * GROUP;
      const long end = end_of(g);
      for (; i + LANES <= end; i += LANES)
        for (unsigned left = at_least(load(logits + i), same(least)); left; left &= left - 1) take(int32_t(i + __builtin_ctz(left)));
      for (; i < end; i++)
        if (logits[i] >= least) take(int32_t(i));
    }
  }

  // A value that at least `count` logits reach, and few more where groups are many: the count-th largest of the groups' largest.
  float reached_by(long count, float* scratch) const {
    if (count >= groups()) return -std::numeric_limits<float>::max();
    std::copy(largest_of, largest_of + groups(), scratch);
    std::nth_element(scratch, scratch + count - 1, scratch + groups(), std::greater<float>());
    return std::max(scratch[count - 1], -std::numeric_limits<float>::max());
  }
};

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
    int32_t* ids = ids_.at_least(size_t(row.size));
    float* values = values_.at_least(size_t(row.size) + PER_VECTOR);
    size_ = 0;
    row.each_from(least, [&](int32_t id) {
      ids[size_] = id;
      values[size_++] = row.logits[id];
    });
    distribute(ids, values, scale, least);
  }

  // The first prefix of this many candidates; all where there are fewer.
  Prefix by_count(long count) {
    if (count >= size_) return {size_, whole_};
    Prefix found{0, 0};
    int b = 0;
    for (; first_[b + 1] <= count; b++) found = {first_[b + 1], found.mass + mass_[b]};
    if (found.count == count) return found;
    order(b);
    for (; found.count < count; found.count++) found.mass += all_[found.count].mass;
    return found;
  }

  // The shortest prefix of at least this mass, which is more than 0; all where they have less.
  Prefix by_mass(int64_t mass) {
    if (mass > whole_) return {size_, whole_};
    Prefix found{0, 0};
    int b = 0;
    for (; found.mass + mass_[b] < mass; b++) found = {first_[b + 1], found.mass + mass_[b]};
    order(b);
    while (found.mass < mass) found.mass += all_[found.count++].mass;
    return found;
  }

  Prefix by_value(const Scale& scale, double least) const {
    Prefix found{0, 0};
    for (long i = 0; i < size_; i++)
      if (scale.of(all_[i].value) >= least) found = {found.count + 1, found.mass + all_[i].mass};
    return found;
  }

  struct Range {
    const Candidate *from, *to;
    const Candidate* begin() const { return from; }
    const Candidate* end() const { return to; }
  };

  // The first `count` in order; all where there are fewer.
  Range first(long count) {
    const long most = std::min(count, size_);
    for (int b = 0; b < BUCKETS && first_[b] < most; b++) order(b);
    return {all_, all_ + most};
  }

  // The token in whose mass the number falls; it is less than the mass of all.
  int32_t at(int64_t number) { return all_[by_mass(number + 1).count - 1].id; }

 private:
  void distribute(const int32_t* ids, float* values, const Scale& scale, float least) {
    uint8_t* bucket = buckets_.at_least(size_t(size_) + PER_VECTOR);
    int64_t* mass = masses_.at_least(size_t(size_) + PER_VECTOR);
    all_ = candidates_.at_least(size_t(size_) + 1);
    std::fill(values + size_, values + size_ + PER_VECTOR, float(scale.best));
    for (long i = 0; i < size_; i += PER_VECTOR) store(mass + i, masses(scale.of(widened(values + i))));
    std::fill(first_, first_ + BUCKETS + 1, 0);
    std::fill(mass_, mass_ + BUCKETS, 0);
    std::fill(ordered_, ordered_ + BUCKETS, false);
    const double span = scale.best - double(least), step = span > 0 ? (BUCKETS - 1) / span : 0;
    whole_ = 0;
    for (long i = 0; i < size_; i++) {
      bucket[i] = uint8_t(std::min(double(BUCKETS - 1), (scale.best - double(values[i])) * step));
      first_[bucket[i] + 1]++;
      mass_[bucket[i]] += mass[i];
      whole_ += mass[i];
    }
    long next[BUCKETS];
    for (int b = 0; b < BUCKETS; b++) {
      next[b] = first_[b];
      first_[b + 1] += first_[b];
    }
    for (long i = 0; i < size_; i++) all_[next[bucket[i]]++] = {values[i], ids[i], mass[i]};
  }

  void order(int b) {
    if (!ordered_[b]) std::sort(all_ + first_[b], all_ + first_[b + 1], before);
    ordered_[b] = true;
  }

  long size_ = 0;
  int64_t whole_ = 0;
  Candidate* all_ = nullptr;
  long first_[BUCKETS + 1];
  int64_t mass_[BUCKETS];
  bool ordered_[BUCKETS];
  Scratch<int32_t> ids_;
  Scratch<float> values_;
  Scratch<uint8_t> buckets_;
  Scratch<int64_t> masses_;
  Scratch<Candidate> candidates_;
};

}  // namespace segue
