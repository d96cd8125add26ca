// Kernels of one idea each: what a primitive does, and mistakes that the emulator must not let pass.
#pragma once
#include "cuda/device.cuh"

namespace dsvlm::example {

using namespace device;

// One warp; each lane's registers as they lie in memory: a [32, 4], b [32, 2], d [32, 4].
template <class T>
__global__ void mma_fragments(const uint32_t* a, const uint32_t* b, float* d) {
  uint32_t left[4];
  float sum[4];
  for (int i = 0; i < 4; ++i) left[i] = a[threadIdx.x * 4 + i], sum[i] = d[threadIdx.x * 4 + i];
  mma<T>(sum, left, b[threadIdx.x * 2], b[threadIdx.x * 2 + 1]);
  for (int i = 0; i < 4; ++i) d[threadIdx.x * 4 + i] = sum[i];
}

// 32 rows of 8 values at `pitch`, four matrices of them to registers [32, 4].
__global__ void matrix_rows(const uint16_t* values, uint32_t* plain, uint32_t* transposed, int pitch) {
  __shared__ __align__(16) uint16_t rows[32 * 64];
  for (int i = 0; i < 8; ++i) rows[threadIdx.x * pitch + i] = values[threadIdx.x * 8 + i];
  __syncwarp();
  uint32_t r[4], t[4];
  load_matrix_x4(r, rows + threadIdx.x * pitch);
  load_matrix_x4_transposed(t, rows + threadIdx.x * pitch);
  for (int i = 0; i < 4; ++i) plain[threadIdx.x * 4 + i] = r[i], transposed[threadIdx.x * 4 + i] = t[i];
}

// One thread, two groups and a copy that no group holds; seen [4, 4]: at once, after wait<1>, after wait<0>, at the end.
__global__ void late_copies(const float* from, float* seen) {
  DSVLM_DYNAMIC_SHARED(shared);
  float* const to = reinterpret_cast<float*>(shared);
  const auto look = [&](int when) {
    for (int i = 0; i < 4; ++i) seen[when * 4 + i] = to[i * 4];
  };
  for (int i = 0; i < 16; ++i) to[i] = -1;
  copy_async_16(to, from, true);
  copy_async_commit();
  copy_async_16(to + 4, from + 4, true);
  copy_async_16(to + 8, nullptr, false);
  copy_async_commit();
  copy_async_16(to + 12, from + 12, true);
  look(0);
  copy_async_wait<1>();
  look(1);
  copy_async_wait<0>();
  look(2);
  copy_async_commit();
  copy_async_wait<0>();
  look(3);
}

// Reverses blockDim.x values by shared memory.
template <bool with_barrier>
__global__ void reverse(const float* values, float* result) {
  DSVLM_DYNAMIC_SHARED(shared);
  float* const kept = reinterpret_cast<float*>(shared);
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  kept[threadIdx.x] = values[i];
  if (with_barrier) __syncthreads();
  result[i] = kept[blockDim.x - 1 - threadIdx.x];
}

// What lanes and blocks agree on: [threads, 12]. All threads of a block of three warps, the last of them 16 lanes.
__global__ void agreements(const int* values, int64_t* result) {
  const int i = threadIdx.x, value = values[i];
  const unsigned lanes = i < 64 ? 0xffffffffu : 0xffffu;
  int64_t* const own = result + i * 12;
  own[0] = __shfl_sync(lanes, value, 3);
  own[1] = __shfl_xor_sync(lanes, value, 5);
  own[2] = __shfl_up_sync(lanes, value, 2, 8);
  own[3] = __shfl_down_sync(lanes, int64_t(value) << 33, 2, 8);
  own[4] = __ballot_sync(lanes, value > 0);
  own[5] = __any_sync(lanes, value > 40);
  own[6] = __all_sync(lanes, value > -40);
  own[7] = __syncthreads_count(value > 0);
  own[8] = __syncthreads_or(value > 40);
  own[9] = __syncthreads_and(value > -40);
  __shared__ int sum;
  own[10] = sum;  // each block starts with -1
  __syncthreads();
  if (i == 0) sum = 0;
  __syncthreads();
  atomicAdd(&sum, value);
  __syncthreads();
  own[11] = i % 2 ? __shfl_xor_sync(lanes & 0xaaaaaaaau, sum, 0) : sum;  // the odd lanes among themselves
}

// Bits of 16-bit values to float, and floats to the nearest of them.
template <class T>
__global__ void conversions(const uint16_t* bits, float* wide, const float* values, uint32_t* narrow, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    wide[i] = to_float(T{bits[i]});
    narrow[i] = pack<T>(values[i], to_float(from_float<T>(values[i])));
    const float2 both = unpack<T>(narrow[i]);
    if (both.x != both.y && both.x == both.x) narrow[i] = 0x12345678;
  }
}

__global__ void powers(const float* x, float* result) { result[threadIdx.x] = fast_exp2(x[threadIdx.x]); }

// Each of these is wrong in one way; blocks of 64 threads, 256 bytes of shared memory.
__global__ void wrong(int kind, const float* from) {
  DSVLM_DYNAMIC_SHARED(shared);
  uint32_t r[4];
  const bool first = threadIdx.x == 0;
  if (kind == 0 && !first) __syncthreads();  // one thread ends, the others wait
  if (kind == 1) {                           // one lane elsewhere
    if (first) __syncwarp();
    else __ballot_sync(0xffffffffu, 1);
  }
  if (kind == 2) copy_async_16(shared + 8, from, true);
  if (kind == 3) copy_async_16(shared, from + 1, true);
  if (kind == 4) copy_async_16(shared + 256, from, true);
  if (kind == 5) load_matrix_x4(r, shared + 2);
  if (kind == 6) load_matrix_x4(r, from);
  if (kind == 7) shared[256 + threadIdx.x] = 0;
  if (kind == 8) __shfl_sync(0xfffffffeu, 1, 0);  // the caller not in its mask
  if (kind == 9) {                                // two barriers
    if (threadIdx.x < 32) __syncthreads();
    else __syncthreads_or(1);
  }
  if (kind == 10 && threadIdx.x % 32 >= 8) __syncwarp();  // some lanes have ended or wait at the next barrier
  if (kind == 10) __syncthreads();
  if (kind == 11 && !first) __syncwarp();
  if (kind == 12) copy_async_16(shared, from + 4 * threadIdx.x, threadIdx.x < 16), copy_async_commit();
  if (kind == 12) copy_async_wait<0>();
  if (kind == 13) __shfl_sync(0xffffffffu, from[threadIdx.x], 0);
}

}  // namespace dsvlm::example

using namespace dsvlm::example;

extern "C" {
cudaError_t probe_mma(const uint32_t* a, const uint32_t* b, float* d, int64_t half) {
  return launch(half ? mma_fragments<f16> : mma_fragments<bf16>, 1, 32, 0, nullptr, a, b, d);
}
cudaError_t probe_matrix_rows(const uint16_t* values, uint32_t* plain, uint32_t* transposed, int64_t pitch) {
  return launch(matrix_rows, 1, 32, 0, nullptr, values, plain, transposed, pitch);
}
cudaError_t probe_late_copies(const float* from, float* seen) {
  return launch(late_copies, 1, 1, 64, nullptr, from, seen);
}
cudaError_t probe_reverse(const float* values, float* result, int64_t blocks, int64_t threads, int64_t barrier) {
  return launch(barrier ? reverse<true> : reverse<false>, dim3(blocks), dim3(threads), threads * 4, nullptr, values,
                result);
}
cudaError_t probe_agreements(const int* values, int64_t* result) {
  return launch(agreements, 2, 80, 0, nullptr, values, result);
}
cudaError_t probe_conversions(const uint16_t* bits, float* wide, const float* values, uint32_t* narrow, int64_t count,
                              int64_t half) {
  return launch(half ? conversions<f16> : conversions<bf16>, 1, 32, 0, nullptr, bits, wide, values, narrow, count);
}
cudaError_t probe_powers(const float* x, float* result, int64_t count) {
  return launch(powers, 1, dim3(count), 0, nullptr, x, result);
}
cudaError_t probe_wrong(int64_t kind, const float* from, int64_t shared) {
  return launch(wrong, dim3(2, 3), 64, shared, nullptr, int(kind), from);
}
}
