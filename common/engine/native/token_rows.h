// What is done to one token's row at a time: norms, rotary embedding, the gate, and writing keys and values into the cache.
#pragma once
#include <math.h>

#include "attention.h"

namespace segue {

// y = x / sqrt(mean(x^2) + epsilon) * weight. `y` may be `x`.
inline void normalise(const float* x, const float* weight, float* y, long size, float epsilon) {
  Vec squares[2] = {zero(), zero()};
  long i = 0;
  for (; i + LANES <= size; i += LANES) squares[i / LANES % 2] = fma(load(x + i), load(x + i), squares[i / LANES % 2]);
  if (i < size) {
    const Vec rest = load_first(x + i, int(size - i));
    squares[i / LANES % 2] = fma(rest, rest, squares[i / LANES % 2]);
  }
  const Vec scale = same(1.0f / sqrtf(sum(add(squares[0], squares[1])) / float(size) + epsilon));
  for (i = 0; i + LANES <= size; i += LANES) store(y + i, mul(load(weight + i), mul(load(x + i), scale)));
  if (i < size) {
    const int rest = int(size - i);
    store_first(y + i, mul(load_first(weight + i, rest), mul(load_first(x + i, rest), scale)), rest);
  }
}

// One head turned by its position: halves (a, b) become (a cos - b sin, b cos + a sin).
inline void rotate(float* head, const float* cosine, const float* sine, long half) {
  for (long i = 0; i < half; i += LANES) {
    const int n = half - i < LANES ? int(half - i) : LANES;
    const Vec a = load_upto(head + i, n), b = load_upto(head + half + i, n);
    const Vec c = load_upto(cosine + i, n), s = load_upto(sine + i, n);
    store_upto(head + i, sub(mul(a, c), mul(b, s)), n);
    store_upto(head + half + i, add(mul(b, c), mul(a, s)), n);
  }
}

inline void write_head(const Cache& cache, const float* x, long at, long size) {
  if (!cache.bf16) {
    memcpy((float*)cache.data + at, x, size_t(size) * 4);
    return;
  }
  uint16_t* out = (uint16_t*)cache.data + at;
  for (long i = 0; i < size; i++) out[i] = to_bf16(x[i]);
}

// y = silu(gate) * up, where `x` holds gate and then up. `size` is that of each.
inline void gate(const float* x, float* y, long size) {
  for (long i = 0; i < size; i += LANES) {
    const int n = size - i < LANES ? int(size - i) : LANES;
    const Vec g = load_upto(x + i, n), u = load_upto(x + size + i, n);
    store_upto(y + i, mul(div(g, add(same(1.0f), exponential(sub(zero(), g)))), u), n);
  }
}

}  // namespace segue
