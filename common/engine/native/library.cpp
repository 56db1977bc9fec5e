// The C interface. Pointers are raw and sizes are trusted: the Python beside this file checks both.
#include "draw.h"
#include "llama_step.h"

using namespace segue;

struct Engine {
  explicit Engine(int threads) : team(threads), members(size_t(team.size())), draws(size_t(team.size())) {}
  Team team;
  std::vector<Member> members;
  std::vector<DrawScratch> draws;
  Workspace space;
};

namespace {

template <class F>
void on_all(Engine* engine, F work) {
  struct Call {
    Engine* engine;
    F* work;
  } call{engine, &work};
  engine->team.run([](void* given, int member, Team& team) {
    Call* c = static_cast<Call*>(given);
    (*c->work)(member, team, c->engine->members[size_t(member)]);
  }, &call);
}

// Rows of logits, each to be drawn from by one member; a single one is not worth waking the others for.
template <class F>
void on_rows(Engine* engine, long count, F draw) {
  if (count == 1) return draw(0, engine->draws[0]);
  on_all(engine, [&](int member, Team& team, Member&) {
    long first, last;
    team.share(count, 1, member, first, last);
    for (long i = first; i < last; i++) draw(i, engine->draws[size_t(member)]);
  });
}

template <class T>
void pack(const T* weights, Packed* out) {
  T* data = static_cast<T*>(out->data);
  const long inputs = out->inputs, step = out->step_items();
  for (long n = 0; n < out->outputs; n++) {
    T* column = data + out->at(n);
    const long stride = out->stride(n);
    for (long k = 0; k < inputs; k++) column[k / step * stride + k % step] = weights[n * inputs + k];
  }
}

// Memory for a matrix: of `memory` where one is given and has room, else its own.
Packed* with_memory(Packed* packed, size_t bytes, WeightMemory* memory) {
  if (memory != nullptr && (packed->data = memory->take(bytes)) != nullptr) {
    packed->memory = memory;
    memory->acquire();
    return packed;
  }
  packed->data = new_memory(bytes);
  if (packed->data != nullptr) return packed;
  delete packed;
  return nullptr;
}

}  // namespace

extern "C" {

const char* segue_variant() {
#if defined(__AVX512BF16__)
  return "avx512bf16";
#elif defined(__AVX512F__)
  return "avx512";
#else
  return "avx2";
#endif
}

Engine* segue_engine_new(int threads) { return new Engine(threads); }
void segue_engine_free(Engine* engine) { delete engine; }

// Null where there is no address space.
WeightMemory* segue_weight_memory_new(long bytes) { return WeightMemory::reserve(size_t(bytes)); }
void segue_weight_memory_free(WeightMemory* memory) { memory->release(); }

// weights [outputs, inputs], row after row, as float32 or as bf16. Null where there is no memory.
Packed* segue_pack(const void* weights, long outputs, long inputs, int bf16, WeightMemory* memory) {
  Packed* packed = new Packed{outputs, inputs, bf16, nullptr};
  packed = with_memory(packed, size_t(packed->panels() * packed->panel_items()) * (bf16 ? 2 : 4), memory);
  if (packed == nullptr) return nullptr;
  if (bf16)
    pack(static_cast<const uint16_t*>(weights), packed);
  else
    pack(static_cast<const float*>(weights), packed);
  return packed;
}

// weights as GGUF has them: row after row, blocks of `quantization`, `inputs` a multiple of 32. Null where there is no memory.
Packed* segue_pack_blocks(const void* weights, long outputs, long inputs, int quantization, WeightMemory* memory) {
  Packed* packed = new Packed{outputs, inputs, 0, nullptr, quantization};
  packed = with_memory(packed, size_t(packed->panels() * bytes_of_panel(*packed)) + WORDS_BYTES, memory);
  if (packed == nullptr) return nullptr;
  pack_blocks(static_cast<const uint8_t*>(weights), *packed);
  return packed;
}

void segue_packed_free(Packed* packed) {
  if (packed->memory != nullptr)
    packed->memory->release();
  else
    free(packed->data);
  delete packed;
}

void segue_gemm(Engine* engine, const float* x, long x_stride, const Packed* w, float* y, long y_stride, long rows, const float* bias) {
  const Product product{x, x_stride, w, y, y_stride, rows, bias, nullptr, 0};
  on_all(engine, [&](int member, Team& team, Member& mine) { multiply_any(product, member, team, mine.gemm); });
}

void segue_attention(Engine* engine, const Cache* cache, const Attention* attention, const Sequence* sequences, long count) {
  on_all(engine, [&](int member, Team& team, Member& mine) { attend(*cache, *attention, sequences, count, member, team, mine.attention); });
}

void segue_norm(const float* x, const float* weight, float* y, long rows, long size, float epsilon) {
  for (long i = 0; i < rows; i++) normalise(x + i * size, weight, y + i * size, size, epsilon);
}

void segue_rotate(float* heads, const float* cosine, const float* sine, long count, long half) {
  for (long i = 0; i < count; i++) rotate(heads + i * 2 * half, cosine + i * half, sine + i * half, half);
}

void segue_gate(const float* x, float* y, long rows, long size) {
  for (long i = 0; i < rows; i++) gate(x + i * 2 * size, y + i * size, size);
}

void segue_exponential(const float* x, float* y, long count) {
  for (long i = 0; i + LANES <= count; i += LANES) store(y + i, exponential(load(x + i)));
}

// Rows of `logits` lie `stride` floats apart, and are changed.
void segue_draw(Engine* engine, float* logits, long stride, long vocabulary, const DrawRow* const* rows, Draw* drawn, long count) {
  on_rows(engine, count, [&](long i, DrawScratch& mine) { drawn[i] = Drawing(*rows[i], logits + i * stride, vocabulary, mine).run(); });
}

// Log-probabilities of given tokens, one a row, and of the row's best.
void segue_score(Engine* engine, float* logits, long stride, long vocabulary, const int64_t* tokens, long alternatives, Draw* scored, long count) {
  DrawRow asked{};
  asked.alternatives = alternatives;
  on_rows(engine, count, [&](long i, DrawScratch& mine) {
    scored[i] = Drawing(asked, logits + i * stride, vocabulary, mine).score_of(int32_t(tokens[i]));
  });
}

void segue_step(Engine* engine, const Model* model, const Batch* batch) {
  Step step(*model, *batch, engine->space);
  on_all(engine, [&](int member, Team& team, Member& mine) { step.run(member, team, mine); });
}
}
