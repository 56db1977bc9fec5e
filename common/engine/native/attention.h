// Attention over the paged cache, for chunks of prompts and for single positions, which have the same bits either way.
#pragma once
#include "attention_few.h"
#include "attention_many.h"

namespace segue {

template <class T, class How>
void attend_with(const Cache& cache, const Attention& a, const Sequence* sequences, long count, int member, const Team& team, AttentionScratch& mine) {
  attend_few<T, How>(cache, a, Units(a, sequences, count, member, team), mine);
  const long group = a.heads / a.kv_heads;
  const long height = QUERY_ROWS / group > 0 ? QUERY_ROWS / group : 1;
  long unit = 0;
  for (long i = 0; i < count; i++) {
    const Sequence& s = sequences[i];
    if (s.count == 1) continue;
    for (long begin = 0; begin < s.count; begin += height)
      for (long head = 0; head < a.kv_heads; head++)
        if (unit++ % team.size() == member) attend_block<T, How>(cache, a, s, head, begin, begin + height < s.count ? begin + height : s.count, mine);
  }
}

// This member's part. No barrier.
inline void attend(const Cache& cache, const Attention& a, const Sequence* sequences, long count, int member, const Team& team, AttentionScratch& mine) {
  if (!cache.bf16)
    attend_with<float, InFloats>(cache, a, sequences, count, member, team, mine);
  else if (a.head_dim % (2 * LANES) == 0)
    attend_with<uint16_t, InPairs>(cache, a, sequences, count, member, team, mine);
  else
    attend_with<uint16_t, InFloats>(cache, a, sequences, count, member, team, mine);
}

}  // namespace segue
