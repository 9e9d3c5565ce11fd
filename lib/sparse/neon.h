// NEON, which every 64-bit ARM has: a table of shuffles puts eight values where the bits of a byte are.
#pragma once
#include <arm_neon.h>

#include "shuffles.h"

namespace {

typedef float32x4_t Vector;
constexpr int LANES = 4;
inline Vector broadcast(float f) { return vdupq_n_f32(f); }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return vfmaq_f32(c, a, b); }
inline Vector multiply_subtract(Vector a, Vector b, Vector c) { return vfmsq_f32(c, a, b); }
inline float total(Vector v) { return vaddvq_f32(v); }

inline float half_to_float(uint16_t v) {
  __fp16 half;
  memcpy(&half, &v, 2);
  return half;
}
inline uint16_t float_to_half(float f) {
  const __fp16 half = f;
  uint16_t v;
  memcpy(&v, &half, 2);
  return v;
}

template <bool HALF>
inline Vector lower(uint16x8_t eight) {  // four of eight numbers
  return HALF ? vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(eight)))
              : vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(eight), 16));
}
template <bool HALF>
inline Vector upper(uint16x8_t eight) {
  return HALF ? vcvt_high_f32_f16(vreinterpretq_f16_u16(eight)) : vreinterpretq_f32_u32(vshll_high_n_u16(eight, 16));
}

template <bool HALF>
inline void to_floats(const uint16_t* from, float* to) {
  const uint16x8_t eight = vld1q_u16(from);
  vst1q_f32(to, lower<HALF>(eight)), vst1q_f32(to + 4, upper<HALF>(eight));
}

inline int squeeze(const float* from, float* to) {
  int byte = 0;
  for (int i = 0, n = 0; i < 8; i++) {
    const float f = from[i];
    to[n] = f, byte |= (f != 0) << i, n += f != 0;
  }
  return byte;
}

inline void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  const float32x4x4_t rows = {vld1q_f32(from), vld1q_f32(from + from_stride), vld1q_f32(from + 2 * from_stride),
                              vld1q_f32(from + 3 * from_stride)};
  float four[16];
  vst4q_f32(four, rows);  // the four numbers of a column side by side
  for (int i = 0; i < 4; i++) vst1q_f32(to + i * to_stride, vld1q_f32(four + 4 * i));
}

template <int M> constexpr int TOGETHER = M <= 4 ? 4 : 2;  // packed rows at once: 16 sums of 32 registers
inline int split(int64_t, int) { return 8; }

template <bool HALF> constexpr int PARTS = 8;
struct Raw { uint16x8_t bits[4]; };

inline Raw load(const uint16_t* v) { return {vld1q_u16(v), vld1q_u16(v + 8), vld1q_u16(v + 16), vld1q_u16(v + 24)}; }
inline void store(Raw raw, uint16_t* v) {
  for (int i = 0; i < 4; i++) vst1q_u16(v + 8 * i, raw.bits[i]);
}
// How many bits of a mask are set in its first byte, its first two, three and all: a byte each.
inline uint32_t counts(uint32_t bits) {
  return vget_lane_u32(vreinterpret_u32_u8(vcnt_u8(vcreate_u8(bits))), 0) * 0x01010101u;
}
inline uint16x8_t placed(uint32_t byte, const uint16_t* v) {
  return vreinterpretq_u16_u8(vqtbl1q_u8(vreinterpretq_u8_u16(vld1q_u16(v)), vld1q_u8(shuffles.narrow[byte])));
}
inline Raw expand(uint32_t bits, const uint16_t* v) {
  const uint32_t ends = counts(bits);
  return {placed(bits & 255, v), placed(bits >> 8 & 255, v + (ends & 255)), placed(bits >> 16 & 255, v + (ends >> 8 & 255)),
          placed(bits >> 24, v + (ends >> 16 & 255))};
}
template <bool HALF>
inline void widen(Raw raw, Vector* part) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) part[2 * i] = lower<HALF>(raw.bits[i]), part[2 * i + 1] = upper<HALF>(raw.bits[i]);
}
template <bool HALF>
inline void spread(uint32_t bits, int p, const uint16_t*& v, Vector* part) {
  const uint32_t ends = counts(bits);  // once for all parts: the compiler sees that it is the same
  if (p % 2 == 0) {
    const uint32_t byte = bits >> 4 * p & 255;
    const uint16_t* from = v + (p ? ends >> (4 * p - 8) & 255 : 0);
    if (HALF) {
      const uint16x8_t eight = placed(byte, from);
      part[p] = lower<true>(eight), part[p + 1] = upper<true>(eight);
    } else {
      const uint8x16_t eight = vreinterpretq_u8_u16(vld1q_u16(from));
      const uint8_t* wide = shuffles.wide[byte];
      part[p] = vreinterpretq_f32_u8(vqtbl1q_u8(eight, vld1q_u8(wide)));
      part[p + 1] = vreinterpretq_f32_u8(vqtbl1q_u8(eight, vld1q_u8(wide + 16)));
    }
  } else if (p == PARTS<HALF> - 1) {
    v += ends >> 24;
  }
}
template <bool HALF>
inline Vector multiply_add(Vector a, Vector b, Vector c) { return multiply_add(a, b, c); }

}  // namespace
