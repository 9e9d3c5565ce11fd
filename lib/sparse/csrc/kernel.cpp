// Products y = W x of a few tokens with weights of 16 or 8 bits, packed (a bit per weight and the values other than
// zero) or dense. Compiled once for each instruction set by kernel.py and called through ctypes; no dependency.
//
// A packed row is ceil(columns / 32) mask words, the first column in the lowest bit, and as many values as there are
// bits set. 32 columns are one step: the values are put where the bits are, the 16 bits become float32, and every
// token's float32 inputs are multiplied and added. The idea is that of SparAMX (arXiv 2502.12444), without AMX.
//
// With int8 values a step is 64 columns. x is rounded to int8 too, and the step's products are added up as integers:
// the sum is multiplied by the weights' scale and by that of these 64 numbers of x, which is a 127th of the largest.
#include "kernel.h"

#include <algorithm>
#include <cmath>
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

struct Input {  // tokens as a matrix takes them
  const Vector* widened;   // [tokens, words, PARTS]
  const int8_t* rounded;   // [tokens, steps, BYTES]
  const int32_t* offsets;  // [tokens, steps, 16]
  const float* scales;     // [tokens, steps rounded up to eights]
};

// The same of a row of int8 values, [M]; scales: room as for those of x.
template <int M, bool HALF, bool PACKED>
inline void dot_row(const Matrix& w, int64_t row, const Input& x, float* scales, float* out) {
  constexpr int SUMS = M == 1 ? 4 : M <= 4 || LANES == 16 ? 2 : 1;
  const int64_t steps = w.words / 2;
  const uint32_t* mask = w.mask + row * w.words;
  const int8_t* v = w.bytes() + (PACKED ? w.starts[row] : row * steps * BYTES);
  const int64_t apart = (steps + 7) / 8 * 8;
  for (int64_t g = 0; g < steps; g += 8) {
    float eight[8];
    to_floats<HALF>(w.scales + row * steps + g, eight);
    for (int m = 0; m < M; m++)
#pragma omp simd
      for (int i = 0; i < 8; i++) scales[m * apart + g + i] = eight[i] * x.scales[m * apart + g + i];
  }
  Vector sum[M][SUMS] = {};
  auto step = [&](int64_t g, int s) __attribute__((always_inline)) {
    __builtin_prefetch(v + 2048);
    const uint64_t bits = PACKED ? pair(mask + 2 * g) : 0;
    const Bytes b = PACKED ? expand_bytes(bits, v) : load_bytes(v);
    v += PACKED ? __builtin_popcountll(bits) : BYTES;
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      const int64_t at = m * steps + g;
      const Vector products = dot_bytes(b, x.rounded + at * BYTES, x.offsets + at * 16);
      sum[m][s % SUMS] = multiply_add(products, broadcast(scales[m * apart + g]), sum[m][s % SUMS]);
    }
  };
  int64_t g = 0;
  for (; g + 4 <= steps; g += 4) {
    if (PACKED) __builtin_prefetch((const char*)(mask + 2 * g) + 512);
    step(g, 0), step(g + 1, 1), step(g + 2, 2), step(g + 3, 3);
  }
  for (; g < steps; g++) step(g, 0);
  for (int m = 0; m < M; m++) {
    for (int s = 1; s < SUMS; s++) sum[m][0] += sum[m][s];
    out[m] = total(sum[m][0]);
  }
}

template <int M, bool HALF, bool PACKED, bool INT8>
void rows(const Matrix& w, const Input& x, void* y, bool wide) {
  constexpr int R = PACKED && !INT8 ? TOGETHER<M> : 1;
  std::vector<float> scales(INT8 ? M * (w.words / 2 + 7) : 0);
#pragma omp for schedule(static) nowait
  for (int64_t first = 0; first < w.rows; first += R) {
    float out[R * M];
    const int count = int(std::min<int64_t>(R, w.rows - first));
    if constexpr (INT8) dot_row<M, HALF, PACKED>(w, first, x, scales.data(), out);
    else if (count == R) dot<M, R, HALF, PACKED>(w, first, x.widened, out);
    else for (int r = 0; r < count; r++) dot<M, 1, HALF, PACKED>(w, first + r, x.widened, out + r * M);
    for (int i = 0; i < count * M; i++) {
      const int64_t row = first + i / M, at = i % M * w.rows + row;
      if (w.bias) out[i] += to_float<HALF>(w.bias[row]);
      if (wide) ((float*)y)[at] = out[i];
      else ((uint16_t*)y)[at] = from_float<HALF>(out[i]);
    }
  }
}

// Numbers of x to int8, and their scale is returned: that of `count` of them, followed by zeros. Is one of them not
// finite, no product with them is.
template <bool HALF>
inline float round_step(const uint16_t* x, int64_t count, int8_t* to) {
  uint16_t padded[BYTES] = {}, largest = 0;
  float numbers[BYTES];
  memcpy(padded, x, count * 2);
  for (int i = 0; i < BYTES; i++) largest = std::max<uint16_t>(largest, padded[i] & 0x7fff);
  for (int i = 0; i < BYTES; i += 8) to_floats<HALF>(padded + i, numbers + i);
  const float most = to_float<HALF>(largest), inverse = most > 1e-30f ? 127 / most : 0;
  for (int i = 0; i < BYTES; i++) {
    const float rounded = numbers[i] * inverse + 12582912.f;  // 1.5 * 2^23: its lowest bits are the nearest integer's
    uint32_t bits;
    memcpy(&bits, &rounded, 4);
    to[i] = int8_t(bits);
  }
  return largest < (HALF ? 0x7c00 : 0x7f80) ? most / 127 : NAN;
}

template <bool HALF>
void product(const Matrix* w, int count, const uint16_t* x, int tokens, void* const* y, bool wide, int threads) {
  constexpr int P = PARTS<HALF>;
  const int64_t columns = w->columns, words = (columns + GROUP - 1) / GROUP, steps = (columns + BYTES - 1) / BYTES;
  const int64_t apart = (steps + 7) / 8 * 8;
  const auto is_int8 = [](const Matrix& matrix) { return matrix.scales != nullptr; };
  const bool as_floats = !std::all_of(w, w + count, is_int8), as_int8 = std::any_of(w, w + count, is_int8);
  static thread_local std::vector<float> buffer, scales;
  static thread_local std::vector<int8_t> rounded;
  static thread_local std::vector<int32_t> known;
  if (as_floats) buffer.resize(tokens * words * P * LANES + 16);
  if (as_int8)
    scales.resize(tokens * apart), rounded.resize(tokens * steps * BYTES), known.resize(tokens * steps * 16);
  Vector* widened = aligned<Vector>(buffer.data());
  const Input all{widened, rounded.data(), known.data(), scales.data()};  // this thread's, for all of them below
  for (int64_t at = 0; as_floats && at < tokens * words; at++) {
    const int64_t g = at % words;
    const uint16_t* from = x + at / words * columns + g * GROUP;
    widen<HALF>(g < columns / GROUP ? load(from) : load_some(from, columns % GROUP), widened + at * P);
  }
  for (int m = 0; as_int8 && m < tokens; m++)
    for (int64_t g = 0; g < steps; g++) {
      const int64_t at = m * steps + g, some = std::min<int64_t>(BYTES, columns - g * BYTES);
      scales[m * apart + g] = round_step<HALF>(x + m * columns + g * BYTES, some, &rounded[at * BYTES]);
      offsets(&rounded[at * BYTES], &known[at * 16]);
    }
#define EACH(P, I) rows<1, HALF, P, I>, rows<2, HALF, P, I>, rows<3, HALF, P, I>, rows<4, HALF, P, I>, \
                   rows<5, HALF, P, I>, rows<6, HALF, P, I>, rows<7, HALF, P, I>, rows<8, HALF, P, I>
  static void (*const table[2][2][8])(const Matrix&, const Input&, void*, bool) = {
      {{EACH(false, false)}, {EACH(true, false)}}, {{EACH(false, true)}, {EACH(true, true)}}};
#pragma omp parallel num_threads(threads) if (threads > 1)
  for (int i = 0; i < count; i++) {
    const int most = w[i].mask ? split(columns, tokens) : 8;
    for (int first = 0; first < tokens; first += most) {
      const Input input{all.widened + first * words * P, all.rounded + first * steps * BYTES,
                        all.offsets + first * steps * 16, all.scales + first * apart};
      void* out = (char*)y[i] + first * w[i].rows * (wide ? 4 : 2);
      table[is_int8(w[i])][w[i].mask != nullptr][std::min(most, tokens - first) - 1](w[i], input, out, wide);
    }
  }
}

}  // namespace

extern "C" void multiply(const Matrix* w, int count, const uint16_t* x, int tokens, void* const* y, int wide,
                         int threads) {
  (w->half ? product<true> : product<false>)(w, count, x, tokens, y, wide, threads);
}

// `count` rows of a packed or int8 matrix, words * 32 columns each.
extern "C" void unpack(const Matrix* w, const int64_t* rows, int64_t count, uint16_t* out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < count; i++)
    (w->half ? unpack_row<true> : unpack_row<false>)(*w, rows[i], out + i * w->words * GROUP, GROUP);
}
