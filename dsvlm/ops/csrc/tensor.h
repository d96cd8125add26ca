// The parts of torch's stable ABI that the bindings use, under short names, and checks with readable messages.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>

namespace dsvlm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) text += (i ? ", " : "") + std::to_string(tensor.size(i));
  return text + "]";
}

// sizes: what is expected, -1 = any. op, name: what the message speaks of.
inline void check_shape(const char* op, const char* name, const Tensor& tensor, std::initializer_list<int64_t> sizes) {
  bool fits = tensor.dim() == static_cast<int64_t>(sizes.size());
  int64_t i = 0;
  std::string expected = "[";
  for (int64_t size : sizes) {
    fits = fits && (size < 0 || tensor.size(i) == size);
    expected += (i++ ? ", " : "") + (size < 0 ? std::string("any") : std::to_string(size));
  }
  STD_TORCH_CHECK(fits, op, ": ", name, " is ", shape_of(tensor), ", expected ", expected, "]");
}

inline void check_type(const char* op, const char* name, const Tensor& tensor, ScalarType type) {
  STD_TORCH_CHECK(tensor.scalar_type() == type, op, ": ", name, " has dtype number ",
                  static_cast<int>(tensor.scalar_type()), ", expected ", static_cast<int>(type),
                  " (numbers of torch's ScalarType)");
}

inline void check_last_contiguous(const char* op, const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.size(tensor.dim() - 1) <= 1 || tensor.stride(tensor.dim() - 1) == 1, op, ": ", name,
                  " must be contiguous in its last dimension; its stride there is ", tensor.stride(tensor.dim() - 1));
}

}  // namespace dsvlm
