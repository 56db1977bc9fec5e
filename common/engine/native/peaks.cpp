// What one core can do at most: loops that live in registers, and one that only reads memory.
//
// Each function is compiled for its own instructions, whatever the flags of this file are, and is called only where the CPU has
// them. The chains are long enough to hide the latency of the multipliers, and their results are returned, so that no compiler
// can leave them out. Operations are counted as usual: a fused multiply-add is two, a dot product of pairs four for each lane.
#include <immintrin.h>

#define FOR_CPU(features) __attribute__((target(features), noinline))

namespace {

constexpr int CHAINS_256 = 12, CHAINS_512 = 16;

FOR_CPU("avx2,fma") double fma_256(long rounds) {
  __m256 sums[CHAINS_256];
  for (int i = 0; i < CHAINS_256; i++) sums[i] = _mm256_set1_ps(float(i));
  const __m256 half = _mm256_set1_ps(0.5f), one = _mm256_set1_ps(1.0f);
  for (long k = 0; k < rounds; k++) {
#pragma GCC unroll 12
    for (int i = 0; i < CHAINS_256; i++) sums[i] = _mm256_fmadd_ps(sums[i], half, one);
  }
  __m256 all = sums[0];
  for (int i = 1; i < CHAINS_256; i++) all = _mm256_add_ps(all, sums[i]);
  return double(_mm256_cvtss_f32(all));
}

FOR_CPU("avx512f") double fma_512(long rounds) {
  __m512 sums[CHAINS_512];
  for (int i = 0; i < CHAINS_512; i++) sums[i] = _mm512_set1_ps(float(i));
  const __m512 half = _mm512_set1_ps(0.5f), one = _mm512_set1_ps(1.0f);
  for (long k = 0; k < rounds; k++) {
#pragma GCC unroll 16
    for (int i = 0; i < CHAINS_512; i++) sums[i] = _mm512_fmadd_ps(sums[i], half, one);
  }
  __m512 all = sums[0];
  for (int i = 1; i < CHAINS_512; i++) all = _mm512_add_ps(all, sums[i]);
  return double(_mm512_cvtss_f32(all));
}

FOR_CPU("avx512f,avx512bf16") double dot_bf16(long rounds) {
  __m512 sums[CHAINS_512];
  for (int i = 0; i < CHAINS_512; i++) sums[i] = _mm512_set1_ps(float(i));
  const __m512bh ones = (__m512bh)_mm512_set1_epi32(0x3f803f80);
  for (long k = 0; k < rounds; k++) {
#pragma GCC unroll 16
    for (int i = 0; i < CHAINS_512; i++) sums[i] = _mm512_dpbf16_ps(sums[i], ones, ones);
  }
  __m512 all = sums[0];
  for (int i = 1; i < CHAINS_512; i++) all = _mm512_add_ps(all, sums[i]);
  return double(_mm512_cvtss_f32(all));
}

FOR_CPU("avx512f,avx512vnni") double dot_int8(long rounds) {
  __m512i sums[CHAINS_512];
  for (int i = 0; i < CHAINS_512; i++) sums[i] = _mm512_set1_epi32(i);
  const __m512i ones = _mm512_set1_epi8(1);
  for (long k = 0; k < rounds; k++) {
#pragma GCC unroll 16
    for (int i = 0; i < CHAINS_512; i++) sums[i] = _mm512_dpbusd_epi32(sums[i], ones, ones);
  }
  __m512i all = sums[0];
  for (int i = 1; i < CHAINS_512; i++) all = _mm512_add_epi32(all, sums[i]);
  return double(_mm512_cvtsi512_si32(all));
}

// Once over all bytes, 256 at a time from each of `streams` places. Prefetching by hand was not quicker.
FOR_CPU("avx2") double read_all(const char* memory, long bytes, long streams) {
  const long part = bytes / streams / 256 * 256;
  __m256i sums[8];
  for (int i = 0; i < 8; i++) sums[i] = _mm256_setzero_si256();
  for (long at = 0; at < part; at += 256) {
    for (long stream = 0; stream < streams; stream++) {
      const char* from = memory + stream * part + at;
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++) sums[i] = _mm256_xor_si256(sums[i], _mm256_loadu_si256((const __m256i*)(from + 32 * i)));
    }
  }
  __m256i all = sums[0];
  for (int i = 1; i < 8; i++) all = _mm256_xor_si256(all, sums[i]);
  return double(_mm256_extract_epi32(all, 0));
}

volatile double result;

}  // namespace

extern "C" {

// Which loops this CPU has; the names and their order are those of the Python beside this file.
int segue_peak_available(int loop) {
  __builtin_cpu_init();
  switch (loop) {
    case 0: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case 1: return __builtin_cpu_supports("avx512f") != 0;
    case 2: return __builtin_cpu_supports("avx512bf16") != 0;
    case 3: return __builtin_cpu_supports("avx512vnni") != 0;
  }
  return 0;
}

// Runs a loop and returns the number of its operations.
double segue_peak_run(int loop, long rounds) {
  switch (loop) {
    case 0: result = fma_256(rounds); return double(rounds) * CHAINS_256 * 8 * 2;
    case 1: result = fma_512(rounds); return double(rounds) * CHAINS_512 * 16 * 2;
    case 2: result = dot_bf16(rounds); return double(rounds) * CHAINS_512 * 16 * 4;
    case 3: result = dot_int8(rounds); return double(rounds) * CHAINS_512 * 16 * 8;
  }
  return 0;
}

// Reads `bytes` bytes, a multiple of 256 for each stream. Needs AVX2 (loop 0).
void segue_peak_read(const void* memory, long bytes, long streams) {
  result = read_all(static_cast<const char*>(memory), bytes, streams);
}
}
