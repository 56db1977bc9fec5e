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

// One KV head's keys `from .. from + count - 1` as panels [4][head_dim][16], its values as panels [head_dim/16][64][16].
template <class T>
void read_tile(const Cache& cache, const Attention& a, const int32_t* table, long head, long from, long count, AttentionScratch& mine) {
  const T* base = (const T*)cache.data;
  const T* rows[TILE_KEYS];
  const long width = a.head_dim;
  for (long i = 0; i < count; i++) {
    const long position = from + i;
    rows[i] = base + cache.at(table[position / cache.block_size], a.layer, head, position % cache.block_size, width);
  }
  for (long i = count; i < (count + LANES - 1) / LANES * LANES; i++) rows[i] = (const T*)mine.nothing;
  for (long panel = 0; panel * LANES < count; panel++)
    for (long d = 0; d < width; d += LANES)
      transpose_tile(rows + panel * LANES, d, mine.keys + (panel * width + d) * LANES);
  for (long i = 0; i < count; i++)
    for (long d = 0; d < width; d += LANES)
      store(mine.values + d * TILE_KEYS + i * LANES, load(rows[i] + cache.value_offset + d));
}

// A row's scores of one tile to weights, its running maximum and total brought forward, its sums rescaled.
inline void soften(const Attention& a, AttentionScratch& mine, long row, long from, int panels, long position) {
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
  Vec total[KEY_PANELS] = {zero(), zero(), zero(), zero()};
  for (int i = 0; i < panels; i++) {
    total[i] = exponential(sub(s[i], same(now)));
    store(scores + i * LANES, total[i]);
  }
  const Vec added = add(add(total[0], total[1]), add(total[2], total[3]));
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

inline void score_and_sum(const Attention& a, AttentionScratch& mine, long first, long last, long position, long group, long from, long count) {
  const long width = a.head_dim;
  const int panels = int((count + LANES - 1) / LANES);
  for (int panel = 0; panel < panels; panel += TILE_PANELS) {
    Tile t{};
    t.x = mine.queries + first * width;
    t.x_stride = width;
    t.w = mine.keys + panel * width * LANES;
    t.panel = width * LANES;
    t.steps = width;
    t.out = mine.scores + first * TILE_KEYS + panel * LANES;
    t.out_stride = TILE_KEYS;
    const int wide = panels - panel < TILE_PANELS ? panels - panel : TILE_PANELS;
    t.columns = wide * LANES;
    compute_group<Float32>(t, last - first, wide);
  }
  for (long row = first; row < last; row++) soften(a, mine, row, from, panels, position + row / group);
  const int value_panels = int(width / LANES);
  for (int panel = 0; panel < value_panels; panel += TILE_PANELS) {
    Tile t{};
    t.x = mine.scores + first * TILE_KEYS;
    t.x_stride = TILE_KEYS;
    t.w = mine.values + panel * LANES * TILE_KEYS;
    t.panel = LANES * TILE_KEYS;
    t.steps = count;
    t.start = t.out = mine.sums + first * width + panel * LANES;
    t.start_stride = t.out_stride = width;
    const int wide = value_panels - panel < TILE_PANELS ? value_panels - panel : TILE_PANELS;
    t.columns = wide * LANES;
    compute_group<Float32>(t, last - first, wide);
  }
}

// Positions `begin .. end - 1` (counted in the sequence's part of the batch) of one KV head.
template <class T>
void attend_block(const Cache& cache, const Attention& a, const Sequence& s, long head, long begin, long end, AttentionScratch& mine) {
  const long group = a.heads / a.kv_heads, width = a.head_dim, rows = (end - begin) * group;
  mine.prepare(width, rows);
  for (long row = 0; row < rows; row++) {
    const long query_head = head * group + row % group;
    const float* q = a.queries + (s.first + begin + row / group) * a.query_stride + query_head * width;
    for (long d = 0; d < width; d += LANES) {
      store(mine.queries + row * width + d, mul(load(q + d), same(a.scale)));
      store(mine.sums + row * width + d, zero());
    }
    float one[LANES] = {1.0f};
    mine.totals[row] = a.sinks ? load(one) : zero();
    mine.largest_yet[row] = a.sinks ? a.sinks[query_head] : -1e30f;
  }
  const long position = s.start + begin, past = s.start + end;
  const long lowest = a.window && position - a.window + 1 > 0 ? position - a.window + 1 : 0;
  for (long from = lowest / TILE_KEYS * TILE_KEYS; from < past; from += TILE_KEYS) {
    const long count = past - from < TILE_KEYS ? past - from : TILE_KEYS;
    const long first = from > position ? from - position : 0;  // earlier queries see nothing of this tile, nor do those
    long last = end - begin;                                   // whose window begins after it
    if (a.window && from + TILE_KEYS - 1 + a.window - position < last) last = from + TILE_KEYS - 1 + a.window - position;
    read_tile<T>(cache, a, s.table, head, from, count, mine);
    score_and_sum(a, mine, first * group, last * group, position, group, from, count);
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
        if (cache.bf16)
          attend_block<uint16_t>(cache, a, sequences[i], head, begin, end, mine);
        else
          attend_block<float>(cache, a, sequences[i], head, begin, end, mine);
      }
}

}  // namespace segue
