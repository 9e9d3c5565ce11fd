// One new token per sequence through a LLaMA's block: norms, rotations, attention and the gated MLP around the products
// of kernel.cpp, with which it is compiled. Values are rounded where they leave a function, and where a
// product takes them; in between they are float32.
#include "kernel.h"

#include <cmath>
#include <vector>

namespace {

struct Block {  // as kernel.py's BlockStruct
  const Matrix *qkv, *o, *gate_up, *down;
  const uint16_t *before, *after;  // weights of the two norms, [width]
  double before_eps, after_eps;
  int64_t width, heads, keys, size, inner;  // heads of queries, heads of keys, numbers of a head, of the MLP
  int64_t half;                             // 1: float16, 0: bfloat16
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
void enter(const Block& b, const uint16_t* x, const uint16_t* cos, const uint16_t* sin, int64_t stride, int tokens,
           uint16_t* q, uint16_t* k, uint16_t* v, int64_t apart, int threads) {
  static thread_local std::vector<uint16_t> normed;
  static thread_local std::vector<float> products;
  const int64_t queries = b.heads * b.size, keys = b.keys * b.size;
  uint16_t* n = room(normed, tokens * b.width);
  float* y = room(products, tokens * (queries + 2 * keys));
  for (int t = 0; t < tokens; t++) norm<HALF>(x + t * b.width, b.before, b.before_eps, b.width, n + t * b.width);
  float* const parts[] = {y, y + tokens * queries, y + tokens * (queries + keys)};
  multiply(b.qkv, 3, n, tokens, (void* const*)parts, 1, threads);
  for (int t = 0; t < tokens; t++) {
    rotate<HALF>(parts[0] + t * queries, cos + t * stride, sin + t * stride, b.heads, b.size, q + t * queries, b.size);
    rotate<HALF>(parts[1] + t * keys, cos + t * stride, sin + t * stride, b.keys, b.size, k + t * b.keys * apart, apart);
  }
  for (int64_t head = 0; head < tokens * b.keys; head++)
    for (int64_t i = 0; i < b.size; i++) v[head * apart + i] = from_float<HALF>(parts[2][head * b.size + i]);
}

// Attention of one token per sequence to all `length` keys; heads / keys heads of queries share a head of keys.
template <bool HALF>
void attend(const Block& b, const uint16_t* q, const uint16_t* keys, const uint16_t* values, int64_t length,
            int64_t apart, float scale, int tokens, uint16_t* out, int threads) {
  const int64_t size = b.size, group = b.heads / b.keys;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t head = 0; head < tokens * b.heads; head++) {
    static thread_local std::vector<float> buffer;
    float *p = room(buffer, length + 2 * size), *query = p + length, *sum = query + size;
    const uint16_t *k = keys + head / group * apart, *v = values + head / group * apart;
    for (int64_t i = 0; i < size; i++) query[i] = to_float<HALF>(q[head * size + i]) * scale, sum[i] = 0;
    float most = -INFINITY, total = 0;
    int64_t j = 0;
    for (; j + 4 <= length; j += 4) {  // four keys at once, and their values below: they share loads and stores
      const uint16_t *a = k + j * size, *b = a + size, *c = b + size, *d = c + size;
      float first = 0, second = 0, third = 0, fourth = 0;
#pragma omp simd reduction(+ : first, second, third, fourth)
      for (int64_t i = 0; i < size; i++) {
        first += query[i] * to_float<HALF>(a[i]), second += query[i] * to_float<HALF>(b[i]);
        third += query[i] * to_float<HALF>(c[i]), fourth += query[i] * to_float<HALF>(d[i]);
      }
      p[j] = first, p[j + 1] = second, p[j + 2] = third, p[j + 3] = fourth;
    }
    for (; j < length; j++) {
      p[j] = 0;
      for (int64_t i = 0; i < size; i++) p[j] += query[i] * to_float<HALF>(k[j * size + i]);
    }
    for (j = 0; j < length; j++) most = p[j] > most ? p[j] : most;
    for (j = 0; j < length; j++) p[j] = exponential(p[j] - most);
    for (j = 0; j < length; j++) total += p[j];
    for (j = 0; j + 4 <= length; j += 4) {
      const uint16_t *a = v + j * size, *b = a + size, *c = b + size, *d = c + size;
      for (int64_t i = 0; i < size; i++)
        sum[i] += p[j] * to_float<HALF>(a[i]) + p[j + 1] * to_float<HALF>(b[i]) + p[j + 2] * to_float<HALF>(c[i]) +
                  p[j + 3] * to_float<HALF>(d[i]);
    }
    for (; j < length; j++)
      for (int64_t i = 0; i < size; i++) sum[i] += p[j] * to_float<HALF>(v[j * size + i]);
    for (int64_t i = 0; i < size; i++) out[head * size + i] = from_float<HALF>(sum[i] / total);
  }
}

template <bool HALF>
void leave(const Block& b, const uint16_t* x, const uint16_t* attended, int tokens, uint16_t* y, int threads) {
  static thread_local std::vector<uint16_t> normed, gated;
  static thread_local std::vector<float> products;
  const int64_t all = tokens * b.width, inner = tokens * b.inner;
  uint16_t *n = room(normed, all), *g = room(gated, inner);
  float* p = room(products, all > 2 * inner ? all : 2 * inner);
  void* sums[] = {p, p + inner};
  multiply(b.o, 1, attended, tokens, sums, 1, threads);
  for (int64_t i = 0; i < all; i++) y[i] = from_float<HALF>(to_float<HALF>(x[i]) + p[i]);
  for (int t = 0; t < tokens; t++) norm<HALF>(y + t * b.width, b.after, b.after_eps, b.width, n + t * b.width);
  multiply(b.gate_up, 2, n, tokens, sums, 1, threads);
  for (int64_t i = 0; i < inner; i++) g[i] = from_float<HALF>(p[i] / (1.f + exponential(-p[i])) * p[inner + i]);
  multiply(b.down, 1, g, tokens, sums, 1, threads);
  for (int64_t i = 0; i < all; i++) y[i] = from_float<HALF>(to_float<HALF>(y[i]) + p[i]);
}

}  // namespace

// Queries, keys and values of x [tokens, width], as the attention takes them: [tokens, heads or keys, size] each, but
// for heads of keys and of values that are `apart` numbers. cos, sin: [size], and `stride` further on for the next token.
extern "C" void enter_block(const Block* b, const uint16_t* x, const uint16_t* cos, const uint16_t* sin, int64_t stride,
                            int tokens, uint16_t* q, uint16_t* k, uint16_t* v, int64_t apart, int threads) {
  (b->half ? enter<true> : enter<false>)(*b, x, cos, sin, stride, tokens, q, k, v, apart, threads);
}

// What the attention of q, [tokens, heads, size], gives: the same shape, and possibly the same place.
// keys, values: [tokens, keys, length, size], each head's `apart` numbers after the one before.
extern "C" void attend_block(const Block* b, const uint16_t* q, const uint16_t* keys, const uint16_t* values,
                             int64_t length, int64_t apart, double scale, int tokens, uint16_t* out, int threads) {
  (b->half ? attend<true> : attend<false>)(*b, q, keys, values, length, apart, float(scale), tokens, out, threads);
}

// What leaves the block, y [tokens, width], given x that entered it and what its attention gave, [tokens, heads * size].
extern "C" void leave_block(const Block* b, const uint16_t* x, const uint16_t* attended, int tokens, uint16_t* y,
                            int threads) {
  (b->half ? leave<true> : leave<false>)(*b, x, attended, tokens, y, threads);
}
