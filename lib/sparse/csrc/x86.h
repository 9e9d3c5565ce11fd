// What both of x86's instruction sets here have: AVX2 with FMA and F16C.
#pragma once
#include <immintrin.h>

namespace {

inline float half_to_float(uint16_t v) { return _cvtsh_ss(v); }
inline uint16_t float_to_half(float f) { return _cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT); }

template <bool HALF>
inline __m256 widened(__m128i eight) {
  return HALF ? _mm256_cvtph_ps(eight) : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(eight), 16));
}
template <bool HALF>
inline void to_floats(const uint16_t* from, float* to) {
  _mm256_storeu_ps(to, widened<HALF>(_mm_loadu_si128((const __m128i*)from)));
}

inline void to_halves(const float* from, uint16_t* to) {
  _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph(_mm256_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT));
}

inline int squeeze(const float* from, float* to) {
  const __m256 eight = _mm256_loadu_ps(from);
  const int byte = _mm256_movemask_ps(_mm256_cmp_ps(eight, _mm256_setzero_ps(), _CMP_NEQ_UQ));
  const __m128i of = _mm_loadl_epi64((const __m128i*)places.of[byte]);
  _mm256_storeu_ps(to, _mm256_permutevar8x32_ps(eight, _mm256_cvtepu8_epi32(of)));
  return byte;
}

inline void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  __m128 v[4];
  for (int i = 0; i < 4; i++) v[i] = _mm_loadu_ps(from + i * from_stride);
  _MM_TRANSPOSE4_PS(v[0], v[1], v[2], v[3]);
  for (int i = 0; i < 4; i++) _mm_storeu_ps(to + i * to_stride, v[i]);
}

}  // namespace
