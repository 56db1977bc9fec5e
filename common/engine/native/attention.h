// Attention over the paged cache, for chunks of prompts and for single positions alike.
//
// Keys are taken in tiles of TILE_KEYS positions whose borders are multiples of TILE_KEYS, first to last, with an online softmax
// (Milakov and Gimelshein; FlashAttention's order of loops). What a query computes in a tile depends on its own position alone:
// keys that it must not see get weight 0 exactly, and a tile of which it sees nothing changes nothing. So a position has the same
// bits whether it came in a chunk of 500 or by itself, and keys and values are read once for all queries of a block.
#pragma once
#include <math.h>

#include "gemm_quantized.h"

namespace segue {

constexpr int TILE_KEYS = 64;
constexpr int KEY_PANELS = TILE_KEYS / LANES;
constexpr long QUERY_ROWS = 96;  // queries of one KV head that share what is read

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
};
#if defined(__AVX512BF16__)
struct InPairs {
  using Kind = DotBf16;
  static constexpr int STEP = 2;
  template <class T>
  using Item = float;  // a pair; it is moved, never computed with
  static void interleave(const uint16_t* even, const uint16_t* odd, float* out) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)even));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)odd));
    _mm512_storeu_si512(out, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
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

// Where one head's keys of a tile lie.
struct Place {
  long head, from, count;
};

// A head's keys of a tile as panels [4][head_dim][16], its values as panels [head_dim/16][64][16]; in pairs,
// [4][head_dim/2][16][2] (of neighbours in a head) and [head_dim/16][32][16][2] (of neighbouring keys).
//
// What lies at `next` is prefetched line by line along the way: blocks are scattered, so no CPU guesses the next one by itself,
// and all of a tile's lines at once would only wait for each other.
template <class T, class How>
void read_tile(const Cache& cache, const Attention& a, const int32_t* table, Place now, Place next, AttentionScratch& mine) {
  const T *rows[TILE_KEYS], *later[TILE_KEYS];
  const long width = a.head_dim;
  each_key<T>(cache, a, table, now.head, now.from, now.count, [&](long i, const T* key) { rows[i] = later[i] = key; });
  each_key<T>(cache, a, table, next.head, next.from, next.count < now.count ? next.count : now.count, [&](long i, const T* key) { later[i] = key; });
  const long whole = (now.count + LANES - 1) / LANES * LANES;
  for (long i = now.count; i < whole; i++) rows[i] = later[i] = (const T*)mine.nothing;
  using Item = typename How::template Item<T>;
  const long items = width * long(sizeof(T)) / long(sizeof(Item));
  for (long panel = 0; panel < whole; panel += LANES)
    for (long d = 0; d < items; d += LANES) {
      UNROLLED for (int i = 0; i < LANES; i++) prefetch((const Item*)later[panel + i] + d);
      transpose_tile((const Item* const*)rows + panel, d, mine.keys + panel * items + d * LANES);
    }
  for (long i = 0; i < now.count; i += How::STEP) {
    for (long d = 0; d < width; d += 64 / long(sizeof(T)))
      for (int k = 0; k < How::STEP; k++) prefetch(later[i + k] + cache.value_offset + d);  // `later` is whole panels long
    const T* value = rows[i] + cache.value_offset;
    if constexpr (How::STEP == 2) {
      const T* other = i + 1 < now.count ? rows[i + 1] + cache.value_offset : (const T*)mine.nothing;
      for (long d = 0; d < width; d += LANES) How::interleave(value + d, other + d, mine.values + d * TILE_KEYS / 2 + i / 2 * LANES);
    } else {
      for (long d = 0; d < width; d += LANES) store(mine.values + d * TILE_KEYS + i * LANES, load(value + d));
    }
  }
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

template <class How>
void score_and_sum(const Attention& a, AttentionScratch& mine, long first, long last, long position, long group, long from, long count) {
  constexpr long per_step = How::STEP;
  const long width = a.head_dim, steps = width / per_step;
  const int panels = int((count + LANES - 1) / LANES);
  for (int panel = 0; panel < panels; panel += TILE_PANELS) {
    Tile t{};
    t.x = mine.queries + first * width;
    t.x_stride = width;
    t.w = mine.keys + panel * steps * LANES;
    t.panel = steps * LANES * per_step;
    t.steps = steps;
    t.out = mine.scores + first * TILE_KEYS + panel * LANES;
    t.out_stride = TILE_KEYS;
    const int wide = panels - panel < TILE_PANELS ? panels - panel : TILE_PANELS;
    t.columns = wide * LANES;
    compute_group<typename How::Kind>(t, last - first, wide);
  }
  for (long row = first; row < last; row++) soften(a, mine, row, from, panels, position + row / group, How::STEP == 2);
  const int value_panels = int(width / LANES);
  for (int panel = 0; panel < value_panels; panel += TILE_PANELS) {
    Tile t{};
    t.x = mine.scores + first * TILE_KEYS;
    t.x_stride = TILE_KEYS;
    t.w = mine.values + panel * LANES * TILE_KEYS / per_step;
    t.panel = LANES * TILE_KEYS;
    t.steps = (count + per_step - 1) / per_step;
    t.start = t.out = mine.sums + first * width + panel * LANES;
    t.start_stride = t.out_stride = width;
    const int wide = value_panels - panel < TILE_PANELS ? value_panels - panel : TILE_PANELS;
    t.columns = wide * LANES;
    compute_group<typename How::Kind>(t, last - first, wide);
  }
}

// The scaled query of each row, and what its online softmax starts from.
template <class How>
void begin_rows(const Attention& a, const Sequence& s, long head, long begin, long rows, AttentionScratch& mine) {
  const long group = a.heads / a.kv_heads, width = a.head_dim;
  for (long row = 0; row < rows; row++) {
    const long query_head = head * group + row % group;
    const float* q = a.queries + (s.first + begin + row / group) * a.query_stride + query_head * width;
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
}

// Positions `begin .. end - 1` (counted in the sequence's part of the batch) of one KV head.
template <class T, class How>
void attend_block(const Cache& cache, const Attention& a, const Sequence& s, long head, long begin, long end, AttentionScratch& mine) {
  const long group = a.heads / a.kv_heads, width = a.head_dim, rows = (end - begin) * group;
  mine.prepare(width, rows);
  begin_rows<How>(a, s, head, begin, rows, mine);
  const long position = s.start + begin, past = s.start + end;
  const long lowest = a.window && position - a.window + 1 > 0 ? position - a.window + 1 : 0, start = lowest / TILE_KEYS * TILE_KEYS;
  const auto place = [&](long from, long of) { return Place{of, from, past - from < TILE_KEYS ? past - from : long(TILE_KEYS)}; };
  for (long from = start; from < past; from += TILE_KEYS) {
    const long first = from > position ? from - position : 0;  // earlier queries see nothing of this tile, nor do those
    long last = end - begin;                                   // whose window begins after it
    if (a.window && from + TILE_KEYS - 1 + a.window - position < last) last = from + TILE_KEYS - 1 + a.window - position;
    const Place now = place(from, head);
    const bool ends = from + TILE_KEYS >= past;
    read_tile<T, How>(cache, a, s.table, now, ends ? place(start, (head + 1) % a.kv_heads) : place(from + TILE_KEYS, head), mine);
    score_and_sum<How>(a, mine, first * group, last * group, position, group, from, now.count);
  }
  for (long row = 0; row < rows; row++) {
    float* out = a.out + (s.first + begin + row / group) * a.out_stride + (head * group + row % group) * width;
    const Vec total = same(sum(mine.totals[row]));
    for (long d = 0; d < width; d += LANES) store(out + d, div(load(mine.sums + row * width + d), total));
  }
}

// This member's part: every so-and-so-many-th block of queries. No barrier.
inline void attend(const Cache& cache, const Attention& a, const Sequence* sequences, long count, int member, const Team& team, AttentionScratch& mine) {
  const long group = a.heads / a.kv_heads;
  const long height = QUERY_ROWS / group > 0 ? QUERY_ROWS / group : 1;
  long unit = 0;
  for (long i = 0; i < count; i++)
    for (long begin = 0; begin < sequences[i].count; begin += height)
      for (long head = 0; head < a.kv_heads; head++) {
        if (unit++ % team.size() != member) continue;
        const long end = begin + height < sequences[i].count ? begin + height : sequences[i].count;
        if (!cache.bf16)
          attend_block<float, InFloats>(cache, a, sequences[i], head, begin, end, mine);
        else if (a.head_dim % (2 * LANES) == 0)
          attend_block<uint16_t, InPairs>(cache, a, sequences[i], head, begin, end, mine);
        else
          attend_block<uint16_t, InFloats>(cache, a, sequences[i], head, begin, end, mine);
      }
}

}  // namespace segue
