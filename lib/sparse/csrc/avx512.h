// AVX-512 with VBMI2 and VNNI: one instruction, vpexpandw or vpexpandb, puts values where the bits are.
#pragma once
#include "x86.h"

namespace {

typedef __m512 Vector;
constexpr int LANES = 16;
inline Vector broadcast(float f) { return _mm512_set1_ps(f); }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
inline Vector multiply_subtract(Vector a, Vector b, Vector c) { return _mm512_fnmadd_ps(a, b, c); }
inline float total(Vector v) { return _mm512_reduce_add_ps(v); }

template <int M> constexpr int TOGETHER = 1;
inline int split(int64_t, int) { return 8; }

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

// vpdpbusd takes one factor without a sign: that is the weight and 128, and 128 times the sum of x is subtracted.
struct Bytes { __m512i plus; };
inline Bytes with_128(__m512i bits) { return {_mm512_xor_si512(bits, _mm512_set1_epi8(-128))}; }
inline Bytes load_bytes(const int8_t* v) { return with_128(_mm512_loadu_si512(v)); }
inline void store_bytes(Bytes b, int8_t* v) { _mm512_store_si512(v, with_128(b.plus).plus); }
inline Bytes expand_bytes(uint64_t bits, const int8_t* v) {
  __m512i placed;
  asm("vpxor %x0, %x0, %x0\n\tvpexpandb %1, %0%{%2%}%{z%}"  // as above
      : "=&x"(placed) : "v"(_mm512_loadu_si512(v)), "Yk"(_cvtu64_mask64(bits)));
  return with_128(placed);
}
inline void offsets(const int8_t* x, int32_t* to) {
  const __m512i none = _mm512_setzero_si512();
  const __m512i sums = _mm512_dpbusd_epi32(none, with_128(none).plus, _mm512_loadu_si512(x));
  _mm512_storeu_si512(to, _mm512_sub_epi32(none, sums));
}
inline Vector dot_bytes(Bytes w, const int8_t* x, const int32_t* offset) {
  return _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(_mm512_loadu_si512(offset), w.plus, _mm512_loadu_si512(x)));
}

}  // namespace
