// Norms, activation and rotation: one pass over each row, computed in fp32, rounded once.
#include <cmath>

#include "kernels.h"

namespace halfmoon {

template <class T>
void rms_norm_rows(const T* x, const T* residual, const T* weight, float eps, int64_t num_rows, int64_t dim, T* out,
                   T* sum) {
  for (int64_t r = 0; r < num_rows; ++r, x += dim, out += dim) {
    F32 squares{};
    by_lanes(dim, [&](int64_t i, int64_t count) {
      F32 v = load_upto(x + i, count);
      if (residual) {
        store_upto(sum + i, v + load_upto(residual + i, count), count);
        v = load_upto(sum + i, count);
      }
      squares = fma(v, v, squares);
    });
    const T* row = residual ? sum : x;
    const F32 scale = splat(1.0f / std::sqrt(sum_lanes(squares) / float(dim) + eps));
    by_lanes(dim, [&](int64_t i, int64_t count) {
      store_upto(out + i, load_upto(row + i, count) * scale * load_upto(weight + i, count), count);
    });
    if (residual) {
      residual += dim;
      sum += dim;
    }
  }
}

template <class T>
void silu_mul_rows(const T* gate_up, int64_t num_rows, int64_t features, T* out) {
  for (int64_t r = 0; r < num_rows; ++r, gate_up += 2 * features, out += features)
    by_lanes(features, [&](int64_t i, int64_t count) {
      const F32 gate = load_upto(gate_up + i, count), up = load_upto(gate_up + features + i, count);
      store_upto(out + i, gate / (splat(1.0f) + exp2(gate * splat(-kLog2e))) * up, count);
    });
}

template <class T>
void rope_rows(T* x, int64_t x_stride, int64_t num_rows, int64_t num_heads, int64_t dim, const float* cos,
               const float* sin) {
  const int64_t half = dim / 2;
  for (int64_t r = 0; r < num_rows; ++r, cos += half, sin += half)
    for (int64_t h = 0; h < num_heads; ++h) {
      T* head = x + r * x_stride + h * dim;
      by_lanes(half, [&](int64_t i, int64_t count) {
        const F32 first = load_upto(head + i, count), second = load_upto(head + half + i, count);
        const F32 c = load_upto(cos + i, count), s = load_upto(sin + i, count);
        store_upto(head + i, fma(first, c, -(second * s)), count);
        store_upto(head + half + i, fma(second, c, first * s), count);
      });
    }
}

template void rms_norm_rows(const float*, const float*, const float*, float, int64_t, int64_t, float*, float*);
template void rms_norm_rows(const bf16*, const bf16*, const bf16*, float, int64_t, int64_t, bf16*, bf16*);
template void silu_mul_rows(const float*, int64_t, int64_t, float*);
template void silu_mul_rows(const bf16*, int64_t, int64_t, bf16*);
template void rope_rows(float*, int64_t, int64_t, int64_t, int64_t, const float*, const float*);
template void rope_rows(bf16*, int64_t, int64_t, int64_t, int64_t, const float*, const float*);

}  // namespace halfmoon
