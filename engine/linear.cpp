// Linear layers over weights packed once in panels; see tile.h for the order of each sum.
#include <algorithm>

#include "kernels.h"
#include "tile.h"

namespace halfmoon {
namespace {

constexpr int64_t kDepthBlock = 512;         // steps, at most: a bf16 panel's block and six rows fit a 32 KiB L1
constexpr int64_t kAheadBytes = 2048;        // of a panel that is read once, at few rows
constexpr int64_t kRowBlockFloats = 80'000;  // inputs of one row block, widened: they stay in a 512 KiB L2
constexpr int64_t kRowBlockMin = 48;         // rows that share one reading of the weights from memory
constexpr int64_t kRowBlockMax = 192;

// Where column j's weight for k lies in its panel: pairs of k side by side, or, widened bf16, the panel's two halves
// interleaved (tile.h, load_columns).
template <class T>
int64_t place_of(int64_t column, int64_t k) {
  if (Operands<T>::paired) return (k / 2 * kPanel + column) * 2 + k % 2;
  if (sizeof(T) == sizeof(float)) return k * kPanel + column;
  return k * kPanel + (column < kLanes ? 2 * column : 2 * (column - kLanes) + 1);
}

int64_t row_block(int64_t steps) {
  return std::clamp(kRowBlockFloats / steps / kTileRows * kTileRows, kRowBlockMin, kRowBlockMax);
}

// Rows of the left operand; the stride counts steps.
template <class A>
struct Rows {
  const A* at;
  int64_t stride;
};

Rows<float> rows_for(const Linear<float>& job, int64_t first, int64_t, float*) {
  return {job.x + first * job.x_stride, job.x_stride};
}

// bf16 rows, brought into `room` as fp32, or as pairs of which the last may end with zero.
Rows<Operands<bf16>::Row> rows_for(const Linear<bf16>& job, int64_t first, int64_t rows, float* room) {
  const int64_t depth = job.in_features, steps = steps_of<bf16>(depth);
  for (int64_t r = 0; r < rows; ++r) {
    const bf16* x = job.x + (first + r) * job.x_stride;
    if constexpr (kPairs) {
      if (depth % 2) room[r * steps + steps - 1] = 0.0f;
      std::memcpy(room + r * steps, x, depth * sizeof(bf16));
    } else {
      by_lanes(depth, [&](int64_t k, int64_t count) {
        store_upto(room + r * depth + k, load_upto(x + k, count), count);
      });
    }
  }
  return {reinterpret_cast<const Operands<bf16>::Row*>(room), steps};
}

void start_sums(const float* bias, int64_t column, int64_t columns, int64_t rows, int64_t width, float* sums) {
  for (int64_t j = 0; j < width; ++j) sums[j] = bias && j < columns ? bias[column + j] : 0.0f;
  for (int64_t r = 1; r < rows; ++r) std::copy_n(sums, width, sums + r * width);
}

template <class T>
void store_sums(const float* sums, int64_t rows, int64_t width, int64_t columns, T* out, int64_t out_stride) {
  for (int64_t r = 0; r < rows; ++r)
    by_lanes(columns, [&](int64_t j, int64_t count) {
      store_upto(out + r * out_stride + j, load(sums + r * width + j), count);
    });
}

// While one tile of many computes on a panel, it fetches its share of the next; a lone one runs ahead in its own.
template <class W>
Ahead ahead_of(const W* panel, int64_t depth, int64_t k, int64_t tile, int64_t tiles) {
  const int64_t step_bytes = kPanel * sizeof(W);
  const char* at = reinterpret_cast<const char*>(panel);
  if (tiles == 1) return {at + k * step_bytes + kAheadBytes, step_bytes};
  const int64_t share = step_bytes / tiles;
  return {at + depth * step_bytes + tile * depth * share + k * share, share};
}

// One row block: each group of panels is read once, from memory into L1, for all its rows.
template <class T, class A>
void multiply_block(const Linear<T>& job, Rows<A> a, int64_t first_row, int64_t rows, int64_t first_panel,
                    int64_t last_panel, float* sums) {
  using W = typename Operands<T>::Panel;
  const int64_t depth = steps_of<T>(job.in_features), tiles = num_tiles(rows);
  const int64_t depth_blocks = (depth + kDepthBlock - 1) / kDepthBlock, step = (depth + depth_blocks - 1) / depth_blocks;
  const int64_t group = panels_at_once(int(std::min<int64_t>(rows, kTileRows)));
  for (int64_t p = first_panel; p < last_panel; p += group) {
    const int64_t panels = std::min(group, last_panel - p), width = panels * kPanel, column = p * kPanel;
    const int64_t columns = std::min(width, job.out_features - column);
    const W* panel = reinterpret_cast<const W*>(job.panels) + p * depth * kPanel;
    start_sums(job.bias, column, columns, rows, width, sums);
    for (int64_t k = 0; k < depth; k += step)
      by_tile_rows(rows, [&](int64_t r, int64_t count) {
        tile_rows<true>(count, a.at + r * a.stride + k, a.stride, panel + k * kPanel, depth * kPanel, panels,
                        std::min(step, depth - k), sums + r * width, width,
                        ahead_of(panel, depth, k, r * tiles / rows, tiles));
      });
    store_sums(sums, rows, width, columns, job.out + first_row * job.out_features + column, job.out_features);
  }
}

}  // namespace

template <class T>
int64_t padded_depth(int64_t in_features) {
  return steps_of<T>(in_features) * Operands<T>::step;
}

template <class T>
void pack_panels(const T* weight, int64_t out_features, int64_t in_features, T* panels) {
  const int64_t depth = padded_depth<T>(in_features);
  for (int64_t column = 0; column < num_panels_of(out_features) * kPanel; ++column) {
    T* panel = panels + column / kPanel * depth * kPanel;
    for (int64_t k = 0; k < depth; ++k)
      panel[place_of<T>(column % kPanel, k)] =
          column < out_features && k < in_features ? weight[column * in_features + k] : T{};
  }
}

template <class T>
void linear_panels(const Linear<T>& job, int64_t first_panel, int64_t last_panel) {
  thread_local Scratch scratch;
  const int64_t steps = steps_of<T>(job.in_features), block = std::min(row_block(steps), job.num_rows);
  const int64_t sums_size = round_up(block * 4 * kPanel, 16);
  float* sums = scratch.room(sums_size + block * steps);
  for (int64_t row = 0; row < job.num_rows; row += block) {
    const int64_t rows = std::min(block, job.num_rows - row);
    multiply_block(job, rows_for(job, row, rows, sums + sums_size), row, rows, first_panel, last_panel, sums);
  }
}

template int64_t padded_depth<float>(int64_t);
template int64_t padded_depth<bf16>(int64_t);
template void pack_panels(const float*, int64_t, int64_t, float*);
template void pack_panels(const bf16*, int64_t, int64_t, bf16*);
template void linear_panels(const Linear<float>&, int64_t, int64_t);
template void linear_panels(const Linear<bf16>&, int64_t, int64_t);

}  // namespace halfmoon
