// Attention of single positions: keys are turned in registers and values are used where they lie, so that a step of decoding
// reads the cache at nearly the pace of the memory. Each score and each sum is added up in the order of attention_many.h.
#pragma once
#include "attention_rows.h"

namespace segue {

#if defined(__AVX512F__)
constexpr int MOST_FEW = 8;  // rows of one KV head that are computed at once
#else
constexpr int MOST_FEW = 3;
#endif
constexpr long PIECE = 1024;     // bytes that are prefetched in one go
constexpr int LEAD_PIECES = 96;  // how far ahead of the computation

// Some neighbouring KV heads of one sequence: what is attended to in one go.
struct Unit {
  const Sequence* sequence;
  long head, last_head;
};

// The units of one member, in order. Where there are few sequences, each head is a unit, so that all members have some.
class Units {
 public:
  Units(const Attention& a, const Sequence* sequences, long count, int member, const Team& team)
      : sequences_(sequences), count_(count), kv_heads_(a.kv_heads), member_(member), members_(team.size()) {
    parts_ = members_ > 1 && count < 2 * members_ ? kv_heads_ : 1;
  }

  bool next(Unit& unit) {
    for (; at_ < count_ * parts_; at_++) {
      const Sequence* s = sequences_ + at_ / parts_;
      if (s->count != 1 || at_ % members_ != member_) continue;
      const long heads = kv_heads_ / parts_, first = at_ % parts_ * heads;
      unit = {s, first, first + heads};
      at_++;
      return true;
    }
    return false;
  }

 private:
  const Sequence* sequences_;
  long count_, kv_heads_, parts_, member_, members_, at_ = 0;
};

// Names what the units will read, in the order in which it lies in memory. Blocks are scattered, so no CPU guesses the next one by
// itself; so it is prefetched, a few lines at a time, and into the second level's cache, for the first level's has room for few
// requests at once.
class Ahead {
 public:
  Ahead(const Cache& cache, const Attention& a, Units units) : cache_(cache), a_(a), units_(units) { more_ = next_unit(); }

  // Where the next PIECE begins; the last one again where there is none.
  const char* next_piece() {
    const char* piece = from_;
    from_ += more_ ? PIECE : 0;
    if (more_ && from_ >= to_) more_ = next_run();
    return piece;
  }

 private:
  bool next_unit() {
    if (!units_.next(unit_)) return false;
    position_ = first_tile(a_, unit_.sequence->start) - cache_.block_size;
    position_ = position_ / cache_.block_size * cache_.block_size;
    values_ = true;
    return next_run();
  }

  // The keys of the unit's heads in one block are one run, and so are their values.
  bool next_run() {
    values_ = !values_;
    if (!values_) position_ += cache_.block_size;
    if (position_ > unit_.sequence->start) return next_unit();
    const long item = cache_.bf16 ? 2 : 4;
    const int32_t block = unit_.sequence->table[position_ / cache_.block_size];
    const long at = cache_.at(block, a_.layer, unit_.head, 0, a_.head_dim) + (values_ ? cache_.value_offset : 0);
    from_ = (const char*)cache_.data + at * item;
    to_ = from_ + (unit_.last_head - unit_.head) * cache_.head_stride * item;
    return true;
  }

  const Cache& cache_;
  const Attention& a_;
  Units units_;
  Unit unit_{};
  const char *from_ = nullptr, *to_ = nullptr;
  long position_ = 0;
  bool values_ = false, more_ = false;
};

inline void prefetch_lines(const char* from, int lines) {
  UNROLLED for (int i = 0; i < lines; i++) prefetch_far(from + i * 64);
}

// Where the keys of a tile lie, and 16 rows of nothing behind them up to a whole panel.
template <class T>
struct KeyRows {
  const T* row[TILE_KEYS];
  long count;

  KeyRows(const Cache& cache, const Attention& a, const int32_t* table, long head, long from, long keys, const float* nothing) : count(keys) {
    each_key<T>(cache, a, table, head, from, keys, [&](long i, const T* key) { row[i] = key; });
    for (long i = keys; i % LANES; i++) row[i] = (const T*)nothing;
  }
};

// The scores of R rows with the tile's keys, from the first element of a head to its last.
template <class T, class How, int R>
inline void score_few(const Attention& a, AttentionScratch& mine, const KeyRows<T>& keys, long row, Ahead& ahead) {
  using Item = typename How::template Item<T>;
  const long items = a.head_dim * long(sizeof(T)) / long(sizeof(Item));
  const float* q = mine.queries + row * a.head_dim;
  for (long panel = 0; panel < keys.count; panel += LANES) {
    Vec sums[R];
    UNROLLED for (int r = 0; r < R; r++) sums[r] = zero();
    for (long d = 0; d < items; d += LANES) {
      prefetch_lines(ahead.next_piece(), LANES);
      Vec columns[LANES];
      transpose_sixteen((const Item* const*)keys.row + panel, d, columns);
      UNROLLED for (int i = 0; i < LANES; i++)
        UNROLLED for (int r = 0; r < R; r++) sums[r] = How::multiplied(q + r * a.head_dim + d + i, columns[i], sums[r]);
    }
    UNROLLED for (int r = 0; r < R; r++) store(mine.scores + (row + r) * TILE_KEYS + panel, sums[r]);
  }
}

// The weighted values of C panels of a head, from the tile's first key to its last, on top of what the rows have.
template <class T, class How, int R, int C>
inline void sum_few(const Attention& a, AttentionScratch& mine, const KeyRows<T>& keys, long offset, long row, long d, Ahead& ahead) {
  const float* weights = mine.scores + row * TILE_KEYS;
  float* out = mine.sums + row * a.head_dim + d;
  constexpr int STEPS = PIECE / (C * 64);  // in which a piece is prefetched; a step reads as much
  const char* pieces[TILE_KEYS / How::STEP / STEPS];
  for (long i = 0; i < keys.count; i += How::STEP * STEPS) pieces[i / How::STEP / STEPS] = ahead.next_piece();
  Vec sums[R][C];
  UNROLLED for (int r = 0; r < R; r++) UNROLLED for (int c = 0; c < C; c++) sums[r][c] = load(out + r * a.head_dim + c * LANES);
  for (long i = 0; i < keys.count; i += How::STEP) {
    const long step = i / How::STEP;
    prefetch_lines(pieces[step / STEPS] + step % STEPS * (C * 64), C);
    const T* value = keys.row[i] + offset + d;
    const T* other = How::STEP == 1 ? value : i + 1 < keys.count ? keys.row[i + 1] + offset + d : (const T*)mine.nothing;
    UNROLLED for (int c = 0; c < C; c++) {
      const Vec column = How::neighbours(value + c * LANES, other + c * LANES);
      UNROLLED for (int r = 0; r < R; r++) sums[r][c] = How::multiplied(weights + r * TILE_KEYS + step, column, sums[r][c]);
    }
  }
  UNROLLED for (int r = 0; r < R; r++) UNROLLED for (int c = 0; c < C; c++) store(out + r * a.head_dim + c * LANES, sums[r][c]);
}

template <class T, class How, int R>
void attend_rows(const Attention& a, AttentionScratch& mine, const KeyRows<T>& keys, long offset, long row, long from, long position, Ahead& ahead) {
  score_few<T, How, R>(a, mine, keys, row, ahead);
  const int panels = int((keys.count + LANES - 1) / LANES);
  for (int r = 0; r < R; r++) soften(a, mine, row + r, from, panels, position, How::STEP == 2);
  constexpr int WIDE = MOST_FEW == 3 ? 1 : R > 4 ? 2 : 4;
  long d = 0;
  for (; d + WIDE * LANES <= a.head_dim; d += WIDE * LANES) sum_few<T, How, R, WIDE>(a, mine, keys, offset, row, d, ahead);
  for (; d < a.head_dim; d += LANES) sum_few<T, How, R, 1>(a, mine, keys, offset, row, d, ahead);
}

template <class T, class How>
inline void attend_some(long rows, const Attention& a, AttentionScratch& mine, const KeyRows<T>& keys, long offset, long row, long from, long position, Ahead& ahead) {
  switch (rows) {
    case 1: return attend_rows<T, How, 1>(a, mine, keys, offset, row, from, position, ahead);
    case 2: return attend_rows<T, How, 2>(a, mine, keys, offset, row, from, position, ahead);
    case 3: return attend_rows<T, How, 3>(a, mine, keys, offset, row, from, position, ahead);
#if defined(__AVX512F__)
    case 4: return attend_rows<T, How, 4>(a, mine, keys, offset, row, from, position, ahead);
    case 5: return attend_rows<T, How, 5>(a, mine, keys, offset, row, from, position, ahead);
    case 6: return attend_rows<T, How, 6>(a, mine, keys, offset, row, from, position, ahead);
    case 7: return attend_rows<T, How, 7>(a, mine, keys, offset, row, from, position, ahead);
    case 8: return attend_rows<T, How, 8>(a, mine, keys, offset, row, from, position, ahead);
#endif
  }
}

// Tile by tile, the heads beside each other: a block's heads lie beside each other too.
template <class T, class How>
void attend_unit(const Cache& cache, const Attention& a, const Unit& unit, AttentionScratch& mine, Ahead& ahead) {
  const Sequence& s = *unit.sequence;
  const long group = a.heads / a.kv_heads, first = unit.head * group, rows = unit.last_head * group - first, past = s.start + 1;
  mine.prepare(a.head_dim, rows);
  for (long row = 0; row < rows; row++) begin_row<How>(a, s.first, first + row, row, mine);
  for (long from = first_tile(a, s.start); from < past; from += TILE_KEYS)
    for (long head = unit.head; head < unit.last_head; head++) {
      const KeyRows<T> keys(cache, a, s.table, head, from, past - from < TILE_KEYS ? past - from : long(TILE_KEYS), mine.nothing);
      const long begin = (head - unit.head) * group;
      for (long row = 0; row < group; row += MOST_FEW)
        attend_some<T, How>(group - row < MOST_FEW ? group - row : long(MOST_FEW), a, mine, keys, cache.value_offset, begin + row, from, s.start, ahead);
    }
  for (long row = 0; row < rows; row++) end_row(a, s.first, first + row, row, mine);
}

template <class T, class How>
void attend_few(const Cache& cache, const Attention& a, Units units, AttentionScratch& mine) {
  Ahead ahead(cache, a, units);
  for (int i = 0; i < LEAD_PIECES; i++) prefetch_lines(ahead.next_piece(), PIECE / 64);
  for (Unit unit; units.next(unit);) attend_unit<T, How>(cache, a, unit, mine, ahead);
}

}  // namespace segue
