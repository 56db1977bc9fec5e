// y[M, N] = x[M, K] * W[N, K]^T (+ bias) (+ residual), W packed once at load, x and y float32.
//
// Each element of y is one running sum over k = 0, 1, 2, ... (bf16 with dot-product instructions: over pairs of k), whatever M
// is, wherever its row lies, and however many threads there are. That makes every result of a model independent of its batch.
//
// W lies in panels of sixteen output columns, of which TILE_PANELS are laid side by side, step by step of k: float32
// [groups][K][panels of the group][16], bf16 [groups][K/2][panels][16][2] (K even). So a product reads W as one run, in which
// the CPU's own prefetching reaches all of the bandwidth; three runs beside each other, or prefetching by hand, reach 70 to 90 %.
#pragma once
#include "scratch.h"
#include "team.h"
#include "vectors.h"
#include "weight_memory.h"

namespace segue {

#if defined(__AVX512F__)
constexpr int TILE_ROWS = 8, TILE_PANELS = 3;
#else
constexpr int TILE_ROWS = 3, TILE_PANELS = 2;
#endif
#if defined(__AVX512BF16__)
constexpr bool DOT_BF16 = true;
#else
constexpr bool DOT_BF16 = false;
#endif
constexpr long BLOCK_ROWS = 96;
constexpr long BLOCK_STEPS = 1536;  // of k, or of pairs of k

struct Packed {
  long outputs, inputs;
  int bf16;
  void* data;
  int quantization = 0;            // see gemm_quantized.h
  WeightMemory* memory = nullptr;  // of which `data` is a part, or null

  long panels() const { return (outputs + LANES - 1) / LANES; }
  long panel_items() const { return inputs * LANES; }
  long group_panels(long first) const { return panels() - first < TILE_PANELS ? panels() - first : TILE_PANELS; }

  // Of weights that are not quantised: where an output's first step is, and how far one step is from the next. In items.
  long step_items() const { return bf16 ? 2 : 1; }
  long at(long output) const {
    const long panel = output / LANES, group = panel / TILE_PANELS * TILE_PANELS;
    return group * panel_items() + ((panel - group) * LANES + output % LANES) * step_items();
  }
  long stride(long output) const { return group_panels(output / LANES / TILE_PANELS * TILE_PANELS) * LANES * step_items(); }
};

// One rectangle of rows x panels. `start` holds partial sums to go on from, or is null. Strides are in items: `panel` from a
// panel of W to the next, `stride` from a step of k to the next.
struct Tile {
  const void* x;
  long x_stride;
  const void* w;
  long panel, stride;
  long steps;
  const float* start;
  long start_stride;
  float* out;
  long out_stride;
  const float* bias;
  const float* residual;
  long residual_stride;
  long columns;
};

struct Float32 {
  using X = float;
  using W = float;
  static constexpr int STEP = LANES;
  template <int MR, int NR>
  static inline void accumulate(Vec (&acc)[MR][NR], const float* x, long xs, const float* w, long panel, long stride, long steps) {
    for (long k = 0; k < steps; k++, w += stride) {
      Vec row[MR];
      UNROLLED for (int m = 0; m < MR; m++) row[m] = same(x[m * xs + k]);
      UNROLLED for (int n = 0; n < NR; n++) {
        Vec column = load(w + n * panel);
        UNROLLED for (int m = 0; m < MR; m++) acc[m][n] = fma(row[m], column, acc[m][n]);
      }
    }
  }
};

struct WidenedBf16 {  // bf16 weights for CPUs without bf16 arithmetic: widened in registers, float32 activations
  using X = float;
  using W = uint16_t;
  static constexpr int STEP = 2 * LANES;
  template <int MR, int NR>
  static inline void accumulate(Vec (&acc)[MR][NR], const float* x, long xs, const uint16_t* w, long panel, long stride, long steps) {
    for (long k = 0; k < steps; k++, w += stride) {
      UNROLLED for (int n = 0; n < NR; n++) {
        const uint16_t* p = w + n * panel;
        Vec even = even_of_pairs(p);
        UNROLLED for (int m = 0; m < MR; m++) acc[m][n] = fma(same(x[m * xs + 2 * k]), even, acc[m][n]);
        Vec odd = odd_of_pairs(p);
        UNROLLED for (int m = 0; m < MR; m++) acc[m][n] = fma(same(x[m * xs + 2 * k + 1]), odd, acc[m][n]);
      }
    }
  }
};

#if defined(__AVX512BF16__)
struct DotBf16 {
  using X = uint32_t;  // a pair of bf16
  using W = uint16_t;
  static constexpr int STEP = 2 * LANES;
  template <int MR, int NR>
  static inline void accumulate(Vec (&acc)[MR][NR], const uint32_t* x, long xs, const uint16_t* w, long panel, long stride, long steps) {
    for (long k = 0; k < steps; k++, w += stride) {
      __m512i row[MR];
      UNROLLED for (int m = 0; m < MR; m++) row[m] = _mm512_set1_epi32(int(x[m * xs + k]));
      UNROLLED for (int n = 0; n < NR; n++) {
        __m512i column = _mm512_loadu_si512(w + n * panel);
        UNROLLED for (int m = 0; m < MR; m++) acc[m][n].v = _mm512_dpbf16_ps(acc[m][n].v, (__m512bh)row[m], (__m512bh)column);
      }
    }
  }
};
using Bf16 = DotBf16;
#else
using Bf16 = WidenedBf16;
#endif

template <class Kind, int MR, int NR>
void compute_tile(const Tile& t) {
  Vec acc[MR][NR];
  UNROLLED for (int m = 0; m < MR; m++) UNROLLED for (int n = 0; n < NR; n++)
      acc[m][n] = t.start ? load(t.start + m * t.start_stride + n * LANES) : zero();
  Kind::accumulate(acc, (const typename Kind::X*)t.x, t.x_stride, (const typename Kind::W*)t.w, t.panel, t.stride, t.steps);
  UNROLLED for (int m = 0; m < MR; m++) UNROLLED for (int n = 0; n < NR; n++) {
    const long from = n * LANES;
    const int width = t.columns - from >= LANES ? LANES : int(t.columns - from);
    Vec value = acc[m][n];
    if (width == LANES) {
      if (t.bias) value = add(value, load(t.bias + from));
      if (t.residual) value = add(value, load(t.residual + m * t.residual_stride + from));
      store(t.out + m * t.out_stride + from, value);
    } else {
      if (t.bias) value = add(value, load_first(t.bias + from, width));
      if (t.residual) value = add(value, load_first(t.residual + m * t.residual_stride + from, width));
      store_first(t.out + m * t.out_stride + from, value, width);
    }
  }
}

template <class Kind, int NR>
inline void compute_rows(const Tile& t, int rows) {
  switch (rows) {
    case 1: return compute_tile<Kind, 1, NR>(t);
    case 2: return compute_tile<Kind, 2, NR>(t);
    case 3: return compute_tile<Kind, 3, NR>(t);
#if defined(__AVX512F__)
    case 4: return compute_tile<Kind, 4, NR>(t);
    case 5: return compute_tile<Kind, 5, NR>(t);
    case 6: return compute_tile<Kind, 6, NR>(t);
    case 7: return compute_tile<Kind, 7, NR>(t);
    case 8: return compute_tile<Kind, 8, NR>(t);
#endif
  }
}

template <class Kind>
inline void compute(const Tile& t, int rows, int panels) {
  switch (panels) {
    case 1: return compute_rows<Kind, 1>(t, rows);
    case 2: return compute_rows<Kind, 2>(t, rows);
#if defined(__AVX512F__)
    case 3: return compute_rows<Kind, 3>(t, rows);
#endif
  }
}

// All rows of a group of panels, in tiles of nearly equal height.
template <class Kind>
inline void compute_group(Tile t, long rows, int panels) {
  const long tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
  for (long i = 0, done = 0; i < tiles; i++) {
    const long height = rows * (i + 1) / tiles - done;
    compute<Kind>(t, int(height), panels);
    t.x = (const typename Kind::X*)t.x + height * t.x_stride;
    if (t.start) t.start += height * t.start_stride;
    t.out += height * t.out_stride;
    if (t.residual) t.residual += height * t.residual_stride;
    done += height;
  }
}

// What one thread needs for itself.
struct GemmScratch {
  Scratch<uint32_t> pairs;
  Scratch<float> partial, expanded;
};

inline void to_pairs(const float* x, long count, uint32_t* out) {  // an even count
  long i = 0;
#if defined(__AVX512BF16__)
  for (; i + 32 <= count; i += 32)
    _mm512_storeu_si512(out + i / 2, (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + i + 16), _mm512_loadu_ps(x + i)));
#endif
  for (; i < count; i += 2) out[i / 2] = uint32_t(to_bf16(x[i + 1])) << 16 | to_bf16(x[i]);
}

struct Product {
  const float* x;
  long x_stride;
  const Packed* w;
  float* y;
  long y_stride;
  long rows;
  const float* bias;
  const float* residual;  // may be y itself
  long residual_stride;
};

template <class Kind>
void multiply_block(const Product& p, const typename Kind::X* x, long x_stride, long row, long rows, long first, long last, GemmScratch& mine) {
  const Packed& w = *p.w;
  const long steps = Kind::STEP == LANES ? w.inputs : w.inputs / 2;
  const long most = BLOCK_STEPS;
  const long x_per_step = !DOT_BF16 && Kind::STEP == 2 * LANES ? 2 : 1;
  float* partial = steps > most ? mine.partial.at_least(BLOCK_ROWS * TILE_PANELS * LANES) : nullptr;
  for (long panel = first; panel < last; panel += TILE_PANELS) {
    const int panels = int(last - panel < TILE_PANELS ? last - panel : TILE_PANELS);
    const long column = panel * LANES;
    for (long k = 0; k < steps; k += most) {
      const bool ends = k + most >= steps;
      Tile t{};
      t.x = x + k * x_per_step;
      t.x_stride = x_stride;
      t.panel = Kind::STEP;
      t.stride = panels * Kind::STEP;
      t.w = (const typename Kind::W*)w.data + panel * w.panel_items() + k * t.stride;
      t.steps = ends ? steps - k : most;
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
      compute_group<Kind>(t, rows, panels);
    }
  }
}

// This member's columns of the product. No barrier: the caller knows who reads y next.
inline void multiply(const Product& p, int member, const Team& team, GemmScratch& mine) {
  long first, last;
  team.share(p.w->panels(), TILE_PANELS, member, first, last);
  if (first == last) return;
  for (long row = 0; row < p.rows; row += BLOCK_ROWS) {
    const long rows = p.rows - row < BLOCK_ROWS ? p.rows - row : BLOCK_ROWS;
    const float* x = p.x + row * p.x_stride;
    if (!p.w->bf16) {
      multiply_block<Float32>(p, x, p.x_stride, row, rows, first, last, mine);
      continue;
    }
    const long inputs = p.w->inputs;
    if (DOT_BF16) {
      const long stride = inputs / 2 + LANES;
      uint32_t* pairs = mine.pairs.at_least(size_t(BLOCK_ROWS * stride));
      for (long m = 0; m < rows; m++) to_pairs(x + m * p.x_stride, inputs, pairs + m * stride);
      multiply_block<Bf16>(p, (const Bf16::X*)pairs, stride, row, rows, first, last, mine);
    } else {
      multiply_block<Bf16>(p, (const Bf16::X*)x, p.x_stride, row, rows, first, last, mine);
    }
  }
}

}  // namespace segue
