// Products y = W x of a few tokens with weights of 16 bits, packed (a bit per weight and the values other than zero)
// or dense. Compiled once for each instruction set by kernel.py and called through ctypes; no dependency.
//
// A packed row is ceil(columns / 32) mask words, the first column in the lowest bit, and as many values as there are
// bits set. 32 columns are one step: vpexpandw puts the values where the bits are, the 16 bits become float32, and
// every token's float32 inputs are multiplied and added. The idea is that of SparAMX (arXiv 2502.12444), without AMX.
#include "kernel.h"

#include <algorithm>
#include <vector>

namespace {

constexpr int GROUP = 32;  // columns of a step

#if defined(__AVX512VBMI2__)
struct Raw { __m512i bits; };  // 32 values of 16 bits

#if defined(__AVX512BF16__)
template <bool HALF> constexpr int PARTS = HALF ? 2 : 1;  // vectors of a step: bfloat16's are multiplied as they are
#else
template <bool HALF> constexpr int PARTS = 2;
#endif

inline Raw load(const uint16_t* v) { return {_mm512_loadu_si512(v)}; }
inline void store(Raw raw, uint16_t* v) { _mm512_storeu_si512(v, raw.bits); }
inline Raw expand(uint32_t bits, const uint16_t* v) {
  Raw raw;
  // Zen 4: vpexpandw waits for its destination's last writer although it zeroes it, so that is cleared first (a step
  // takes half the time), and its form that loads from memory is slow microcode; no intrinsic settles either.
  asm("vpxor %x0, %x0, %x0\n\tvpexpandw %1, %0%{%2%}%{z%}"
      : "=&x"(raw.bits) : "v"(_mm512_loadu_si512(v)), "Yk"(_cvtu32_mask32(bits)));
  return raw;
}
// The order of the columns in the parts does not matter, as x is widened by the same function: for bfloat16 the even
// columns come first and then the odd ones, which needs no move across lanes.
template <bool HALF>
inline void widen(Raw raw, Vector* part) {
  if (PARTS<HALF> == 1) {
    part[0] = _mm512_castsi512_ps(raw.bits);
  } else if (HALF) {
    part[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(raw.bits));
    part[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(raw.bits, 1));
  } else {
    part[0] = _mm512_castsi512_ps(_mm512_slli_epi32(raw.bits, 16));
    part[1] = _mm512_castsi512_ps(_mm512_and_si512(raw.bits, _mm512_set1_epi32(int(0xffff0000))));
  }
}
template <bool HALF>
inline void spread(uint32_t bits, int p, const uint16_t*& v, Vector* part) {
  if (p == 0) widen<HALF>(expand(bits, v), part), v += __builtin_popcount(bits);
}
template <bool HALF>
inline Vector multiply_add(Vector a, Vector b, Vector c) {
#if defined(__AVX512BF16__)
  // The products of two bfloat16 are exact and the sums float32, as below.
  if (PARTS<HALF> == 1) return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
#endif
  return ::multiply_add(a, b, c);
}
inline float total(Vector v) { return _mm512_reduce_add_ps(v); }

#elif defined(__AVX2__)
template <bool HALF> constexpr int PARTS = 4;
struct Raw { __m128i bits[4]; };

struct Shuffles {  // for each byte of a mask: from where its eight places take their bytes; 0x80 is a zero
  alignas(64) uint8_t wide[256][32], narrow[256][16];  // wide: as float32, whose upper half a bfloat16 is
  Shuffles() {
    memset(this, 0x80, sizeof *this);
    for (int byte = 0; byte < 256; byte++)
      for (int place = 0, next = 0; place < 8; place++)
        if (byte >> place & 1) {
          for (int i = 0; i < 2; i++) narrow[byte][2 * place + i] = wide[byte][4 * place + 2 + i] = 2 * next + i;
          next++;
        }
  }
} const shuffles;

inline Raw load(const uint16_t* v) { Raw raw; memcpy(&raw, v, sizeof raw); return raw; }
inline void store(Raw raw, uint16_t* v) { memcpy(v, &raw, sizeof raw); }
inline Raw expand(uint32_t bits, const uint16_t* v) {
  Raw raw;
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++, bits >>= 8) {
    const __m128i from = _mm_load_si128((const __m128i*)shuffles.narrow[bits & 255]);
    raw.bits[i] = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)v), from);
    v += __builtin_popcount(bits & 255);
  }
  return raw;
}
template <bool HALF>
inline void widen(Raw raw, Vector* part) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++)
    part[i] = HALF ? _mm256_cvtph_ps(raw.bits[i])
                   : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw.bits[i]), 16));
}
template <bool HALF>
inline void spread(uint32_t bits, int p, const uint16_t*& v, Vector* part) {
  const int turn = (8 * p + 27) % 32;
  int64_t at = (bits >> turn | bits << (32 - turn)) & 0x1fe0;  // 32 times the byte, in one rotation
  const __m128i eight = _mm_loadu_si128((const __m128i*)v), *from = (const __m128i*)(shuffles.narrow[0] + at / 2);
  const __m256i both = _mm256_broadcastsi128_si256(eight), *wide = (const __m256i*)(shuffles.wide[0] + at);
  // bfloat16 by way of 16 bits, as float16, would take half as many instructions again.
  part[p] = HALF ? _mm256_cvtph_ps(_mm_shuffle_epi8(eight, *from))
                 : _mm256_castsi256_ps(_mm256_shuffle_epi8(both, *wide));
  asm("popcnt %0, %0" : "+r"(at));  // in place: g++ would clear another register first, for old CPUs
  v += at;
}
template <bool HALF>
inline Vector multiply_add(Vector a, Vector b, Vector c) { return ::multiply_add(a, b, c); }
inline float total(Vector v) {
  const __m128 half = _mm256_castps256_ps128(v) + _mm256_extractf128_ps(v, 1), two = half + _mm_movehl_ps(half, half);
  return two[0] + two[1];
}
#else
#error "needs AVX-512 VBMI2 or AVX2"
#endif

// The last columns of a dense row, followed by zeros: the next row's weights are not to be read in their place.
inline Raw load_some(const uint16_t* v, int64_t count) {
  uint16_t padded[GROUP] = {};
  memcpy(padded, v, count * 2);
  return load(padded);
}

// Rows at once, as registers allow: AVX2 is held up by its two loads a cycle, and they share those of x.
template <int M, bool PACKED> constexpr int ROWS = LANES == 8 && PACKED ? (M <= 2 ? 4 : M <= 6 ? 2 : 1) : 1;

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
    if (R == 1) _mm_prefetch((const char*)v[0] + 4096, _MM_HINT_T1);
    for (int line = 0; line < R - 1; line++) _mm_prefetch(ahead + 64 * line, _MM_HINT_T0);
    if (R > 1) _mm_prefetch(ahead_mask, _MM_HINT_T0), ahead += bytes / w.words + 1, ahead_mask += R * 4;
    if (!PACKED) widen<HALF>(load(v[0]), part[0]), v[0] += GROUP;
#pragma GCC unroll 16
    for (int i = 0; i < R * P; i++) {  // one token: row by row, more: the rows take turns, with their x at hand
      const int r = M == 1 ? i / P : i % R, p = M == 1 ? i % P : i / R;
      if (PACKED) spread<HALF>(mask[r * w.words + group], p, v[r], part[r]);
      step(group, r, p, first);
    }
  };
  int64_t g = 0;
  for (; R == 1 && g + 4 <= whole; g += 4) {
    if (PACKED) _mm_prefetch((const char*)(mask + g) + 512, _MM_HINT_T0);
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
  constexpr int R = ROWS<M, PACKED>;
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
    // AVX2 has registers for one row of 7 or 8 tokens, which pays only if their x stays in L1.
    const int most = LANES == 8 && w[i].mask && tokens > 6 && tokens * columns > 8192 ? 4 : 8;
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
