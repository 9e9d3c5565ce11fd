// What the files beside this one share: matrices and their product, numbers of 16 and 8 bits, and an instruction set.
#pragma once
#include <cstdint>
#include <cstring>

struct Matrix {  // as kernel.py's MatrixStruct
  const uint32_t* mask;    // [rows, words], null if the matrix is dense
  const uint16_t* values;  // packed: 64 more than there are bits set, which may be read; dense: [rows, columns]
  const int64_t* starts;   // [rows + 1], where each row's values begin
  const uint16_t* bias;    // [rows] or null
  int64_t rows, columns, words;
  int64_t half;            // 1: float16, 0: bfloat16
  const uint16_t* scales;  // null, or [rows, words / 2] and more: the values are int8, and 64 columns of a row share a
                           // scale of the kind that `half` says; words are even then, and dense rows have such a length
  const int8_t* bytes() const { return (const int8_t*)values; }
};

// y[i] = W[i] x + bias[i] of 1 to 8 tokens, for matrices of one kind of numbers with equally many columns.
// x: [tokens, columns], of that kind; y[i]: [tokens, rows], of that kind, or float32 if `wide`.
extern "C" void multiply(const Matrix* w, int count, const uint16_t* x, int tokens, void* const* y, int wide, int threads);

constexpr int GROUP = 32;  // columns of a step of that product
constexpr int BYTES = 64;  // and of one with int8 values

namespace {

constexpr struct Places {  // for each byte of a mask: the places of its bits, the lowest first
  alignas(64) uint8_t of[256][8] = {};
  constexpr Places() {
    for (int byte = 0; byte < 256; byte++)
      for (int bit = 0, next = 0; bit < 8; bit++)
        if (byte >> bit & 1) of[byte][next++] = bit;
  }
} places;

#if !defined(__AVX512VBMI2__)  // AVX2 and NEON put values where the bits of a byte are by a table of shuffles
const struct Shuffles {  // for each byte of a mask: from where its eight places take their bytes; 0x80 is a zero
  alignas(64) uint8_t wide[256][32] = {}, narrow[256][16] = {};  // wide: as float32, whose upper half a bfloat16 is
  uint8_t bytes[256][8];
  Shuffles() {  // not constexpr: g++ would find its places by slower instructions, a tenth of a product's time
    for (int byte = 0; byte < 256; byte++) {
      for (uint8_t& from : wide[byte]) from = 0x80;
      for (uint8_t& from : narrow[byte]) from = 0x80;
      for (int place = 0, next = 0; place < 8; place++) {
        bytes[byte][place] = byte >> place & 1 ? next : 0x80;
        if (byte >> place & 1) {
          for (int i = 0; i < 2; i++) narrow[byte][2 * place + i] = wide[byte][4 * place + 2 + i] = 2 * next + i;
          next++;
        }
      }
    }
  }
} shuffles;
#endif

}  // namespace

// An instruction set gives, in a namespace without a name, since the same names stand for other code in another:
//   Vector, LANES                     float32s and their number; operators are the compiler's
//   broadcast, multiply_add(a, b, c), multiply_subtract, total     a * b + c and c - a * b, rounded once; the sum of all
//   half_to_float, float_to_half      float16 in 16 bits
//   to_floats<HALF>(from, to)         eight numbers; to_halves(from, to): the other way, to float16
//   squeeze(from, to)                 those of eight float32s that are not 0, to the front; returns their mask
//   transpose(from, apart, to, apart) four rows of four
//   Raw, load, store, expand          GROUP weights of 16 bits, and those put where the bits of a mask are
//   PARTS<HALF>, widen, spread        vectors that such a step becomes; widened; expanded and widened, a part at a time
//   multiply_add<HALF>                of two parts
//   TOGETHER<M>, split(columns, tokens)   packed rows at once for M tokens; tokens at once
//   Bytes, load_bytes, store_bytes, expand_bytes   BYTES weights of 8 bits, and those put where the bits of a mask are
//   offsets(x, to), dot_bytes(Bytes, x, offsets)   16 numbers about BYTES int8; LANES sums of products with these
#if defined(__aarch64__)
#include "neon.h"
#elif defined(__AVX512VBMI2__)
#include "avx512.h"
#elif defined(__AVX2__)
#include "avx2.h"
#else
#error "needs AVX-512 VBMI2, AVX2 or NEON"
#endif

namespace {

inline uint64_t pair(const uint32_t* words) {
  uint64_t bits;
  memcpy(&bits, words, 8);
  return bits;
}

template <bool HALF>
inline float to_float(uint16_t v) {
  if (HALF) return half_to_float(v);
  const uint32_t bits = uint32_t(v) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
inline uint16_t upper_half(float f) {  // bfloat16 of what is no NaN: to nearest, ties to even
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
template <bool HALF>
inline uint16_t from_float(float f) {
  return HALF ? float_to_half(f) : f == f ? upper_half(f) : 0x7fc0;
}

// A row of a packed or int8 matrix: words, `apart` numbers from one to the next.
template <bool HALF>
inline void unpack_row(const Matrix& w, int64_t row, uint16_t* to, int64_t apart) {
  const uint32_t* mask = w.mask + row * w.words;
  if (!w.scales) {
    const uint16_t* v = w.values + w.starts[row];
    for (int64_t g = 0; g < w.words; g++, to += apart) {
      __builtin_prefetch((const char*)v + 2048);
      store(expand(mask[g], v), to);
      v += __builtin_popcount(mask[g]);
    }
    return;
  }
  const int8_t* v = w.bytes() + (w.mask ? w.starts[row] : row * w.words * GROUP);
  for (int64_t g = 0; g < w.words; g += 2) {
    alignas(64) int8_t q[BYTES];
    __builtin_prefetch(v + 2048);
    store_bytes(w.mask ? expand_bytes(pair(mask + g), v) : load_bytes(v), q);
    v += w.mask ? __builtin_popcountll(pair(mask + g)) : BYTES;
    const float scale = to_float<HALF>(w.scales[(row * w.words + g) / 2]);
    float numbers[BYTES];
    uint16_t rounded[BYTES];
    for (int i = 0; i < BYTES; i++) numbers[i] = q[i] * scale;
    for (int i = 0; HALF && i < BYTES; i += 8) to_halves(numbers + i, rounded + i);
    for (int i = 0; !HALF && i < BYTES; i++) rounded[i] = upper_half(numbers[i]);
    for (int word = 0; word < 2; word++, to += apart) memcpy(to, rounded + word * GROUP, GROUP * 2);
  }
}

template <class T>
T* aligned(void* p) {  // to 64 bytes, as vectors want it: their buffers are as much larger
  return (T*)((uintptr_t(p) + 63) & ~uintptr_t(63));
}

}  // namespace
