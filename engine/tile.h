// The one product kernel: a few rows times packed panels. Linear layers and attention both go through it.
//
// Every output element is one chain of multiply-adds in fp32 over k = 0, 1, 2, ...; the chain is cut and resumed
// without rounding. So its bits depend on its own row and column alone, never on how many rows or panels a call has.
//
// A step of the chain is one k, or, where the CPU multiplies bf16 natively, a pair of them (simd.h, kPairs).
#pragma once

#include <type_traits>

#include "simd.h"

namespace halfmoon {

// Six rows by two vectors of sums, 2 weights and 1 input fill AVX2's 16 registers; AVX-512 has twice as many.
constexpr int kTileRows = kLanes == 16 ? 12 : 6;

// What a product of T is computed on: a row's elements, a panel's, and how many of T are one step of the chain.
template <class T>
struct Operands {
  static constexpr bool paired = kPairs && std::is_same_v<T, bf16>;
  using Row = std::conditional_t<paired, Bf16Pair, float>;
  using Panel = std::conditional_t<paired, Bf16Pair, T>;
  static constexpr int64_t step = paired ? 2 : 1;
};

template <class T>
constexpr int64_t steps_of(int64_t depth) {
  return (depth + Operands<T>::step - 1) / Operands<T>::step;
}

// One step of a panel: kPanel weights (or pairs of them) as two vectors.
template <class V>
struct Columns {
  V low, high;
};

inline Columns<F32> load_columns(const float* p) { return {load(p), load(p + kLanes)}; }

inline Columns<U32> load_columns(const Bf16Pair* p) { return {load_as<U32>(p), load_as<U32>(p + kLanes)}; }

// bf16 panels interleave their two halves, so that widening is one shift and one mask.
inline Columns<F32> load_columns(const bf16* p) {
  const U32 both = load_as<U32>(p);
  return {(F32)(both << 16), (F32)(both & 0xffff0000u)};
}

inline F32 spread_over_lanes(const float* x) { return splat(*x); }

inline U32 spread_over_lanes(const Bf16Pair* x) { return load_as<uint32_t>(x) + U32{}; }

inline F32 multiply_add(F32 x, F32 w, F32 sum) { return fma(x, w, sum); }

#if HALFMOON_PAIRS
inline F32 multiply_add(U32 x, U32 w, F32 sum) { return dot(x, w, sum); }
#endif

constexpr int64_t kLineBytes = 64;

// What a tile asks memory for while it computes: from `from` on, `bytes_per_step` of k. Null: nothing.
struct Ahead {
  const char* from = nullptr;
  int64_t bytes_per_step = 0;
};

// c[r][p * kPanel + j] += sum over k of a[r][k] * b[p][k][j] for `rows` rows and `panels` panels. With `streams`, each
// panel's part of `ahead` is prefetched, at most two cache lines a step. Strides and depth count steps.
template <int rows, int panels, bool streams, class A, class W>
inline void tile(const A* a, int64_t a_stride, const W* b, int64_t panel_stride, int64_t depth, float* c,
                 int64_t c_stride, Ahead ahead) {
  F32 sum[rows][panels][2];
#pragma GCC unroll 12
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
      if constexpr (streams) {
        const char* from = ahead.from + p * panel_stride * sizeof(W) + k * ahead.bytes_per_step;
        __builtin_prefetch(from);
        if (ahead.bytes_per_step > kLineBytes) __builtin_prefetch(from + kLineBytes);
      }
      const auto w = load_columns(at);
#pragma GCC unroll 12
      for (int r = 0; r < rows; ++r) {
        const auto x = spread_over_lanes(a + r * a_stride + k);
        sum[r][p][0] = multiply_add(x, w.low, sum[r][p][0]);
        sum[r][p][1] = multiply_add(x, w.high, sum[r][p][1]);
      }
      // One panel after the other: GCC would load both first, and run out of registers.
      if constexpr (rows >= 3 && panels > 1) asm volatile("" ::: "memory");
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int p = 0; p < panels; ++p) {
      store(c + r * c_stride + p * kPanel, sum[r][p][0]);
      store(c + r * c_stride + p * kPanel + kLanes, sum[r][p][1]);
    }
}

// Panels that a tile of so many rows takes at once: enough independent sums to hide the multiply-add's latency.
constexpr int panels_at_once(int rows) {
  if (kLanes == 16) return rows <= 3 ? 4 : rows <= 6 ? 2 : 1;
  return rows == 1 ? 4 : rows <= 3 ? 2 : 1;
}

// All panels, `wide` at a time; the rest by halves.
template <int rows, int wide, bool streams, class A, class W>
inline void tile_across(const A* a, int64_t a_stride, const W* b, int64_t panel_stride, int64_t num_panels,
                        int64_t depth, float* c, int64_t c_stride, Ahead ahead) {
  int64_t p = 0;
  for (; p + wide <= num_panels; p += wide)
    tile<rows, wide, streams>(a, a_stride, b + p * panel_stride, panel_stride, depth, c + p * kPanel, c_stride, ahead);
  if constexpr (wide > 1)
    if (p < num_panels)
      tile_across<rows, wide / 2, streams>(a, a_stride, b + p * panel_stride, panel_stride, num_panels - p, depth,
                                           c + p * kPanel, c_stride, ahead);
}

template <int n>
using Count = std::integral_constant<int, n>;

// The same for 1 to kTileRows rows known only at run time.
template <bool streams, class A, class W>
void tile_rows(int64_t rows, const A* a, int64_t a_stride, const W* b, int64_t panel_stride, int64_t num_panels,
               int64_t depth, float* c, int64_t c_stride, Ahead ahead = {}) {
  const auto across = [&](auto count) {
    tile_across<count(), panels_at_once(count()), streams>(a, a_stride, b, panel_stride, num_panels, depth, c, c_stride, ahead);
  };
  switch (rows) {
    case 1: return across(Count<1>{});
    case 2: return across(Count<2>{});
    case 3: return across(Count<3>{});
    case 4: return across(Count<4>{});
    case 5: return across(Count<5>{});
    case 6: return across(Count<6>{});
  }
  if constexpr (kTileRows > 6) switch (rows) {
      case 7: return across(Count<7>{});
      case 8: return across(Count<8>{});
      case 9: return across(Count<9>{});
      case 10: return across(Count<10>{});
      case 11: return across(Count<11>{});
      case 12: return across(Count<12>{});
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
