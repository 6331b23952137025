// Causal attention over the paged pool: the same code, and the same bits, for decode steps and prefill chunks.
//
// A query row walks over tiles of kKeys keys that are aligned from position 0, first to last, with an online softmax
// (Milakov and Gimelshein 2018; Dao et al. 2022). Scores and weighted values are the chains of tile.h; where those run
// over pairs of bf16, weights are rounded to bf16, and so summed. Keys that a row does not see have weight zero, so
// neither its company in the tile nor the end of its chunk changes a bit.
#include <algorithm>
#include <limits>

#include "kernels.h"
#include "tile.h"

namespace halfmoon {
namespace {

constexpr int64_t kKeys = 64;       // keys of one tile
constexpr int64_t kUnitRows = 96;   // query rows x heads that share a tile of K and V
constexpr int64_t kDimMax = 256;
constexpr float kLowest = -std::numeric_limits<float>::infinity();

struct Lanes {
  float index[kKeys];
  constexpr Lanes() : index() {
    for (int i = 0; i < kKeys; ++i) index[i] = float(i);
  }
};
constexpr Lanes kIndex;

// What the products of one unit run on: fp32, or pairs of bf16 (along dimensions, then along keys).
template <class T>
using Operand = typename Operands<T>::Row;

// The working memory of one unit. K and V take turns in `panels`, so that each stays in L1 while all rows meet it.
template <class T>
struct Work {
  int64_t width;      // dim rounded up to whole panels
  Operand<T>* q;      // [rows][steps of dim]
  float* scores;      // [rows][kKeys]
  float* sum;         // [rows][width]: weighted values, not yet divided
  float* total;       // [rows][kLanes]: weights, lane by lane
  float* highest;     // [rows]: the greatest score so far
  Operand<T>* panels; // K [kKeys / kPanel][steps of dim][kPanel], or V [width / kPanel][steps of kKeys][kPanel]

  Work(Scratch& scratch, int64_t rows, int64_t dim) : width(round_up(dim, kPanel)) {
    const int64_t highest_size = round_up(rows, 16), q_size = rows * steps_of<T>(dim);
    float* room = scratch.room(kKeys * width + rows * (kKeys + width + kLanes) + highest_size + q_size);
    panels = reinterpret_cast<Operand<T>*>(room);
    scores = room + kKeys * width;
    sum = scores + rows * kKeys;
    total = sum + rows * width;
    highest = total + rows * kLanes;
    q = reinterpret_cast<Operand<T>*>(highest + highest_size);
  }

  // A row's weights take the place of its scores, from the row's start; kKeys words apart as well.
  Operand<T>* weights(int64_t row) const { return reinterpret_cast<Operand<T>*>(scores + row * kKeys); }
};

// Where the K rows of a tile lie; V's lie block_size * dim further. Absent keys read as zeros.
template <class T>
struct KvRows {
  const T* k[kKeys];
  const T* v[kKeys];
};

template <class T>
void find_rows(const Attention<T>& job, const AttentionUnit& unit, int64_t first_key, KvRows<T>& rows) {
  alignas(64) static const T zeros[kDimMax] = {};
  const T* head = job.layer + unit.kv_head * job.kv_head_stride;
  const int64_t end = unit.position + unit.num_rows;
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

// Asks for the rows of the next tile that will be packed where `count` of this one are now: into L2, because L1 has too
// few outstanding misses for it.
template <class T>
void prefetch(const T* const* rows, int64_t count, int64_t dim) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t d = 0; d < dim; d += line) __builtin_prefetch(rows[i] + d, 0, 2);
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

inline void spread(const bf16* const* rows, int64_t d, Bf16Pair* out) {
  U32x8 in[8], columns[8];
  for (int i = 0; i < 8; ++i) in[i] = load_as<U32x8>(rows[i] + d);
  transpose(in, columns);
  for (int j = 0; j < 8; ++j) store_as(out + (d / 2 + j) * kPanel, columns[j]);
}

// The same for dimensions [d, dim), too few for a transpose.
template <class T>
void spread_rest(const T* const* rows, int64_t d, int64_t dim, float* out) {
  for (; d < dim; ++d)
    for (int64_t j = 0; j < 8; ++j) out[d * kPanel + j] = widen(rows[j][d]);
}

inline void spread_rest(const bf16* const* rows, int64_t d, int64_t dim, Bf16Pair* out) {
  for (; d < dim; d += 2)
    for (int64_t j = 0; j < 8; ++j) out[d / 2 * kPanel + j] = load_as<Bf16Pair>(rows[j] + d);
}

template <class T>
void pack_keys(const T* const* rows, const T* const* next, int64_t dim, Operand<T>* keys) {
  constexpr int64_t step = 32 / sizeof(T);
  for (int64_t i = 0; i < kKeys; i += 8) {
    Operand<T>* out = keys + i / kPanel * steps_of<T>(dim) * kPanel + i % kPanel;
    prefetch(next + i, 8, dim);
    int64_t d = 0;
    for (; d + step <= dim; d += step) spread(rows + i, d, out);
    spread_rest(rows + i, d, dim, out);
  }
}

// One step of kPanel columns of V from dimension d on: one key's, widened, or a pair of keys'.
template <class T>
void put_values(const T* const* rows, int64_t d, int64_t dim, float* out) {
  const int64_t low = std::min<int64_t>(dim - d, kLanes), high = std::min<int64_t>(dim - d - low, kLanes);
  store(out, load_upto(rows[0] + d, low));
  store(out + kLanes, load_upto(rows[0] + d + kLanes, high));
}

inline void put_values(const bf16* const* rows, int64_t d, int64_t dim, Bf16Pair* out) {
  for (int64_t half = 0; half < kPanel; half += kLanes) {
    const int64_t count = std::clamp<int64_t>(dim - d - half, 0, kLanes);
    const U32 first = load_bits_upto(rows[0] + d + half, count), second = load_bits_upto(rows[1] + d + half, count);
    store_as(out + half, first | second << 16);
  }
}

template <class T>
void pack_values(const T* const* rows, const T* const* next, int64_t dim, Operand<T>* values) {
  constexpr int64_t step = Operands<T>::step;
  for (int64_t i = 0; i < kKeys; i += step, values += kPanel) {
    prefetch(next + i, step, dim);
    for (int64_t d = 0; d < dim; d += kPanel) put_values(rows + i, d, dim, values + d * steps_of<T>(kKeys));
  }
}

inline void put_queries(const float* row, int64_t size, float* q) { std::copy_n(row, size, q); }

inline void put_queries(const bf16* row, int64_t size, float* q) {
  by_lanes(size, [&](int64_t i, int64_t count) { store_upto(q + i, load_upto(row + i, count), count); });
}

inline void put_queries(const bf16* row, int64_t size, Bf16Pair* q) { std::memcpy(q, row, size * sizeof(bf16)); }

template <class T>
void load_queries(const Attention<T>& job, const AttentionUnit& unit, Operand<T>* q) {
  const int64_t size = job.num_heads / job.num_kv_heads * job.dim;
  for (int64_t r = 0; r < unit.num_rows; ++r) {
    const T* row = job.q + (unit.first_row + r) * job.q_stride + unit.kv_head * size;
    put_queries(row, size, q + r * steps_of<T>(size));
  }
}

// Scales the scores of a tile; its keys [low, high) are seen, the rest becomes -inf. Returns the greatest.
float scale_and_mask(float* scores, float scale, int64_t low, int64_t high) {
  F32 highest = splat(kLowest);
  for (int64_t i = 0; i < kKeys; i += kLanes) {
    F32 s = load(scores + i) * splat(scale);
    if (low > 0 || high < kKeys) {
      const F32 index = load(kIndex.index + i);
      s = index < float(high) ? s : splat(kLowest);
      s = index >= float(low) ? s : splat(kLowest);
    }
    store(scores + i, s);
    highest = max(s, highest);
  }
  return max_lanes(highest);
}

void scale_by(float* x, int64_t size, float factor) {
  for (int64_t i = 0; i < size; i += kLanes) store(x + i, load(x + i) * splat(factor));
}

// Both return what they stored. Weights of lanes [i, i + kLanes) never reach scores that are still to be read.
inline F32 store_weights(float* weights, int64_t i, F32 v) {
  store(weights + i, v);
  return v;
}

#if HALFMOON_PAIRS
inline F32 store_weights(Bf16Pair* weights, int64_t i, F32 v) {
  const U16 bits = rounded(v);
  store_as(weights + i / 2, bits);
  return (F32)(widen(bits) << 16);
}
#endif

// Row r's scores -> weights in their place; brings its running sums to the new maximum.
template <class T>
void soften(const Work<T>& work, int64_t r, float scale, int64_t low, int64_t high) {
  float* scores = work.scores + r * kKeys;
  if (high <= low) {
    std::fill_n(scores, kKeys, 0.0f);
    return;
  }
  const float highest = std::max(work.highest[r], scale_and_mask(scores, scale, low, high));
  if (highest != work.highest[r]) {
    const float factor = exp2(splat(work.highest[r] - highest))[0];
    scale_by(work.sum + r * work.width, work.width, factor);
    scale_by(work.total + r * kLanes, kLanes, factor);
    work.highest[r] = highest;
  }
  F32 total = load(work.total + r * kLanes);
  for (int64_t i = 0; i < kKeys; i += kLanes)
    total = total + store_weights(work.weights(r), i, exp2(load(scores + i) - splat(highest)));
  store(work.total + r * kLanes, total);
}

template <class T>
void score(const Attention<T>& job, const Work<T>& work, int64_t rows) {
  const int64_t steps = steps_of<T>(job.dim);
  std::fill_n(work.scores, rows * kKeys, 0.0f);
  by_tile_rows(rows, [&](int64_t first, int64_t count) {
    tile_rows<false>(count, work.q + first * steps, steps, work.panels, steps * kPanel, kKeys / kPanel, steps,
                     work.scores + first * kKeys, kKeys);
  });
}

// Scores become weights, of the keys that each row sees.
template <class T>
void soften_rows(const Attention<T>& job, const AttentionUnit& unit, const Work<T>& work, int64_t first_key) {
  const int64_t group = job.num_heads / job.num_kv_heads;
  for (int64_t r = 0; r < unit.num_rows * group; ++r) {
    const int64_t position = unit.position + r / group;
    const int64_t low = job.window ? std::max<int64_t>(0, position - job.window + 1 - first_key) : 0;
    soften(work, r, job.scale * kLog2e, low, std::min(position + 1 - first_key, kKeys));
  }
}

// Adds the first `count` values of the tile.
template <class T>
void add_values(const Work<T>& work, int64_t rows, int64_t count) {
  by_tile_rows(rows, [&](int64_t first, int64_t tile) {
    tile_rows<false>(tile, work.weights(first), kKeys, work.panels, steps_of<T>(kKeys) * kPanel, work.width / kPanel,
                     steps_of<T>(count), work.sum + first * work.width, work.width);
  });
}

template <class T>
void store_rows(const Attention<T>& job, const AttentionUnit& unit, const Work<T>& work) {
  const int64_t group = job.num_heads / job.num_kv_heads;
  for (int64_t r = 0; r < unit.num_rows * group; ++r) {
    T* row = job.out + ((unit.first_row + r / group) * job.num_heads + unit.kv_head * group + r % group) * job.dim;
    const F32 total = splat(sum_lanes(load(work.total + r * kLanes)));
    by_lanes(job.dim, [&](int64_t d, int64_t count) {
      store_upto(row + d, load(work.sum + r * work.width + d) / total, count);
    });
  }
}

template <class T>
int64_t first_tile(const Attention<T>& job, const AttentionUnit& unit) {
  return job.window ? std::max<int64_t>(0, unit.position - job.window + 1) / kKeys * kKeys : 0;
}

// `next` comes in with the rows of the unit's first tile, and leaves with those of the unit after it, if there is one.
template <class T>
void attend_one(const Attention<T>& job, const AttentionUnit& unit, const AttentionUnit* after, KvRows<T>& next,
                Scratch& scratch) {
  const int64_t rows = unit.num_rows * (job.num_heads / job.num_kv_heads), end = unit.position + unit.num_rows;
  const Work<T> work(scratch, rows, job.dim);
  std::fill_n(work.sum, rows * (work.width + kLanes), 0.0f);
  std::fill_n(work.highest, rows, kLowest);
  load_queries(job, unit, work.q);
  for (int64_t key = first_tile(job, unit); key < end; key += kKeys) {
    const KvRows<T> now = next;
    if (key + kKeys >= end && after) {
      find_rows(job, *after, first_tile(job, *after), next);
    } else {
      find_rows(job, unit, key + kKeys, next);
    }
    pack_keys(now.k, next.k, job.dim, work.panels);
    score(job, work, rows);
    soften_rows(job, unit, work, key);
    pack_values(now.v, next.v, job.dim, work.panels);
    add_values(work, rows, std::min(kKeys, end - key));
  }
  store_rows(job, unit, work);
}

}  // namespace

int64_t rows_per_unit(int64_t heads_per_kv_head) { return std::max<int64_t>(1, kUnitRows / heads_per_kv_head); }

template <class T>
void attend(const Attention<T>& job, const AttentionUnit* units, int64_t count) {
  thread_local Scratch scratch;
  KvRows<T> next;
  if (count) find_rows(job, units[0], first_tile(job, units[0]), next);
  for (int64_t i = 0; i < count; ++i)
    attend_one(job, units[i], i + 1 < count ? units + i + 1 : nullptr, next, scratch);
}

template void attend(const Attention<float>&, const AttentionUnit*, int64_t);
template void attend(const Attention<bf16>&, const AttentionUnit*, int64_t);

}  // namespace halfmoon
