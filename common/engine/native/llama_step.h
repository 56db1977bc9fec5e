// One step of a model of the Llama family: all layers in one call. Each thread runs `step` beside the others.
#pragma once
#include "token_rows.h"

namespace segue {

struct Layer {
  const Packed *qkv, *output, *gate_up, *down;
  const float *input_norm, *middle_norm;
  const float *query_norm, *key_norm;                            // of one head's size, or null
  const float *qkv_bias, *output_bias, *gate_up_bias, *down_bias;  // or null
  int32_t window;                                                // 0: none
  int32_t rotary;                                                // 0: this layer knows no positions
};

struct Model {
  int32_t layers, hidden, heads, kv_heads, head_dim, intermediate;
  float epsilon, scale;
  const Layer* layer;
  const float* final_norm;
  const Packed* head;
  const Packed* embedding;  // the same where the two are tied
};

struct Batch {
  int32_t tokens, sequences, kept;
  int32_t cache_bf16, block_size;
  const int32_t* ids;
  const int32_t* positions;
  const int32_t* owners;  // of each token: its sequence
  const Sequence* sequence;
  const int32_t* keep;  // places in the batch whose logits are wanted
  const float *cosine, *sine;  // [positions, head_dim / 2]
  void* cache;
  float* logits;  // [kept, vocabulary]
};

struct Member {
  GemmScratch gemm;
  AttentionScratch attention;
};

// A row's stride, in floats, that keeps rows from falling into the same lines of a cache of the first level.
inline long stride_of(long width) { return (width + LANES - 1) / LANES * LANES + LANES; }

struct Workspace {
  Scratch<float> hidden, normed, qkv, attended, wide, gated;
};

constexpr long FEED_FORWARD_ROWS = 2 * BLOCK_ROWS;

class Step {
 public:
  Step(const Model& model, const Batch& batch, Workspace& space) : m_(model), b_(batch) {
    const size_t tokens = size_t(batch.tokens), rows = tokens < size_t(FEED_FORWARD_ROWS) ? tokens : size_t(FEED_FORWARD_ROWS);
    hs_ = stride_of(m_.hidden);
    qs_ = stride_of((m_.heads + 2L * m_.kv_heads) * m_.head_dim);
    as_ = stride_of(long(m_.heads) * m_.head_dim);
    ws_ = stride_of(2L * m_.intermediate);
    gs_ = stride_of(m_.intermediate);
    hidden_ = space.hidden.at_least(tokens * hs_);
    normed_ = space.normed.at_least(tokens * hs_);
    qkv_ = space.qkv.at_least(tokens * qs_);
    attended_ = space.attended.at_least(tokens * as_);
    wide_ = space.wide.at_least(rows * ws_);
    gated_ = space.gated.at_least(rows * gs_);
    const long head = long(batch.block_size) * m_.head_dim;
    cache_ = {batch.cache, batch.cache_bf16, m_.layers * 2L * m_.kv_heads * head, 2L * m_.kv_heads * head, head, m_.kv_heads * head, batch.block_size};
  }

  void run(int member, Team& team, Member& mine) {
    embed(member, team);
    for (long i = 0; i < m_.layers; i++) {
      attend_layer(i, member, team, mine);
      feed_forward(m_.layer[i], member, team, mine);
    }
    finish(member, team, mine);
  }

 private:
  void embed(int member, const Team& team) {
    const Packed& e = *m_.embedding;
    long first, last;
    team.share(b_.tokens, 1, member, first, last);
    for (long t = first; t < last; t++) {
      const long id = b_.ids[t], from = e.at(id), stride = e.stride(id);
      float* out = hidden_ + t * hs_;
      if (e.quantization) {
        expand_row(e, id, out);
      } else if (e.bf16) {
        const uint16_t* p = (const uint16_t*)e.data + from;
        for (long k = 0; k < m_.hidden; k++) out[k] = from_bf16(p[k / 2 * stride + k % 2]);
      } else {
        const float* p = (const float*)e.data + from;
        for (long k = 0; k < m_.hidden; k++) out[k] = p[k * stride];
      }
    }
  }  // the same member's rows are normalised next: no barrier

  void attend_layer(long index, int member, Team& team, Member& mine) {
    const Layer& layer = m_.layer[index];
    long first, last;
    team.share(b_.tokens, 1, member, first, last);
    if (index > 0) team.barrier();
    for (long t = first; t < last; t++) normalise(hidden_ + t * hs_, layer.input_norm, normed_ + t * hs_, m_.hidden, m_.epsilon);
    team.barrier();
    multiply_any({normed_, hs_, layer.qkv, qkv_, qs_, b_.tokens, layer.qkv_bias, nullptr, 0}, member, team, mine.gemm);
    team.barrier();
    for (long t = first; t < last; t++) place(layer, index, t);
    team.barrier();
    const Attention a{qkv_, qs_, attended_, as_, m_.heads, m_.kv_heads, m_.head_dim, index, m_.scale, 0.0f, layer.window, nullptr};
    attend(cache_, a, b_.sequence, b_.sequences, member, team, mine.attention);
    team.barrier();
    multiply_any({attended_, as_, layer.output, hidden_, hs_, b_.tokens, layer.output_bias, hidden_, hs_}, member, team, mine.gemm);
    team.barrier();
  }

  // A token's heads are normalised and turned; its keys and values go into the cache.
  void place(const Layer& layer, long index, long t) {
    const long width = m_.head_dim, position = b_.positions[t];
    const int32_t block = b_.sequence[b_.owners[t]].table[position / b_.block_size];
    float* row = qkv_ + t * qs_;
    for (long h = 0; h < m_.heads + m_.kv_heads; h++) {
      float* head = row + h * width;
      const float* norm = h < m_.heads ? layer.query_norm : layer.key_norm;
      if (norm) normalise(head, norm, head, width, m_.epsilon);
      if (layer.rotary) rotate(head, b_.cosine + position * (width / 2), b_.sine + position * (width / 2), width / 2);
    }
    for (long h = 0; h < m_.kv_heads; h++) {
      const long at = cache_.at(block, index, h, position % b_.block_size, width);
      write_head(cache_, row + (m_.heads + h) * width, at, width);
      write_head(cache_, row + (m_.heads + m_.kv_heads + h) * width, at + cache_.value_offset, width);
    }
  }

  void feed_forward(const Layer& layer, int member, Team& team, Member& mine) {
    for (long row = 0; row < b_.tokens; row += FEED_FORWARD_ROWS) {
      const long rows = b_.tokens - row < FEED_FORWARD_ROWS ? b_.tokens - row : FEED_FORWARD_ROWS;
      long first, last;
      team.share(rows, 1, member, first, last);
      for (long t = first; t < last; t++)
        normalise(hidden_ + (row + t) * hs_, layer.middle_norm, normed_ + (row + t) * hs_, m_.hidden, m_.epsilon);
      team.barrier();
      multiply_any({normed_ + row * hs_, hs_, layer.gate_up, wide_, ws_, rows, layer.gate_up_bias, nullptr, 0}, member, team, mine.gemm);
      team.barrier();
      for (long t = first; t < last; t++) gate(wide_ + t * ws_, gated_ + t * gs_, m_.intermediate);
      team.barrier();
      float* h = hidden_ + row * hs_;
      multiply_any({gated_, gs_, layer.down, h, hs_, rows, layer.down_bias, h, hs_}, member, team, mine.gemm);
    }
  }

  void finish(int member, Team& team, Member& mine) {
    team.barrier();
    long first, last;
    team.share(b_.kept, 1, member, first, last);
    for (long i = first; i < last; i++) normalise(hidden_ + b_.keep[i] * hs_, m_.final_norm, normed_ + i * hs_, m_.hidden, m_.epsilon);
    team.barrier();
    if (b_.kept > 0) multiply_any({normed_, hs_, m_.head, b_.logits, m_.head->outputs, b_.kept, nullptr, nullptr, 0}, member, team, mine.gemm);
  }

  const Model& m_;
  const Batch& b_;
  long hs_, qs_, as_, ws_, gs_;
  float *hidden_, *normed_, *qkv_, *attended_, *wide_, *gated_;
  Cache cache_;
};

}  // namespace segue
