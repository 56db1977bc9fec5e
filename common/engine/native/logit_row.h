// A row of logits as it is searched: by groups of tokens whose largest logit is known, so that most of the row is passed over.
#pragma once
#include <algorithm>
#include <functional>
#include <limits>

#include "token_mass.h"

namespace segue {

constexpr long GROUP = 64;

#if defined(__AVX512F__)
inline unsigned at_least(Vec x, Vec least) { return _mm512_cmp_ps_mask(x.v, least.v, _CMP_GE_OQ); }

// Those lanes that `chosen` names, side by side: ids from `id` on, and values. How many.
inline int compress(Vec x, unsigned chosen, int32_t id, int32_t* ids, float* values) {
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  _mm512_storeu_ps(values, _mm512_maskz_compress_ps(__mmask16(chosen), x.v));
  _mm512_storeu_si512(ids, _mm512_maskz_compress_epi32(__mmask16(chosen), _mm512_add_epi32(lanes, _mm512_set1_epi32(id))));
  return __builtin_popcount(chosen);
}
#else
inline unsigned at_least(Vec x, Vec least) {
  const int low = _mm256_movemask_ps(_mm256_cmp_ps(x.a, least.a, _CMP_GE_OQ));
  return unsigned(low | _mm256_movemask_ps(_mm256_cmp_ps(x.b, least.b, _CMP_GE_OQ)) << 8);
}

inline int compress(Vec x, unsigned chosen, int32_t id, int32_t* ids, float* values) {
  float lanes[LANES];
  store(lanes, x);
  int count = 0;
  for (; chosen; chosen &= chosen - 1, count++) {
    ids[count] = id + __builtin_ctz(chosen);
    values[count] = lanes[__builtin_ctz(chosen)];
  }
  return count;
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

  // Ids and values of the logits that are at least `least`, in the order of ids; how many. There is room for LANES more.
  long copy_from(float least, int32_t* ids, float* values) const {
    long count = 0;
    for (long g = 0; g < groups(); g++) {
      if (!(largest_of[g] >= least)) continue;
      long i = g * GROUP;
      const long end = end_of(g);
      for (; i + LANES <= end; i += LANES) {
        const Vec x = load(logits + i);
        count += compress(x, at_least(x, same(least)), int32_t(i), ids + count, values + count);
      }
      for (; i < end; i++)
        if (logits[i] >= least) {
          ids[count] = int32_t(i);
          values[count++] = logits[i];
        }
    }
    return count;
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

  // A value that at least `count` logits reach, and few more: the count-th largest of the groups' largest. `count` < groups().
  float reached_by(long count, float* scratch) const {
    std::copy(largest_of, largest_of + groups(), scratch);
    std::nth_element(scratch, scratch + count - 1, scratch + groups(), std::greater<float>());
    return scratch[count - 1];
  }

  // The mass of all tokens.
  int64_t mass(const Scale& scale) const {
    Integers whole = none();
    const float least = scale.logit_below(LEAST_SCALED);
    for (long g = 0; g < groups(); g++) {
      if (largest_of[g] < least) continue;
      float copy[GROUP];
      const float* x = logits + g * GROUP;
      if (g * GROUP + GROUP > size) {
        std::fill(copy, copy + GROUP, -std::numeric_limits<float>::infinity());
        memcpy(copy, x, size_t(size - g * GROUP) * sizeof(float));
        x = copy;
      }
      UNROLLED for (int i = 0; i < GROUP; i += PER_VECTOR) whole = whole + masses(scale.of(widened(x + i)));
    }
    return sum(whole);
  }
};

// Where the tokens of a row lie, guessed from the groups' largest and from a part of the others: bins of half a unit from the best
// down. A guess only saves work: whoever uses it finds out by exact masses whether it was enough.
class Guess {
 public:
  Guess(const Row& row, const Scale& scale) {
    for (long g = 0; g < row.groups(); g++) {
      float sample[2 * PER_VECTOR];
      int64_t mass[2 * PER_VECTOR];
      const long from = g * GROUP + g % (GROUP / PER_VECTOR) * PER_VECTOR;
      const bool whole = g % SAMPLED == 0 && from + PER_VECTOR <= row.size;
      const int taken = whole ? PER_VECTOR + 1 : 1;
      std::fill(sample, sample + 2 * PER_VECTOR, row.largest_of[g]);
      if (whole) memcpy(sample + PER_VECTOR, row.logits + from, PER_VECTOR * sizeof(float));
      for (int i = 0; i < taken; i += PER_VECTOR) store(mass + i, masses(scale.of(widened(sample + i))));
      put(scale.of(sample[0]), mass[0], 1);
      if (whole)
        for (int i = PER_VECTOR; i < 2 * PER_VECTOR; i++) put(scale.of(sample[i]), mass[i], SAMPLED * GROUP / PER_VECTOR);
    }
  }

  // Scaled values from which on there is perhaps this part of the mass, or perhaps this many tokens.
  double with_part(double part) const { return reaching(mass_, part); }
  double with_count(long count) const {
    double tokens = 0;
    for (double bin : count_) tokens += bin;
    return reaching(count_, double(count) / tokens);
  }

 private:
  static constexpr int BINS = 64, SAMPLED = 4;

  void put(double scaled, int64_t mass, int weight) {
    const int bin = int(std::min(double(BINS - 1), -2 * scaled));
    mass_[bin] += double(mass) * weight;
    count_[bin] += weight;
  }

  static double reaching(const double* bins, double part) {
    double whole = 0, found = 0;
    for (int b = 0; b < BINS; b++) whole += bins[b];
    for (int b = 0; b < BINS; b++)
      if ((found += bins[b]) >= part * whole) return std::max(LEAST_SCALED, -0.5 * (b + 2));
    return LEAST_SCALED;
  }

  double mass_[BINS] = {}, count_[BINS] = {};
};

}  // namespace segue
