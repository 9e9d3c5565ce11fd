// SparseGPT's step for a block of columns on the CPU: what lib/pruning/sparsegpt.py's solve_block does, for a tile of outputs
// at a time, which stays in the first-level cache while the columns are zeroed and repaired one after another.
#include "kernel.h"

#include <algorithm>
#include <memory>

namespace {

constexpr int TILE = LANES == 4 ? 16 : 32, VECTORS = TILE / LANES;  // outputs
typedef float Tile[TILE];

// 1 for each output's `removed` lowest scores among `group` columns of w, else 0; of equal ones the upper are lower.
void lowest(const Tile* w, const float* upper, int64_t stride, int64_t group, const int32_t* removed, int count,
            Tile* score, Tile* gone) {
  for (int64_t a = 0; a < group; a++) {
    const float pivot = upper[a * (stride + 1)];
    for (int o = 0; o < TILE; o++) score[a][o] = w[a][o] * w[a][o] / (pivot * pivot);
  }
  for (int64_t a = 0; a < group; a++) {
    int32_t rank[TILE] = {};
    for (int64_t b = 0; b < group; b++)
      for (int o = 0; o < TILE; o++)
        rank[o] += b < a ? score[b][o] <= score[a][o] : b > a && !(score[a][o] <= score[b][o]);
    for (int o = 0; o < TILE; o++) gone[a][o] = o < count && rank[o] < removed[o];
  }
}

// Zero and repair the columns `i` to i + S - 1 of w in turn, then take all their errors from each later column at once.
template <int S>
void step(Tile* w, const float* upper, int64_t columns, int64_t i, const Tile* mask, Tile* errors) {
  Vector e[S][VECTORS];
  for (int s = 0; s < S; s++) {
    const float *gone = mask[i + s], *row = upper + (i + s) * columns;
    float *now = w[i + s], *error = errors[i + s];
    for (int o = 0; o < TILE; o++) {
      error[o] = now[o] * gone[o];
      now[o] -= error[o];  // w - w is 0, w - 0 is w
      error[o] /= row[i + s];
    }
    memcpy(e[s], error, sizeof e[s]);
    for (int t = s + 1; t < S; t++)
      for (int p = 0; p < VECTORS; p++) {
        Vector& later = ((Vector*)w[i + t])[p];
        later = multiply_subtract(broadcast(row[i + t]), e[s][p], later);
      }
  }
  const float* row = upper + i * columns;
  for (int64_t j = i + S; j < columns; j++) {
    Vector sum[VECTORS];
    memcpy(sum, w[j], sizeof sum);
#pragma GCC unroll 4
    for (int s = 0; s < S; s++)
#pragma GCC unroll 4
      for (int p = 0; p < VECTORS; p++) sum[p] = multiply_subtract(broadcast(row[s * columns + j]), e[s][p], sum[p]);
    memcpy(w[j], sum, sizeof sum);
  }
}

}  // namespace

// block: [columns, outputs], zeroed and repaired in place; errors: the same shape; upper: [columns, columns].
// drop: float32, 1 to zero and 0 to keep, [columns, outputs]; with a `group`: int32 [outputs], how many lowest of each go.
extern "C" void solve_block(float* block, const float* upper, const void* drop, int64_t columns, int64_t outputs,
                            int64_t group, float* errors, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const std::unique_ptr<char[]> buffer(new char[sizeof(Tile) * (3 * columns + group) + 64]);
    Tile* w = aligned<Tile>(buffer.get());
    Tile *error = w + columns, *mask = error + columns, *score = mask + columns;
#pragma omp for schedule(static)
    for (int64_t first = 0; first < outputs; first += TILE) {
      const int count = int(std::min<int64_t>(TILE, outputs - first));
      if (count < TILE) memset(w, 0, sizeof(Tile) * 3 * columns);
      for (int64_t i = 0; i < columns; i++) {
        memcpy(w[i], block + i * outputs + first, count * 4);
        if (!group) memcpy(mask[i], (const float*)drop + i * outputs + first, count * 4);
      }
      for (int64_t i = 0; i < columns;) {
        if (group && i % group == 0) {
          const int64_t some = std::min(group, columns - i);
          const int32_t* removed = (const int32_t*)drop + first;
          lowest(w + i, upper + i * (columns + 1), columns, some, removed, count, score, mask + i);
        }
        // Four at a time, unless another group begins among them.
        const bool four = i + 4 <= columns && group % 4 == 0;
        (four ? step<4> : step<1>)(w, upper, columns, i, mask, error);
        i += four ? 4 : 1;
      }
      for (int64_t i = 0; i < columns; i++) {
        memcpy(block + i * outputs + first, w[i], count * 4);
        memcpy(errors + i * outputs + first, error[i], count * 4);
      }
    }
  }
}
