// The attention kernels as plain C functions, for the emulator. sizes: batch, queries, keys, heads, key heads, head
// size, and rows of a mask (0: one for all samples); strides: batch, position and head of each tensor in turn.
#include "git_attention/backward.cuh"
#include "git_attention/forward.cuh"

namespace dsvlm::attention {

inline Strided strided(const void* data, const int64_t* strides) {
  return Strided{data, strides[0] / 8, strides[2] / 8, uint32_t(strides[1] / 8)};
}

template <class Kind>
Kind problem(const void* q, const void* k, const void* v, const Row* rows, const float* slopes, const int64_t* sizes,
             const int64_t* strides, float scale) {
  Kind p{};
  p.batch = sizes[0], p.queries = sizes[1], p.keys = sizes[2], p.heads = sizes[3], p.kv_heads = sizes[4];
  p.q = strided(q, strides), p.k = strided(k, strides + 3), p.v = strided(v, strides + 6);
  p.rows = rows, p.rows_batch = sizes[6], p.slopes = slopes, p.scale = scale;
  return p;
}

// row_blocks: 1 or 2 for blocks of 64 or 128 queries, 0 for the choice by length
template <class T, int D>
cudaError_t forward_of(const Forward& p, int64_t row_blocks) {
  if (row_blocks == 0) return start_forward<T, D>(p, nullptr);
  return row_blocks == 1 ? start_forward<T, D, 1>(p, nullptr) : start_forward<T, D, 2>(p, nullptr);
}

}  // namespace dsvlm::attention

#define DSVLM_TEST_KERNELS(type, D)                                                                                 \
  extern "C" cudaError_t forward_##type##_##D(void* out, float* lse, const void* q, const void* k, const void* v,   \
                                              const dsvlm::Row* rows, const float* slopes, const int64_t* sizes,    \
                                              const int64_t* strides, float scale, int64_t row_blocks) {            \
    using namespace dsvlm::attention;                                                                               \
    Forward p = problem<Forward>(q, k, v, rows, slopes, sizes, strides, scale);                                     \
    p.out = out, p.lse = lse;                                                                                       \
    return forward_of<dsvlm::device::type, D>(p, row_blocks);                                                       \
  }                                                                                                                 \
  extern "C" cudaError_t backward_##type##_##D(                                                                     \
      void* grad_q, void* grad_k, void* grad_v, const void* grad_out, const void* out, const float* lse,            \
      const void* q, const void* k, const void* v, const dsvlm::Row* rows, const float* slopes,                     \
      const int64_t* sizes, const int64_t* strides, float scale, void* statistics, void* summaries) {               \
    using namespace dsvlm::attention;                                                                               \
    Backward p = problem<Backward>(q, k, v, rows, slopes, sizes, strides, scale);                                   \
    p.grad_q = grad_q, p.grad_k = grad_k, p.grad_v = grad_v, p.lse = lse;                                           \
    p.grad_out = strided(grad_out, strides + 9), p.out = strided(out, strides + 12);                                \
    p.statistics = static_cast<Statistic*>(statistics), p.summaries = static_cast<Summary*>(summaries);             \
    return start_backward<dsvlm::device::type, D>(p, nullptr);                                                      \
  }
