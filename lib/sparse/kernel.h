// What the files beside this one share: matrices and their product, numbers of 16 bits, and vectors.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

struct Matrix {  // as kernel.py's Matrix
  const uint32_t* mask;    // [rows, words], null if the matrix is dense
  const uint16_t* values;  // packed: 32 more than there are bits set, which may be read; dense: [rows, columns]
  const int64_t* starts;   // [rows + 1], where each row's values begin
  const uint16_t* bias;    // [rows] or null
  int64_t rows, columns, words;
  int64_t half;  // 1: float16, 0: bfloat16
};

// y[i] = W[i] x + bias[i] of 1 to 8 tokens, for matrices of one kind of numbers with equally many columns.
// x: [tokens, columns], of that kind; y[i]: [tokens, rows], of that kind, or float32 if `wide`.
extern "C" void multiply(const Matrix* w, int count, const uint16_t* x, int tokens, void* const* y, int wide, int threads);

template <bool HALF>
inline float to_float(uint16_t v) {
  if (HALF) return _cvtsh_ss(v);
  const uint32_t bits = uint32_t(v) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
template <bool HALF>
inline uint16_t from_float(float f) {  // rounds to nearest, ties to even
  if (HALF) return _cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT);
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return f == f ? uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : 0x7fc0;
}

template <class T>
T* aligned(void* p) {  // to 64 bytes, as vectors want it: their buffers are as much larger
  return (T*)((uintptr_t(p) + 63) & ~uintptr_t(63));
}

// Vectors of float32, as wide as the instruction set has them.
#if defined(__AVX512F__)
typedef __m512 Vector;
inline Vector broadcast(float f) { return _mm512_set1_ps(f); }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }  // a * b + c, rounded once
inline Vector multiply_subtract(Vector a, Vector b, Vector c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a * b
#else
typedef __m256 Vector;
inline Vector broadcast(float f) { return _mm256_set1_ps(f); }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
inline Vector multiply_subtract(Vector a, Vector b, Vector c) { return _mm256_fnmadd_ps(a, b, c); }
#endif
constexpr int LANES = sizeof(Vector) / 4;
