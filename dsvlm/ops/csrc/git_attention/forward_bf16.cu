// One file a type, so that they compile side by side.
#include "forward.cuh"

namespace dsvlm::attention {

cudaError_t forward_bf16(const Forward& problem, int head_dim, cudaStream_t stream) {
  return forward<device::bf16>(problem, head_dim, stream);
}

}  // namespace dsvlm::attention
