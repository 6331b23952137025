// Causal attention over the paged pool: the same code, and the same bits, for decode steps and prefill chunks.
//
// A query row walks over tiles of kKeys keys that are aligned from position 0, first to last, with an online softmax
// (Milakov and Gimelshein 2018; Dao et al. 2022). Scores and weighted values are the chains of tile.h. Keys that a row
// does not see have weight zero, so neither its company in the tile nor the end of its chunk changes a bit.
#include <algorithm>
#include <limits>

#include "kernels.h"
#include "tile.h"

namespace halfmoon {
namespace {

constexpr int64_t kKeys = 64;       // keys of one tile
constexpr int64_t kUnitRows = 48;   // query rows x heads that share a tile of K and V
constexpr int64_t kDimMax = 256;
constexpr float kLowest = -std::numeric_limits<float>::infinity();

struct Lanes {
  float index[kKeys];
  constexpr Lanes() : index() {
    for (int i = 0; i < kKeys; ++i) index[i] = float(i);
  }
};
constexpr Lanes kIndex;

// The working memory of one unit. K and V take turns in `panels`, so that each stays in L1 while all rows meet it.
struct Work {
  int64_t width;   // dim rounded up to whole panels
  float* q;        // [rows][dim], times scale and log2(e)
  float* weights;  // [rows][kKeys]: scores, then weights
  float* sum;      // [rows][width]: weighted values, not yet divided
  float* total;    // [rows][kLanes]: weights, lane by lane
  float* highest;  // [rows]: the greatest score so far
  float* panels;   // K [kKeys / kPanel][dim][kPanel], or V [width / kPanel][kKeys][kPanel]

  Work(Scratch& scratch, int64_t rows, int64_t dim) : width(round_up(dim, kPanel)) {
    const int64_t highest_size = round_up(rows, 16);
    panels = scratch.room(kKeys * width + rows * (kKeys + 2 * width + kLanes) + highest_size);
    weights = panels + kKeys * width;
    sum = weights + rows * kKeys;
    total = sum + rows * width;
    highest = total + rows * kLanes;
    q = highest + highest_size;
  }
};

// Where the K rows of a tile lie; V's lie block_size * dim further. Absent keys read as zeros.
template <class T>
struct Rows {
  const T* k[kKeys];
  const T* v[kKeys];
};

template <class T>
void find_rows(const Attention<T>& job, const AttentionUnit& unit, int64_t first_key, int64_t end, Rows<T>& rows) {
  alignas(64) static const T zeros[kDimMax] = {};
  const T* head = job.layer + unit.kv_head * job.kv_head_stride;
  const int64_t count = std::clamp<int64_t>(end - first_key, 0, kKeys), v_offset = job.block_size * job.dim;
  int64_t block = first_key / job.block_size, offset = first_key % job.block_size;
  for (int64_t i = 0; i < count; ++block, offset = 0) {
    const T* k = head + unit.block_table[block] * job.slot_stride + offset * job.dim;
    for (; i < count && offset < job.block_size; ++i, ++offset, k += job.dim) {
      rows.k[i] = k;
      rows.v[i] = k + v_offset;
    }
  }
  std::fill(rows.k + count, rows.k + kKeys, zeros);
  std::fill(rows.v + count, rows.v + kKeys, zeros);
}

// Asks for the rows of the next tile that will be packed where [first, first + count) of this one are now.
template <class T>
void prefetch(const T* const* rows, int64_t count, int64_t dim) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t d = 0; d < dim; d += line) __builtin_prefetch(rows[i] + d);
}

// 8 keys' words at d, transposed: out[d + j] gets dimension d + j of the 8 keys.
inline void spread(const float* const* rows, int64_t d, float* out) {
  U32x8 in[8], columns[8];
  for (int i = 0; i < 8; ++i) in[i] = load_as<U32x8>(rows[i] + d);
  transpose(in, columns);
  for (int j = 0; j < 8; ++j) store_as(out + (d + j) * kPanel, columns[j]);
}

inline void spread(const bf16* const* rows, int64_t d, float* out) {
  U32x8 in[8], columns[8];
  for (int i = 0; i < 8; ++i) in[i] = load_as<U32x8>(rows[i] + d);
  transpose(in, columns);
  for (int j = 0; j < 8; ++j) {
    store_as(out + (d + 2 * j) * kPanel, columns[j] << 16);
    store_as(out + (d + 2 * j + 1) * kPanel, columns[j] & 0xffff0000u);
  }
}

template <class T>
void pack_keys(const T* const* rows, const T* const* next, int64_t dim, float* keys) {
  constexpr int64_t step = 32 / sizeof(T);
  for (int64_t i = 0; i < kKeys; i += 8) {
    float* out = keys + i / kPanel * dim * kPanel + i % kPanel;
    prefetch(next + i, 8, dim);
    int64_t d = 0;
    for (; d + step <= dim; d += step) spread(rows + i, d, out);
    for (; d < dim; ++d)
      for (int64_t j = 0; j < 8; ++j) out[d * kPanel + j] = widen(rows[i + j][d]);
  }
}

template <class T>
void pack_values(const T* const* rows, const T* const* next, int64_t dim, float* values) {
  for (int64_t i = 0; i < kKeys; ++i, values += kPanel) {
    prefetch(next + i, 1, dim);
    for (int64_t d = 0; d < dim; d += kPanel) {
      float* out = values + d * kKeys;
      const int64_t low = std::min<int64_t>(dim - d, kLanes), high = std::min<int64_t>(dim - d - low, kLanes);
      store(out, load_upto(rows[i] + d, low));
      store(out + kLanes, load_upto(rows[i] + d + kLanes, high));
    }
  }
}

template <class T>
void load_queries(const Attention<T>& job, const AttentionUnit& unit, float* q) {
  const int64_t group = job.num_heads / job.num_kv_heads, size = group * job.dim;
  const F32 scale = splat(job.scale * kLog2e);
  for (int64_t r = 0; r < unit.num_rows; ++r) {
    const T* row = job.q + (unit.first_row + r) * job.q_stride + unit.kv_head * size;
    by_lanes(size, [&](int64_t i, int64_t count) {
      store_upto(q + r * size + i, load_upto(row + i, count) * scale, count);
    });
  }
}

// Keys [low, high) of a tile are seen; the rest of `scores` becomes -inf. Returns the greatest.
float mask(float* scores, int64_t low, int64_t high) {
  F32 highest = splat(kLowest);
  for (int64_t i = 0; i < kKeys; i += kLanes) {
    const F32 index = load(kIndex.index + i);
    F32 s = load(scores + i);
    if (low > 0 || high < kKeys) {
      s = index < float(high) ? s : splat(kLowest);
      s = index >= float(low) ? s : splat(kLowest);
      store(scores + i, s);
    }
    highest = max(s, highest);
  }
  return max_lanes(highest);
}

void scale_by(float* x, int64_t size, float factor) {
  for (int64_t i = 0; i < size; i += kLanes) store(x + i, load(x + i) * splat(factor));
}

// scores [kKeys] -> weights in place; brings row r's running sums to the new maximum.
void soften(const Work& work, int64_t r, float* scores, int64_t low, int64_t high) {
  if (high <= low) {
    std::fill_n(scores, kKeys, 0.0f);
    return;
  }
  const float highest = std::max(work.highest[r], mask(scores, low, high));
  if (highest != work.highest[r]) {
    const float factor = exp2(splat(work.highest[r] - highest))[0];
    scale_by(work.sum + r * work.width, work.width, factor);
    scale_by(work.total + r * kLanes, kLanes, factor);
    work.highest[r] = highest;
  }
  F32 total = load(work.total + r * kLanes);
  for (int64_t i = 0; i < kKeys; i += kLanes) {
    const F32 weight = exp2(load(scores + i) - splat(highest));
    store(scores + i, weight);
    total = total + weight;
  }
  store(work.total + r * kLanes, total);
}

template <class T>
void score(const Attention<T>& job, const Work& work, int64_t rows) {
  std::fill_n(work.weights, rows * kKeys, 0.0f);
  by_tile_rows(rows, [&](int64_t first, int64_t count) {
    tile_rows<false>(count, work.q + first * job.dim, job.dim, work.panels, job.dim * kPanel, kKeys / kPanel, job.dim,
              work.weights + first * kKeys, kKeys);
  });
}

// Scores become weights, of the keys that each row sees.
template <class T>
void soften_rows(const Attention<T>& job, const AttentionUnit& unit, const Work& work, int64_t first_key) {
  const int64_t group = job.num_heads / job.num_kv_heads;
  for (int64_t r = 0; r < unit.num_rows * group; ++r) {
    const int64_t position = unit.position + r / group;
    const int64_t low = job.window ? std::max<int64_t>(0, position - job.window + 1 - first_key) : 0;
    soften(work, r, work.weights + r * kKeys, low, std::min(position + 1 - first_key, kKeys));
  }
}

// Adds the first `depth` values of the tile.
void add_values(const Work& work, int64_t rows, int64_t depth) {
  by_tile_rows(rows, [&](int64_t first, int64_t count) {
    tile_rows<false>(count, work.weights + first * kKeys, kKeys, work.panels, kKeys * kPanel, work.width / kPanel, depth,
              work.sum + first * work.width, work.width);
  });
}

template <class T>
void store_rows(const Attention<T>& job, const AttentionUnit& unit, const Work& work) {
  const int64_t group = job.num_heads / job.num_kv_heads;
  for (int64_t r = 0; r < unit.num_rows * group; ++r) {
    T* row = job.out + ((unit.first_row + r / group) * job.num_heads + unit.kv_head * group + r % group) * job.dim;
    const F32 total = splat(sum_lanes(load(work.total + r * kLanes)));
    by_lanes(job.dim, [&](int64_t d, int64_t count) {
      store_upto(row + d, load(work.sum + r * work.width + d) / total, count);
    });
  }
}

}  // namespace

int64_t rows_per_unit(int64_t heads_per_kv_head) { return std::max<int64_t>(1, kUnitRows / heads_per_kv_head); }

template <class T>
void attend(const Attention<T>& job, const AttentionUnit& unit) {
  thread_local Scratch scratch;
  const int64_t rows = unit.num_rows * (job.num_heads / job.num_kv_heads), end = unit.position + unit.num_rows;
  const Work work(scratch, rows, job.dim);
  std::fill_n(work.sum, rows * (work.width + kLanes), 0.0f);
  std::fill_n(work.highest, rows, kLowest);
  load_queries(job, unit, work.q);
  const int64_t seen_from = job.window ? std::max<int64_t>(0, unit.position - job.window + 1) : 0;
  const int64_t first_key = seen_from / kKeys * kKeys;
  Rows<T> now, next;
  find_rows(job, unit, first_key, end, next);
  for (int64_t key = first_key; key < end; key += kKeys) {
    now = next;
    find_rows(job, unit, key + kKeys, end, next);
    pack_keys(now.k, next.k, job.dim, work.panels);
    score(job, work, rows);
    soften_rows(job, unit, work, key);
    pack_values(now.v, next.v, job.dim, work.panels);
    add_values(work, rows, std::min(kKeys, end - key));
  }
  store_rows(job, unit, work);
}

template void attend(const Attention<float>&, const AttentionUnit&);
template void attend(const Attention<bf16>&, const AttentionUnit&);

}  // namespace halfmoon
