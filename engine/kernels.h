// The kernels behind ops.cpp: plain pointers, no torch, each over a range that one thread takes.
//
// Strides are in elements. T is float or bf16. No result depends on how the ranges were cut.
#pragma once

#include <cstdint>
#include <cstdlib>

#include "simd.h"

namespace halfmoon {

// A thread's working memory: grows to the largest request, aligned to a cache line, kept until the thread ends.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  ~Scratch() { std::free(floats_); }

  // Uninitialised room for `count` floats, valid until the next call.
  float* room(int64_t count) {
    if (count > size_) {
      std::free(floats_);
      size_ = (count + 15) / 16 * 16;
      floats_ = static_cast<float*>(std::aligned_alloc(64, size_ * sizeof(float)));
    }
    return floats_;
  }

 private:
  float* floats_ = nullptr;
  int64_t size_ = 0;
};

inline int64_t round_up(int64_t size, int64_t step) { return (size + step - 1) / step * step; }

inline int64_t num_panels_of(int64_t out_features) { return (out_features + kPanel - 1) / kPanel; }

// ---- linear.cpp

// in_features rounded up to whole steps of the product's chain (tile.h, Operands).
template <class T>
int64_t padded_depth(int64_t in_features);

// weight [out][in] -> panels [num_panels][padded depth][kPanel], zero beyond out_features and in_features.
template <class T>
void pack_panels(const T* weight, int64_t out_features, int64_t in_features, T* panels);

template <class T>
struct Linear {
  const T* x;
  int64_t x_stride, num_rows, in_features;
  const T* panels;
  const float* bias;  // may be null
  T* out;
  int64_t out_features;  // and row stride of out
};

// Computes the columns of panels [first_panel, last_panel) for all rows.
template <class T>
void linear_panels(const Linear<T>& job, int64_t first_panel, int64_t last_panel);

// ---- attention.cpp

template <class T>
struct Attention {
  const T* q;
  int64_t q_stride;  // of a row
  T* out;            // [n][heads][dim]
  int64_t num_heads, num_kv_heads, dim;
  const T* layer;  // the pool's slot 0, kv-head 0 of this layer: K, then V, [block_size][dim] each
  int64_t slot_stride, kv_head_stride, block_size;
  float scale;
  int64_t window;  // 0: none
};

// Some query rows of one sequence under one kv-head.
struct AttentionUnit {
  const int32_t* block_table;
  int64_t kv_head, first_row, num_rows;
  int64_t position;  // of first_row
};

// Query rows of one unit: enough (rows x query heads per kv-head) to pay for widening K and V.
int64_t rows_per_unit(int64_t heads_per_kv_head);

template <class T>
void attend(const Attention<T>& job, const AttentionUnit* units, int64_t count);

// ---- elementwise.cpp

// out = x / rms(x) * weight; with `residual`, x + residual (rounded) stands for x and is written to `sum`.
template <class T>
void rms_norm_rows(const T* x, const T* residual, const T* weight, float eps, int64_t num_rows, int64_t dim, T* out,
                   T* sum);

template <class T>
void silu_mul_rows(const T* gate_up, int64_t num_rows, int64_t features, T* out);

// Rotates num_heads heads of each row in place; x's rows are x_stride apart, its heads dim.
template <class T>
void rope_rows(T* x, int64_t x_stride, int64_t num_rows, int64_t num_heads, int64_t dim, const float* cos,
               const float* sin);

// ---- roofline.cpp

// Runs rounds of independent multiply-adds in registers; returns how many floating-point operations that was.
int64_t multiply_adds(int64_t rounds);

// The same of products of bf16 pairs; 0 where the CPU has none.
int64_t pair_products(int64_t rounds);

}  // namespace halfmoon
