// One file a type, so that they compile side by side.
#include "backward.cuh"

namespace dsvlm::attention {

cudaError_t backward_f16(const Backward& problem, int head_dim, cudaStream_t stream) {
  return backward<device::f16>(problem, head_dim, stream);
}

}  // namespace dsvlm::attention
