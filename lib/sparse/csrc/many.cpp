// Products y = W x of many tokens that skip the zeros of W: prompts, and passes through a block that was pruned.
//
// The tokens are the lanes. 96 of them are a panel, [columns, 96]: each weight other than zero is multiplied with its
// column's row of the panel and added to the sums of its row, which the registers hold. So a sum is that of the
// weights other than zero in the order of the columns, each product and addition rounded once (FMA), in float32: the
// same bits on every CPU, and for any number of tokens or threads.
#include "kernel.h"

#include <algorithm>
#include <array>
#include <memory>
#include <utility>

namespace {

// Tokens: 12 sums in AVX2's 16 registers, 24 in NEON's 32, enough to hide the latency of an addition.
constexpr int PANEL = 96;
constexpr int CHUNK = 64;      // columns at a time: 24 KB of the panel, which stay in L1
constexpr int ROWS = 64;       // rows at a time: their sums, and what they are multiplied with, stay in L2
constexpr int SLAB = 8;        // panels at a time: how often the weights are read again
constexpr int MOST = PANEL / LANES;

struct Kept {  // the weights other than zero of ROWS rows, row by row; eight at a time are written
  int64_t columns, chunks;
  std::unique_ptr<uint32_t[]> at{new uint32_t[ROWS * columns + 8]};  // of their columns in a panel's chunk, in bytes
  std::unique_ptr<float[]> value{new float[ROWS * columns + 8]};
  std::unique_ptr<int32_t[]> ends{new int32_t[ROWS * (chunks + 1)]};  // [row, chunk + 1], of each row's chunks in them
};

struct Dense {  // float32, zeros included
  const float* weight;
  int64_t columns;
  const float* row = nullptr;
  void start(int64_t r) { row = weight + r * columns; }
  // Write those of eight columns to `value`, which has room for eight, and return their mask.
  int take(int64_t group, float* value) {
    float padded[8] = {};
    const float* from = row + group * 8;
    if (group * 8 + 8 > columns) from = (const float*)memcpy(padded, from, (columns - group * 8) * 4);
    return squeeze(from, value);
  }
};

template <bool HALF>
struct Packed {
  const Matrix& w;
  const uint8_t* mask = nullptr;
  const uint16_t* next = nullptr;
  void start(int64_t r) { mask = (const uint8_t*)(w.mask + r * w.words), next = w.values + w.starts[r]; }
  int take(int64_t group, float* value) {
    to_floats<HALF>(next, value);  // there are 32 more than needed
    const int64_t left = w.columns - group * 8;  // a bit beyond the last column would lead out of the panel
    const int byte = mask[group] & (left < 8 ? (1 << left) - 1 : 255);
    next += __builtin_popcount(mask[group]);
    return byte;
  }
};

template <bool HALF>
struct Int8 {  // packed
  const Matrix& w;
  const uint8_t* mask = nullptr;
  const int8_t* next = nullptr;
  const uint16_t* scales = nullptr;
  void start(int64_t r) {
    mask = (const uint8_t*)(w.mask + r * w.words), next = w.bytes() + w.starts[r], scales = w.scales + r * w.words / 2;
  }
  int take(int64_t group, float* value) {
    const float scale = to_float<HALF>(scales[group / 8]);
    for (int i = 0; i < 8; i++) value[i] = next[i] * scale;
    const int64_t left = w.columns - group * 8;  // as above
    const int byte = mask[group] & (left < 8 ? (1 << left) - 1 : 255);
    next += __builtin_popcount(mask[group]);
    return byte;
  }
};

template <class Source>
void collect(Source source, int64_t first, int count, int64_t columns, int stride, Kept& kept) {
  int32_t n = 0, *end = kept.ends.get();
  for (int r = 0; r < count; r++) {
    source.start(first + r);
    for (int64_t group = 0; group * 8 < columns; group++) {
      if (group % (CHUNK / 8) == 0) *end++ = n;
      const int byte = source.take(group, &kept.value[n]);
      const uint32_t column = uint32_t(group * 8 % CHUNK);
      for (int i = 0; i < 8; i++) kept.at[n + i] = (places.of[byte][i] + column) * stride;
      n += __builtin_popcount(byte);
    }
    *end++ = n;
  }
}

// Sums [count, K vectors] of `count` rows for the tokens of a panel.
template <int K>
void multiply_panel(const Kept& kept, int count, int64_t chunks, const float* panel, Vector* sums) {
  const uint32_t* places = kept.at.get();
  const float* values = kept.value.get();
  for (int64_t c = 0; c < chunks; c++) {
    const char* part = (const char*)(panel + c * CHUNK * K * LANES);
    for (int r = 0; r < count; r++) {
      const int32_t *ends = &kept.ends[r * (chunks + 1) + c], end = ends[1];
      Vector sum[K];
      for (int i = 0; i < K; i++) sum[i] = c ? sums[r * K + i] : Vector{};
      for (int64_t n = ends[0]; n < end; n++) {
        const char* at = part + places[n];
        asm("" : "+r"(at));  // one register, so that the loads below are one operation each with the additions
        const Vector* x = (const Vector*)at;
#pragma GCC unroll 24
        for (int i = 0; i < K; i++) sum[i] = multiply_add(broadcast(values[n]), x[i], sum[i]);
      }
      for (int i = 0; i < K; i++) sums[r * K + i] = sum[i];
    }
  }
}
template <size_t... K>
constexpr auto panels_of(std::index_sequence<K...>) {
  return std::array{multiply_panel<K + 1>...};
}
constexpr auto PANELS = panels_of(std::make_index_sequence<MOST>());  // by vectors

// to [columns, to_stride] = the transpose of from [rows, columns], rows further apart by from_stride; four by four.
void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to, int64_t to_stride) {
  for (int64_t r = 0; r < rows; r += 4)
    for (int64_t c = 0; c < columns; c += 4) {
      if (r + 4 <= rows && c + 4 <= columns) {
        transpose(from + r * from_stride + c, from_stride, to + c * to_stride + r, to_stride);
      } else {
        for (int64_t i = r; i < std::min(r + 4, rows); i++)
          for (int64_t j = c; j < std::min(c + 4, columns); j++) to[j * to_stride + i] = from[i * from_stride + j];
      }
    }
}

template <class Source>
void product(Source source, int64_t rows, int64_t columns, const float* x, int64_t tokens, float* y, int threads) {
  // Equal panels: as few as possible, and each as narrow as that allows.
  const int64_t vectors = (tokens + LANES - 1) / LANES, panels = (vectors + MOST - 1) / MOST;
  const int64_t k = (vectors + panels - 1) / panels, width = k * LANES, size = width * columns;
  const int64_t chunks = (columns + CHUNK - 1) / CHUNK;
  const std::unique_ptr<float[]> buffer(new float[std::min<int64_t>(panels, SLAB) * size + 16]);
  float* slab = aligned<float>(buffer.get());
  // Fewer rows at a time where there are more threads than work for them.
  const int64_t height = std::min<int64_t>(ROWS, std::max<int64_t>(8, (rows / threads + 7) / 8 * 8));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Kept kept{columns, chunks};
    alignas(64) Vector sums[ROWS * MOST];
    for (int64_t start = 0; start < panels; start += SLAB) {
      const int64_t count = std::min<int64_t>(SLAB, panels - start);
      const auto here = [&](int64_t p) { return std::min(width, std::max<int64_t>(0, tokens - (start + p) * width)); };
#pragma omp for schedule(static)
      for (int64_t p = 0; p < count; p++) {
        if (here(p) < width) memset(slab + p * size, 0, size * 4);
        transpose(x + (start + p) * width * columns, columns, here(p), columns, slab + p * size, width);
      }
#pragma omp for schedule(dynamic)
      for (int64_t first = 0; first < rows; first += height) {
        const int some = int(std::min(height, rows - first));
        collect(source, first, some, columns, int(width * 4), kept);
        for (int64_t p = 0; p < count; p++) {
          PANELS[k - 1](kept, some, chunks, slab + p * size, sums);
          transpose((const float*)sums, width, some, here(p), y + (start + p) * width * rows + first, rows);
        }
      }
    }
  }
}

}  // namespace

// y = W x, W: [rows, columns] packed, or float32 if there is no mask; x: [tokens, columns] and y: [tokens, rows]
// float32. The bias is left out.
extern "C" void multiply_many(const Matrix* w, const float* x, int64_t tokens, float* y, int threads) {
  if (!w->mask) product(Dense{(const float*)w->values, w->columns}, w->rows, w->columns, x, tokens, y, threads);
  else if (w->scales && w->half) product(Int8<true>{*w}, w->rows, w->columns, x, tokens, y, threads);
  else if (w->scales) product(Int8<false>{*w}, w->rows, w->columns, x, tokens, y, threads);
  else if (w->half) product(Packed<true>{*w}, w->rows, w->columns, x, tokens, y, threads);
  else product(Packed<false>{*w}, w->rows, w->columns, x, tokens, y, threads);
}

// The same in bfloat16 on AMX, which multiplies tiles of 16 rows of 64 bytes. The 32 columns of a mask word are a row
// of such a tile: 32 rows at a time are unpacked into a panel, zeros included, and multiplied with all tokens.
#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>

namespace {

constexpr int TILE = 512;                      // numbers of one
constexpr int64_t FEW = 128, IN_L2 = 1 << 20;  // tokens at a time are as many as L2 holds, or at least a few

struct alignas(64) Config {  // of the eight tiles
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

constexpr struct Halves {  // what changes places in step s of a transposition: blocks of 2^s beside the diagonal
  alignas(64) int32_t upper[4][16] = {}, lower[4][16] = {};
  constexpr Halves() {
    for (int s = 0; s < 4; s++)
      for (int i = 0; i < 16; i++)
        upper[s][i] = i >> s & 1 ? 16 + i - (1 << s) : i, lower[s][i] = i >> s & 1 ? 16 + i : i + (1 << s);
  }
} halves;

// 16 x 16 numbers of 32 bits.
inline void transpose(__m512i* row) {
#pragma GCC unroll 4
  for (int s = 0; s < 4; s++)
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
      if (i >> s & 1) continue;
      const __m512i a = row[i], b = row[i + (1 << s)];
      row[i] = _mm512_permutex2var_epi32(a, _mm512_load_si512(halves.upper[s]), b);
      row[i + (1 << s)] = _mm512_permutex2var_epi32(a, _mm512_load_si512(halves.lower[s]), b);
    }
}

// Tiles [words] of 16 tokens as a second factor: pairs of columns x tokens. Zeros are beyond the last column and token.
void arrange(const uint16_t* x, int64_t tokens, const Matrix& w, uint16_t* to) {
  for (int64_t g = 0; g < w.words; g++, to += TILE) {
    const int64_t count = std::min<int64_t>(GROUP, std::max<int64_t>(0, w.columns - g * GROUP));
    __m512i row[16];
#pragma GCC unroll 16
    for (int t = 0; t < 16; t++)
      row[t] = _mm512_maskz_loadu_epi16(t < tokens ? uint32_t((1ull << count) - 1) : 0, x + t * w.columns + g * GROUP);
    transpose(row);
    for (int pair = 0; pair < 16; pair++) _mm512_store_si512(to + pair * GROUP, row[pair]);
  }
}

// The sums of 16 rows of W x 16 tokens, and the rows' bias, to `count` of each token's products, as from_float rounds.
inline void deliver(const float* sums, __m512 bias, int64_t tokens, int64_t count, uint16_t* y, int64_t apart) {
  __m512i row[16];
#pragma GCC unroll 16
  for (int r = 0; r < 16; r++) row[r] = _mm512_load_si512(sums + r * 16);
  transpose(row);
#pragma GCC unroll 16
  for (int t = 0; t < 16; t++) {
    const __m512 v = _mm512_castsi512_ps(row[t]) + bias;
    const __m512i bits = _mm512_castps_si512(v), odd = _mm512_srli_epi32(_mm512_slli_epi32(bits, 15), 31);
    __m512i up = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff)), 16);
    up = _mm512_mask_mov_epi32(up, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
    if (t < tokens)
      _mm256_mask_storeu_epi16(y + t * apart, __mmask16(0xffff >> (16 - count)), _mm512_cvtepi32_epi16(up));
  }
}

// Rows `row` to `row` + 31 of W, to y [tokens, rows]; panel: two rows of tiles.
void multiply_panel(const Matrix& w, int64_t row, const uint16_t* x, int64_t tokens, uint16_t* panel, uint16_t* y) {
  alignas(64) float bias[32] = {};
  for (int r = 0; r < 32; r++) {
    // What is in the place of rows beyond the last is not delivered.
    unpack_row<false>(w, std::min(row + r, w.rows - 1), panel + r / 16 * w.words * TILE + r % 16 * GROUP, TILE);
    if (w.bias && row + r < w.rows) bias[r] = to_float<false>(w.bias[row + r]);
  }
  for (int64_t t = 0; t < tokens; t += 32) {
    alignas(64) float sums[4][256];
    const uint16_t *a = panel, *b = x + t * w.words * GROUP;
    const int64_t next = w.words * TILE;
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);  // macros of statements
    for (int64_t g = 0; g < w.words; g++, a += TILE, b += TILE) {
      _tile_loadd(4, a, 64); _tile_loadd(5, a + next, 64); _tile_loadd(6, b, 64); _tile_loadd(7, b + next, 64);
      _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums[0], 64); _tile_stored(1, sums[1], 64);
    _tile_stored(2, sums[2], 64); _tile_stored(3, sums[3], 64);
    for (int i = 0; i < 4; i++) {
      const int64_t first = i / 2 * 16, token = t + i % 2 * 16, count = std::min<int64_t>(16, w.rows - row - first);
      if (count > 0)
        deliver(sums[i], _mm512_load_ps(bias + first), tokens - token, count, y + token * w.rows + row + first, w.rows);
    }
  }
}

}  // namespace

// Whether the system lets this process use tiles; before the first product.
extern "C" int request_tiles() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

// y [tokens, rows] = x [tokens, columns] W' + bias of a packed matrix, all bfloat16; sums are float32.
extern "C" void multiply_tiles(const Matrix* w, const uint16_t* x, int64_t tokens, uint16_t* y, int threads) {
  const int64_t most = std::max(FEW, IN_L2 / (w->words * 64) / 32 * 32), width = w->words * TILE;
  const std::unique_ptr<uint16_t[]> buffer(new uint16_t[(std::min(most, tokens) + 31) / 32 * 2 * width + 32]);
  uint16_t* arranged = aligned<uint16_t>(buffer.get());
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const Config config;
    _tile_loadconfig(&config);  // torch's are other ones, in every thread
    const std::unique_ptr<uint16_t[]> room(new uint16_t[2 * width + 32]);
    for (int64_t first = 0; first < tokens; first += most) {
      const int64_t count = std::min(most, tokens - first);
#pragma omp for schedule(static)
      for (int64_t t = 0; t < (count + 31) / 32 * 32; t += 16)
        arrange(x + (first + t) * w->columns, count - t, *w, arranged + t / 16 * width);
#pragma omp for schedule(static)
      for (int64_t row = 0; row < w->rows; row += 32)
        multiply_panel(*w, row, arranged, count, aligned<uint16_t>(room.get()), y + first * w->rows);
    }
    _tile_release();
  }
}
#else
extern "C" int request_tiles() { return 0; }
extern "C" void multiply_tiles(const Matrix*, const uint16_t*, int64_t, uint16_t*, int) {}
#endif
