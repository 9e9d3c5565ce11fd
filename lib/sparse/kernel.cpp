// Products y = W x of a few tokens with weights of 16 bits, packed (a bit per weight and the values other than zero)
// or dense. Compiled once for each instruction set by kernel.py and called through ctypes; no dependency.
//
// A packed row is ceil(columns / 32) mask words, the first column in the lowest bit, and as many values as there are
// bits set. 32 columns are one step: vpexpandw puts the values where the bits are, the 16 bits become float32, and
// every token's float32 inputs are multiplied and added. The idea is that of SparAMX (arXiv 2502.12444), without AMX.
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <vector>

namespace {

struct Matrix {  // as kernel.py's Matrix
  const uint32_t* mask;    // [rows, words], null if the matrix is dense
  const uint16_t* values;  // packed: 32 more than there are bits set, which may be read; dense: [rows, columns]
  const int64_t* starts;   // [rows + 1], where each row's values begin
  const uint16_t* bias;    // [rows] or null
  int64_t rows, columns, words;
  int64_t half;  // 1: float16, 0: bfloat16
};

constexpr int GROUP = 32;  // columns of a step

#if defined(__AVX512VBMI2__)
using Vector = __m512;
constexpr int LANES = 16;
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
inline Vector zero() { return _mm512_setzero_ps(); }
inline Vector at(const float* x) { return _mm512_load_ps(x); }
inline void put(float* x, Vector v) { _mm512_store_ps(x, v); }
inline Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
template <bool HALF>
inline Vector multiply_add(Vector a, Vector b, Vector c) {
#if defined(__AVX512BF16__)
  // The products of two bfloat16 are exact and the sums float32, as below.
  if (PARTS<HALF> == 1) return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
#endif
  return _mm512_fmadd_ps(a, b, c);
}
inline float total(Vector v) { return _mm512_reduce_add_ps(v); }

#elif defined(__AVX2__)
using Vector = __m256;
constexpr int LANES = 8;
template <bool HALF> constexpr int PARTS = 4;
struct Raw { __m128i bits[4]; };

struct Shuffles {  // for each byte of a mask: from where its eight places take their two bytes; 0x80 is a zero
  alignas(64) uint8_t from[256][16];
  Shuffles() {
    for (int byte = 0; byte < 256; byte++)
      for (int place = 0, next = 0; place < 8; place++) {
        const bool set = byte >> place & 1;
        from[byte][2 * place] = set ? 2 * next : 0x80;
        from[byte][2 * place + 1] = set ? 2 * next + 1 : 0x80;
        next += set;
      }
  }
} const shuffles;

inline Raw load(const uint16_t* v) { Raw raw; memcpy(&raw, v, sizeof raw); return raw; }
inline void store(Raw raw, uint16_t* v) { memcpy(v, &raw, sizeof raw); }
inline Raw expand(uint32_t bits, const uint16_t* v) {
  Raw raw;
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++, bits >>= 8) {
    const __m128i from = _mm_load_si128((const __m128i*)shuffles.from[bits & 255]);
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
inline Vector zero() { return _mm256_setzero_ps(); }
inline Vector at(const float* x) { return _mm256_load_ps(x); }
inline void put(float* x, Vector v) { _mm256_store_ps(x, v); }
inline Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
template <bool HALF>
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
inline float total(Vector v) {
  alignas(32) float lane[8];
  put(lane, v);
  return ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]));
}
#else
#error "needs AVX-512 VBMI2 or AVX2"
#endif

float to_float(uint16_t v, bool half) {
  if (half) return _cvtsh_ss(v);
  const uint32_t bits = uint32_t(v) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
uint16_t from_float(float f, bool half) {  // rounds to nearest, ties to even
  if (half) return _cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT);
  uint32_t bits;
  memcpy(&bits, &f, 4);
  if (f != f) return 0x7fc0;
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// The last columns of a dense row, followed by zeros: the next row's weights are not to be read in their place.
inline Raw load_some(const uint16_t* v, int64_t count) {
  uint16_t padded[GROUP] = {};
  memcpy(padded, v, count * 2);
  return load(padded);
}

// The dot products of one row with M tokens; x is [M, words, PARTS, LANES].
template <int M, bool HALF, bool PACKED>
inline void dot(const Matrix& w, int64_t row, const float* x, float* out) {
  constexpr int P = PARTS<HALF>;
  constexpr int SUMS = M <= 2 ? 4 : M <= 4 || LANES == 16 ? 2 : 1;  // of a token: hide the latency, fit the registers
  const uint32_t* mask = w.mask + row * w.words;
  const uint16_t* v = w.values + (PACKED ? w.starts[row] : row * w.columns);
  const int64_t whole = PACKED ? w.words : w.columns / GROUP;
  Vector sum[M][SUMS];
  for (auto& token : sum)
    for (auto& s : token) s = zero();
  auto step = [&](Raw raw, int64_t group, int first) __attribute__((always_inline)) {
    Vector part[P];
    widen<HALF>(raw, part);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
      for (int p = 0; p < P; p++) {
        Vector& s = sum[m][(first + p) % SUMS];
        s = multiply_add<HALF>(part[p], at(x + ((m * w.words + group) * P + p) * LANES), s);
      }
  };
  auto next = [&](int64_t group, int first) __attribute__((always_inline)) {
    // The hardware prefetcher stops at each page. Into L2: L1 is full of x where there are thousands of columns.
    _mm_prefetch((const char*)v + 4096, _MM_HINT_T1);
    step(PACKED ? expand(mask[group], v) : load(v), group, first);
    v += PACKED ? __builtin_popcount(mask[group]) : GROUP;
  };
  int64_t g = 0;
  for (; g + 4 <= whole; g += 4) {
    if (PACKED) _mm_prefetch((const char*)(mask + g) + 512, _MM_HINT_T0);
    next(g, 0), next(g + 1, P), next(g + 2, 2 * P), next(g + 3, 3 * P);
  }
  for (; g < whole; g++) next(g, 0);
  if (!PACKED && whole < w.words) step(load_some(v, w.columns % GROUP), whole, 0);
  for (int m = 0; m < M; m++) {
    for (int s = 1; s < SUMS; s++) sum[m][0] = add(sum[m][0], sum[m][s]);
    out[m] = total(sum[m][0]);
  }
}

template <int M, bool HALF, bool PACKED>
void rows(const Matrix& w, const float* x, uint16_t* y, float* wide, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < w.rows; row++) {
    float out[M];
    dot<M, HALF, PACKED>(w, row, x, out);
    for (int m = 0; m < M; m++) {
      if (w.bias) out[m] += to_float(w.bias[row], HALF);
      if (wide) wide[m * w.rows + row] = out[m];
      else y[m * w.rows + row] = from_float(out[m], HALF);
    }
  }
}

template <bool HALF, bool PACKED>
void product(const Matrix& w, const uint16_t* x, int tokens, uint16_t* y, float* wide, int threads) {
  constexpr int P = PARTS<HALF>;
  static thread_local std::vector<float> buffer;
  buffer.resize(tokens * w.words * P * LANES + 16);
  float* widened = (float*)((uintptr_t(buffer.data()) + 63) & ~uintptr_t(63));
  for (int m = 0; m < tokens; m++)
    for (int64_t g = 0; g < w.words; g++) {
      Vector part[P];
      const uint16_t* from = x + m * w.columns + g * GROUP;
      widen<HALF>(g < w.columns / GROUP ? load(from) : load_some(from, w.columns % GROUP), part);
      for (int p = 0; p < P; p++) put(widened + ((m * w.words + g) * P + p) * LANES, part[p]);
    }
  using Rows = void (*)(const Matrix&, const float*, uint16_t*, float*, int);
  static const Rows table[] = {rows<1, HALF, PACKED>, rows<2, HALF, PACKED>, rows<3, HALF, PACKED>,
                               rows<4, HALF, PACKED>, rows<5, HALF, PACKED>, rows<6, HALF, PACKED>,
                               rows<7, HALF, PACKED>, rows<8, HALF, PACKED>};
  table[tokens - 1](w, widened, y, wide, threads);
}

}  // namespace

// y = W x + bias of 1 to 8 tokens. x: [tokens, columns], the weights' kind of numbers; y: [tokens, rows], of that kind,
// or float32 in `wide` if that is not null.
extern "C" void multiply(const Matrix* w, const uint16_t* x, int tokens, uint16_t* y, float* wide, int threads) {
  using Product = void (*)(const Matrix&, const uint16_t*, int, uint16_t*, float*, int);
  static const Product table[] = {product<false, false>, product<false, true>, product<true, false>,
                                  product<true, true>};
  table[2 * (w->half != 0) + (w->mask != nullptr)](*w, x, tokens, y, wide, threads);
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
