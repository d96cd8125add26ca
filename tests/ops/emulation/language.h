// CUDA's own names for host C++: qualifiers, vector types, intrinsics that concern one thread only.
#pragma once
#include <math.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
// Thread-local variables lie side by side, so the emulator finds them all: one run of a block is one OS thread.
#define __shared__ static thread_local

#define DSVLM_VECTOR2(name, type)     \
  struct alignas(2 * sizeof(type)) name { \
    type x, y;                        \
  };                                  \
  inline name make_##name(type x, type y) { return {x, y}; }
#define DSVLM_VECTOR3(name, type) \
  struct name {                   \
    type x, y, z;                 \
  };                              \
  inline name make_##name(type x, type y, type z) { return {x, y, z}; }
#define DSVLM_VECTOR4(name, type)                                \
  struct alignas(sizeof(type) < 4 ? 4 * sizeof(type) : 16) name { \
    type x, y, z, w;                                             \
  };                                                             \
  inline name make_##name(type x, type y, type z, type w) { return {x, y, z, w}; }
DSVLM_VECTOR2(float2, float)
DSVLM_VECTOR3(float3, float)
DSVLM_VECTOR4(float4, float)
DSVLM_VECTOR2(int2, int)
DSVLM_VECTOR3(int3, int)
DSVLM_VECTOR4(int4, int)
DSVLM_VECTOR2(uint2, unsigned)
DSVLM_VECTOR3(uint3, unsigned)
DSVLM_VECTOR4(uint4, unsigned)
DSVLM_VECTOR2(short2, short)
DSVLM_VECTOR2(ushort2, unsigned short)
DSVLM_VECTOR4(ushort4, unsigned short)
DSVLM_VECTOR2(longlong2, long long)
DSVLM_VECTOR2(ulonglong2, unsigned long long)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };
using cudaStream_t = void*;

template <class To, class From>
To bit_cast_to(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

inline uint32_t __float_as_uint(float value) { return bit_cast_to<uint32_t>(value); }
inline int32_t __float_as_int(float value) { return bit_cast_to<int32_t>(value); }
inline float __uint_as_float(uint32_t bits) { return bit_cast_to<float>(bits); }
inline float __int_as_float(int32_t bits) { return bit_cast_to<float>(bits); }
inline long long __double_as_longlong(double value) { return bit_cast_to<long long>(value); }
inline double __longlong_as_double(long long bits) { return bit_cast_to<double>(bits); }

inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }
inline int __popcll(uint64_t bits) { return __builtin_popcountll(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits ? __builtin_clz(static_cast<unsigned>(bits)) : 32; }
inline int __ffsll(long long bits) { return __builtin_ffsll(bits); }
inline int __clzll(long long bits) { return bits ? __builtin_clzll(static_cast<uint64_t>(bits)) : 64; }
inline uint32_t __brev(uint32_t bits) {
  uint32_t result = 0;
  for (int i = 0; i < 32; ++i) result |= (bits >> i & 1u) << (31 - i);
  return result;
}
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>(uint64_t(a) * b >> 32); }

// The device's are approximations; nothing may depend on their last digits.
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }

template <class T>
T __ldg(const T* pointer) {
  return *pointer;
}

template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  return T(b) < T(a) ? T(b) : T(a);
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  return T(a) < T(b) ? T(b) : T(a);
}

// Threads run one at a time, so an atomic operation is a plain one. Each returns the old value.
template <class T, class Change>
T changed(T* address, Change change) {
  const T old = *address;
  *address = change(old);
  return old;
}
template <class T>
T atomicAdd(T* address, std::common_type_t<T> value) {
  return changed(address, [&](T old) { return T(old + value); });
}
template <class T>
T atomicSub(T* address, std::common_type_t<T> value) {
  return changed(address, [&](T old) { return T(old - value); });
}
template <class T>
T atomicOr(T* address, std::common_type_t<T> value) {
  return changed(address, [&](T old) { return T(old | value); });
}
template <class T>
T atomicAnd(T* address, std::common_type_t<T> value) {
  return changed(address, [&](T old) { return T(old & value); });
}
template <class T>
T atomicMin(T* address, std::common_type_t<T> value) {
  return changed(address, [&](T old) { return old < value ? old : value; });
}
template <class T>
T atomicMax(T* address, std::common_type_t<T> value) {
  return changed(address, [&](T old) { return old < value ? value : old; });
}
template <class T>
T atomicExch(T* address, std::common_type_t<T> value) {
  return changed(address, [&](T) { return value; });
}
template <class T>
T atomicCAS(T* address, std::common_type_t<T> expected, std::common_type_t<T> value) {
  return changed(address, [&](T old) { return old == expected ? value : old; });
}
inline void __threadfence() {}
inline void __threadfence_block() {}
