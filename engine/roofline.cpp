// What this core can do at most, for benchmarks to compare with.
#include "kernels.h"

namespace halfmoon {
namespace {

constexpr int kChains = 12;  // enough to hide the latency of two units

// `step` of each chain, `rounds` times.
template <class Step>
void run_chains(int64_t rounds, Step step) {
  F32 sums[kChains];
  for (int i = 0; i < kChains; ++i) sums[i] = splat(float(i));
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) sums[i] = step(sums[i]);
  }
  F32 total{};
  for (int i = 0; i < kChains; ++i) total += sums[i];
  volatile float kept = sum_lanes(total);  // or the compiler would drop the loop
  (void)kept;
}

}  // namespace

int64_t multiply_adds(int64_t rounds) {
  const F32 factor = splat(0.999f), term = splat(0.001f);
  run_chains(rounds, [&](F32 sum) { return fma(sum, factor, term); });
  return rounds * kChains * kLanes * 2;
}

int64_t pair_products(int64_t rounds) {
#if HALFMOON_PAIRS
  const U32 ones = U32{} + 0x3f803f80u;
  run_chains(rounds, [&](F32 sum) { return dot(ones, ones, sum); });
  return rounds * kChains * kLanes * 4;
#else
  (void)rounds;
  return 0;
#endif
}

}  // namespace halfmoon
