// Products y = W x of a few tokens with weights of 16 bits, packed (a bit per weight and the values other than zero)
// or dense. Compiled once for each instruction set by kernel.py and called through ctypes; no dependency.
//
// A packed row is ceil(columns / 32) mask words, the first column in the lowest bit, and as many values as there are
// bits set. 32 columns are one step: the values are put where the bits are, the 16 bits become float32, and every
// token's float32 inputs are multiplied and added. The idea is that of SparAMX (arXiv 2502.12444), without AMX.
#include "kernel.h"

#include <algorithm>
#include <vector>

namespace {

// The last columns of a dense row, followed by zeros: the next row's weights are not to be read in their place.
inline Raw load_some(const uint16_t* v, int64_t count) {
  uint16_t padded[GROUP] = {};
  memcpy(padded, v, count * 2);
  return load(padded);
}

// The dot products of R rows from `row` on with M tokens, [R, M]; x is [M, words, PARTS].
template <int M, int R, bool HALF, bool PACKED>
inline void dot(const Matrix& w, int64_t row, const Vector* x, float* out) {
  constexpr int P = PARTS<HALF>;
  // Of a row and token, to hide the latency as long as they fit the registers.
  constexpr int SUMS = M * R <= 2 ? 4 : M * R <= 4 || LANES == 16 ? 2 : 1;
  const uint32_t* mask = w.mask + row * w.words;
  const int64_t whole = PACKED ? w.words : w.columns / GROUP;
  const uint16_t* v[R];
  for (int r = 0; r < R; r++) v[r] = w.values + (PACKED ? w.starts[row + r] : (row + r) * w.columns);
  // Several rows at once: what the next ones need is fetched meanwhile, from front to back.
  const int64_t bytes = R > 1 ? (w.starts[row + R] - w.starts[row]) * 2 : 0;
  const char* ahead = (const char*)v[0] + std::max<int64_t>(bytes, 4096);
  const char* ahead_mask = (const char*)mask + std::max<int64_t>(R * w.words * 4, 1024);
  Vector sum[R][M][SUMS] = {}, part[R][P];
  auto step = [&](int64_t group, int r, int p, int first) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      Vector& s = sum[r][m][(first + p) % SUMS];
      s = multiply_add<HALF>(part[r][p], x[(m * w.words + group) * P + p], s);
    }
  };
  auto next = [&](int64_t group, int first) __attribute__((always_inline)) {
    // The hardware prefetcher stops at each page. Into L2: L1 is full of x where there are thousands of columns.
    if (R == 1) __builtin_prefetch((const char*)v[0] + 4096, 0, 2);
    for (int line = 0; line < R - 1; line++) __builtin_prefetch(ahead + 64 * line);
    if (R > 1) __builtin_prefetch(ahead_mask), ahead += bytes / w.words + 1, ahead_mask += R * 4;
    if (!PACKED) widen<HALF>(load(v[0]), part[0]), v[0] += GROUP;
#pragma GCC unroll 32
    for (int i = 0; i < R * P; i++) {  // one token: row by row, more: the rows take turns, with their x at hand
      const int r = M == 1 ? i / P : i % R, p = M == 1 ? i % P : i / R;
      if (PACKED) spread<HALF>(mask[r * w.words + group], p, v[r], part[r]);
      step(group, r, p, first);
    }
  };
  int64_t g = 0;
  for (; R == 1 && g + 4 <= whole; g += 4) {
    if (PACKED) __builtin_prefetch((const char*)(mask + g) + 512);
    next(g, 0), next(g + 1, P), next(g + 2, 2 * P), next(g + 3, 3 * P);
  }
  for (; g < whole; g++) next(g, 0);
  if (!PACKED && whole < w.words) {
    widen<HALF>(load_some(v[0], w.columns % GROUP), part[0]);
    for (int p = 0; p < P; p++) step(whole, 0, p, 0);
  }
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) {
      for (int s = 1; s < SUMS; s++) sum[r][m][0] += sum[r][m][s];
      out[r * M + m] = total(sum[r][m][0]);
    }
}

template <int M, bool HALF, bool PACKED>
void rows(const Matrix& w, const Vector* x, void* y, bool wide) {
  constexpr int R = PACKED ? TOGETHER<M> : 1;
#pragma omp for schedule(static) nowait
  for (int64_t first = 0; first < w.rows; first += R) {
    float out[R * M];
    const int count = int(std::min<int64_t>(R, w.rows - first));
    if (count == R) dot<M, R, HALF, PACKED>(w, first, x, out);
    else for (int r = 0; r < count; r++) dot<M, 1, HALF, PACKED>(w, first + r, x, out + r * M);
    for (int i = 0; i < count * M; i++) {
      const int64_t row = first + i / M, at = i % M * w.rows + row;
      if (w.bias) out[i] += to_float<HALF>(w.bias[row]);
      if (wide) ((float*)y)[at] = out[i];
      else ((uint16_t*)y)[at] = from_float<HALF>(out[i]);
    }
  }
}

template <bool HALF>
void product(const Matrix* w, int count, const uint16_t* x, int tokens, void* const* y, bool wide, int threads) {
  constexpr int P = PARTS<HALF>;
  const int64_t columns = w->columns, words = w->words;
  static thread_local std::vector<float> buffer;
  buffer.resize(tokens * words * P * LANES + 16);
  Vector* widened = aligned<Vector>(buffer.data());
  for (int m = 0; m < tokens; m++)
    for (int64_t g = 0; g < words; g++) {
      const uint16_t* from = x + m * columns + g * GROUP;
      widen<HALF>(g < columns / GROUP ? load(from) : load_some(from, columns % GROUP), widened + (m * words + g) * P);
    }
#define EACH(PACKED) rows<1, HALF, PACKED>, rows<2, HALF, PACKED>, rows<3, HALF, PACKED>, rows<4, HALF, PACKED>, \
                     rows<5, HALF, PACKED>, rows<6, HALF, PACKED>, rows<7, HALF, PACKED>, rows<8, HALF, PACKED>
  static void (*const table[2][8])(const Matrix&, const Vector*, void*, bool) = {{EACH(false)}, {EACH(true)}};
#pragma omp parallel num_threads(threads) if (threads > 1)
  for (int i = 0; i < count; i++) {
    const int most = w[i].mask ? split(columns, tokens) : 8;
    for (int first = 0; first < tokens; first += most) {
      void* out = (char*)y[i] + first * w[i].rows * (wide ? 4 : 2);
      table[w[i].mask != nullptr][std::min(most, tokens - first) - 1](w[i], widened + first * words * P, out, wide);
    }
  }
}

}  // namespace

extern "C" void multiply(const Matrix* w, int count, const uint16_t* x, int tokens, void* const* y, int wide,
                         int threads) {
  (w->half ? product<true> : product<false>)(w, count, x, tokens, y, wide, threads);
}

// Rows first to last - 1 of a packed matrix, words * 32 columns each.
extern "C" void unpack(const Matrix* w, int64_t first, int64_t last, uint16_t* out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t row = first; row < last; row++) {
    const uint16_t* v = w->values + w->starts[row];
    for (int64_t g = 0; g < w->words; g++) {
      const uint32_t bits = w->mask[row * w->words + g];
      store(expand(bits, v), out + ((row - first) * w->words + g) * GROUP);
      v += __builtin_popcount(bits);
    }
  }
}
