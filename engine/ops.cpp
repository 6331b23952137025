// torch.ops.halfmoon: shape checks, output tensors and threads around the kernels (kernels.h).
//
// torch releases the GIL while an operator runs. The number of threads (torch.set_num_threads) changes no result.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "kernels.h"

namespace halfmoon {
namespace {

using at::Tensor;

constexpr int64_t kGrain = 1 << 15;  // multiply-adds or elements worth a thread's wake-up

int64_t grain_of(int64_t work_per_item) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, work_per_item)); }

template <class T>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <class T>
T* mutable_data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// Calls body with a value of the element type, float or bf16, of x.
template <class Body>
void by_dtype(const Tensor& x, Body body) {
  if (x.scalar_type() == at::kFloat) return body(float{});
  TORCH_CHECK(x.scalar_type() == at::kBFloat16, "expected float32 or bfloat16, got ", x.scalar_type());
  body(bf16{});
}

void check_rows(const Tensor& x, int64_t dims, const char* name) {
  TORCH_CHECK(x.dim() == dims, name, ": expected ", dims, " dimensions, got ", x.dim());
  int64_t inner = 1;
  for (int64_t d = dims - 1; d > 0; --d) {
    TORCH_CHECK(x.size(d) == 1 || x.stride(d) == inner, name, ": each row must be contiguous");
    inner *= x.size(d);
  }
}

void check_type(const Tensor& x, const Tensor& like, const char* name) {
  TORCH_CHECK(x.scalar_type() == like.scalar_type(), name, ": expected ", like.scalar_type(), ", got ",
              x.scalar_type());
}

Tensor pack(const Tensor& weight) {
  TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous(), "weight: expected a contiguous [out, in]");
  const int64_t out = weight.size(0), in = weight.size(1);
  Tensor panels;
  by_dtype(weight, [&](auto t) {
    using T = decltype(t);
    panels = at::empty({num_panels_of(out), padded_depth<T>(in), kPanel}, weight.options());
    pack_panels(data<T>(weight), out, in, mutable_data<T>(panels));
  });
  return panels;
}

Tensor linear(const Tensor& x, const Tensor& panels, const std::optional<Tensor>& bias, int64_t out_features) {
  check_rows(x, 2, "x");
  check_type(panels, x, "panels");
  TORCH_CHECK(num_panels_of(out_features) == panels.size(0), "panels: not of ", out_features, " features");
  TORCH_CHECK(!bias || (bias->scalar_type() == at::kFloat && bias->is_contiguous() && bias->numel() == out_features),
              "bias: expected contiguous float32 [out]");
  Tensor out = at::empty({x.size(0), out_features}, x.options());
  by_dtype(x, [&](auto t) {
    using T = decltype(t);
    TORCH_CHECK(padded_depth<T>(x.size(1)) == panels.size(1), "x: expected ", panels.size(1), " features, got ",
                x.size(1));
    const Linear<T> job{data<T>(x), x.stride(0), x.size(0), x.size(1), data<T>(panels),
                        bias ? data<float>(*bias) : nullptr, mutable_data<T>(out), out_features};
    at::parallel_for(0, panels.size(0), grain_of(x.numel() * kPanel),
                     [&](int64_t first, int64_t last) { linear_panels(job, first, last); });
  });
  return out;
}

void norm_into(const Tensor& x, const Tensor* residual, const Tensor& weight, double eps, Tensor& out, Tensor* sum) {
  check_type(weight, x, "weight");
  TORCH_CHECK(x.dim() == 2 && x.is_contiguous() && weight.is_contiguous(), "x: expected a contiguous [n, d]");
  TORCH_CHECK(weight.numel() == x.size(1), "weight: expected ", x.size(1), " elements, got ", weight.numel());
  const int64_t dim = x.size(1);
  by_dtype(x, [&](auto t) {
    using T = decltype(t);
    at::parallel_for(0, x.size(0), grain_of(dim), [&](int64_t first, int64_t last) {
      const int64_t at = first * dim;
      rms_norm_rows(data<T>(x) + at, residual ? data<T>(*residual) + at : nullptr, data<T>(weight), float(eps),
                    last - first, dim, mutable_data<T>(out) + at, sum ? mutable_data<T>(*sum) + at : nullptr);
    });
  });
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  Tensor out = at::empty(x.sizes(), x.options());
  norm_into(x, nullptr, weight, eps, out, nullptr);
  return out;
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
  check_type(residual, x, "residual");
  TORCH_CHECK(residual.sizes() == x.sizes() && residual.is_contiguous(), "residual: expected x's shape, contiguous");
  Tensor out = at::empty(x.sizes(), x.options()), sum = at::empty(x.sizes(), x.options());
  norm_into(x, &residual, weight, eps, out, &sum);
  return {out, sum};
}

Tensor silu_mul(const Tensor& gate_up) {
  TORCH_CHECK(gate_up.dim() == 2 && gate_up.is_contiguous() && gate_up.size(1) % 2 == 0,
              "gate_up: expected a contiguous [n, 2f]");
  const int64_t features = gate_up.size(1) / 2;
  Tensor out = at::empty({gate_up.size(0), features}, gate_up.options());
  by_dtype(gate_up, [&](auto t) {
    using T = decltype(t);
    at::parallel_for(0, gate_up.size(0), grain_of(features), [&](int64_t first, int64_t last) {
      silu_mul_rows(data<T>(gate_up) + first * 2 * features, last - first, features,
                    mutable_data<T>(out) + first * features);
    });
  });
  return out;
}

void rope_one(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  const int64_t dim = x.size(2), half = dim / 2;
  TORCH_CHECK(dim % 2 == 0 && cos.size(0) == x.size(0) && cos.size(1) == half, "cos: expected [n, d / 2]");
  by_dtype(x, [&](auto t) {
    using T = decltype(t);
    at::parallel_for(0, x.size(0), grain_of(x.size(1) * dim), [&](int64_t first, int64_t last) {
      rope_rows(mutable_data<T>(x) + first * x.stride(0), x.stride(0), last - first, x.size(1), dim,
                data<float>(cos) + first * half, data<float>(sin) + first * half);
    });
  });
}

void rope(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin) {
  check_rows(q, 3, "q");
  check_rows(k, 3, "k");
  TORCH_CHECK(cos.scalar_type() == at::kFloat && sin.scalar_type() == at::kFloat, "cos, sin: expected float32");
  TORCH_CHECK(cos.dim() == 2 && cos.is_contiguous() && sin.is_contiguous() && sin.sizes() == cos.sizes(),
              "cos, sin: expected two contiguous [n, d / 2]");
  rope_one(q, cos, sin);
  rope_one(k, cos, sin);
}

// The pool's geometry: [slots, kv_heads, layers, 2, block_size, dim].
struct Pool {
  int64_t num_slots, kv_heads, block_size, dim, slot_stride, kv_head_stride, layer_offset;

  Pool(const Tensor& pool, int64_t layer) {
    TORCH_CHECK(pool.dim() == 6 && pool.is_contiguous() && pool.size(3) == 2,
                "pool: expected a contiguous [slots, kv_heads, layers, 2, block_size, d]");
    TORCH_CHECK(0 <= layer && layer < pool.size(2), "layer: ", layer, " of ", pool.size(2));
    num_slots = pool.size(0);
    kv_heads = pool.size(1);
    block_size = pool.size(4);
    dim = pool.size(5);
    slot_stride = pool.stride(0);
    kv_head_stride = pool.stride(1);
    layer_offset = layer * pool.stride(2);
  }
};

template <class T>
void write_row(T* slot, const Pool& geometry, int64_t offset, const T* k, const T* v) {
  for (int64_t h = 0; h < geometry.kv_heads; ++h) {
    T* place = slot + geometry.layer_offset + h * geometry.kv_head_stride + offset * geometry.dim;
    std::memcpy(place, k + h * geometry.dim, geometry.dim * sizeof(T));
    std::memcpy(place + geometry.block_size * geometry.dim, v + h * geometry.dim, geometry.dim * sizeof(T));
  }
}

void write_kv(const Tensor& pool, int64_t layer, const Tensor& k, const Tensor& v, const Tensor& slots,
              const Tensor& offsets) {
  const Pool geometry(pool, layer);
  check_rows(k, 3, "k");
  check_rows(v, 3, "v");
  check_type(k, pool, "k");
  check_type(v, pool, "v");
  const int64_t num_rows = k.size(0);
  TORCH_CHECK(k.sizes() == v.sizes() && k.size(1) == geometry.kv_heads && k.size(2) == geometry.dim,
              "k, v: expected [n, ", geometry.kv_heads, ", ", geometry.dim, "]");
  for (const Tensor* index : {&slots, &offsets})
    TORCH_CHECK(index->scalar_type() == at::kLong && index->is_contiguous() && index->numel() == num_rows,
                "slots, offsets: expected contiguous int64 [n]");
  const auto *slot = data<int64_t>(slots), *offset = data<int64_t>(offsets);
  by_dtype(pool, [&](auto t) {
    using T = decltype(t);
    for (int64_t r = 0; r < num_rows; ++r) {
      TORCH_CHECK(0 <= slot[r] && slot[r] < geometry.num_slots, "slots: ", slot[r], " of ", geometry.num_slots);
      TORCH_CHECK(0 <= offset[r] && offset[r] < geometry.block_size, "offsets: ", offset[r]);
      write_row(mutable_data<T>(pool) + slot[r] * geometry.slot_stride, geometry, offset[r],
                data<T>(k) + r * k.stride(0), data<T>(v) + r * v.stride(0));
    }
  });
}

void check_ints(const Tensor& x, int64_t count, const char* name) {
  TORCH_CHECK(x.scalar_type() == at::kInt && x.is_contiguous() && x.numel() == count, name,
              ": expected contiguous int32, ", count, " elements");
}

void check_blocks(const int32_t* table, int64_t num_blocks, int64_t max_blocks, const Pool& geometry) {
  TORCH_CHECK(num_blocks <= max_blocks, "block_tables: ", num_blocks, " blocks needed, ", max_blocks, " given");
  for (int64_t i = 0; i < num_blocks; ++i)
    TORCH_CHECK(0 <= table[i] && table[i] < geometry.num_slots, "block_tables: slot ", table[i], " of ",
                geometry.num_slots);
}

std::vector<AttentionUnit> units_of(const Pool& geometry, int64_t num_rows, const Tensor& block_tables,
                                    const Tensor& query_start, const Tensor& starts, int64_t step) {
  std::vector<AttentionUnit> units;
  const auto *bounds = data<int32_t>(query_start), *start = data<int32_t>(starts);
  for (int64_t s = 0; s < starts.numel(); ++s) {
    const int64_t first = bounds[s], last = bounds[s + 1];
    TORCH_CHECK(0 <= first && first <= last && last <= num_rows && start[s] >= 0, "query_start: not ascending");
    const int32_t* table = data<int32_t>(block_tables) + s * block_tables.size(1);
    const int64_t num_tokens = start[s] + last - first;
    check_blocks(table, (num_tokens + geometry.block_size - 1) / geometry.block_size, block_tables.size(1), geometry);
    for (int64_t h = 0; h < geometry.kv_heads; ++h)
      for (int64_t row = first; row < last; row += step)
        units.push_back({table, h, row, std::min(step, last - row), start[s] + row - first});
  }
  return units;
}

Tensor paged_attention(const Tensor& q, const Tensor& pool, int64_t layer, const Tensor& block_tables,
                       const Tensor& query_start, const Tensor& starts, double scale, int64_t window) {
  const Pool geometry(pool, layer);
  check_rows(q, 3, "q");
  check_type(q, pool, "q");
  const int64_t heads = q.size(1);
  TORCH_CHECK(q.size(2) == geometry.dim && heads % geometry.kv_heads == 0, "q: expected [n, heads, ", geometry.dim,
              "], heads a multiple of ", geometry.kv_heads);
  TORCH_CHECK(geometry.dim % 8 == 0 && geometry.dim <= 256, "head_dim: expected a multiple of 8 up to 256");
  TORCH_CHECK(block_tables.dim() == 2 && block_tables.size(0) == starts.numel(), "block_tables: expected [seqs, max]");
  check_ints(block_tables, block_tables.numel(), "block_tables");
  check_ints(query_start, starts.numel() + 1, "query_start");
  check_ints(starts, starts.numel(), "starts");
  const auto units = units_of(geometry, q.size(0), block_tables, query_start, starts,
                              rows_per_unit(heads / geometry.kv_heads));
  Tensor out = at::empty(q.sizes(), q.options());
  by_dtype(q, [&](auto t) {
    using T = decltype(t);
    const Attention<T> job{data<T>(q), q.stride(0), mutable_data<T>(out), heads, geometry.kv_heads, geometry.dim,
                           data<T>(pool) + geometry.layer_offset, geometry.slot_stride, geometry.kv_head_stride,
                           geometry.block_size, float(scale), window};
    at::parallel_for(0, int64_t(units.size()), 1, [&](int64_t first, int64_t last) {
      attend(job, units.data() + first, last - first);
    });
  });
  return out;
}

}  // namespace
}  // namespace halfmoon

TORCH_LIBRARY(halfmoon, m) {
  m.def("pack(Tensor weight) -> Tensor");
  m.def("linear(Tensor x, Tensor panels, Tensor? bias, int out_features) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.def("silu_mul(Tensor gate_up) -> Tensor");
  m.def("rope_(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin) -> ()");
  m.def("write_kv(Tensor(a!) pool, int layer, Tensor k, Tensor v, Tensor slots, Tensor offsets) -> ()");
  m.def(
      "paged_attention(Tensor q, Tensor pool, int layer, Tensor block_tables, Tensor query_start, Tensor starts, "
      "float scale, int window) -> Tensor");
  m.def("multiply_adds(int rounds) -> int", &halfmoon::multiply_adds);
  m.def("pair_products(int rounds) -> int", &halfmoon::pair_products);
}

TORCH_LIBRARY_IMPL(halfmoon, CPU, m) {
  m.impl("pack", &halfmoon::pack);
  m.impl("linear", &halfmoon::linear);
  m.impl("rms_norm", &halfmoon::rms_norm);
  m.impl("add_rms_norm", &halfmoon::add_rms_norm);
  m.impl("silu_mul", &halfmoon::silu_mul);
  m.impl("rope_", &halfmoon::rope);
  m.impl("write_kv", &halfmoon::write_kv);
  m.impl("paged_attention", &halfmoon::paged_attention);
}
