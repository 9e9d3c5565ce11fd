// NEON, which every 64-bit ARM has: a table of shuffles puts eight values where the bits of a byte are.
#pragma once
#include <arm_neon.h>

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

inline void to_halves(const float* from, uint16_t* to) {
  const float16x4_t low = vcvt_f16_f32(vld1q_f32(from));
  vst1q_u16(to, vreinterpretq_u16_f16(vcvt_high_f16_f32(low, vld1q_f32(from + 4))));
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

template <int M> constexpr int TOGETHER = M <= 2 ? 4 : M <= 6 ? 2 : 1;  // packed rows at once, as registers allow
inline int split(int64_t, int) { return 8; }

template <bool HALF> constexpr int PARTS = 8;
struct Raw { uint16x8_t bits[4]; };

inline Raw load(const uint16_t* v) { return {vld1q_u16(v), vld1q_u16(v + 8), vld1q_u16(v + 16), vld1q_u16(v + 24)}; }
inline void store(Raw raw, uint16_t* v) {
  for (int i = 0; i < 4; i++) vst1q_u16(v + 8 * i, raw.bits[i]);
}
inline uint32_t byte_of(uint32_t word, int b) { return word >> 8 * b & 255; }
// How many bytes the values of a mask's first byte take, of its first two, three and all: a byte each.
inline uint32_t ends_of(uint32_t bits) {
  return vget_lane_u32(vreinterpret_u32_u8(vcnt_u8(vcreate_u8(bits))), 0) * 0x02020202u;
}
// The eight values of which some are for byte `b` of the mask.
inline uint8x16_t eight_for(uint32_t ends, int b, const uint16_t* v) {
  return vld1q_u8((const uint8_t*)v + (b ? byte_of(ends, b - 1) : 0));
}
inline uint16x8_t placed(uint8x16_t eight, uint32_t byte) {
  return vreinterpretq_u16_u8(vqtbl1q_u8(eight, vld1q_u8(shuffles.narrow[byte])));
}
inline Raw expand(uint32_t bits, const uint16_t* v) {
  Raw raw;
#pragma GCC unroll 4
  for (int b = 0; b < 4; b++) raw.bits[b] = placed(eight_for(ends_of(bits), b, v), byte_of(bits, b));
  return raw;
}
template <bool HALF>
inline void widen(Raw raw, Vector* part) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) part[2 * i] = lower<HALF>(raw.bits[i]), part[2 * i + 1] = upper<HALF>(raw.bits[i]);
}
template <bool HALF>
inline void spread(uint32_t bits, int p, const uint16_t*& v, Vector* part) {
  const uint32_t ends = ends_of(bits);  // once for all parts: the compiler sees that it is the same
  if (p % 2 == 0) {
    const uint32_t byte = byte_of(bits, p / 2);
    const uint8x16_t eight = eight_for(ends, p / 2, v);
    if (HALF) {
      part[p] = lower<true>(placed(eight, byte)), part[p + 1] = upper<true>(placed(eight, byte));
    } else {
      const uint8_t* wide = shuffles.wide[byte];
      asm("" : "+r"(wide));  // one register for both halves
      part[p] = vreinterpretq_f32_u8(vqtbl1q_u8(eight, vld1q_u8(wide)));
      part[p + 1] = vreinterpretq_f32_u8(vqtbl1q_u8(eight, vld1q_u8(wide + 16)));
    }
    if (p == PARTS<HALF> - 2) v = (const uint16_t*)((const char*)v + byte_of(ends, 3));
  }
}
template <bool HALF>
inline Vector multiply_add(Vector a, Vector b, Vector c) { return multiply_add(a, b, c); }

struct Bytes { int8x16_t q[4]; };
inline Bytes load_bytes(const int8_t* v) { return {vld1q_s8(v), vld1q_s8(v + 16), vld1q_s8(v + 32), vld1q_s8(v + 48)}; }
inline void store_bytes(Bytes b, int8_t* v) {
  for (int i = 0; i < 4; i++) vst1q_s8(v + 16 * i, b.q[i]);
}
inline int8x8_t next_bytes(uint32_t byte, const int8_t*& v) {
  const int8x8_t eight = vtbl1_s8(vld1_s8(v), vld1_s8((const int8_t*)shuffles.bytes[byte]));
  v += __builtin_popcount(byte);
  return eight;
}
inline Bytes expand_bytes(uint64_t bits, const int8_t* v) {
  Bytes b;
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++, bits >>= 16) {
    const int8x8_t first = next_bytes(bits & 255, v);
    b.q[i] = vcombine_s8(first, next_bytes(bits >> 8 & 255, v));
  }
  return b;
}
inline void offsets(const int8_t*, int32_t*) {}
inline Vector dot_bytes(Bytes w, const int8_t* x, const int32_t*) {
  int32x4_t sums = {};
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const int8x16_t y = vld1q_s8(x + 16 * i);
    const int16x8_t two = vmull_s8(vget_low_s8(w.q[i]), vget_low_s8(y));  // and two more: at most 2 * 128 * 127
    sums = vpadalq_s16(sums, vmlal_high_s8(two, w.q[i], y));
  }
  return vcvtq_f32_s32(sums);
}

}  // namespace
