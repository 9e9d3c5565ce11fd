// One new token per sequence through a LLaMA: norms, rotations, attention and the gated MLP of each block around the
// products of kernel.cpp, with which it is compiled, then the last norm and the head. Values are rounded where they
// leave a function, and where a product takes them; in between they are float32.
#include "kernel.h"

#include <cmath>
#include <vector>

namespace {

struct Block {  // as kernel.py's BlockStruct
  const Matrix *qkv, *o, *gate_up, *down;
  const uint16_t *before, *after;  // weights of the two norms, [width]
  double before_eps, after_eps, scale;      // of the norms, and of the attention's scores
  int64_t width, heads, keys, size, inner;  // heads of queries, heads of keys, numbers of a head, of the MLP
};
struct Decoder {  // as kernel.py's DecoderStruct
  const Block* blocks;
  const Matrix* embedding;  // [tokens of the vocabulary, width]
  const uint16_t* norm;  // [width]
  const Matrix* head;    // null: the hidden states that leave the last block are the result
  double eps;
  int64_t count, width, half;  // blocks; 1: float16, 0: bfloat16
};

inline float exponential(float x) {  // to 2e-7, in operations that the compiler turns into vectors
  x = x < -87.f ? -87.f : x > 88.f ? 88.f : x;
  const float n = std::floor(x * 1.44269504f + 0.5f);
  x = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts
  float p = 1.9875691500e-4f;
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) p = p * x + c;
  const uint32_t bits = uint32_t(int32_t(n) + 127) << 23;
  float power;
  memcpy(&power, &bits, 4);
  return (p * x * x + x + 1.f) * power;
}

template <bool HALF>
void norm(const uint16_t* x, const uint16_t* weight, double eps, int64_t width, uint16_t* y) {
  float squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < width; i++) squares += to_float<HALF>(x[i]) * to_float<HALF>(x[i]);
  const float scale = 1.f / std::sqrt(squares / float(width) + float(eps));
  for (int64_t i = 0; i < width; i++) y[i] = from_float<HALF>(to_float<HALF>(x[i]) * scale * to_float<HALF>(weight[i]));
}

// Half rotations of each head: (a, b) becomes (a cos - b sin, b cos + a sin). y's heads are `apart` numbers.
template <bool HALF>
void rotate(const float* x, const uint16_t* cos, const uint16_t* sin, int64_t heads, int64_t size, uint16_t* y,
            int64_t apart) {
  const int64_t half = size / 2;
  for (int64_t h = 0; h < heads; h++, x += size, y += apart)
    for (int64_t i = 0; i < half; i++) {
      const float a = x[i], b = x[i + half];
      y[i] = from_float<HALF>(a * to_float<HALF>(cos[i]) - b * to_float<HALF>(sin[i]));
      y[i + half] = from_float<HALF>(b * to_float<HALF>(cos[i + half]) + a * to_float<HALF>(sin[i + half]));
    }
}

template <typename T>
T* room(std::vector<T>& buffer, int64_t count) {
  if (int64_t(buffer.size()) < count) buffer.resize(count);
  return buffer.data();
}

template <bool HALF>
void enter(const Block& b, const uint16_t* x, const uint16_t* cos, const uint16_t* sin, const int64_t* turns,
           int tokens, uint16_t* q, uint16_t* k, uint16_t* v, int64_t apart, int threads) {
  static thread_local std::vector<uint16_t> normed;
  static thread_local std::vector<float> products;
  const int64_t queries = b.heads * b.size, keys = b.keys * b.size;
  uint16_t* n = room(normed, tokens * b.width);
  float* y = room(products, tokens * (queries + 2 * keys));
  for (int t = 0; t < tokens; t++) norm<HALF>(x + t * b.width, b.before, b.before_eps, b.width, n + t * b.width);
  float* const parts[] = {y, y + tokens * queries, y + tokens * (queries + keys)};
  multiply(b.qkv, 3, n, tokens, (void* const*)parts, 1, threads);
  for (int t = 0; t < tokens; t++) {
    const uint16_t *c = cos + turns[t] * b.size, *s = sin + turns[t] * b.size;
    rotate<HALF>(parts[0] + t * queries, c, s, b.heads, b.size, q + t * queries, b.size);
    rotate<HALF>(parts[1] + t * keys, c, s, b.keys, b.size, k + t * b.keys * apart, apart);
  }
  for (int64_t head = 0; head < tokens * b.keys; head++)
    for (int64_t i = 0; i < b.size; i++) v[head * apart + i] = from_float<HALF>(parts[2][head * b.size + i]);
}

// Attention of one token per sequence to keys `begins[sequence]` to `length` - 1; heads / keys heads of queries share
// one of keys.
template <bool HALF>
void attend(const Block& b, const uint16_t* q, const uint16_t* keys, const uint16_t* values, const int64_t* begins,
            int64_t length, int64_t apart, int tokens, uint16_t* out, int threads) {
  const int64_t size = b.size, group = b.heads / b.keys;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t head = 0; head < tokens * b.heads; head++) {
    static thread_local std::vector<float> buffer;
    const int64_t begin = begins[head / b.heads], count = length - begin, from = head / group * apart + begin * size;
    float *p = room(buffer, count + 2 * size), *query = p + count, *sum = query + size, scale = float(b.scale);
    const uint16_t *k = keys + from, *v = values + from;
    for (int64_t i = 0; i < size; i++) query[i] = to_float<HALF>(q[head * size + i]) * scale, sum[i] = 0;
    float most = -INFINITY, total = 0;
    int64_t j = 0;
    for (; j + 4 <= count; j += 4) {  // four keys at once, and their values below: they share loads and stores
      const uint16_t *a = k + j * size, *b = a + size, *c = b + size, *d = c + size;
      float first = 0, second = 0, third = 0, fourth = 0;
#pragma omp simd reduction(+ : first, second, third, fourth)
      for (int64_t i = 0; i < size; i++) {
        first += query[i] * to_float<HALF>(a[i]), second += query[i] * to_float<HALF>(b[i]);
        third += query[i] * to_float<HALF>(c[i]), fourth += query[i] * to_float<HALF>(d[i]);
      }
      p[j] = first, p[j + 1] = second, p[j + 2] = third, p[j + 3] = fourth;
    }
    for (; j < count; j++) {
      p[j] = 0;
      for (int64_t i = 0; i < size; i++) p[j] += query[i] * to_float<HALF>(k[j * size + i]);
    }
    for (j = 0; j < count; j++) most = p[j] > most ? p[j] : most;
    for (j = 0; j < count; j++) p[j] = exponential(p[j] - most);
    for (j = 0; j < count; j++) total += p[j];
    for (j = 0; j + 4 <= count; j += 4) {
      const uint16_t *a = v + j * size, *b = a + size, *c = b + size, *d = c + size;
      for (int64_t i = 0; i < size; i++)
        sum[i] += p[j] * to_float<HALF>(a[i]) + p[j + 1] * to_float<HALF>(b[i]) + p[j + 2] * to_float<HALF>(c[i]) +
                  p[j + 3] * to_float<HALF>(d[i]);
    }
    for (; j < count; j++)
      for (int64_t i = 0; i < size; i++) sum[i] += p[j] * to_float<HALF>(v[j * size + i]);
    for (int64_t i = 0; i < size; i++) out[head * size + i] = from_float<HALF>(sum[i] / total);
  }
}

template <bool HALF>
void leave(const Block& b, const uint16_t* attended, int tokens, uint16_t* h, int threads) {
  static thread_local std::vector<uint16_t> normed, gated;
  static thread_local std::vector<float> products;
  const int64_t all = tokens * b.width, inner = tokens * b.inner;
  uint16_t *n = room(normed, all), *g = room(gated, inner);
  float* p = room(products, all > 2 * inner ? all : 2 * inner);
  void* sums[] = {p, p + inner};
  multiply(b.o, 1, attended, tokens, sums, 1, threads);
  for (int64_t i = 0; i < all; i++) h[i] = from_float<HALF>(to_float<HALF>(h[i]) + p[i]);
  for (int t = 0; t < tokens; t++) norm<HALF>(h + t * b.width, b.after, b.after_eps, b.width, n + t * b.width);
  multiply(b.gate_up, 2, n, tokens, sums, 1, threads);
  for (int64_t i = 0; i < inner; i++) g[i] = from_float<HALF>(p[i] / (1.f + exponential(-p[i])) * p[inner + i]);
  multiply(b.down, 1, g, tokens, sums, 1, threads);
  for (int64_t i = 0; i < all; i++) h[i] = from_float<HALF>(to_float<HALF>(h[i]) + p[i]);
}

// The arguments of decode().
template <bool HALF>
void run(const Decoder& d, const int64_t* places, int tokens, const uint16_t* angles, uint16_t* kept, int64_t most,
         int64_t length, uint16_t* out, int threads) {
  static thread_local std::vector<uint16_t> hidden, attended, unpacked;
  const Matrix& table = *d.embedding;
  uint16_t *h = d.head ? room(hidden, 2 * tokens * d.width) : out, *row = room(unpacked, table.words * GROUP);
  for (int t = 0; t < tokens; t++) {
    const bool dense = !table.mask && !table.scales;
    if (!dense) unpack_row<HALF>(table, places[t], row, GROUP);
    memcpy(h + t * d.width, dense ? table.values + places[t] * d.width : row, d.width * 2);
  }
  const int64_t *turns = places + tokens, *begins = turns + tokens;
  uint16_t* values = kept;  // those of each block lie behind the keys of all
  for (int64_t i = 0; i < d.count; i++) values += tokens * d.blocks[i].keys * most * d.blocks[i].size;
  for (int64_t i = 0; i < d.count; i++) {
    const Block& b = d.blocks[i];
    const int64_t apart = most * b.size, last = (length - 1) * b.size;
    uint16_t* q = room(attended, tokens * b.heads * b.size);
    enter<HALF>(b, h, angles, angles + most * b.size, turns, tokens, q, kept + last, values + last, apart, threads);
    attend<HALF>(b, q, kept, values, begins, length, apart, tokens, q, threads);
    leave<HALF>(b, q, tokens, h, threads);
    kept += tokens * b.keys * apart, values += tokens * b.keys * apart;
  }
  if (!d.head) return;
  for (int t = 0; t < tokens; t++) norm<HALF>(h + t * d.width, d.norm, d.eps, d.width, h + (tokens + t) * d.width);
  void* logits = out;
  multiply(d.head, 1, h + tokens * d.width, tokens, &logits, 0, threads);
}

}  // namespace

// The logits [tokens, rows of the head] of one new token for each of 1 to 8 sequences.
// places: [3, tokens], the sequences' rows of the embedding, their rows of `angles`, and their first keys. angles:
// cosines and then sines, [2, most, size]. kept: keys of all blocks and then values of all, each [tokens, keys, most,
// size]; place `length` - 1 is filled in, and those from the sequence's first to it are read.
extern "C" void decode(const Decoder* d, const int64_t* places, int tokens, const uint16_t* angles, uint16_t* kept,
                       int64_t most, int64_t length, uint16_t* out, int threads) {
  (d->half ? run<true> : run<false>)(*d, places, tokens, angles, kept, most, length, out, threads);
}
