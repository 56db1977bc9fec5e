// A token's mass: e^((logit - best) / temperature) as an integer, MASS_OF_BEST for the best. Integers add up to the same sum in any
// order, so that totals do not depend on vectors, threads or batches. Products and sums are never fused, and the twin in torch does
// the same ones: every variant and the twin give the same integers.
#pragma once
#include "vectors.h"

namespace segue {

constexpr int MASS_BITS = 42;
constexpr int64_t MASS_OF_BEST = int64_t(1) << MASS_BITS;
constexpr double LEAST_SCALED = -32.0;  // below it masses are 0
constexpr int PER_VECTOR = 8;

#if defined(__AVX512F__)

struct Doubles {
  __m512d v;
};
struct Integers {
  __m512i v;
};
inline Doubles every(double x) { return {_mm512_set1_pd(x)}; }
inline Doubles widened(const float* p) { return {_mm512_cvtps_pd(_mm256_loadu_ps(p))}; }
inline Doubles operator+(Doubles a, Doubles b) { return {_mm512_add_pd(a.v, b.v)}; }
inline Doubles operator-(Doubles a, Doubles b) { return {_mm512_sub_pd(a.v, b.v)}; }
inline Doubles operator*(Doubles a, Doubles b) { return {_mm512_mul_pd(a.v, b.v)}; }
inline Doubles larger(Doubles a, Doubles b) { return {_mm512_max_pd(a.v, b.v)}; }
inline Integers bits(Doubles a) { return {_mm512_castpd_si512(a.v)}; }
inline Doubles as_exponent(Integers a) { return {_mm512_castsi512_pd(_mm512_slli_epi64(a.v, 52))}; }
inline Integers none() { return {_mm512_setzero_si512()}; }
inline Integers every(int64_t x) { return {_mm512_set1_epi64(x)}; }
inline Integers operator+(Integers a, Integers b) { return {_mm512_add_epi64(a.v, b.v)}; }
inline Integers operator-(Integers a, Integers b) { return {_mm512_sub_epi64(a.v, b.v)}; }
inline void store(int64_t* p, Integers a) { _mm512_storeu_si512(p, a.v); }

#else

struct Doubles {
  __m256d a, b;
};
struct Integers {
  __m256i a, b;
};
inline Doubles every(double x) { return {_mm256_set1_pd(x), _mm256_set1_pd(x)}; }
inline Doubles widened(const float* p) { return {_mm256_cvtps_pd(_mm_loadu_ps(p)), _mm256_cvtps_pd(_mm_loadu_ps(p + 4))}; }
inline Doubles operator+(Doubles x, Doubles y) { return {_mm256_add_pd(x.a, y.a), _mm256_add_pd(x.b, y.b)}; }
inline Doubles operator-(Doubles x, Doubles y) { return {_mm256_sub_pd(x.a, y.a), _mm256_sub_pd(x.b, y.b)}; }
inline Doubles operator*(Doubles x, Doubles y) { return {_mm256_mul_pd(x.a, y.a), _mm256_mul_pd(x.b, y.b)}; }
inline Doubles larger(Doubles x, Doubles y) { return {_mm256_max_pd(x.a, y.a), _mm256_max_pd(x.b, y.b)}; }
inline Integers bits(Doubles x) { return {_mm256_castpd_si256(x.a), _mm256_castpd_si256(x.b)}; }
inline Doubles as_exponent(Integers x) {
  return {_mm256_castsi256_pd(_mm256_slli_epi64(x.a, 52)), _mm256_castsi256_pd(_mm256_slli_epi64(x.b, 52))};
}
inline Integers none() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline Integers every(int64_t x) { return {_mm256_set1_epi64x(x), _mm256_set1_epi64x(x)}; }
inline Integers operator+(Integers x, Integers y) { return {_mm256_add_epi64(x.a, y.a), _mm256_add_epi64(x.b, y.b)}; }
inline Integers operator-(Integers x, Integers y) { return {_mm256_sub_epi64(x.a, y.a), _mm256_sub_epi64(x.b, y.b)}; }
inline void store(int64_t* p, Integers x) {
  _mm256_storeu_si256((__m256i*)p, x.a);
  _mm256_storeu_si256((__m256i*)(p + 4), x.b);
}

#endif

inline int64_t sum(Integers x) {
  int64_t lanes[PER_VECTOR], whole = 0;
  store(lanes, x);
  for (int64_t lane : lanes) whole += lane;
  return whole;
}

// What logits mean at one temperature.
struct Scale {
  double best, inverse_temperature;

  Doubles of(Doubles logits) const { return larger((logits - every(best)) * every(inverse_temperature), every(LEAST_SCALED)); }
  double of(float logit) const { return (double(logit) - best) * inverse_temperature; }
  // A logit below which no mass is more than 0, or no scaled value at least `scaled`: a bound, not the edge itself.
  float logit_below(double scaled) const {
    const double edge = best + (scaled - 1e-9) / inverse_temperature;
    return float(edge - 1e-6 * (edge < 0 ? -edge : edge));
  }
};

// `scaled` in [LEAST_SCALED, 0]. Taylor's polynomial of degree 9 on half of ln 2 to each side: error below 1e-11.
inline Integers masses(Doubles scaled) {
  constexpr double WHOLE = 4503599627370496.0;  // 2^52: what is added to it is rounded to an integer, in its lowest bits
  constexpr double EXPONENT = WHOLE + 1023 + MASS_BITS;
  const Doubles raised = scaled * every(1.4426950408889634) + every(EXPONENT);
  const Doubles n = raised - every(EXPONENT);
  const Doubles r = (scaled - n * every(6.93147180369123816490e-01)) - n * every(1.90821492927058770002e-10);
  const Doubles r2 = r * r, r4 = r2 * r2;
  const Doubles low = (every(1.0) + r) + r2 * (every(0.5) + r * every(1.0 / 6));
  const Doubles middle = (every(1.0 / 24) + r * every(1.0 / 120)) + r2 * (every(1.0 / 720) + r * every(1.0 / 5040));
  const Doubles high = every(1.0 / 40320) + r * every(1.0 / 362880);
  const Doubles y = (low + r4 * middle) + (r4 * r4) * high;
  return bits(y * as_exponent(bits(raised)) + every(WHOLE)) - bits(every(WHOLE));
}

}  // namespace segue
