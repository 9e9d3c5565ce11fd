// AVX2 with FMA: a table of shuffles puts eight values where the bits of a byte are.
#pragma once
#include "x86.h"

namespace {

typedef __m256 Vector;
constexpr int LANES = 8;
inline Vector broadcast(float f) { return _mm256_set1_ps(f); }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
inline Vector multiply_subtract(Vector a, Vector b, Vector c) { return _mm256_fnmadd_ps(a, b, c); }
inline float total(Vector v) {
  const __m128 half = _mm256_castps256_ps128(v) + _mm256_extractf128_ps(v, 1), two = half + _mm_movehl_ps(half, half);
  return two[0] + two[1];
}

// As registers allow: the two loads a cycle are what holds it up, and rows share those of x.
template <int M> constexpr int TOGETHER = M <= 2 ? 4 : M <= 6 ? 2 : 1;
// There are registers for one row of 7 or 8 tokens, which pays only if their x stays in L1.
inline int split(int64_t columns, int tokens) { return tokens > 6 && tokens * columns > 8192 ? 4 : 8; }

template <bool HALF> constexpr int PARTS = 4;
struct Raw { __m128i bits[4]; };

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
  for (int i = 0; i < 4; i++) part[i] = widened<HALF>(raw.bits[i]);
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

struct Bytes { __m256i q[2]; };
inline Bytes load_bytes(const int8_t* v) { Bytes b; memcpy(&b, v, sizeof b); return b; }
inline void store_bytes(Bytes b, int8_t* v) { memcpy(v, &b, sizeof b); }
inline Bytes expand_bytes(uint64_t bits, const int8_t* v) {
  __m128i eight[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++, bits >>= 8) {
    const __m128i from = _mm_loadl_epi64((const __m128i*)shuffles.bytes[bits & 255]);
    eight[i] = _mm_shuffle_epi8(_mm_loadl_epi64((const __m128i*)v), from);
    v += __builtin_popcount(bits & 255);
  }
  Bytes b;
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++)
    b.q[i] = _mm256_set_m128i(_mm_unpacklo_epi64(eight[4 * i + 2], eight[4 * i + 3]),
                              _mm_unpacklo_epi64(eight[4 * i], eight[4 * i + 1]));
  return b;
}
inline void offsets(const int8_t*, int32_t*) {}
// vpmaddubsw takes one factor without a sign: that is the weight's size, and x takes the weight's sign.
inline Vector dot_bytes(Bytes w, const int8_t* x, const int32_t*) {
  __m256i sums[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) {
    const __m256i turned = _mm256_sign_epi8(_mm256_loadu_si256((const __m256i*)x + i), w.q[i]);
    sums[i] = _mm256_maddubs_epi16(_mm256_abs_epi8(w.q[i]), turned);  // of two products: at most 2 * 128 * 127
    sums[i] = _mm256_madd_epi16(sums[i], _mm256_set1_epi16(1));
  }
  return _mm256_cvtepi32_ps(_mm256_add_epi32(sums[0], sums[1]));
}

}  // namespace
