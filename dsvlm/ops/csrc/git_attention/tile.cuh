// Matrix tiles of the attention kernels: global to shared memory, products on tensor cores, and back.
//
// A block is four warps. Rows in shared memory are 16 bytes longer than D values: D / 8 + 1 is odd for every D here, so
// the eight rows of an ldmatrix lie in different banks. An accumulator c[r][n][2 i + e] of lane l is row
// 16 r + 8 i + l / 4, column 8 n + 2 (l % 4) + e.
#pragma once

#include "problem.h"

namespace dsvlm::attention {

using device::pack;

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kInfinity = __builtin_huge_valf();

template <int D>
constexpr int kPitch = D + 8;

__device__ __forceinline__ int warp_index() { return threadIdx.x / 32; }
__device__ __forceinline__ int lane_index() { return threadIdx.x % 32; }

// Starts to copy kRows rows from `position` on to shared memory, 16 bytes a thread at a time; rows that are not live
// become zeros unread.
template <int D, int kRows, class T, class Live>
__device__ __forceinline__ void copy_tile(T* shared, const uint4* global, uint32_t stride, int position, Live live) {
  constexpr int kChunks = D / 8, kStep = kThreads / kChunks;
  const int first = threadIdx.x / kChunks, column = threadIdx.x % kChunks;
  shared += first * kPitch<D> + 8 * column;
  uint32_t offset = (position + first) * stride + column;
#pragma unroll
  for (int begin = 0; begin < kRows; begin += kStep) {
    const int row = begin + first;
    const bool inside = (kStep * kChunks == kThreads || first < kStep) && (kRows % kStep == 0 || row < kRows);
    if (inside) device::copy_async_16(shared + begin * kPitch<D>, global + offset, live(row));
    offset += kStep * stride;
  }
}

// c[16 R x N] += a[16 R x D] b[N x D]^T, both in shared memory; a is the warp's own.
template <int D, int R, int N, class T>
__device__ __forceinline__ void multiply_transposed(float (&c)[R][N / 8][4], const T* a, const T* b) {
  const int lane = lane_index();
  a += lane % 16 * kPitch<D> + lane / 16 * 8;
  b += (lane % 8 + lane / 16 * 8) * kPitch<D> + lane / 8 % 2 * 8;
#pragma unroll
  for (int k = 0; k < D; k += 16) {
    uint32_t left[R][4];
#pragma unroll
    for (int r = 0; r < R; ++r) device::load_matrix_x4(left[r], a + 16 * r * kPitch<D> + k);
#pragma unroll
    for (int n = 0; n < N; n += 16) {
      uint32_t right[4];
      device::load_matrix_x4(right, b + n * kPitch<D> + k);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        device::mma<T>(c[r][n / 8], left[r], right[0], right[1]);
        device::mma<T>(c[r][n / 8 + 1], left[r], right[2], right[3]);
      }
    }
  }
}

// c[16 R x D] += a[16 R x N] b[N x D]; a as packed by fragments(), b in shared memory.
template <int D, int R, int N, class T>
__device__ __forceinline__ void multiply(float (&c)[R][D / 8][4], const uint32_t (&a)[R][N / 16][4], const T* b) {
  const int lane = lane_index();
  b += lane % 16 * kPitch<D> + lane / 16 * 8;
#pragma unroll
  for (int k = 0; k < N; k += 16) {
#pragma unroll
    for (int n = 0; n < D; n += 16) {
      uint32_t right[4];
      device::load_matrix_x4_transposed(right, b + k * kPitch<D> + n);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        device::mma<T>(c[r][n / 8], a[r][k / 16], right[0], right[1]);
        device::mma<T>(c[r][n / 8 + 1], a[r][k / 16], right[2], right[3]);
      }
    }
  }
}

// Accumulators as the left operand of the next product: the two layouts agree, nothing moves between lanes.
template <class T, int R, int N>
__device__ __forceinline__ void fragments(uint32_t (&a)[R][N / 16][4], const float (&c)[R][N / 8][4]) {
#pragma unroll
  for (int r = 0; r < R; ++r) {
#pragma unroll
    for (int k = 0; k < N / 16; ++k) {
      a[r][k][0] = pack<T>(c[r][2 * k][0], c[r][2 * k][1]);
      a[r][k][1] = pack<T>(c[r][2 * k][2], c[r][2 * k][3]);
      a[r][k][2] = pack<T>(c[r][2 * k + 1][0], c[r][2 * k + 1][1]);
      a[r][k][3] = pack<T>(c[r][2 * k + 1][2], c[r][2 * k + 1][3]);
    }
  }
}

// A warp's rows times their factors to global memory, 16 bytes a lane, by way of `shared`, which no other warp uses.
// Factor 0: the row is zeros, whatever it holds. Rows from `count` on are not written.
template <int D, int R, class T>
__device__ __forceinline__ void store_rows(T* global, int64_t stride, int count, T* shared,
                                           const float (&c)[R][D / 8][4], const float (&factor)[R][2]) {
  const int lane = lane_index();
#pragma unroll
  for (int r = 0; r < R; ++r) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      T* row = shared + (16 * r + 8 * i + lane / 4) * kPitch<D> + lane % 4 * 2;
      const float by = factor[r][i];
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        const float low = c[r][n][2 * i] * by, high = c[r][n][2 * i + 1] * by;
        *reinterpret_cast<uint32_t*>(row + 8 * n) = by == 0 ? 0u : pack<T>(low, high);
      }
    }
  }
  __syncwarp();
  constexpr int kChunks = D / 8;
#pragma unroll
  for (int i = lane; i < 16 * R * kChunks; i += 32) {
    const int row = i / kChunks, column = i % kChunks * 8;
    if (row < count) {
      const uint4 chunk = *reinterpret_cast<const uint4*>(shared + row * kPitch<D> + column);
      *reinterpret_cast<uint4*>(global + row * stride + column) = chunk;
    }
  }
}

// A block for each tile of `rows` positions, each head and each sample; nothing where there are none.
template <class Work>
cudaError_t start_blocks(void (*kernel)(Work), int positions, int rows, int heads, size_t shared_bytes,
                         cudaStream_t stream, const Work& work) {
  if (positions == 0 || heads == 0 || work.batch == 0) return cudaSuccess;
  const dim3 grid(positions / rows + (positions % rows != 0), heads, work.batch);
  return device::launch(kernel, grid, dim3(kThreads), shared_bytes, stream, work);
}

}  // namespace dsvlm::attention
