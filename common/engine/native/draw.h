// Draws a token from each row of logits. A row is one member's work from beginning to end: its token, and its log-probabilities,
// depend on its own logits and parameters alone.
#pragma once
#include <math.h>

#include "candidates.h"

namespace segue {

constexpr int MOST_ALTERNATIVES = 20;

// What drawing needs of a sequence. Tokens lie in the vocabulary.
struct DrawRow {
  uint64_t seed, choice, position;  // the counter of this draw
  double inverse_temperature;       // 0: greedy
  double top_p;                     // 1: all
  double least_scaled;              // log(min_p), or -infinity
  int64_t top_k;                    // 0: all
  int64_t alternatives;             // of log-probabilities; less than 0: none are wanted
  int64_t min_tokens;               // while there are fewer, `masked` may not be drawn
  int64_t bias_count, counted, masked_count;
  const int64_t* bias_tokens;
  const float* bias_values;
  const int64_t* counted_tokens;  // each distinct token of the sequence,
  const int64_t* output_counts;   // and how often it is among the new ones
  const int64_t* masked;
  const int32_t* allowed;  // a bit for each token that a grammar allows, or null
  float repetition, presence, frequency;
};

enum Fault : int32_t { NO_FAULT, NOT_FINITE, ALL_MASKED };

struct Draw {
  int32_t fault, token;
  int64_t whole;  // the mass of all tokens at temperature 1, where log-probabilities are wanted
  int32_t rank, alternatives;
  float best, value;
  int32_t tokens[MOST_ALTERNATIVES];
  float values[MOST_ALTERNATIVES];
};

// Philox4x32-10, as common/engine/draws.py has it.
inline double uniform(uint64_t seed, uint64_t choice, uint64_t position) {
  uint32_t a = uint32_t(position), b = uint32_t(position >> 32), c = uint32_t(choice), d = 0;
  uint32_t k = uint32_t(seed), m = uint32_t(seed >> 32);
  for (int round = 0; round < 10; round++) {
    const uint64_t low = uint64_t(0xD2511F53u) * a, high = uint64_t(0xCD9E8D57u) * c;
    a = uint32_t(high >> 32) ^ b ^ k;
    b = uint32_t(high);
    c = uint32_t(low >> 32) ^ d ^ m;
    d = uint32_t(low);
    k += 0x9E3779B9u;
    m += 0xBB67AE85u;
  }
  return double((uint64_t(a) << 32 | b) >> 11) * 0x1p-53;
}

struct DrawScratch {
  Scratch<float> largest, sorted;
  Candidates candidates;
};

class Drawing {
 public:
  Drawing(const DrawRow& asked, float* logits, long size, DrawScratch& scratch)
      : asked_(asked), scratch_(scratch), row_{logits, size, scratch.largest.at_least(size_t(size / GROUP + 1)), 0.0f} {}

  Draw run() {
    Draw drawn{};
    const bool finite = row_.survey();
    if (finite && adjust()) row_.survey();
    drawn.fault = !finite ? NOT_FINITE : row_.best == -std::numeric_limits<float>::infinity() ? ALL_MASKED : NO_FAULT;
    if (drawn.fault != NO_FAULT) return drawn;
    drawn.token = asked_.inverse_temperature == 0 ? row_.first_with(row_.best) : choose();
    if (asked_.alternatives >= 0) score(drawn);
    return drawn;
  }

  // Log-probabilities of a token that is given.
  Draw score_of(int32_t token) {
    Draw scored{};
    scored.token = token;
    scored.fault = row_.survey() ? NO_FAULT : NOT_FINITE;
    if (scored.fault == NO_FAULT) score(scored);
    return scored;
  }

 private:
  // Bias, penalties, masks, in this order; see logit_adjustments.py. Whether anything was changed.
  bool adjust() {
    const DrawRow& a = asked_;
    float* x = row_.logits;
    for (int64_t i = 0; i < a.bias_count; i++) x[a.bias_tokens[i]] += a.bias_values[i];
    for (int64_t i = 0; i < a.counted; i++) {
      float& value = x[a.counted_tokens[i]];
      if (a.repetition != 1.0f) value = value > 0 ? value / a.repetition : value * a.repetition;
      value = value - a.frequency * float(a.output_counts[i]) - (a.output_counts[i] > 0 ? a.presence : 0.0f);
    }
    const bool waits = a.masked_count > 0 && int64_t(a.position) < a.min_tokens;
    if (waits)
      for (int64_t i = 0; i < a.masked_count; i++)
        if (a.masked[i] >= 0 && a.masked[i] < row_.size) x[a.masked[i]] = -std::numeric_limits<float>::infinity();
    if (a.allowed) keep_allowed();
    return a.bias_count > 0 || a.counted > 0 || waits || a.allowed;
  }

  void keep_allowed() {
    for (long word = 0; word * 32 < row_.size; word++) {
      const uint32_t bits = uint32_t(asked_.allowed[word]);
      if (bits == 0xffffffffu) continue;
      const long end = std::min(row_.size, (word + 1) * 32);
      for (long i = word * 32; i < end; i++)
        if (!(bits >> (i & 31) & 1)) row_.logits[i] = -std::numeric_limits<float>::infinity();
    }
  }

  int32_t choose() {
    const Scale scale{row_.best, asked_.inverse_temperature};
    const bool counts = asked_.top_k > 0 && asked_.top_k < row_.size;
    const double number = uniform(asked_.seed, asked_.choice, asked_.position);
    return counts ? choose_among_best(scale, number) : choose_among_all(scale, number);
  }

  int32_t choose_among_best(const Scale& scale, double number) {
    gather_best(asked_.top_k, scale);
    const Prefix best = found().by_count(asked_.top_k);
    return choose_from(scale, number, best, best.mass);
  }

  // At least the `count` best tokens, or all that have a mass.
  void gather_best(long count, const Scale& scale) {
    const float least = scale.logit_below(LEAST_SCALED);
    if (count < row_.groups() / 2) {
      const float reached = row_.reached_by(count, scratch_.sorted.at_least(size_t(row_.groups())));
      return found().gather(row_, scale, std::max(reached, least));
    }
    found().gather(row_, scale, scale.logit_below(Guess(row_, scale).with_count(count)));
    if (found().size() < count) found().gather(row_, scale, least);
  }

  int32_t choose_among_all(const Scale& scale, double number) {
    const bool narrows = asked_.top_p < 1.0, bounded = asked_.least_scaled > LEAST_SCALED;
    if (bounded && !narrows) {
      found().gather(row_, scale, scale.logit_below(asked_.least_scaled));
      return choose_from(scale, number, {found().size(), found().mass()}, 0);
    }
    const int64_t whole = row_.mass(scale);
    if (scale.inverse_temperature == 1.0) at_one_ = whole;
    gather_mass(narrows ? part_of(whole, asked_.top_p) : place_in(whole, number) + 1, whole, scale);
    return choose_from(scale, number, {found().size(), narrows ? found().mass() : whole}, whole);
  }

  // Tokens of at least this mass out of `whole`, from the best one on.
  void gather_mass(int64_t mass, int64_t whole, const Scale& scale) {
    const double from = Guess(row_, scale).with_part(double(mass) / double(whole));
    for (double scaled : {from, from - 1.5, 2 * from}) {
      found().gather(row_, scale, scale.logit_below(std::max(scaled, LEAST_SCALED)));
      if (found().mass() >= mass) return;
    }
    found().gather(row_, scale, scale.logit_below(LEAST_SCALED));
  }

  // From the first of the candidates, of which top-p counts a part of `whole`.
  int32_t choose_from(const Scale& scale, double number, Prefix kept, int64_t whole) {
    if (asked_.top_p < 1.0) kept = shorter(kept, found().by_mass(part_of(whole, asked_.top_p)));
    if (asked_.least_scaled > LEAST_SCALED) kept = shorter(kept, found().by_value(scale, asked_.least_scaled));
    return found().at(place_in(kept.mass, number));
  }

  static Prefix shorter(Prefix a, Prefix b) { return a.count < b.count ? a : b; }
  static int64_t part_of(int64_t mass, double part) {
    return std::min(mass, std::max(int64_t(1), int64_t(ceil(part * double(mass)))));
  }
  static int64_t place_in(int64_t mass, double number) { return std::min(mass - 1, int64_t(number * double(mass))); }

  void score(Draw& drawn) {
    drawn.best = row_.best;
    drawn.value = row_.logits[drawn.token];
    drawn.whole = at_one_ ? at_one_ : row_.mass({row_.best, 1.0});
    drawn.rank = 1;
    row_.each_from(drawn.value, [&](int32_t id) { drawn.rank += row_.logits[id] > drawn.value || id < drawn.token; });
    if (asked_.alternatives < 1) return;
    const long wanted = std::min<long>(asked_.alternatives, MOST_ALTERNATIVES);
    float least = -std::numeric_limits<float>::max();
    if (wanted < row_.groups()) least = std::max(least, row_.reached_by(wanted, scratch_.sorted.at_least(size_t(row_.groups()))));
    found().gather(row_, {row_.best, 1.0}, least);
    found().first(wanted, [&](const Candidate& one) {
      drawn.tokens[drawn.alternatives] = one.id;
      drawn.values[drawn.alternatives++] = one.value;
    });
  }

  Candidates& found() { return scratch_.candidates; }

  const DrawRow& asked_;
  DrawScratch& scratch_;
  Row row_;
  int64_t at_one_ = 0;  // the mass of all tokens at temperature 1, once it is known
};

}  // namespace segue
