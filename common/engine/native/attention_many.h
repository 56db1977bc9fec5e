// Attention of many queries: a tile of keys and values is turned once into panels, which all queries of a block then share.
#pragma once
#include "attention_rows.h"

namespace segue {

constexpr long QUERY_ROWS = 96;  // queries of one KV head that share what is read

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
      for (long d = 0; d < width; d += LANES) store(mine.values + d * TILE_KEYS / 2 + i / 2 * LANES, How::neighbours(value + d, other + d));
    } else {
      for (long d = 0; d < width; d += LANES) store(mine.values + d * TILE_KEYS + i * LANES, load(value + d));
    }
  }
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
    t.stride = LANES * per_step;
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
    t.stride = LANES * per_step;
    t.steps = (count + per_step - 1) / per_step;
    t.start = t.out = mine.sums + first * width + panel * LANES;
    t.start_stride = t.out_stride = width;
    const int wide = value_panels - panel < TILE_PANELS ? value_panels - panel : TILE_PANELS;
    t.columns = wide * LANES;
    compute_group<typename How::Kind>(t, last - first, wide);
  }
}

// Positions `begin .. end - 1` (counted in the sequence's part of the batch) of one KV head.
template <class T, class How>
void attend_block(const Cache& cache, const Attention& a, const Sequence& s, long head, long begin, long end, AttentionScratch& mine) {
  const long group = a.heads / a.kv_heads, width = a.head_dim, rows = (end - begin) * group;
  mine.prepare(width, rows);
  for (long row = 0; row < rows; row++) begin_row<How>(a, s.first + begin + row / group, head * group + row % group, row, mine);
  const long position = s.start + begin, past = s.start + end;
  const long start = first_tile(a, position);
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
  for (long row = 0; row < rows; row++) end_row(a, s.first + begin + row / group, head * group + row % group, row, mine);
}

}  // namespace segue
