// The one product kernel: a few rows times packed panels. Linear layers and attention both go through it.
//
// Every output element is one chain of fused multiply-adds in fp32 over k = 0, 1, 2, ...; the chain is cut and resumed
// without rounding. So its bits depend on its own row and column alone, never on how many rows or panels a call has.
#pragma once

#include "simd.h"

namespace halfmoon {

constexpr int kTileRows = 6;              // 12 sums, 2 weights and 1 input fill AVX2's 16 registers

// One step of k of a panel: kPanel weights as two vectors.
struct Pair {
  F32 low, high;
};

inline Pair load_pair(const float* p) { return {load(p), load(p + kLanes)}; }

// bf16 panels interleave their two halves, so that widening is one shift and one mask.
inline Pair load_pair(const bf16* p) {
  const U32 both = load_as<U32>(p);
  return {(F32)(both << 16), (F32)(both & 0xffff0000u)};
}

// What a tile asks memory for while it computes: from `from` on, `bytes_per_step` of k. Null: nothing.
struct Ahead {
  const char* from = nullptr;
  int64_t bytes_per_step = 0;
};

// c[r][p * kPanel + j] += sum over k of a[r][k] * b[p][k][j] for `rows` rows and `panels` panels. With `streams`, each
// panel's part of `ahead` is prefetched.
template <int rows, int panels, bool streams, class W>
inline void tile(const float* a, int64_t a_stride, const W* b, int64_t panel_stride, int64_t depth, float* c,
                 int64_t c_stride, Ahead ahead) {
  F32 sum[rows][panels][2];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int p = 0; p < panels; ++p) {
      sum[r][p][0] = load(c + r * c_stride + p * kPanel);
      sum[r][p][1] = load(c + r * c_stride + p * kPanel + kLanes);
    }
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; ++k) {
#pragma GCC unroll 4
    for (int p = 0; p < panels; ++p) {
      const W* at = b + p * panel_stride + k * kPanel;
      if constexpr (streams)
        __builtin_prefetch(ahead.from + p * panel_stride * sizeof(W) + k * ahead.bytes_per_step);
      const Pair w = load_pair(at);
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
        const F32 x = splat(a[r * a_stride + k]);
        sum[r][p][0] = fma(x, w.low, sum[r][p][0]);
        sum[r][p][1] = fma(x, w.high, sum[r][p][1]);
      }
      // One panel after the other: GCC would load both first, and run out of registers.
      if constexpr (rows >= 3 && panels > 1) asm volatile("" ::: "memory");
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int p = 0; p < panels; ++p) {
      store(c + r * c_stride + p * kPanel, sum[r][p][0]);
      store(c + r * c_stride + p * kPanel + kLanes, sum[r][p][1]);
    }
}

// Panels that a tile of so many rows takes at once: enough independent sums to hide the multiply-add's latency.
constexpr int panels_at_once(int rows) {
  if (kLanes == 16) return rows <= 3 ? 4 : 2;
  return rows == 1 ? 4 : rows <= 3 ? 2 : 1;
}

template <int rows, bool streams, class W>
inline void tile_across(const float* a, int64_t a_stride, const W* b, int64_t panel_stride, int64_t num_panels,
                        int64_t depth, float* c, int64_t c_stride, Ahead ahead) {
  constexpr int wide = panels_at_once(rows);
  int64_t p = 0;
  for (; p + wide <= num_panels; p += wide)
    tile<rows, wide, streams>(a, a_stride, b + p * panel_stride, panel_stride, depth, c + p * kPanel, c_stride, ahead);
  for (; p < num_panels; ++p)
    tile<rows, 1, streams>(a, a_stride, b + p * panel_stride, panel_stride, depth, c + p * kPanel, c_stride, ahead);
}

// The same for 1 to kTileRows rows known only at run time.
template <bool streams, class W>
void tile_rows(int64_t rows, const float* a, int64_t a_stride, const W* b, int64_t panel_stride, int64_t num_panels,
               int64_t depth, float* c, int64_t c_stride, Ahead ahead = {}) {
  switch (rows) {
    case 1: return tile_across<1, streams>(a, a_stride, b, panel_stride, num_panels, depth, c, c_stride, ahead);
    case 2: return tile_across<2, streams>(a, a_stride, b, panel_stride, num_panels, depth, c, c_stride, ahead);
    case 3: return tile_across<3, streams>(a, a_stride, b, panel_stride, num_panels, depth, c, c_stride, ahead);
    case 4: return tile_across<4, streams>(a, a_stride, b, panel_stride, num_panels, depth, c, c_stride, ahead);
    case 5: return tile_across<5, streams>(a, a_stride, b, panel_stride, num_panels, depth, c, c_stride, ahead);
    case 6: return tile_across<6, streams>(a, a_stride, b, panel_stride, num_panels, depth, c, c_stride, ahead);
  }
}

inline int64_t num_tiles(int64_t num_rows) { return (num_rows + kTileRows - 1) / kTileRows; }

// Calls body(first row, rows) for [0, num_rows) in the fewest tiles, as even as can be (8 rows: 4 + 4).
template <class Body>
inline void by_tile_rows(int64_t num_rows, Body body) {
  const int64_t tiles = num_tiles(num_rows);
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t first = num_rows * i / tiles;
    body(first, num_rows * (i + 1) / tiles - first);
  }
}

}  // namespace halfmoon
