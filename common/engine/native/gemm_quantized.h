// Products with weights that stay in blocks of 32 along k with a float16 scale (and minimum), as GGUF's Q4_0, Q4_1 and Q8_0 have
// them. A weight is expanded to float32 right before it is used, and sums run in the order of gemm.h; so every result has the
// bits that the expanded matrix would give. The expansion itself is exact up to its last addition (a float16 times eight bits
// fits a float32), so a fused operation rounds it just as a multiplication and an addition do.
//
// W lies in panels of sixteen output columns, each a run of blocks. A block holds sixteen scales, sixteen minima where its kind
// has them, and the numbers: four bits as words of eight k's a column, [4][16], eight bits as [32][16].
#pragma once
#include "gemm.h"

namespace segue {

constexpr long BLOCK = 32;
constexpr int WORD_STEPS = 8;  // of k, in a word of four-bit numbers
constexpr long SCALES_BYTES = LANES * 2;
constexpr long WORDS_BYTES = LANES * 4;
constexpr long EXPANDED_STEPS = 768;  // of k: what is expanded at once stays in the second level's cache
#if defined(__AVX512F__)
constexpr int REGISTER_ROWS = 8;
#else
constexpr int REGISTER_ROWS = 4;
#endif

// The kinds have GGUF's numbers. 0 is a matrix that is not quantised.
enum Quantization : int { Q4_0 = 2, Q4_1 = 3, Q8_0 = 8 };

#if defined(__AVX512F__)

inline Vec load_half(const uint8_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
inline Vec load_signed(const uint8_t* p) { return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))}; }

struct Words {
  __m512i w;
  void load(const uint8_t* p) { w = _mm512_loadu_si512(p); }
  void advance() { w = _mm512_srli_epi32(w, 4); }
  Vec lookup(Vec table) const { return {_mm512_permutexvar_ps(w, table.v)}; }  // which looks at the lowest four bits alone
  Vec whole() const { return lookup({_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)}); }
  Vec from_below() const { return lookup({_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1)}); }
};

#else

inline __m256 load_half8(const uint8_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
inline Vec load_half(const uint8_t* p) { return {load_half8(p), load_half8(p + 16)}; }
inline __m256 load_signed8(const uint8_t* p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))); }
inline Vec load_signed(const uint8_t* p) { return {load_signed8(p), load_signed8(p + 8)}; }

struct Words {
  __m256i a, b;
  void load(const uint8_t* p) {
    a = _mm256_loadu_si256((const __m256i*)p);
    b = _mm256_loadu_si256((const __m256i*)(p + 32));
  }
  void advance() {
    a = _mm256_srli_epi32(a, 4);
    b = _mm256_srli_epi32(b, 4);
  }
  static __m256 whole(__m256i w) { return _mm256_cvtepi32_ps(_mm256_and_si256(w, _mm256_set1_epi32(15))); }
  static __m256 from_below(__m256i w) { return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(w, 28), 28)); }
  Vec whole() const { return {whole(a), whole(b)}; }
  Vec from_below() const { return {from_below(a), from_below(b)}; }
};

#endif

// How a kind's block is walked through: `open` it, then for each of its runs `begin` and RUN times `next`.
struct BlockOfQ4_0 {  // numbers in two's complement
  static constexpr long BYTES = SCALES_BYTES + BLOCK / WORD_STEPS * WORDS_BYTES;
  static constexpr int RUN = WORD_STEPS;
  Vec scale;
  Words words;
  void open(const uint8_t* block) { scale = load_half(block); }
  void begin(const uint8_t* block, long run) { words.load(block + SCALES_BYTES + run * WORDS_BYTES); }
  Vec next() {
    Vec value = mul(scale, words.from_below());
    words.advance();
    return value;
  }
};

struct BlockOfQ4_1 {
  static constexpr long BYTES = 2 * SCALES_BYTES + BLOCK / WORD_STEPS * WORDS_BYTES;
  static constexpr int RUN = WORD_STEPS;
  Vec scale, least;
  Words words;
  void open(const uint8_t* block) {
    scale = load_half(block);
    least = load_half(block + SCALES_BYTES);
  }
  void begin(const uint8_t* block, long run) { words.load(block + 2 * SCALES_BYTES + run * WORDS_BYTES); }
  Vec next() {
    Vec value = fma(scale, words.whole(), least);
    words.advance();
    return value;
  }
};

struct BlockOfQ8_0 {
  static constexpr long BYTES = SCALES_BYTES + BLOCK * LANES;
  static constexpr int RUN = 4;
  Vec scale;
  const uint8_t* numbers;
  void open(const uint8_t* block) { scale = load_half(block); }
  void begin(const uint8_t* block, long run) { numbers = block + SCALES_BYTES + run * RUN * LANES; }
  Vec next() {
    Vec value = mul(scale, load_signed(numbers));
    numbers += LANES;
    return value;
  }
};

inline long bytes_of_block(int quantization) {
  return quantization == Q4_0 ? BlockOfQ4_0::BYTES : quantization == Q4_1 ? BlockOfQ4_1::BYTES : BlockOfQ8_0::BYTES;
}
inline long bytes_of_panel(const Packed& w) { return w.inputs / BLOCK * bytes_of_block(w.quantization); }

// Few rows: weights are expanded in registers. `panel` and `w` count bytes, `steps` whole blocks' k's.
template <class B, int PANELS>
struct Quantized {
  using X = float;
  using W = uint8_t;
  template <int MR, int NR>
  static inline void accumulate(Vec (&acc)[MR][NR], const float* x, long xs, const uint8_t* w, long panel, long, long steps) {
    for (long k = 0; k < steps; k += BLOCK, w += B::BYTES) {
      B block[NR];
      UNROLLED for (int n = 0; n < NR; n++) block[n].open(w + n * panel);
      for (long run = 0; run < BLOCK / B::RUN; run++, x += B::RUN) {
        UNROLLED for (int n = 0; n < NR; n++) {
          block[n].begin(w + n * panel, run);
          _mm_prefetch((const char*)(w + (n + PANELS) * panel + run * WORDS_BYTES), _MM_HINT_T0);
        }
        UNROLLED for (int j = 0; j < B::RUN; j++) {
          Vec column[NR];
          UNROLLED for (int n = 0; n < NR; n++) column[n] = block[n].next();
          UNROLLED for (int m = 0; m < MR; m++) {
            const Vec row = same(x[m * xs + j]);
            UNROLLED for (int n = 0; n < NR; n++) acc[m][n] = fma(row, column[n], acc[m][n]);
          }
        }
      }
    }
  }
};

template <class B, int MR, int NR>
inline void compute_in_registers(const Tile& t, int panels) {
  if constexpr (NR > 1)
    if (panels < NR) return compute_in_registers<B, MR, NR - 1>(t, panels);
  compute_tile<Quantized<B, NR>, MR, NR>(t);
}

template <class B>
inline void multiply_few(const Product& p, long first, long last) {
#if defined(__AVX512F__)
  const long wide = p.rows == 1 ? 4 : p.rows <= 5 ? 3 : 2;
#else
  const long wide = p.rows == 1 ? 2 : 1;
#endif
  const Packed& w = *p.w;
  Tile t{};
  t.x = p.x;
  t.x_stride = p.x_stride;
  t.panel = bytes_of_panel(w);
  t.steps = w.inputs;
  t.out_stride = p.y_stride;
  t.residual_stride = p.residual_stride;
  for (long panel = first; panel < last; panel += wide) {
    const long column = panel * LANES;
    const int panels = int(last - panel < wide ? last - panel : wide);
    t.w = (const uint8_t*)w.data + panel * t.panel;
    t.columns = w.outputs - column < panels * LANES ? w.outputs - column : panels * LANES;
    t.out = p.y + column;
    t.bias = p.bias ? p.bias + column : nullptr;
    t.residual = p.residual ? p.residual + column : nullptr;
    switch (p.rows) {
#if defined(__AVX512F__)
      case 1: compute_in_registers<B, 1, 4>(t, panels); break;
      case 2: compute_in_registers<B, 2, 3>(t, panels); break;
      case 3: compute_in_registers<B, 3, 3>(t, panels); break;
      case 4: compute_in_registers<B, 4, 3>(t, panels); break;
      case 5: compute_in_registers<B, 5, 3>(t, panels); break;
      case 6: compute_in_registers<B, 6, 2>(t, panels); break;
      case 7: compute_in_registers<B, 7, 2>(t, panels); break;
      case 8: compute_in_registers<B, 8, 2>(t, panels); break;
#else
      case 1: compute_in_registers<B, 1, 2>(t, panels); break;
      case 2: compute_in_registers<B, 2, 1>(t, panels); break;
      case 3: compute_in_registers<B, 3, 1>(t, panels); break;
      case 4: compute_in_registers<B, 4, 1>(t, panels); break;
#endif
    }
  }
}

// Some blocks of some panels as float32 panels of `steps` k's.
template <class B>
inline void expand(const uint8_t* w, long panel, int panels, long steps, float* out) {
  for (int n = 0; n < panels; n++)
    for (long k = 0; k < steps; k += BLOCK) {
      const uint8_t* p = w + n * panel + k / BLOCK * B::BYTES;
      B block;
      block.open(p);
      for (long run = 0; run < BLOCK / B::RUN; run++) {
        block.begin(p, run);
        UNROLLED for (int j = 0; j < B::RUN; j++, out += LANES) store(out, block.next());
      }
    }
}

// Many rows: a few panels are expanded into the cache, then multiplied as float32.
template <class B>
inline void multiply_many(const Product& p, long row, long rows, long first, long last, GemmScratch& mine) {
  const Packed& w = *p.w;
  float* expanded = mine.expanded.at_least(EXPANDED_STEPS * TILE_PANELS * LANES);
  float* partial = w.inputs > EXPANDED_STEPS ? mine.partial.at_least(BLOCK_ROWS * TILE_PANELS * LANES) : nullptr;
  const long panel_bytes = bytes_of_panel(w);
  for (long panel = first; panel < last; panel += TILE_PANELS) {
    const int panels = int(last - panel < TILE_PANELS ? last - panel : TILE_PANELS);
    const long column = panel * LANES;
    for (long k = 0; k < w.inputs; k += EXPANDED_STEPS) {
      const bool ends = k + EXPANDED_STEPS >= w.inputs;
      Tile t{};
      t.steps = ends ? w.inputs - k : EXPANDED_STEPS;
      expand<B>((const uint8_t*)w.data + panel * panel_bytes + k / BLOCK * B::BYTES, panel_bytes, panels, t.steps, expanded);
      t.x = p.x + row * p.x_stride + k;
      t.x_stride = p.x_stride;
      t.w = expanded;
      t.panel = t.steps * LANES;
      t.stride = LANES;
      t.start = k ? partial : nullptr;
      t.start_stride = TILE_PANELS * LANES;
      t.columns = long(panels) * LANES;
      t.out = partial;
      t.out_stride = TILE_PANELS * LANES;
      if (ends) {
        if (w.outputs - column < t.columns) t.columns = w.outputs - column;
        t.out = p.y + row * p.y_stride + column;
        t.out_stride = p.y_stride;
        t.bias = p.bias ? p.bias + column : nullptr;
        t.residual = p.residual ? p.residual + row * p.residual_stride + column : nullptr;
        t.residual_stride = p.residual_stride;
      }
      compute_group<Float32>(t, rows, panels);
    }
  }
}

template <class B>
inline void multiply_blocks(const Product& p, long first, long last, GemmScratch& mine) {
  if (p.rows <= REGISTER_ROWS) return multiply_few<B>(p, first, last);
  for (long row = 0; row < p.rows; row += BLOCK_ROWS)
    multiply_many<B>(p, row, p.rows - row < BLOCK_ROWS ? p.rows - row : BLOCK_ROWS, first, last, mine);
}

// This member's columns of the product, whatever W is. No barrier.
inline void multiply_any(const Product& p, int member, const Team& team, GemmScratch& mine) {
  if (p.w->quantization == 0) return multiply(p, member, team, mine);
  long first, last;
  team.share(p.w->panels(), TILE_PANELS, member, first, last);
  if (first == last) return;
  switch (p.w->quantization) {
    case Q4_0: return multiply_blocks<BlockOfQ4_0>(p, first, last, mine);
    case Q4_1: return multiply_blocks<BlockOfQ4_1>(p, first, last, mine);
    case Q8_0: return multiply_blocks<BlockOfQ8_0>(p, first, last, mine);
  }
}

// One row of W (a token's embedding) as float32: sixteen rows are expanded, one is taken.
template <class B>
inline void expand_row(const Packed& w, long row, float* out) {
  const uint8_t* p = (const uint8_t*)w.data + row / LANES * bytes_of_panel(w);
  for (long k = 0; k < w.inputs; k += BLOCK, p += B::BYTES) {
    float lines[BLOCK * LANES];
    expand<B>(p, 0, 1, BLOCK, lines);
    for (long i = 0; i < BLOCK; i++) out[k + i] = lines[i * LANES + row % LANES];
  }
}

inline void expand_row(const Packed& w, long row, float* out) {
  switch (w.quantization) {
    case Q4_0: return expand_row<BlockOfQ4_0>(w, row, out);
    case Q4_1: return expand_row<BlockOfQ4_1>(w, row, out);
    case Q8_0: return expand_row<BlockOfQ8_0>(w, row, out);
  }
}

// GGUF's rows [outputs][inputs / 32] of blocks to panels. In GGUF byte i of a four-bit block holds numbers i and i + 16.
inline void pack_blocks(const uint8_t* rows, const Packed& w) {
  const bool narrow = w.quantization != Q8_0;
  const long scales = w.quantization == Q4_1 ? 2 : 1;
  const long blocks = w.inputs / BLOCK, block_bytes = bytes_of_block(w.quantization);
  const long row_block = scales * 2 + (narrow ? BLOCK / 2 : BLOCK);
  for (long n = 0; n < w.outputs; n++)
    for (long b = 0; b < blocks; b++) {
      const uint8_t* in = rows + (n * blocks + b) * row_block;
      uint8_t* out = (uint8_t*)w.data + n / LANES * bytes_of_panel(w) + b * block_bytes;
      const long lane = n % LANES;
      for (long s = 0; s < scales; s++) memcpy(out + s * SCALES_BYTES + lane * 2, in + s * 2, 2);
      in += scales * 2;
      out += scales * SCALES_BYTES;
      if (!narrow) {
        for (long k = 0; k < BLOCK; k++) out[k * LANES + lane] = in[k];
        continue;
      }
      for (long run = 0; run < BLOCK / WORD_STEPS; run++) {
        uint32_t word = 0;
        for (long j = 0; j < WORD_STEPS; j++) {
          const long k = run * WORD_STEPS + j;
          uint32_t number = k < BLOCK / 2 ? in[k] & 15 : in[k - BLOCK / 2] >> 4;
          if (w.quantization == Q4_0) number ^= 8;  // from 0..15 meaning -8..7 to two's complement
          word |= number << (4 * j);
        }
        memcpy(out + run * WORDS_BYTES + lane * 4, &word, 4);
      }
    }
}

}  // namespace segue
