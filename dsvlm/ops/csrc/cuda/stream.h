// What bindings need of CUDA: torch's current stream, without torch's CUDA headers, so that the code also loads on
// CPU-only torch; and what to say of kernels that did not start.
#pragma once

#include <cuda_runtime.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <string>

// in libtorch_cuda; weak: CPU-only torch has no such symbol and never calls what uses it
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace dsvlm {

inline cudaStream_t current_stream(int32_t device_index) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "this torch has no CUDA: its current stream cannot be asked for");
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream) == 0, "no current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

inline std::string told(cudaError_t error) {
  const std::string text = std::string("CUDA says \"") + cudaGetErrorString(error) + "\"";
  if (error != cudaErrorNoKernelImageForDevice && error != cudaErrorInvalidDeviceFunction) return text;
  return text + " (dsvlm was built for other devices: build it with DSVLM_CUDA_ARCH=100 for compute capability 10.0)";
}

}  // namespace dsvlm
