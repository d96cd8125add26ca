// What the CUDA kernels are given, and how they are started.
#pragma once

#include <cstdint>

#include "../cuda/device.cuh"
#include "mask.h"

namespace dsvlm::attention {

// [batch, position, head, D] of 16-bit values, in pieces of 16 bytes: D is contiguous, every row begins with a piece.
struct Strided {
  const void* data;
  int64_t batch, head;
  uint32_t position;  // times the last position: below 2^32

  __device__ __forceinline__ const uint4* at(int b, int h) const {
    const uint4* place = static_cast<const uint4*>(data) + b * batch + h * head;
#ifndef DSVLM_EMULATE
    asm("" : "+l"(place));  // one register pair, or compilers add up its parts again at every use
#endif
    return place;
  }
};

struct Problem {
  int batch, queries, keys, heads, kv_heads;
  Strided q, k, v;
  const Row* rows;      // [batch, queries], or one for all when rows_batch is 0
  int64_t rows_batch;   // rows from one sample to the next
  const float* slopes;  // [heads] or null
  float scale;          // above 0

  // A key is padding if its own row is empty, where queries and keys are the same positions.
  __device__ __forceinline__ const Row* key_rows(int b) const {
    return queries == keys ? rows + b * rows_batch : nullptr;
  }
  // ALiBi counts from the last query, which stands at the last key.
  __device__ __forceinline__ int position_of(int query) const { return query + keys - queries; }
};

struct Forward : Problem {
  void* out;   // [batch, queries, heads, D], contiguous
  float* lse;  // [batch, heads, queries]
};

// Left by the kernel of dQ for that of dK and dV. Per query: log-sum-exp to base 2, rowsum(grad_out * out).
struct alignas(8) Statistic {
  float lse, delta;
};

// Per 32 queries: their intervals, and which of them are not padding.
struct alignas(16) Summary {
  QueryTile tile;
  uint32_t live, unused[3];
};

struct Backward : Problem {
  Strided grad_out, out;
  const float* lse;
  void *grad_q, *grad_k, *grad_v;  // contiguous
  Statistic* statistics;           // [batch, heads, queries]
  Summary* summaries;              // [batch or 1, ceil(queries / 32)]
};

// Head sizes 64, 80, 96, 128; another is cudaErrorInvalidValue.
cudaError_t forward_bf16(const Forward& problem, int head_dim, cudaStream_t stream);
cudaError_t forward_f16(const Forward& problem, int head_dim, cudaStream_t stream);
cudaError_t backward_bf16(const Backward& problem, int head_dim, cudaStream_t stream);
cudaError_t backward_f16(const Backward& problem, int head_dim, cudaStream_t stream);

}  // namespace dsvlm::attention
