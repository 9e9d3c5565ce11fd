// Table of shuffles that put the next values where the bits of a byte are; for AVX2 and NEON.
#pragma once
#include <cstdint>

namespace {

const struct Shuffles {  // for each byte of a mask: from where its eight places take their bytes; 0x80 is a zero
  alignas(64) uint8_t wide[256][32] = {}, narrow[256][16] = {};  // wide: as float32, whose upper half a bfloat16 is
  Shuffles() {  // not constexpr: g++ would find its places by slower instructions, a tenth of a product's time
    for (int byte = 0; byte < 256; byte++) {
      for (uint8_t& from : wide[byte]) from = 0x80;
      for (uint8_t& from : narrow[byte]) from = 0x80;
      for (int place = 0, next = 0; place < 8; place++)
        if (byte >> place & 1) {
          for (int i = 0; i < 2; i++) narrow[byte][2 * place + i] = wide[byte][4 * place + 2 + i] = 2 * next + i;
          next++;
        }
    }
  }
} shuffles;

}  // namespace
