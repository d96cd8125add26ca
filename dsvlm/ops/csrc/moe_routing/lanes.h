// In a namespace of its own: two inline functions of one name would be merged with those of other ops.
// Vectors of the instruction set that a source is compiled for: conversion, sums across lanes, exp, log, erfc.
// Included by *_simd.cpp only.
#pragma once

#include <cstdint>
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#include <type_traits>
#include <utility>

#include "moe_routing/route.h"

namespace dsvlm::DSVLM_ISA::routing {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

template <class Real>
struct Vectors;
template <>
struct Vectors<float> {
  static constexpr int lanes = kBytes / 4;
  typedef float V __attribute__((vector_size(kBytes)));
  typedef int32_t I __attribute__((vector_size(kBytes)));
  typedef uint16_t Halves __attribute__((vector_size(kBytes / 2)));
  static constexpr float smallest = -88.2f;  // exp of it and of anything smaller is 0
  using Key = uint32_t;
  using Integer = int32_t;
};
template <>
struct Vectors<double> {
  static constexpr int lanes = kBytes / 8;
  typedef double V __attribute__((vector_size(kBytes)));
  typedef int64_t I __attribute__((vector_size(kBytes)));
  static constexpr double smallest = -800.0;
  using Key = uint64_t;
  using Integer = int64_t;
};
using VF = Vectors<float>::V;
using IF = Vectors<float>::I;
using VD = Vectors<double>::V;

template <class To, class From>
inline To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

template <class V, class Scalar>
inline V all(Scalar x) {
  return static_cast<std::decay_t<decltype(V{}[0])>>(x) - V{};  // x + 0 would be a sum: of -0 it is 0
}

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

inline VF load(const float* p) {
  VF v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline VD load(const double* p) {
  VD v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline VF load(const Bf16* p) {
  Vectors<float>::Halves h;
  __builtin_memcpy(&h, p, sizeof h);
  return bits_as<VF>(__builtin_convertvector(h, IF) << 16);
}
// The exponent of fp16 is moved by a multiplication, which also makes normal numbers of subnormal ones.
inline VF load(const F16* p) {
  Vectors<float>::Halves h;
  __builtin_memcpy(&h, p, sizeof h);
  const IF wide = __builtin_convertvector(h, IF);
  const IF magnitude = (wide & 0x7fff) << 13;
  const IF finite = bits_as<IF>(bits_as<VF>(magnitude) * 0x1p112f);
  const IF value = magnitude >= (0x7c00 << 13) ? (magnitude | 0x7f800000) : finite;
  return bits_as<VF>(value | ((wide & 0x8000) << 16));
}

inline void store(float* p, VF v) { __builtin_memcpy(p, &v, sizeof v); }
inline void store(double* p, VD v) { __builtin_memcpy(p, &v, sizeof v); }
inline void store(Bf16* p, VF v) {
  const IF b = bits_as<IF>(v);
  const IF rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
  const Vectors<float>::Halves h = __builtin_convertvector(v == v ? rounded : all<IF>(0x7fc0), Vectors<float>::Halves);
  __builtin_memcpy(p, &h, sizeof h);
}
inline void store(F16* p, VF v) {
  const IF b = bits_as<IF>(v), magnitude = b & 0x7fffffff;
  // normal: round the 13 bits away, to even; subnormal: 0.5 has an ulp of 2^-24, so adding it rounds there
  const IF normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const IF subnormal = bits_as<IF>(bits_as<VF>(magnitude) + 0.5f) - 0x3f000000;
  const IF finite = magnitude < (113 << 23) ? subnormal : normal;
  const IF special = magnitude > 0x7f800000 ? all<IF>(0x7e00) : all<IF>(0x7c00);
  const IF value = magnitude >= 0x477ff000 ? special : finite;
  const Vectors<float>::Halves h = __builtin_convertvector(value | ((b >> 16) & 0x8000), Vectors<float>::Halves);
  __builtin_memcpy(p, &h, sizeof h);
}

// Bit i: whether lane i of both is the same number.
template <class V>
inline uint64_t equal_bits(V x, V y) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<V, VF>) return _mm512_cmp_ps_mask((__m512)x, (__m512)y, _CMP_EQ_OQ);
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<V, VF>)
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)x, (__m256)y, _CMP_EQ_OQ));
#endif
  const auto equal = x == y;
  uint64_t bits = 0;
  for (size_t i = 0; i < sizeof(V) / sizeof(x[0]); ++i) bits |= static_cast<uint64_t>(equal[i] & 1) << i;
  return bits;
}

// Blocks of `step` lanes change places between a and b: one stage of a transposition.
template <int step, class V, int... lane>
inline void exchange(V& a, V& b, std::integer_sequence<int, lane...>) {
  constexpr int n = sizeof...(lane);
  const V low = __builtin_shufflevector(a, b, ((lane & step) ? n + lane - step : lane)...);
  b = __builtin_shufflevector(a, b, ((lane & step) ? n + lane : lane + step)...);
  a = low;
}
// Lane i of the result: `op` over all lanes of rows[i]; the rows are used up.
template <int step, int lanes, class V, class Op>
[[gnu::always_inline]] inline V across(V* rows, Op op) {
  if constexpr (step == 0) {
    return rows[0];
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < step; ++i) {
      exchange<step>(rows[i], rows[i + step], std::make_integer_sequence<int, lanes>{});
      rows[i] = op(rows[i], rows[i + step]);
    }
    return across<step / 2, lanes>(rows, op);
  }
}

// exp of numbers that are at least `smallest` and at most some tens; 0 at `smallest`, exactly 1 at 0, NaN of NaN.
// fp32: relative error 1.8e-7; where one fused step takes the multiple of ln 2 off, 3.9e-7 towards exp(-87); results
// below 2^-126 have fewer bits, and those of less than -87.69 are 0. A fit to
// exp of [-ln 2 / 2, ln 2 / 2] by weighted least squares; the polynomial of log is S. Moshier's, Cephes.
[[gnu::always_inline]] inline VF exp_of(VF x) {  // the constants stay in registers
  const VF shifted = x * 1.44269504088896341f + 12582912.0f;
  const VF n = shifted - 12582912.0f;
  const IF exponent = (bits_as<IF>(shifted) - 0x4b400000 + 127) << 23;
#if defined(__FMA__)
  const VF r = x - n * 0.693147181f;
#else
  const VF r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
#endif
  VF p = r * 8.29023e-3f + 4.189839e-2f;
  p = p * r + 1.666764e-1f;
  p = p * r + 4.9999146e-1f;
  p = p * r + 9.9999971e-1f;
  return (p * r + 1.0f) * bits_as<VF>(exponent);
}
inline VF log_of(VF x) {
  const IF b = bits_as<IF>(x);
  IF exponent = (b >> 23) - 126;
  VF m = bits_as<VF>((b & 0x7fffff) | 0x3f000000);
  const IF small = m < 0.707106781186547524f;
  exponent += small;  // true is -1
  m = (small ? m + m : m) - 1.0f;
  const VF e = __builtin_convertvector(exponent, VF), square = m * m;
  VF p = m * 7.0376836292e-2f + -1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m + -1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m + -1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m + -2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const VF low = p * (m * square) + e * -2.12194440e-4f - square * 0.5f;
  return m + low + e * 0.693359375f;
}
template <class F>
inline VD each_lane(VD x, F f) {
  for (int i = 0; i < Vectors<double>::lanes; ++i) x[i] = f(x[i]);
  return x;
}
inline VD exp_of(VD x) {
  return each_lane(x, [](double v) { return v <= Vectors<double>::smallest ? 0.0 : __builtin_exp(v); });
}
inline VD log_of(VD x) {
  return each_lane(x, [](double v) { return __builtin_log(v); });
}

// Keeps NaN: exp_of gives it back.
template <class Real, class V>
inline V at_least_smallest(V x) {
  const V least = all<V>(Vectors<Real>::smallest);
#if defined(__AVX512F__)
  if constexpr (sizeof(Real) == 4) return (V)_mm512_maskz_max_ps(0xffff, (__m512)least, (__m512)x);
#endif
  return x < least ? least : x;
}

// The normal distribution function. fp32: erfc by a Chebyshev fit (Press et al., Numerical Recipes, 6.2), relative
// error 5e-7 above 0, 2e-6 down to -5, 2e-5 at -13; infinities are clamped first, where the result is 0 or 1 anyway.
inline VF normal_cdf(VF x) {
  x = x < -13.0f ? all<VF>(-13.0f) : x;
  x = x > 13.0f ? all<VF>(13.0f) : x;
  const VF a = (x < 0.0f ? -x : x) * 0.70710678118654752f;
  const VF t = 1.0f / (1.0f + 0.5f * a);
  VF p = t * 0.17087277f + -0.82215223f;
  p = p * t + 1.48851587f;
  p = p * t + -1.13520398f;
  p = p * t + 0.27886807f;
  p = p * t + -0.18628806f;
  p = p * t + 0.09678418f;
  p = p * t + 0.37409196f;
  p = p * t + 1.00002368f;
  p = p * t + -1.26551223f;
  const VF tail = 0.5f * t * exp_of(at_least_smallest<float>(p - a * a));
  return x < 0.0f ? tail : 1.0f - tail;
}
inline VD normal_cdf(VD x) {
  return each_lane(x, [](double v) { return 0.5 * __builtin_erfc(v * -0.70710678118654752440); });
}
template <class Real, class V>
inline V normal_density(V x) {
  return exp_of(at_least_smallest<Real>(x * x * Real(-0.5))) * Real(0.39894228040143267794);
}

}  // namespace dsvlm::DSVLM_ISA::routing
