// Kernels that the checks of compiled code must not let pass.
#pragma once
#include <cstdint>

namespace dsvlm::example {

// Needs more registers than a quarter of an SM's can give to each of 1024 threads.
__global__ void __launch_bounds__(1024, 2) spilling(float* values) {
  float kept[96];
#pragma unroll
  for (int i = 0; i < 96; ++i) kept[i] = values[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 96; ++i) values[(95 - i) * 1024 + threadIdx.x] = kept[i] * kept[(i * 7 + 5) % 96];
}

// An index that is not known when compiling keeps the array out of registers.
__global__ void indexed(const int* which, float* values) {
  float kept[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) kept[i] = values[i * 32 + threadIdx.x];
  for (int i = 0; i < 16; ++i) kept[which[i] & 15] += kept[which[i + 1] & 15];
#pragma unroll
  for (int i = 0; i < 16; ++i) values[i * 32 + threadIdx.x] = kept[i];
}

// Good, but for work that tensor cores should do.
__global__ void scalar(const float* a, float* b) { b[threadIdx.x] = fmaf(a[threadIdx.x], b[threadIdx.x], 1.0f); }

}  // namespace dsvlm::example
