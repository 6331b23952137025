// What this core can do at most, for benchmarks to compare with.
#include "kernels.h"

namespace halfmoon {

int64_t multiply_adds(int64_t rounds) {
  constexpr int chains = 12;  // enough to hide the latency of two units
  F32 sums[chains];
  for (int i = 0; i < chains; ++i) sums[i] = splat(float(i));
  const F32 factor = splat(0.999f), term = splat(0.001f);
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < chains; ++i) sums[i] = fma(sums[i], factor, term);
  }
  F32 total{};
  for (int i = 0; i < chains; ++i) total += sums[i];
  volatile float kept = sum_lanes(total);  // or the compiler would drop the loop
  (void)kept;
  return rounds * chains * kLanes * 2;
}

}  // namespace halfmoon
