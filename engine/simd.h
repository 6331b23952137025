// The few vector operations that the kernels share, at the widest width that the compiler was told of.
//
// GCC's and Clang's vector extensions do the arithmetic; only the fused multiply-add is spelled per instruction set,
// because its single rounding is part of the operators' contract (the same bits in every kernel).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef HALFMOON_LANES
#if defined(__AVX512F__)
#define HALFMOON_LANES 16
#elif defined(__AVX2__)
#define HALFMOON_LANES 8
#else
#define HALFMOON_LANES 4
#endif
#endif

namespace halfmoon {

constexpr int kLanes = HALFMOON_LANES;
constexpr int kPanel = 2 * kLanes;  // output columns of one packed weight panel

typedef float F32 __attribute__((vector_size(4 * kLanes)));
typedef int32_t I32 __attribute__((vector_size(4 * kLanes)));
typedef uint32_t U32 __attribute__((vector_size(4 * kLanes)));
typedef uint16_t U16 __attribute__((vector_size(2 * kLanes)));
typedef uint32_t U32x8 __attribute__((vector_size(32)));  // transposes work on 8 x 8 words at every width

// bf16 in memory: the upper half of an fp32.
struct bf16 {
  uint16_t bits;
};

// Two bf16 that follow each other along a sum, the earlier in the lower half: what a dot-product instruction takes.
struct Bf16Pair {
  uint32_t bits;
};

#if defined(__AVX512BF16__) && HALFMOON_LANES == 16
#define HALFMOON_PAIRS 1
#else
#define HALFMOON_PAIRS 0
#endif
constexpr bool kPairs = HALFMOON_PAIRS;  // bf16 products run over pairs; where false, bf16 is widened to fp32

template <class V, class T>
inline V load_as(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class V, class T>
inline void store_as(T* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

inline F32 splat(float x) { return x - F32{}; }  // x - 0 is x, also for -0

inline F32 fma(F32 a, F32 b, F32 c) {
#if defined(__AVX512F__) && HALFMOON_LANES == 16
  return (F32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__) && HALFMOON_LANES == 8
  return (F32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  F32 out;
  for (int i = 0; i < kLanes; ++i) out[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return out;
#endif
}

#if HALFMOON_PAIRS
// c + a.low * b.low + a.high * b.high in fp32, in the instruction's own order and rounding; subnormals count as zero.
inline F32 dot(U32 a, U32 b, F32 c) { return (F32)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b); }

// Rounded to nearest even; subnormals become zero.
inline U16 rounded(F32 v) { return (U16)_mm512_cvtneps_pbh((__m512)v); }
#endif

inline F32 max(F32 a, F32 b) { return a > b ? a : b; }

// ---- loads and stores of contiguous elements, widened to fp32 and rounded to nearest even ----------------------------

inline F32 load(const float* p) { return load_as<F32>(p); }

// GCC 12 makes several instructions of the conversions that are not spelled here.
inline U32 widen(U16 v) {
#if defined(__AVX512F__) && HALFMOON_LANES == 16
  return (U32)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)v);
#elif defined(__AVX2__) && HALFMOON_LANES == 8
  return (U32)_mm256_cvtepu16_epi32((__m128i)v);
#else
  return __builtin_convertvector(v, U32);
#endif
}

inline U16 lower_halves(U32 v) {
#if defined(__AVX512F__) && HALFMOON_LANES == 16
  return (U16)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)v);
#else
  return __builtin_convertvector(v, U16);
#endif
}

inline F32 load(const bf16* p) { return (F32)(widen(load_as<U16>(p)) << 16); }

inline void store(float* p, F32 v) { store_as(p, v); }

inline void store(bf16* p, F32 v) {
  const U32 bits = (U32)v;
  const U32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const U32 kept = v == v ? rounded : U32{} + 0x7fc0;  // a NaN stays one
  store_as(p, lower_halves(kept));
}

inline float widen(float x) { return x; }

inline float widen(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

inline void narrow(float x, float* out) { *out = x; }

inline void narrow(float x, bf16* out) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  out->bits = x == x ? uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) : uint16_t(0x7fc0);
}

// Up to kLanes elements; the missing ones read as zero, and are not written.
template <class T>
inline F32 load_some(const T* p, int64_t count) {
  T buffer[kLanes] = {};
  std::memcpy(buffer, p, count * sizeof(T));
  return load(buffer);
}

template <class T>
inline void store_some(T* p, F32 v, int64_t count) {
  T buffer[kLanes];
  store(buffer, v);
  std::memcpy(p, buffer, count * sizeof(T));
}

// Calls body(offset, count) for [0, size) in steps of kLanes; only the last may be short.
template <class Body>
inline void by_lanes(int64_t size, Body body) {
  for (int64_t i = 0; i < size; i += kLanes) body(i, size - i < kLanes ? size - i : int64_t(kLanes));
}

template <class T>
inline F32 load_upto(const T* p, int64_t count) {
  return count == kLanes ? load(p) : load_some(p, count);
}

// The bits of up to kLanes bf16, each in the lower half of a word; the missing ones are zero.
inline U32 load_bits_upto(const bf16* p, int64_t count) {
  if (count == kLanes) return widen(load_as<U16>(p));
  uint16_t bits[kLanes] = {};
  std::memcpy(bits, p, count * sizeof(bf16));
  return widen(load_as<U16>(bits));
}

template <class T>
inline void store_upto(T* p, F32 v, int64_t count) {
  if (count == kLanes) {
    store(p, v);
  } else {
    store_some(p, v, count);
  }
}

// ---- reductions in one fixed order: lane i with lane i + half, down to one -------------------------------------------

template <int lanes, class Join>
inline float join_lanes(const float* p, Join join) {
  if constexpr (lanes == 1) {
    return *p;
  } else {
    float halves[lanes / 2];
    for (int i = 0; i < lanes / 2; ++i) halves[i] = join(p[i], p[i + lanes / 2]);
    return join_lanes<lanes / 2>(halves, join);
  }
}

inline float sum_lanes(F32 v) {
  return join_lanes<kLanes>((const float*)&v, [](float a, float b) { return a + b; });
}

inline float max_lanes(F32 v) {
  return join_lanes<kLanes>((const float*)&v, [](float a, float b) { return a > b ? a : b; });
}

// 2^x to about one unit in the last place; exactly 1 at 0, 0 below -126, 2^127 above 127; NaN stays NaN.
inline F32 exp2(F32 x) {
  const F32 clamped = x > 127.0f ? splat(127.0f) : x;
  const F32 magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const F32 shifted = clamped + magic;
  const F32 f = clamped - (shifted - magic);
  F32 p = splat(1.5403530e-4f);
  p = fma(p, f, splat(1.3333558e-3f));
  p = fma(p, f, splat(9.6181291e-3f));
  p = fma(p, f, splat(5.5504109e-2f));
  p = fma(p, f, splat(2.4022651e-1f));
  p = fma(p, f, splat(6.9314718e-1f));
  p = fma(p, f, splat(1.0f));
  const F32 scaled = (F32)((I32)p + ((I32)shifted << 23));
  return x < -126.0f ? F32{} : scaled;
}

constexpr float kLog2e = 1.44269504f;

// ---- 8 x 8 words, row r from rows[r]; out[c] holds column c ----------------------------------------------------------

inline void transpose(const U32x8 (&in)[8], U32x8 (&out)[8]) {
  U32x8 pairs[8], quads[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = __builtin_shufflevector(in[i], in[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    pairs[i + 1] = __builtin_shufflevector(in[i], in[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      quads[i + 2 * j] = __builtin_shufflevector(pairs[i + j], pairs[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      quads[i + 2 * j + 1] = __builtin_shufflevector(pairs[i + j], pairs[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  for (int j = 0; j < 4; ++j) {
    out[j] = __builtin_shufflevector(quads[j], quads[j + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    out[j + 4] = __builtin_shufflevector(quads[j], quads[j + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

}  // namespace halfmoon
