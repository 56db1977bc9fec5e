// Sixteen floats at a time, on AVX-512 as one register, on AVX2 (with FMA) as two. Everything above is written once, in these.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#if defined(__clang__)
#define UNROLLED _Pragma("unroll")
#else
#define UNROLLED _Pragma("GCC unroll 16")
#endif

namespace segue {

constexpr int LANES = 16;

// As assembly, because GCC takes a function that only prefetches for one that does nothing, and leaves its calls out.
inline void prefetch(const void* p) { asm volatile("prefetcht0 (%0)" : : "r"(p)); }

inline void prefetch_far(const void* p) { asm volatile("prefetcht1 (%0)" : : "r"(p)); }

inline float from_bf16(uint16_t bits) {
  uint32_t wide = uint32_t(bits) << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}

inline uint16_t to_bf16(float value) {  // to nearest even; NaN stays NaN
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t((bits >> 16) | 0x40);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#if defined(__AVX512F__)

struct Vec {
  __m512 v;
};
inline Vec zero() { return {_mm512_setzero_ps()}; }
inline Vec same(float x) { return {_mm512_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load_first(const float* p, int n) { return {_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p)}; }
inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x.v); }
inline void store_first(float* p, Vec x, int n) { _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), x.v); }
inline Vec load(const uint16_t* p) {
  __m256i narrow = _mm256_loadu_si256((const __m256i*)p);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16))};
}
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec div(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
constexpr float LEAST_EXPONENT = -104.0f, LARGEST_EXPONENT = 89.0f;
inline Vec times_two_to(Vec y, Vec n, Vec) { return {_mm512_scalef_ps(y.v, n.v)}; }
// `value` where low <= x <= high (false for NaN), else `other`.
inline Vec where_within(Vec x, float low, float high, Vec value, Vec other) {
  __mmask16 inside = _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(low), _CMP_GE_OQ) & _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(high), _CMP_LE_OQ);
  return {_mm512_mask_blend_ps(inside, other.v, value.v)};
}
// Pairs (even, odd) of bf16: the even or the odd one of each lane as a float.
inline Vec even_of_pairs(const uint16_t* p) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16))}; }
inline Vec odd_of_pairs(const uint16_t* p) {
  return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(int(0xffff0000))))};
}
inline __m256 halves(Vec x, int which) { return which ? _mm512_extractf32x8_ps(x.v, 1) : _mm512_castps512_ps256(x.v); }

#else

struct Vec {
  __m256 a, b;
};
inline Vec zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Vec same(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline Vec load_first(const float* p, int n) {
  float whole[LANES] = {};
  memcpy(whole, p, size_t(n) * 4);
  return load(whole);
}
inline void store(float* p, Vec x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
inline void store_first(float* p, Vec x, int n) {
  float whole[LANES];
  store(whole, x);
  memcpy(p, whole, size_t(n) * 4);
}
inline __m256 widen(__m128i narrow) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16)); }
inline Vec load(const uint16_t* p) { return {widen(_mm_loadu_si128((const __m128i*)p)), widen(_mm_loadu_si128((const __m128i*)(p + 8)))}; }
inline Vec fma(Vec x, Vec y, Vec z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline Vec add(Vec x, Vec y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline Vec sub(Vec x, Vec y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline Vec mul(Vec x, Vec y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline Vec div(Vec x, Vec y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline Vec max(Vec x, Vec y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline Vec min(Vec x, Vec y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline Vec round(Vec x) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, mode), _mm256_round_ps(x.b, mode)};
}
constexpr float LEAST_EXPONENT = -87.0f, LARGEST_EXPONENT = 88.0f;
inline __m256 times_two_to(__m256 y, __m256 n, __m256 x) {  // 0 where x is less than the least exponent
  const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  const __m256 kept = _mm256_cmp_ps(x, _mm256_set1_ps(LEAST_EXPONENT), _CMP_NLT_UQ);
  return _mm256_and_ps(kept, _mm256_mul_ps(y, _mm256_castsi256_ps(power)));
}
inline Vec times_two_to(Vec y, Vec n, Vec x) { return {times_two_to(y.a, n.a, x.a), times_two_to(y.b, n.b, x.b)}; }
inline __m256 where_within(__m256 x, __m256 low, __m256 high, __m256 value, __m256 other) {
  __m256 inside = _mm256_and_ps(_mm256_cmp_ps(x, low, _CMP_GE_OQ), _mm256_cmp_ps(x, high, _CMP_LE_OQ));
  return _mm256_blendv_ps(other, value, inside);
}
inline Vec where_within(Vec x, float low, float high, Vec value, Vec other) {
  __m256 from = _mm256_set1_ps(low), to = _mm256_set1_ps(high);
  return {where_within(x.a, from, to, value.a, other.a), where_within(x.b, from, to, value.b, other.b)};
}
inline __m256 even_half(const uint16_t* p) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256((const __m256i*)p), 16)); }
inline __m256 odd_half(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256((const __m256i*)p), _mm256_set1_epi32(int(0xffff0000))));
}
inline Vec even_of_pairs(const uint16_t* p) { return {even_half(p), even_half(p + 16)}; }
inline Vec odd_of_pairs(const uint16_t* p) { return {odd_half(p), odd_half(p + 16)}; }
inline __m256 halves(Vec x, int which) { return which ? x.b : x.a; }

#endif

inline Vec load_upto(const float* p, int n) { return n == LANES ? load(p) : load_first(p, n); }
inline void store_upto(float* p, Vec x, int n) {
  if (n == LANES)
    store(p, x);
  else
    store_first(p, x, n);
}

inline float sum(Vec x) {  // always in this order
  __m256 eight = _mm256_add_ps(halves(x, 0), halves(x, 1));
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}

inline float largest(Vec x) {
  __m256 eight = _mm256_max_ps(halves(x, 0), halves(x, 1));
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_shuffle_ps(four, four, 1)));
}

// e^x to about one unit in the last place (Cephes' polynomial). Exactly 1 at 0, exactly 0 below -104; NaN stays NaN, because
// max and min return their second operand where one is NaN.
inline Vec exponential(Vec x) {
  const Vec bounded = min(same(LARGEST_EXPONENT), max(same(LEAST_EXPONENT), x));
  const Vec n = round(mul(bounded, same(1.44269504088896341f)));
  Vec r = fma(n, same(-0.693359375f), bounded);
  r = fma(n, same(2.12194440e-4f), r);
  Vec y = same(1.9875691500e-4f);
  y = fma(y, r, same(1.3981999507e-3f));
  y = fma(y, r, same(8.3334519073e-3f));
  y = fma(y, r, same(4.1665795894e-2f));
  y = fma(y, r, same(1.6666665459e-1f));
  y = fma(y, r, same(5.0000001201e-1f));
  y = fma(y, mul(r, r), add(r, same(1.0f)));
  return times_two_to(y, n, x);
}

// Four floats of a row, and four of another beside them.
inline __m256 two_fours(const float* p, const float* q) {
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(q), 1);
}
inline __m256 two_fours(const uint16_t* p, const uint16_t* q) {
  const __m128i both = _mm_unpacklo_epi64(_mm_loadl_epi64((const __m128i*)p), _mm_loadl_epi64((const __m128i*)q));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(both), 16));
}

// Four columns of eight rows: out[j] holds element j of each row.
template <class T>
inline void turn_columns(const T* const* rows, long from, __m256* out) {
  __m256 in[4], half[4];
  UNROLLED for (int i = 0; i < 4; i++) in[i] = two_fours(rows[i] + from, rows[i + 4] + from);
  half[0] = _mm256_unpacklo_ps(in[0], in[1]);
  half[1] = _mm256_unpackhi_ps(in[0], in[1]);
  half[2] = _mm256_unpacklo_ps(in[2], in[3]);
  half[3] = _mm256_unpackhi_ps(in[2], in[3]);
  out[0] = _mm256_shuffle_ps(half[0], half[2], 0x44);
  out[1] = _mm256_shuffle_ps(half[0], half[2], 0xee);
  out[2] = _mm256_shuffle_ps(half[1], half[3], 0x44);
  out[3] = _mm256_shuffle_ps(half[1], half[3], 0xee);
}

// Columns `from .. from + 15` of sixteen rows, written as sixteen lines of sixteen.
template <class T>
inline void transpose_tile(const T* const* rows, long from, float* out) {
  for (int across = 0; across < LANES; across += 8)
    for (int down = 0; down < LANES; down += 4) {
      __m256 turned[4];
      turn_columns(rows + across, from + down, turned);
      UNROLLED for (int i = 0; i < 4; i++) _mm256_storeu_ps(out + (down + i) * LANES + across, turned[i]);
    }
}

// Columns `from .. from + 15` of sixteen rows, each in a register.
template <class T>
inline void transpose_sixteen(const T* const* rows, long from, Vec* out) {
  alignas(64) float lines[LANES * LANES];
  transpose_tile(rows, from, lines);
  UNROLLED for (int i = 0; i < LANES; i++) out[i] = load(lines + i * LANES);
}

#if defined(__AVX512F__)
inline __m512 four_fours(const float* a, const float* b, const float* c, const float* d) {
  __m512 all = _mm512_castps128_ps512(_mm_loadu_ps(a));
  all = _mm512_insertf32x4(all, _mm_loadu_ps(b), 1);
  all = _mm512_insertf32x4(all, _mm_loadu_ps(c), 2);
  return _mm512_insertf32x4(all, _mm_loadu_ps(d), 3);
}

inline void transpose_sixteen(const float* const* rows, long from, Vec* out) {
  UNROLLED for (int j = 0; j < LANES; j += 4) {
    __m512 in[4], half[4];
    UNROLLED for (int i = 0; i < 4; i++)
      in[i] = four_fours(rows[i] + from + j, rows[i + 4] + from + j, rows[i + 8] + from + j, rows[i + 12] + from + j);
    half[0] = _mm512_unpacklo_ps(in[0], in[1]);
    half[1] = _mm512_unpackhi_ps(in[0], in[1]);
    half[2] = _mm512_unpacklo_ps(in[2], in[3]);
    half[3] = _mm512_unpackhi_ps(in[2], in[3]);
    out[j].v = _mm512_shuffle_ps(half[0], half[2], 0x44);
    out[j + 1].v = _mm512_shuffle_ps(half[0], half[2], 0xee);
    out[j + 2].v = _mm512_shuffle_ps(half[1], half[3], 0x44);
    out[j + 3].v = _mm512_shuffle_ps(half[1], half[3], 0xee);
  }
}
#endif

}  // namespace segue
