// A small complete kernel for the emulator's tests: c[m x n] = a[m x k] b[k x n], fp32 from 16-bit, row-major.
// One warp computes 16 x 64 of a 64 x 64 tile, the next 64 of k are on their way meanwhile.
#pragma once
#include "cuda/device.cuh"

namespace dsvlm::example {

using namespace device;

constexpr int kTile = 64, kPitch = kTile + 8;  // 16-bit values; an odd number of 16-byte pieces a row: no bank conflicts
constexpr int kBytes = kTile * kPitch * 2;     // of one tile

// Rows and columns beyond the matrix are zeros. columns % 8 == 0.
template <class T>
__device__ void load_tile(T* tile, const T* matrix, int rows, int columns, int row, int column) {
  for (int i = threadIdx.x; i < kTile * kTile / 8; i += blockDim.x) {
    const int r = i / (kTile / 8), c = i % (kTile / 8) * 8;
    const bool valid = row + r < rows && column + c < columns;
    copy_async_16(tile + r * kPitch + c, matrix + (valid ? int64_t(row + r) * columns + column + c : 0), valid);
  }
}

template <class T>
__global__ void __launch_bounds__(128) matmul(const T* a, const T* b, float* c, int m, int n, int k) {
  DSVLM_DYNAMIC_SHARED(shared);
  T* const tiles = reinterpret_cast<T*>(shared);  // a, b of the even steps, then of the odd ones
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = blockIdx.y * kTile, column = blockIdx.x * kTile;
  float sum[8][4] = {};
  const auto load = [&](int step) {
    T* const target = tiles + step % 2 * 2 * kTile * kPitch;
    load_tile(target, a, m, k, row, step * kTile);
    load_tile(target + kTile * kPitch, b, k, n, step * kTile, column);
    copy_async_commit();
  };
  const int steps = (k + kTile - 1) / kTile;
  load(0);
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) load(step + 1);
    else copy_async_commit();
    copy_async_wait<1>();
    __syncthreads();
    const T* const left = tiles + step % 2 * 2 * kTile * kPitch;
    const T* const right = left + kTile * kPitch;
#pragma unroll
    for (int part = 0; part < kTile; part += 16) {
      uint32_t x[4];
      load_matrix_x4(x, left + (warp * 16 + lane % 16) * kPitch + part + lane / 16 * 8);
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        uint32_t y[4];
        load_matrix_x4_transposed(y, right + (part + lane % 16) * kPitch + (j + lane / 16) * 8);
        mma<T>(sum[j], x, y[0], y[1]);
        mma<T>(sum[j + 1], x, y[2], y[3]);
      }
    }
#ifndef DSVLM_WITHOUT_BARRIER
    __syncthreads();  // the next load overwrites what this step has read
#endif
  }
#pragma unroll
  for (int j = 0; j < 8; ++j)
    for (int i = 0; i < 4; ++i) {
      const int r = row + warp * 16 + lane / 4 + i / 2 * 8, q = column + j * 8 + lane % 4 * 2 + i % 2;
      if (r < m && q < n) c[int64_t(r) * n + q] = sum[j][i];
    }
}

template <class T>
cudaError_t matmul_on(const void* a, const void* b, float* c, int64_t m, int64_t n, int64_t k, cudaStream_t stream) {
  const dim3 grid((n + kTile - 1) / kTile, (m + kTile - 1) / kTile);
  return launch(matmul<T>, grid, 128, 4 * kBytes, stream, static_cast<const T*>(a), static_cast<const T*>(b), c, m, n,
                k);
}

}  // namespace dsvlm::example

extern "C" cudaError_t matmul_bf16(const void* a, const void* b, float* c, int64_t m, int64_t n, int64_t k) {
  return dsvlm::example::matmul_on<dsvlm::device::bf16>(a, b, c, m, n, k, nullptr);
}

extern "C" cudaError_t matmul_f16(const void* a, const void* b, float* c, int64_t m, int64_t n, int64_t k) {
  return dsvlm::example::matmul_on<dsvlm::device::f16>(a, b, c, m, n, k, nullptr);
}
