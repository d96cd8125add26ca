// What the kernels of the routing share: their arguments, the workspace between gate and select, rows of logits.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "cuda/device.cuh"

namespace dsvlm::moe::cuda {

constexpr int kTokensPerBlock = 64;  // of the gate; below 256, so that a block's counts fit in bytes
constexpr int kMaxExperts = 1024;
constexpr int kMaxPools = 256;
constexpr int kMaxSegments = 8192;  // experts * pools
constexpr int kMaxChoices = 32;
constexpr uint32_t kAllLanes = ~0u;
constexpr uint16_t kNoSegment = 0xffff;

enum class Scalar : int { f32, bf16, f16 };
enum class Policy : int { bpr, position, probs };

__host__ __device__ constexpr int round_up(int value, int unit) { return (value + unit - 1) / unit * unit; }

// The router's output, which forward and backward read. Absent tensors are null: no noise, modality 0, all valid.
struct Logits {
  const void* values;  // [tokens, experts]
  const float* noise;  // [tokens, experts]
  const uint8_t* modality;
  const uint8_t* valid;
  Scalar type;
  int tokens, experts, k, modalities;
  float load_sigma;  // 0: no load probabilities
  bool renormalize;
  bool vectors;  // rows start at multiples of four logits in address, and experts is a multiple of 4

  __device__ int modality_of(int token) const { return modality ? min(int(modality[token]), modalities - 1) : 0; }
};

// All of moe_route; library.cpp says what each output means. A segment is (expert, pool), a choice token * k + rank.
struct Route {
  Logits logits;
  const uint8_t* pool;
  Policy policy;
  int pools, align, max_rows;
  bool by_priority;
  int capacity[kMaxPools];

  float *weight, *lse, *prob_sum, *ent_sum, *z2_sum, *loadp_sum;
  int *index, *slot, *src, *offs, *load, *kept, *bad_rows;

  // workspace, see place()
  uint16_t* segment;           // [choices]: where each choice asks for a row, kNoSegment = nowhere
  uint32_t* key;               // [choices]: smaller = earlier in the order of the policy; equal ones by choice
  uint8_t* counts;             // [segments + 1, stride]: choices that ask, by block of the gate; last row: bad rows
  float* sums;                 // [blocks, columns]
  unsigned long long* asking;  // [choices]: key and choice, by segment; for those with too many for shared memory

  __host__ __device__ int segments() const { return logits.experts * pools; }
  __host__ __device__ int blocks() const { return (logits.tokens + kTokensPerBlock - 1) / kTokensPerBlock; }
  __host__ __device__ int stride() const { return round_up(blocks(), 16); }
  // one block's sums: [modalities, padded_experts] of probabilities, the same of load probabilities if wanted,
  // [modalities] of entropies, [modalities] of squared logsumexp
  __host__ __device__ int padded_experts() const { return round_up(logits.experts, 4); }
  __host__ __device__ int tables() const { return logits.load_sigma > 0 ? 2 : 1; }
  __host__ __device__ int entropy_column() const { return tables() * logits.modalities * padded_experts(); }
  __host__ __device__ int columns() const { return round_up(entropy_column() + 2 * logits.modalities, 4); }
};

// Gives the workspace its places in `memory` (16-byte aligned; null: only measures). Returns its bytes.
inline size_t place(Route& route, void* memory) {
  size_t used = 0;
  const auto take = [&](auto*& pointer, size_t count) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(static_cast<unsigned char*>(memory) + used);
    used += (count * sizeof(*pointer) + 15) / 16 * 16;
  };
  const size_t choices = size_t(route.logits.tokens) * route.logits.k;
  take(route.asking, choices);
  take(route.sums, size_t(route.blocks()) * route.columns());
  take(route.key, choices);
  take(route.segment, choices);
  take(route.counts, (size_t(route.segments()) + 1) * route.stride());
  return used;
}

// Butterflies over groups of kLanes lanes: all of them get the same result. Every lane of the warp must take part.
template <int kLanes>
__device__ __forceinline__ float group_sum(float value) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

template <int kLanes>
__device__ __forceinline__ float group_max(float value) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, step));
  return value;
}

// Floats as integers in the same order; nothing that is not NaN gives 0. The zeros must be made equal before.
__device__ __forceinline__ uint32_t ordered(float value) {
  const uint32_t bits = __float_as_uint(value);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float from_ordered(uint32_t bits) {
  return __uint_as_float(bits >> 31 ? bits & 0x7fffffffu : ~bits);
}

// One token's logits spread over kLanes lanes: lane l holds experts 4 l .. 4 l + 3 of every 4 kLanes.
template <int kLanes_, int kChunks>
struct Row {
  static constexpr int kLanes = kLanes_;
  static constexpr int kValues = 4 * kChunks;

  __device__ static int expert(int i) { return (i / 4 * kLanes + int(threadIdx.x) % kLanes) * 4 + i % 4; }

  template <class T>
  __device__ static void load(float (&out)[kValues], const T* row, int experts, bool vectors) {
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int first = expert(4 * chunk);
      if (vectors && first < experts) {
        load_four(out + 4 * chunk, row + first);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (first + i < experts) out[4 * chunk + i] = load_one(row + first + i);
      }
    }
  }

  // `out` gets the row's values for experts that exist, and keeps what it has for the others
  __device__ static void load(float (&out)[kValues], const Logits& logits, int token) {
    const int64_t offset = int64_t(token) * logits.experts;
    if (logits.type == Scalar::f32)
      load(out, static_cast<const float*>(logits.values) + offset, logits.experts, logits.vectors);
    else if (logits.type == Scalar::bf16)
      load(out, static_cast<const device::bf16*>(logits.values) + offset, logits.experts, logits.vectors);
    else
      load(out, static_cast<const device::f16*>(logits.values) + offset, logits.experts, logits.vectors);
  }

  // the row's gradient, in the type of the logits
  __device__ static void store(void* to, const Logits& logits, int token, const float (&values)[kValues]) {
    const int64_t offset = int64_t(token) * logits.experts;
    if (logits.type == Scalar::f32)
      store(static_cast<float*>(to) + offset, logits.experts, logits.vectors, values);
    else if (logits.type == Scalar::bf16)
      store(static_cast<device::bf16*>(to) + offset, logits.experts, logits.vectors, values);
    else
      store(static_cast<device::f16*>(to) + offset, logits.experts, logits.vectors, values);
  }

 private:
  template <class T>
  __device__ static void store(T* row, int experts, bool vectors, const float (&values)[kValues]) {
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int first = expert(4 * chunk);
      if (vectors && first < experts) {
        store_four(row + first, values + 4 * chunk);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (first + i < experts) store_one(row + first + i, values[4 * chunk + i]);
      }
    }
  }

  __device__ static void store_one(float* to, float value) { *to = value; }
  template <class T>
  __device__ static void store_one(T* to, float value) {
    *to = device::from_float<T>(value);
  }
  __device__ static void store_four(float* to, const float* values) {
    *reinterpret_cast<float4*>(to) = make_float4(values[0], values[1], values[2], values[3]);
  }
  template <class T>
  __device__ static void store_four(T* to, const float* values) {
    *reinterpret_cast<uint2*>(to) =
        make_uint2(device::pack<T>(values[0], values[1]), device::pack<T>(values[2], values[3]));
  }

  __device__ static float load_one(const float* from) { return *from; }
  template <class T>
  __device__ static float load_one(const T* from) {
    return device::to_float(*from);
  }
  __device__ static void load_four(float* out, const float* from) {
    const float4 four = *reinterpret_cast<const float4*>(from);
    out[0] = four.x, out[1] = four.y, out[2] = four.z, out[3] = four.w;
  }
  template <class T>
  __device__ static void load_four(float* out, const T* from) {
    const uint2 four = *reinterpret_cast<const uint2*>(from);
    const float2 low = device::unpack<T>(four.x), high = device::unpack<T>(four.y);
    out[0] = low.x, out[1] = low.y, out[2] = high.x, out[3] = high.y;
  }
};

// Calls `run` with the smallest kind of row that holds all experts.
template <class Run>
auto with_row(int experts, Run run) {
  if (experts <= 32) return run(Row<8, 1>{});
  if (experts <= 64) return run(Row<8, 2>{});
  if (experts <= 128) return run(Row<16, 2>{});
  if (experts <= 256) return run(Row<32, 2>{});
  return run(Row<32, 8>{});
}

}  // namespace dsvlm::moe::cuda
