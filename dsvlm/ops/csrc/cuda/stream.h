// torch's current CUDA stream without torch's CUDA headers, so that the code also loads on CPU-only torch.
#pragma once

#include <cuda_runtime.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

// in libtorch_cuda; weak: CPU-only torch has no such symbol and never calls what uses it
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace dsvlm {

inline cudaStream_t current_stream(int32_t device_index) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "this torch has no CUDA: its current stream cannot be asked for");
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream) == 0, "no current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

}  // namespace dsvlm
