// Tokens to the rows of their experts and back: a group of lanes per row, 16 bytes at a time where the rows allow it.
#pragma once
#include "route.cuh"

namespace dsvlm::moe::cuda {

constexpr int kRowThreads = 128;

// tokens [N, d] in the order of tokens, rows [R, d] in that of experts; which is read and which written, the op says.
struct Rows {
  const void *from, *other;  // other: y in the backward of combine
  void* to;
  const int *src, *slot;
  const float* weight;  // null: 1
  float* grad_weight;
  int64_t rows, tokens;
  int k, width;  // width: d, in elements
};

// A row is taken by 2^shift lanes, kUnroll vectors each before the next ones; units: vectors in it.
struct Lanes {
  int shift, units;
};

template <class T, int kWidth>
struct Vector {
  static_assert(kWidth == 1 || kWidth * sizeof(T) == 16, "single elements or 16 bytes");

  __device__ static void load(float (&out)[kWidth], const T* from) {
    if constexpr (kWidth == 1) {
      if constexpr (sizeof(T) == 4)
        out[0] = *from;
      else
        out[0] = device::to_float(*from);
    } else {
      const uint4 bits = *reinterpret_cast<const uint4*>(from);
      const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(T) == 4) {
          out[i] = __uint_as_float(words[i]);
        } else {
          const float2 pair = device::unpack<T>(words[i]);
          out[2 * i] = pair.x, out[2 * i + 1] = pair.y;
        }
      }
    }
  }

  __device__ static void store(T* to, const float (&values)[kWidth]) {
    if constexpr (kWidth == 1) {
      if constexpr (sizeof(T) == 4)
        *to = values[0];
      else
        *to = device::from_float<T>(values[0]);
    } else {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(T) == 4)
          words[i] = __float_as_uint(values[i]);
        else
          words[i] = device::pack<T>(values[2 * i], values[2 * i + 1]);
      }
      *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
};

__device__ __forceinline__ int64_t group_of(const Lanes& lanes) {
  return (int64_t(blockIdx.x) * kRowThreads + threadIdx.x) >> lanes.shift;
}

// to[row] = from[src[row] / k], zeros where src is -1. Bits are copied, whatever they mean.
template <class Unit>
__global__ void __launch_bounds__(kRowThreads) permute(const Rows r, const Lanes lanes) {
  constexpr int kUnroll = 4;
  const int64_t row = group_of(lanes);
  if (row >= r.rows) return;
  const int count = 1 << lanes.shift, src = r.src[row];
  const Unit* const from = static_cast<const Unit*>(r.from) + int64_t(src < 0 ? 0 : src / r.k) * lanes.units;
  Unit* const to = static_cast<Unit*>(r.to) + row * lanes.units;
  for (int first = threadIdx.x & (count - 1); first < lanes.units; first += kUnroll * count) {
    Unit held[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      held[i] = Unit{};
      if (src >= 0 && first + i * count < lanes.units) held[i] = from[first + i * count];
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i)
      if (first + i * count < lanes.units) to[first + i * count] = held[i];
  }
}

// to[token] = sum over k of weight * from[slot], in fp32 and in the order of k. Rows that nobody has are not read.
template <class T, int kWidth>
__global__ void __launch_bounds__(kRowThreads) combine(const Rows r, const Lanes lanes) {
  constexpr int kUnroll = 2;
  using V = Vector<T, kWidth>;
  const int64_t token = group_of(lanes);
  if (token >= r.tokens) return;
  const int count = 1 << lanes.shift;
  for (int first = threadIdx.x & (count - 1); first < lanes.units; first += kUnroll * count) {
    float sum[kUnroll][kWidth] = {};
    for (int rank = 0; rank < r.k; ++rank) {
      const int row = r.slot[token * r.k + rank];
      if (row < 0) continue;
      const float weight = r.weight ? r.weight[token * r.k + rank] : 1.0f;
      const T* const from = static_cast<const T*>(r.from) + int64_t(row) * r.width;
      float held[kUnroll][kWidth];
#pragma unroll
      for (int i = 0; i < kUnroll; ++i)
        if (first + i * count < lanes.units) V::load(held[i], from + (first + i * count) * kWidth);
#pragma unroll
      for (int i = 0; i < kUnroll; ++i)
        if (first + i * count < lanes.units)
#pragma unroll
          for (int j = 0; j < kWidth; ++j) sum[i][j] += weight * held[i][j];
    }
    T* const to = static_cast<T*>(r.to) + token * r.width;
#pragma unroll
    for (int i = 0; i < kUnroll; ++i)
      if (first + i * count < lanes.units) V::store(to + (first + i * count) * kWidth, sum[i]);
  }
}

// from: gradient of the tokens; to[row] = weight * from[token], zeros in rows that nobody has; grad_weight of a choice
// is the product of its token's gradient and its row of `other`, 0 where it has none.
template <class T, int kWidth>
__global__ void __launch_bounds__(kRowThreads) combine_backward(const Rows r, const Lanes lanes) {
  constexpr int kUnroll = 2;
  using V = Vector<T, kWidth>;
  const int64_t row = group_of(lanes);
  const int count = 1 << lanes.shift, src = row < r.rows ? r.src[row] : -1;
  const float weight = src < 0 ? 0.0f : r.weight[src];
  const T* const from = static_cast<const T*>(r.from) + int64_t(src < 0 ? 0 : src / r.k) * r.width;
  const T* const other = static_cast<const T*>(r.other) + row * r.width;
  T* const to = static_cast<T*>(r.to) + row * r.width;
  float dot = 0;
  for (int first = threadIdx.x & (count - 1); first < lanes.units && row < r.rows; first += kUnroll * count) {
    float grad[kUnroll][kWidth] = {}, value[kUnroll][kWidth] = {};
#pragma unroll
    for (int i = 0; i < kUnroll; ++i)
      if (src >= 0 && first + i * count < lanes.units) {
        V::load(grad[i], from + (first + i * count) * kWidth);
        V::load(value[i], other + (first + i * count) * kWidth);
      }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (first + i * count >= lanes.units) continue;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        dot += grad[i][j] * value[i][j];
        grad[i][j] *= weight;
      }
      V::store(to + (first + i * count) * kWidth, grad[i]);
    }
  }
  for (int step = count / 2; step > 0; step /= 2) dot += __shfl_xor_sync(kAllLanes, dot, step);
  if (src >= 0 && (threadIdx.x & (count - 1)) == 0) r.grad_weight[src] = dot;
  const int64_t choices = r.tokens * r.k;
  for (int64_t i = int64_t(blockIdx.x) * kRowThreads + threadIdx.x; i < choices; i += int64_t(gridDim.x) * kRowThreads)
    if (r.slot[i] < 0) r.grad_weight[i] = 0;
}

inline bool in_vectors(const Rows& r, size_t element) {
  const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  return r.width * element % 16 == 0 && aligned(r.from) && aligned(r.other) && aligned(r.to);
}

// groups: rows or tokens; at least one block starts.
inline cudaError_t launch_rows(void (*kernel)(Rows, Lanes), const Rows& r, int64_t groups, int units,
                               cudaStream_t stream) {
  Lanes lanes{0, units};
  while (lanes.shift < 5 && 1 << lanes.shift < units) ++lanes.shift;
  const int64_t blocks = ((groups << lanes.shift) + kRowThreads - 1) / kRowThreads;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  return device::launch(kernel, dim3(unsigned(blocks > 0 ? blocks : 1)), dim3(kRowThreads), 0, stream, r, lanes);
}

inline cudaError_t launch_permute(const Rows& r, Scalar type, cudaStream_t stream) {
  const int size = type == Scalar::f32 ? 4 : 2;
  if (in_vectors(r, size)) return launch_rows(permute<uint4>, r, r.rows, r.width * size / 16, stream);
  if (size == 4) return launch_rows(permute<uint32_t>, r, r.rows, r.width, stream);
  return launch_rows(permute<uint16_t>, r, r.rows, r.width, stream);
}

template <class T>
cudaError_t launch_combine_of(const Rows& r, bool backward, cudaStream_t stream) {
  constexpr int kWidth = 16 / sizeof(T);
  const int64_t groups = backward ? r.rows : r.tokens;
  const bool wide = in_vectors(r, sizeof(T));
  const auto kernel = wide ? (backward ? combine_backward<T, kWidth> : combine<T, kWidth>)
                           : (backward ? combine_backward<T, 1> : combine<T, 1>);
  return launch_rows(kernel, r, groups, wide ? r.width / kWidth : r.width, stream);
}

// combine; without weights it is also the backward of permute.
inline cudaError_t launch_combine(const Rows& r, Scalar type, bool backward, cudaStream_t stream) {
  if (type == Scalar::f32) return launch_combine_of<float>(r, backward, stream);
  if (type == Scalar::bf16) return launch_combine_of<device::bf16>(r, backward, stream);
  return launch_combine_of<device::f16>(r, backward, stream);
}

}  // namespace dsvlm::moe::cuda
