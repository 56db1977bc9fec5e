// What attention does to a row, which is one query of one head: it begins, each tile of keys brings it forward, it ends.
//
// Keys are taken in tiles of TILE_KEYS positions whose borders are multiples of TILE_KEYS, first to last, with an online softmax
// (Milakov and Gimelshein; FlashAttention's order of loops). What a query computes in a tile depends on its own position alone:
// keys that it must not see get weight 0 exactly, and a tile of which it sees nothing changes nothing. So a position has the same
// bits whether it came in a chunk of 500 (attention_many.h) or by itself (attention_few.h).
#pragma once
#include <math.h>

#include "gemm_quantized.h"

namespace segue {

constexpr int TILE_KEYS = 64;
constexpr int KEY_PANELS = TILE_KEYS / LANES;

// One layer's cache and settings, `[blocks, layers, 2, kv_heads, block_size, head_dim]`. Strides are in items.
struct Cache {
  void* data;
  int bf16;
  long block_stride, layer_stride, head_stride, value_offset;
  long block_size;

  long at(long block, long layer, long head, long offset, long head_dim) const {
    return block * block_stride + layer * layer_stride + head * head_stride + offset * head_dim;
  }
};

struct Attention {
  const float* queries;  // [tokens, heads, head_dim] with a stride between tokens
  long query_stride;
  float* out;
  long out_stride;
  long heads, kv_heads, head_dim;
  long layer;
  float scale;
  float softcap;  // 0: none
  long window;    // 0: none; else a query sees this many positions, its own included
  const float* sinks;  // one logit a head, or null
};

// Positions `start .. start + count - 1` of one sequence, at `first` of the batch; `table` lists its blocks from position 0 on.
struct Sequence {
  long first, start, count;
  const int32_t* table;
};

// How scores and sums are computed: in float32, or from pairs of bf16 where the CPU multiplies those.
struct InFloats {
  using Kind = Float32;
  static constexpr int STEP = 1;  // neighbours that one step of a product takes
  template <class T>
  using Item = T;  // of which a key's row is read
  static Vec multiplied(const float* x, Vec column, Vec sum) { return fma(same(*x), column, sum); }
  template <class T>
  static Vec neighbours(const T* value, const T*) {
    return load(value);
  }
};
#if defined(__AVX512BF16__)
struct InPairs {
  using Kind = DotBf16;
  static constexpr int STEP = 2;
  template <class T>
  using Item = float;  // a pair; it is moved, never computed with
  static Vec multiplied(const float* x, Vec column, Vec sum) {
    int pair;
    memcpy(&pair, x, 4);
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)column.v)};
  }
  static Vec neighbours(const uint16_t* even, const uint16_t* odd) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)even));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)odd));
    return {_mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)))};
  }
};
#else
using InPairs = InFloats;
#endif

struct AttentionScratch {
  Scratch<float> memory;
  float *keys, *values, *queries, *scores, *sums, *nothing;
  Vec* totals;
  float* largest_yet;

  void prepare(long head_dim, long rows) {
    const long tile = TILE_KEYS * head_dim;
    float* p = memory.at_least(size_t(2 * tile + rows * (2 * head_dim + TILE_KEYS + LANES + LANES) + head_dim));
    keys = p;
    values = keys + tile;
    queries = values + tile;
    scores = queries + rows * head_dim;
    sums = scores + rows * TILE_KEYS;
    totals = (Vec*)(sums + rows * head_dim);
    largest_yet = sums + rows * head_dim + rows * LANES;
    nothing = largest_yet + rows * LANES;
    memset(nothing, 0, size_t(head_dim) * 4);
  }
};

// Calls `each(place, address)` for the keys of one head at positions `from .. from + count - 1`.
template <class T, class Each>
inline void each_key(const Cache& cache, const Attention& a, const int32_t* table, long head, long from, long count, Each each) {
  long block = from / cache.block_size, offset = from % cache.block_size;
  for (long i = 0; i < count; block++, offset = 0) {
    const T* key = (const T*)cache.data + cache.at(table[block], a.layer, head, offset, a.head_dim);
    for (; offset < cache.block_size && i < count; offset++, i++, key += a.head_dim) each(i, key);
  }
}

// Where the tiles of a query at `position` begin.
inline long first_tile(const Attention& a, long position) {
  const long lowest = a.window && position - a.window + 1 > 0 ? position - a.window + 1 : 0;
  return lowest / TILE_KEYS * TILE_KEYS;
}

// The scaled query of a row, and what its online softmax starts from.
template <class How>
void begin_row(const Attention& a, long token, long query_head, long row, AttentionScratch& mine) {
  const long width = a.head_dim;
  const float* q = a.queries + token * a.query_stride + query_head * width;
  float* out = mine.queries + row * width;
  for (long d = 0; d < width; d += LANES) {
    store(out + d, mul(load(q + d), same(a.scale)));
    store(mine.sums + row * width + d, zero());
  }
  if (How::STEP == 2) to_pairs(out, width, (uint32_t*)out);  // in place: each pair lies at or before what it is made of
  const float one[LANES] = {1.0f};
  mine.totals[row] = a.sinks ? load(one) : zero();
  mine.largest_yet[row] = a.sinks ? a.sinks[query_head] : -1e30f;
}

inline void store_weights(float* scores, const Vec* weights, int panels, bool pairs) {
#if defined(__AVX512BF16__)
  if (pairs) {
    for (int i = 0; i < panels; i += 2)
      _mm512_storeu_si512(scores + i / 2 * LANES, (__m512i)_mm512_cvtne2ps_pbh(weights[i + 1].v, weights[i].v));
    return;
  }
#endif
  (void)pairs;
  for (int i = 0; i < panels; i++) store(scores + i * LANES, weights[i]);
}

// A row's scores of one tile to weights, its running maximum and total brought forward, its sums rescaled.
inline void soften(const Attention& a, AttentionScratch& mine, long row, long from, int panels, long position, bool pairs) {
  float* scores = mine.scores + row * TILE_KEYS;
  const long lowest = a.window && position - a.window + 1 > 0 ? position - a.window + 1 : 0;
  const bool edge = from < lowest || from + panels * LANES - 1 > position;
  alignas(64) static constexpr float COUNT[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  Vec s[KEY_PANELS], top = same(mine.largest_yet[row]);
  for (int i = 0; i < panels; i++) {
    s[i] = load(scores + i * LANES);
    if (a.softcap != 0) {  // tanh(x) = 1 - 2 / (e^2x + 1)
      Vec twice = exponential(mul(s[i], same(2.0f / a.softcap)));
      s[i] = mul(same(a.softcap), sub(same(1.0f), div(same(2.0f), add(twice, same(1.0f)))));
    }
    if (edge) {
      const float offset = float(from + i * LANES - position);  // small where it decides
      const Vec distance = add(load(COUNT), same(offset));
      s[i] = where_within(distance, float(lowest - position), 0.0f, s[i], same(-INFINITY));
    }
    top = max(top, s[i]);
  }
  const float now = largest(top), before = mine.largest_yet[row];
  Vec weights[KEY_PANELS] = {zero(), zero(), zero(), zero()};
  for (int i = 0; i < panels; i++) weights[i] = exponential(sub(s[i], same(now)));
  store_weights(scores, weights, panels, pairs);
  const Vec added = add(add(weights[0], weights[1]), add(weights[2], weights[3]));
  if (now == before) {
    mine.totals[row] = add(mine.totals[row], added);
    return;
  }
  const Vec shrink = exponential(same(before - now));
  mine.totals[row] = fma(mine.totals[row], shrink, added);
  float* sums = mine.sums + row * a.head_dim;
  for (long d = 0; d < a.head_dim; d += LANES) store(sums + d, mul(load(sums + d), shrink));
  mine.largest_yet[row] = now;
}

// What a row has become, divided by its total.
inline void end_row(const Attention& a, long token, long query_head, long row, AttentionScratch& mine) {
  float* out = a.out + token * a.out_stride + query_head * a.head_dim;
  const Vec total = same(sum(mine.totals[row]));
  for (long d = 0; d < a.head_dim; d += LANES) store(out + d, div(load(mine.sums + row * a.head_dim + d), total));
}

}  // namespace segue
