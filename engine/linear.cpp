// Linear layers over weights packed once in panels; see tile.h for the order of each sum.
#include <algorithm>

#include "kernels.h"
#include "tile.h"

namespace halfmoon {
namespace {

constexpr int64_t kDepthBlock = 512;         // of k, at most: a bf16 panel's block and six rows fit a 32 KiB L1
constexpr int64_t kAheadBytes = 2048;        // of a panel that is read once, at few rows
constexpr int64_t kRowBlockFloats = 80'000;  // inputs of one row block, widened: they stay in a 512 KiB L2
constexpr int64_t kRowBlockMin = 48;         // rows that share one reading of the weights from memory
constexpr int64_t kRowBlockMax = 192;

// Column j of a panel lies here in a step of k: bf16 interleaves the halves (tile.h, load_pair).
template <class T>
int64_t place_of(int64_t column) {
  if (sizeof(T) == sizeof(float)) return column;
  return column < kLanes ? 2 * column : 2 * (column - kLanes) + 1;
}

int64_t row_block(int64_t depth) {
  return std::clamp(kRowBlockFloats / depth / kTileRows * kTileRows, kRowBlockMin, kRowBlockMax);
}

const float* widened(const float* x, int64_t, int64_t, int64_t, float*) { return x; }

const float* widened(const bf16* x, int64_t x_stride, int64_t rows, int64_t depth, float* room) {
  for (int64_t r = 0; r < rows; ++r)
    by_lanes(depth, [&](int64_t k, int64_t count) {
      store_upto(room + r * depth + k, load_upto(x + r * x_stride + k, count), count);
    });
  return room;
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
template <class T>
Ahead ahead_of(const T* panel, int64_t depth, int64_t k, int64_t tile, int64_t tiles) {
  const int64_t step_bytes = kPanel * sizeof(T);
  const char* at = reinterpret_cast<const char*>(panel);
  if (tiles == 1) return {at + k * step_bytes + kAheadBytes, step_bytes};
  const int64_t share = step_bytes / tiles;
  return {at + depth * step_bytes + tile * depth * share + k * share, share};
}

// One row block: each group of panels is read once, from memory into L1, for all its rows.
template <class T>
void multiply_block(const Linear<T>& job, const float* a, int64_t a_stride, int64_t first_row, int64_t rows,
                    int64_t first_panel, int64_t last_panel, float* sums) {
  const int64_t depth = job.in_features, tiles = num_tiles(rows);
  const int64_t depth_blocks = (depth + kDepthBlock - 1) / kDepthBlock, step = (depth + depth_blocks - 1) / depth_blocks;
  const int64_t group = panels_at_once(int(std::min<int64_t>(rows, kTileRows)));
  for (int64_t p = first_panel; p < last_panel; p += group) {
    const int64_t panels = std::min(group, last_panel - p), width = panels * kPanel, column = p * kPanel;
    const int64_t columns = std::min(width, job.out_features - column);
    const T* panel = job.panels + p * depth * kPanel;
    start_sums(job.bias, column, columns, rows, width, sums);
    for (int64_t k = 0; k < depth; k += step)
      by_tile_rows(rows, [&](int64_t r, int64_t count) {
        tile_rows<true>(count, a + r * a_stride + k, a_stride, panel + k * kPanel, depth * kPanel, panels,
                        std::min(step, depth - k), sums + r * width, width,
                        ahead_of(panel, depth, k, r * tiles / rows, tiles));
      });
    store_sums(sums, rows, width, columns, job.out + first_row * job.out_features + column, job.out_features);
  }
}

}  // namespace

template <class T>
void pack_panels(const T* weight, int64_t out_features, int64_t in_features, T* panels) {
  for (int64_t column = 0; column < num_panels_of(out_features) * kPanel; ++column) {
    T* panel = panels + column / kPanel * in_features * kPanel + place_of<T>(column % kPanel);
    for (int64_t k = 0; k < in_features; ++k)
      panel[k * kPanel] = column < out_features ? weight[column * in_features + k] : T{};
  }
}

template <class T>
void linear_panels(const Linear<T>& job, int64_t first_panel, int64_t last_panel) {
  thread_local Scratch scratch;
  const int64_t depth = job.in_features, block = std::min(row_block(depth), job.num_rows);
  const int64_t sums_size = round_up(block * 4 * kPanel, 16);
  float* sums = scratch.room(sums_size + block * depth);
  for (int64_t row = 0; row < job.num_rows; row += block) {
    const int64_t rows = std::min(block, job.num_rows - row);
    const T* x = job.x + row * job.x_stride;
    const float* a = widened(x, job.x_stride, rows, depth, sums + sums_size);
    const int64_t a_stride = sizeof(T) == sizeof(float) ? job.x_stride : depth;
    multiply_block(job, a, a_stride, row, rows, first_panel, last_panel, sums);
  }
}

template void pack_panels(const float*, int64_t, int64_t, float*);
template void pack_panels(const bf16*, int64_t, int64_t, bf16*);
template void linear_panels(const Linear<float>&, int64_t, int64_t);
template void linear_panels(const Linear<bf16>&, int64_t, int64_t);

}  // namespace halfmoon
