// Check of lib/sparse's C++ for every instruction set in one program, which run.sh boots on an emulated CPU: products
// against float64, sums and SparseGPT's solver bit for bit against plain loops, tokens against AVX2's.
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#include <sys/mount.h>
#include <sys/reboot.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

using Halves = std::vector<uint16_t>;
using Floats = std::vector<float>;

struct Matrix {  // as in kernel.h, which would include the intrinsics of one instruction set
  const uint32_t* mask;
  const uint16_t* values;
  const int64_t* starts;
  const uint16_t* bias;
  int64_t rows, columns, words, half;
  const uint16_t* scales = nullptr;
};
struct Block {  // as in step.cpp
  const Matrix *qkv, *o, *gate_up, *down;
  const uint16_t *before, *after;
  double before_eps, after_eps, scale;
  int64_t width, heads, keys, size, inner;
};
struct Decoder {
  const Block* blocks;
  const Matrix* embedding;
  const uint16_t* norm;
  const Matrix* head;
  double eps;
  int64_t count, width, half;
};

#define FUNCTIONS(F)                                                                                                  \
  F(multiply, (const Matrix*, int, const uint16_t*, int, void* const*, int, int))                                     \
  F(unpack, (const Matrix*, const int64_t*, int64_t, uint16_t*, int))                                                 \
  F(multiply_many, (const Matrix*, const float*, int64_t, float*, int))                                               \
  F(multiply_tiles, (const Matrix*, const uint16_t*, int64_t, uint16_t*, int))                                        \
  F(solve_block, (float*, const float*, const void*, int64_t, int64_t, int64_t, float*, int))                         \
  F(decode, (const Decoder*, const int64_t*, int, const uint16_t*, uint16_t*, int64_t, int64_t, uint16_t*, int))

#if defined(__x86_64__)
#define DECLARE(name, arguments)                                                       \
  void avx2_##name arguments, avx512_##name arguments, avx512bf16_##name arguments, amx_##name arguments;
#else
#define DECLARE(name, arguments) void neon_##name arguments;
#endif
extern "C" {
FUNCTIONS(DECLARE)
int amx_request_tiles();
}
struct Level {
  const char* name;
#define MEMBER(name, arguments) void(*name) arguments;
  FUNCTIONS(MEMBER)
};
#if defined(__x86_64__)
#define AVX2(name, arguments) avx2_##name,
#define AVX512(name, arguments) avx512_##name,
#define AVX512BF16(name, arguments) avx512bf16_##name,
#define AMX(name, arguments) amx_##name,
const Level LEVELS[] = {{"avx2", FUNCTIONS(AVX2)},
                        {"avx512", FUNCTIONS(AVX512)},
                        {"avx512bf16", FUNCTIONS(AVX512BF16)},
                        {"amx", FUNCTIONS(AMX)}};

std::vector<bool> present() {  // which of LEVELS this CPU has
  unsigned a = 0, b = 0, c = 0, d = 0;
  __get_cpuid_count(7, 0, &a, &b, &c, &d);
  const bool vbmi2 = b >> 16 & 1 && c >> 6 & 1, tiles = d >> 22 & d >> 24 & 1;
  __get_cpuid_count(7, 1, &a, &b, &c, &d);
  return {true, vbmi2, vbmi2 && a >> 5 & 1, vbmi2 && tiles && amx_request_tiles()};
}
#else
#define NEON(name, arguments) neon_##name,
const Level LEVELS[] = {{"neon", FUNCTIONS(NEON)}};

std::vector<bool> present() { return {true}; }
#endif

std::mt19937 draw(1);
long checks, failures;

float normal() {
  static std::normal_distribution<float> distribution;
  return distribution(draw);
}

void expect(bool right, const char* level, const char* what, int64_t rows, int64_t columns, int tokens) {
  checks++;
  if (!right && failures++ < 20)
    printf("FAIL %s: %s %dx%d, %d\n", level, what, int(rows), int(columns), tokens);
}

float decoded(uint16_t v, bool half) {
  float f;
  if (!half) {
    const uint32_t bits = uint32_t(v) << 16;
    memcpy(&f, &bits, 4);
    return f;
  }
  const int exponent = v >> 10 & 31, mantissa = v & 1023;
  f = exponent ? std::ldexp(1 + mantissa / 1024.f, exponent - 15) : std::ldexp(mantissa / 1024.f, -14);
  return v >> 15 ? -f : f;
}
uint16_t encoded(float f, bool half) {  // cuts bits off; numbers too small for float16 become zero
  uint32_t bits;
  memcpy(&bits, &f, 4);
  if (!half) return bits >> 16;
  const int exponent = int(bits >> 23 & 255) - 127 + 15;
  return uint16_t(bits >> 31 << 15 | (exponent > 0 ? exponent << 10 | (bits >> 13 & 1023) : 0));
}
Halves randoms(int64_t count, bool half, float mean = 0, float spread = 1) {
  Halves made(count + 64);  // the kernel may read 64 more
  for (int64_t i = 0; i < count; i++) made[i] = encoded(mean + spread * normal(), half);
  return made;
}

std::vector<int64_t> upwards(int64_t count) {
  std::vector<int64_t> made(count);
  std::iota(made.begin(), made.end(), 0);
  return made;
}

struct Weight {  // [rows, columns] with a fraction of zeros, dense and packed
  Halves dense, values, bias;
  std::vector<uint32_t> mask;
  std::vector<int64_t> starts{0};
  Matrix packed, plain;
  Weight(int64_t rows, int64_t columns, double zeros, bool half, bool biased = false)
      : dense(rows * columns + 64), bias(randoms(rows, half)), mask(rows * ((columns + 31) / 32)) {
    const int64_t words = (columns + 31) / 32;
    std::uniform_real_distribution<double> uniform(0, 1);
    for (int64_t r = 0; r < rows; r++, starts.push_back(values.size()))
      for (int64_t c = 0; c < columns; c++)
        if (uniform(draw) >= zeros) {
          uint16_t value = encoded(0.2f * normal(), half);
          if (!(value & 0x7fff)) value = encoded(0.1f, half);
          values.push_back(dense[r * columns + c] = value);
          mask[r * words + c / 32] |= 1u << c % 32;
        }
    values.resize(values.size() + 64);
    const uint16_t* b = biased ? bias.data() : nullptr;
    packed = {mask.data(), values.data(), starts.data(), b, rows, columns, words, half};
    plain = {nullptr, dense.data(), nullptr, b, rows, columns, words, half};
  }
  Weight(const Weight&) = delete;
};

// int8 values with a scale for 64 columns of a row, packed and dense. Few tokens: numbers that int8 holds exactly are
// within 3e-6, as below. Many: a float32 sum in the order of the columns, bit for bit. Rows and tiles: rounded once.
void check_int8(const Level& level, int64_t rows, int64_t columns, double zeros, bool half) {
  const int64_t steps = (columns + 63) / 64, padded = steps * 64;
  std::vector<int8_t> dense(rows * padded), packed;
  std::vector<uint32_t> mask(rows * steps * 2);
  std::vector<int64_t> starts{0};
  Halves scales = randoms(rows * steps, half, 0.02f, 0.001f), bias = randoms(rows, half);
  Floats weight(rows * columns);
  std::uniform_real_distribution<double> uniform(0, 1);
  for (int64_t r = 0; r < rows; r++, starts.push_back(packed.size()))
    for (int64_t c = 0; c < columns; c++)
      if (uniform(draw) >= zeros) {
        const int8_t q = int8_t(draw() % 127 + 1) * (draw() % 2 ? 1 : -1);
        packed.push_back(dense[r * padded + c] = q);
        mask[r * steps * 2 + c / 32] |= 1u << c % 32;
        weight[r * columns + c] = q * decoded(scales[r * steps + c / 64], half);
      }
  packed.resize(packed.size() + 64), dense.resize(dense.size() + 64);
  const auto* values = (const uint16_t*)packed.data();
  const Matrix matrices[] = {
      {mask.data(), values, starts.data(), bias.data(), rows, columns, steps * 2, half, scales.data()},
      {nullptr, (const uint16_t*)dense.data(), nullptr, bias.data(), rows, columns, steps * 2, half, scales.data()}};
  const double unit = half ? 1. / 2048 : 1. / 256;
  for (const Matrix& matrix : matrices) {
    Halves out(rows * padded);
    level.unpack(&matrix, upwards(rows).data(), rows, out.data(), 1);
    for (int64_t i = 0; i < rows * padded; i++) {
      const double wanted = i % padded < columns ? weight[i / padded * columns + i % padded] : 0;
      const double off = std::fabs(decoded(out[i], half) - wanted);
      expect(off <= unit * std::fabs(wanted) + 1e-7, level.name, "int8 rows", rows, columns, 0);
    }
    for (int tokens : {1, 3, 8, 40}) {
      Halves x(tokens * columns + 64), rounded(tokens * rows);
      Floats y(tokens * rows, NAN), wide(x.size());
      for (int64_t i = 0; i < tokens * columns; i++)
        x[i] = encoded(wide[i] = (i % columns % 64 ? int(draw() % 255) - 127 : 127) / 32.f, half);
      void* places[] = {y.data()};
      const bool tiles = tokens > 8 && !half && level.name == std::string("amx"), sums = tokens > 8 && matrix.mask;
      if (tokens <= 8) level.multiply(&matrix, 1, x.data(), tokens, places, 1, 1);
      if (sums) level.multiply_many(&matrix, wide.data(), tokens, y.data(), 1);
      if (tiles) level.multiply_tiles(&matrix, x.data(), tokens, rounded.data(), 1);
      for (int64_t i = 0; i < tokens * rows; i++) {
        double sum = decoded(bias[i % rows], half), size = std::fabs(sum);
        float in_order = 0;
        for (int64_t c = 0; c < columns; c++) {
          const float a = weight[i % rows * columns + c], b = wide[i / rows * columns + c];
          sum += double(a) * b, size += std::fabs(double(a) * b);
          if (a != 0) in_order = std::fma(a, b, in_order);
        }
        if (tokens <= 8) expect(std::fabs(y[i] - sum) <= 3e-6 * size, level.name, "int8", rows, columns, tokens);
        if (sums) expect(y[i] == in_order, level.name, "int8, many", rows, columns, tokens);
        const double off = tiles ? std::fabs(decoded(rounded[i], half) - sum) : 0;  // weights are rounded, and the sum
        expect(off <= 2 * unit * size, level.name, "int8, tiles", rows, columns, tokens);
      }
    }
  }
}

// Up to eight tokens: within 3e-6 of the sum of all |w x|, as tests/sparse/test_layers.py has it.
void check_few(const Level& level, const Weight& w, bool half) {
  const int64_t rows = w.plain.rows, columns = w.plain.columns;
  for (int tokens = 1; tokens <= 8; tokens++) {
    const Halves x = randoms(tokens * columns, half);
    for (const Matrix* matrix : {&w.packed, &w.plain}) {
      Floats y(tokens * rows);
      void* out[] = {y.data()};
      level.multiply(matrix, 1, x.data(), tokens, out, 1, 1);
      for (int64_t i = 0; i < tokens * rows; i++) {
        double sum = decoded(w.bias[i % rows], half), size = std::fabs(sum);
        for (int64_t c = 0; c < columns; c++) {
          const double a = decoded(w.dense[i % rows * columns + c], half), b = decoded(x[i / rows * columns + c], half);
          sum += a * b, size += std::fabs(a * b);
        }
        const char* what = matrix->mask ? "packed" : "dense";
        expect(std::fabs(y[i] - sum) <= 3e-6 * size, level.name, what, rows, columns, tokens);
      }
    }
  }
}

// Many tokens: the bits of a float32 sum in the order of the columns, products and additions fused.
void check_many(const Level& level, const Weight& w, bool half) {
  const int64_t rows = w.plain.rows, columns = w.plain.columns;
  Floats weight(rows * columns);
  for (int64_t i = 0; i < rows * columns; i++) weight[i] = decoded(w.dense[i], half);
  for (int tokens : {1, 17, 96, 97, 130}) {
    Floats x(tokens * columns), packed(tokens * rows), dense(tokens * rows);
    for (float& v : x) v = normal();
    level.multiply_many(&w.packed, x.data(), tokens, packed.data(), 1);
    const Matrix plain{nullptr, (const uint16_t*)weight.data(), nullptr, nullptr, rows, columns, 0, 0};
    level.multiply_many(&plain, x.data(), tokens, dense.data(), 1);
    for (int64_t i = 0; i < tokens * rows; i++) {
      float sum = 0;
      for (int64_t c = 0; c < columns; c++)
        if (const float v = weight[i % rows * columns + c]) sum = std::fma(v, x[i / rows * columns + c], sum);
      expect(packed[i] == sum, level.name, "many, packed", rows, columns, tokens);
      expect(dense[i] == sum, level.name, "many, float32", rows, columns, tokens);
    }
  }
}

// Many tokens on AMX: as check_few, and rounded to bfloat16 at the end.
void check_tiles(const Level& level, const Weight& w) {
  const int64_t rows = w.plain.rows, columns = w.plain.columns;
  for (int tokens : {1, 16, 33, 130}) {
    const Halves x = randoms(tokens * columns, false);
    Halves y(tokens * rows + 1, 7);
    level.multiply_tiles(&w.packed, x.data(), tokens, y.data(), 1);
    for (int64_t i = 0; i < tokens * rows; i++) {
      double sum = decoded(w.bias[i % rows], false), size = std::fabs(sum);
      for (int64_t c = 0; c < columns; c++) {
        const double a = decoded(w.dense[i % rows * columns + c], false), b = decoded(x[i / rows * columns + c], false);
        sum += a * b, size += std::fabs(a * b);
      }
      const double off = std::fabs(decoded(y[i], false) - sum);
      expect(off <= 3e-6 * size + std::fabs(sum) / 256, level.name, "tiles", rows, columns, tokens);
    }
    expect(y.back() == 7, level.name, "beyond the tiles", rows, columns, tokens);
  }
}

void check_products(const Level& level, bool half) {
  const int shapes[][2] = {{7, 31}, {33, 200}, {1, 64}, {5, 8}, {40, 700}, {130, 96}, {3, 33}};
  for (const auto& [rows, columns] : shapes)
    for (double zeros : {0., 0.5, 0.9, 1.}) {
      const Weight w(rows, columns, zeros, half, true);
      const int64_t padded = w.packed.words * 32;
      Halves out(rows * padded);
      level.unpack(&w.packed, upwards(rows).data(), rows, out.data(), 1);
      for (int64_t i = 0; i < rows * padded; i++) {
        const uint16_t wanted = i % padded < columns ? w.dense[i / padded * columns + i % padded] : 0;
        expect(out[i] == wanted, level.name, "unpack", rows, columns, 0);
      }
      check_few(level, w, half);
      check_many(level, w, half);
      if (level.name == std::string("amx") && !half) check_tiles(level, w);
      check_int8(level, rows, columns, zeros, half);
    }
}

// The definition of a block's solution, one output after another.
void solve_plainly(Floats& block, const Floats& upper, Floats& gone, const std::vector<int32_t>& removed, int columns,
                   int outputs, int group, Floats& errors) {
  for (int o = 0; o < outputs; o++) {
    const auto w = [&](int i) -> float& { return block[i * outputs + o]; };
    const auto score = [&](int i) {
      const float pivot = upper[i * columns + i];
      return w(i) * w(i) / (pivot * pivot);
    };
    for (int i = 0; i < columns; i++) {
      for (int a = i; group && i % group == 0 && a < i + group; a++) {
        int rank = 0;  // of equal ones the upper are lower
        for (int b = i; b < i + group; b++) rank += b < a ? score(b) <= score(a) : b > a && score(b) < score(a);
        gone[a * outputs + o] = rank < removed[o];
      }
      const float taken = w(i) * gone[i * outputs + o], error = taken / upper[i * columns + i];
      w(i) -= taken;
      errors[i * outputs + o] = error;
      for (int j = i + 1; j < columns; j++) w(j) = std::fma(-upper[i * columns + j], error, w(j));
    }
  }
}

void check_solver(const Level& level) {
  const int shapes[][2] = {{128, 40}, {127, 3}, {20, 70}, {40, 96}};
  for (int group : {0, 2, 4, 8, 5})
    for (const auto& [most, outputs] : shapes) {
      const int columns = group ? most - most % group : most;
      Floats block(columns * outputs), upper(columns * columns), gone(block.size()), errors(block.size());
      std::vector<int32_t> removed(outputs);
      for (float& v : block) v = normal();
      for (float& v : gone) v = normal() > 0;
      for (int32_t& v : removed) v = group ? draw() % (group + 1) : 0;
      for (int i = 0; i < columns; i++)
        for (int j = i; j < columns; j++)
          upper[i * columns + j] = i == j ? 0.5f + std::fabs(normal()) : 0.1f * normal();
      Floats expected = block, wanted(block.size());
      const void* drop = group ? (const void*)removed.data() : gone.data();
      level.solve_block(block.data(), upper.data(), drop, columns, outputs, group, errors.data(), 1);
      solve_plainly(expected, upper, gone, removed, columns, outputs, group, wanted);
      expect(block == expected && errors == wanted, level.name, "solver", columns, outputs, group);
    }
}

// Two instruction sets add in different orders, and may round a result differently: by a few units in the last place of
// the largest number.
void check_tokens(const Level& level, bool half) {
  const int64_t width = 96, heads = 6, keys = 2, size = 16, inner = 200, length = 37, most = 40, vocabulary = 70;
  const double zeros = 0.6, unit = half ? 1. / 1024 : 1. / 128;
  const Weight q(heads * size, width, zeros, half), k(keys * size, width, zeros, half);
  const Weight v(keys * size, width, zeros, half), o(width, heads * size, zeros, half), down(width, inner, zeros, half);
  const Weight gate(inner, width, zeros, half), up(inner, width, zeros, half), head(vocabulary, width, 0, half, true);
  const Matrix qkv[] = {q.packed, k.packed, v.packed}, gate_up[] = {gate.packed, up.packed};
  const Halves before = randoms(width, half, 1, 0.1f), after = randoms(width, half, 1, 0.1f);
  const Block block{qkv, &o.packed, gate_up, &down.packed, before.data(), after.data(), 1e-5, 1e-5, 0.25,
                    width, heads, keys, size, inner};
  const Block blocks[] = {block, block};
  const Weight table(vocabulary, width, 0, half);
  const Decoder decoders[] = {{blocks, &table.plain, before.data(), &head.plain, 1e-5, 2, width, half},
                              {blocks, &table.packed, nullptr, nullptr, 0, 1, width, half}};
  for (const Decoder& decoder : decoders)
    for (int tokens : {1, 2, 3, 5, 8}) {
      const Halves angles = randoms(2 * most * size, half);
      const Halves kept = randoms(2 * decoder.count * tokens * keys * most * size, half);
      std::vector<int64_t> places;  // rows of the table and of the angles, and first keys
      for (int step : {7, 4, 3})
        for (int t = 0; t < tokens; t++) places.push_back(step * t);
      std::vector<Halves> first;  // AVX2's
      for (const Level* now : {&LEVELS[0], &level}) {
        std::vector<Halves> made{kept, Halves(tokens * (decoder.head ? vocabulary : width))};
        now->decode(&decoder, places.data(), tokens, angles.data(), made[0].data(), most, length, made[1].data(), 1);
        for (size_t part = 0; part < first.size(); part++) {
          double largest = 0;
          for (uint16_t number : first[part]) largest = std::max<double>(largest, std::fabs(decoded(number, half)));
          for (size_t i = 0; i < made[part].size(); i++) {
            const double off = std::fabs(decoded(made[part][i], half) - decoded(first[part][i], half));
            expect(off <= 4 * unit * largest, level.name, "token", part, i, tokens);
          }
        }
        if (first.empty()) first = made;
      }
    }
}

int main() {
  const bool booted = getpid() == 1;
  if (booted) {
    mount("dev", "/dev", "devtmpfs", 0, nullptr);
    if (freopen("/dev/ttyS0", "w", stdout)) setvbuf(stdout, nullptr, _IOLBF, 0);
  }
  const std::vector<bool> has = present();
  for (size_t i = 0; i < has.size(); i++) {
    if (!has[i]) continue;
    for (bool half : {false, true}) check_products(LEVELS[i], half), check_tokens(LEVELS[i], half);
    check_solver(LEVELS[i]);
    printf("%s: done\n", LEVELS[i].name);
  }
  printf("checks: %ld, failures: %ld\n", checks, failures);
  fflush(stdout);
  if (booted) sleep(1), reboot(RB_POWER_OFF);
  return failures != 0;
}
