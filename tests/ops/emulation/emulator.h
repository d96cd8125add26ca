// The host's side of cuda/device.cuh: what warps and blocks do together, 16-bit types, tensor cores, copies, launches.
#pragma once
#include "block.h"

#define DSVLM_DYNAMIC_SHARED(name) unsigned char* const name = emulation::machine.shared

namespace emulation {

constexpr uint32_t kAll = ~0u;

struct Nothing {};
struct Vote {
  bool predicate;
  uint32_t ballot;
};
struct Shuffle {
  uint64_t bits;
  uint32_t source;  // lane
  uint64_t result;
};
struct MatrixLoad {
  const unsigned char* row;
  uint32_t (&r)[4];
};
struct Product {
  float (&d)[4];
  const uint32_t (&a)[4];
  uint32_t b[2];
};

inline uint32_t vote(const char* name, uint32_t mask, bool predicate) {
  Vote own{predicate, 0};
  join<Vote>(name, mask, own, [](Vote* const (&lanes)[kLanes]) {
    uint32_t ballot = 0;
    for (int i = 0; i < kLanes; ++i) ballot |= lanes[i] ? uint32_t(lanes[i]->predicate) << i : 0u;
    for (Vote* lane : lanes)
      if (lane) lane->ballot = ballot;
  });
  return own.ballot;
}

// `outside`: the source lies outside the segment of `width` lanes, so the lane keeps its own value.
template <class T>
T shuffle(const char* name, uint32_t mask, T value, int source, bool outside) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "CUDA shuffles 4 or 8 bytes");
  Shuffle own{0, outside ? uint32_t(machine.current % kLanes) : uint32_t(source), 0};
  memcpy(&own.bits, &value, sizeof(T));
  join<Shuffle>(name, mask, own, [](Shuffle* const (&lanes)[kLanes]) {
    for (Shuffle* lane : lanes)
      if (lane) lane->result = lanes[lane->source] ? lanes[lane->source]->bits : ~uint64_t(0);  // not taking part: NaN
  });
  memcpy(&value, &own.result, sizeof(T));
  return value;
}

inline int lane() { return machine.current % kLanes; }

inline bool inside(const unsigned char* pointer, size_t bytes, const unsigned char* memory, size_t size) {
  return pointer >= memory && pointer + bytes <= memory + size;
}

inline void check_shared(const char* name, const void* pointer) {
  const auto* address = static_cast<const unsigned char*>(pointer);
  if (reinterpret_cast<uintptr_t>(address) % 16) fail(std::string(name) + " of an address that is not a multiple of 16");
  if (!inside(address, 16, machine.shared, machine.shared_bytes) &&
      !inside(address, 16, machine.statics, machine.static_bytes))
    fail(std::string(name) + " of 16 bytes that are not shared memory (offset " +
         std::to_string(address - machine.shared) + " of " + std::to_string(machine.shared_bytes) + " dynamic bytes)");
}

template <bool transposed>
void load_matrices(const char* name, uint32_t (&r)[4], const void* shared) {
  check_shared(name, shared);
  MatrixLoad own{static_cast<const unsigned char*>(shared), r};
  join<MatrixLoad>(name, kAll, own, [](MatrixLoad* const (&lanes)[kLanes]) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t values[8][8];
      for (int row = 0; row < 8; ++row) memcpy(values[row], lanes[8 * matrix + row]->row, 16);
      for (int i = 0; i < kLanes; ++i) {
        const int row = i / 4, column = i % 4 * 2;
        const uint32_t low = transposed ? values[column][row] : values[row][column];
        const uint32_t high = transposed ? values[column + 1][row] : values[row][column + 1];
        lanes[i]->r[matrix] = low | high << 16;
      }
    }
  });
}

}  // namespace emulation

#define __syncthreads() (void)emulation::barrier("__syncthreads", false)
#define __syncthreads_count(predicate) (emulation::barrier("__syncthreads_count", predicate)[0])
#define __syncthreads_and(predicate) (emulation::barrier("__syncthreads_and", predicate)[1])
#define __syncthreads_or(predicate) (emulation::barrier("__syncthreads_or", predicate)[2])

inline void __syncwarp(uint32_t mask = emulation::kAll) {
  emulation::Nothing own;
  emulation::join<emulation::Nothing>("__syncwarp", mask, own, [](emulation::Nothing* const (&)[32]) {});
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate) { return emulation::vote("__ballot_sync", mask, predicate); }
inline int __any_sync(uint32_t mask, int predicate) { return emulation::vote("__any_sync", mask, predicate) != 0; }
inline int __all_sync(uint32_t mask, int predicate) { return emulation::vote("__all_sync", mask, predicate) == mask; }

template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32) {
  const int first = emulation::lane() & ~(width - 1);
  return emulation::shuffle("__shfl_sync", mask, value, first + (source & (width - 1)), false);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32) {
  const int source = emulation::lane() - int(delta);
  return emulation::shuffle("__shfl_up_sync", mask, value, source, source < (emulation::lane() & ~(width - 1)));
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32) {
  const int source = emulation::lane() + int(delta);
  return emulation::shuffle("__shfl_down_sync", mask, value, source, source > (emulation::lane() | (width - 1)));
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32) {
  const int source = emulation::lane() ^ bits;
  return emulation::shuffle("__shfl_xor_sync", mask, value, source, source > (emulation::lane() | (width - 1)));
}

namespace dsvlm::device {

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

inline float to_float(bf16 value) { return __uint_as_float(uint32_t(value.bits) << 16); }

inline float to_float(f16 value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000) << 16, rest = value.bits & 0x7fff;
  if (rest >= 0x7c00) return __uint_as_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  if (rest >= 0x400) return __uint_as_float(sign | ((rest << 13) + (112u << 23)));
  return __uint_as_float(sign | __float_as_uint(float(rest) * 0x1p-24f));
}

template <class T>
T from_float(float value);

template <>
inline bf16 from_float<bf16>(float value) {
  if (value != value) return {0x7fff};
  const uint32_t bits = __float_as_uint(value);
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <>
inline f16 from_float<f16>(float value) {
  if (value != value) return {0x7fff};
  const uint16_t sign = __float_as_uint(value) >> 16 & 0x8000;
  const float size = fabsf(value);
  if (size >= 65520.0f) return {uint16_t(sign | 0x7c00)};
  if (size < 0x1p-14f) return {uint16_t(sign | uint16_t(nearbyintf(size * 0x1p24f)))};
  const uint32_t bits = __float_as_uint(size) - (112u << 23);
  return {uint16_t(sign | ((bits + 0xfff + (bits >> 13 & 1)) >> 13))};
}

template <class T>
uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | uint32_t(from_float<T>(high).bits) << 16;
}

template <class T>
float2 unpack(uint32_t pair) {
  return make_float2(to_float(T{uint16_t(pair)}), to_float(T{uint16_t(pair >> 16)}));
}

template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::Product own{d, a, {b0, b1}};
  emulation::join<emulation::Product>("mma", emulation::kAll, own, [](emulation::Product* const (&lanes)[32]) {
    float a[16][16], b[16][8], sum[16][8];
    for (int i = 0; i < 32; ++i) {
      const int group = i / 4, pair = i % 4 * 2;
      for (int part = 0; part < 4; ++part) {
        const float2 values = unpack<T>(lanes[i]->a[part]);
        const int row = group + part % 2 * 8, k = pair + part / 2 * 8;
        a[row][k] = values.x, a[row][k + 1] = values.y;
        sum[group + part / 2 * 8][pair + part % 2] = lanes[i]->d[part];
      }
      for (int part = 0; part < 2; ++part) {
        const float2 values = unpack<T>(lanes[i]->b[part]);
        b[pair + part * 8][group] = values.x, b[pair + part * 8 + 1][group] = values.y;
      }
    }
    for (int row = 0; row < 16; ++row)
      for (int k = 0; k < 16; ++k)
        for (int column = 0; column < 8; ++column) sum[row][column] += a[row][k] * b[k][column];
    for (int i = 0; i < 32; ++i)
      for (int part = 0; part < 4; ++part) lanes[i]->d[part] = sum[i / 4 + part / 2 * 8][i % 4 * 2 + part % 2];
  });
}

inline void load_matrix_x4(uint32_t (&r)[4], const void* shared) {
  emulation::load_matrices<false>("load_matrix_x4", r, shared);
}
inline void load_matrix_x4_transposed(uint32_t (&r)[4], const void* shared) {
  emulation::load_matrices<true>("load_matrix_x4_transposed", r, shared);
}

// The destination is NaN until the group is waited for: nothing may be read earlier, and nothing else be kept there.
inline void copy_async_16(void* shared, const void* global, bool valid) {
  emulation::check_shared("copy_async_16", shared);
  if (valid && reinterpret_cast<uintptr_t>(global) % 16)
    emulation::fail("copy_async_16 from an address that is not a multiple of 16");
  memset(shared, emulation::kPoison, 16);
  emulation::Thread& thread = emulation::current();
  thread.copies.push_back({static_cast<unsigned char*>(shared), valid ? global : nullptr, thread.groups});
}

inline void copy_async_commit() { ++emulation::current().groups; }

template <int N>
void copy_async_wait() {
  emulation::Thread& thread = emulation::current();
  auto end = thread.copies.begin();
  for (; end != thread.copies.end() && end->group < thread.groups - N; ++end) {
    if (end->global)
      memcpy(end->shared, end->global, 16);
    else
      memset(end->shared, 0, 16);
  }
  thread.copies.erase(thread.copies.begin(), end);
}

inline float fast_exp2(float x) {
  const float result = exp2f(x);
  return result < 0x1p-126f ? 0.0f : result;
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
                   Arguments... arguments) {
  auto body = [&] { kernel(static_cast<Parameters>(arguments)...); };
  return emulation::run(
      grid, block, shared_bytes, [](void* closure) { (*static_cast<decltype(body)*>(closure))(); }, &body);
}

}  // namespace dsvlm::device
