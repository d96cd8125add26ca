// The CPU implementation of permute, combine and their gradients: rows are dealt to threads, nothing is added across them.
#include <algorithm>
#include <cstring>
#include <tuple>

#include "moe_routing/route.h"
#include "tensor.h"

namespace dsvlm {
namespace {

using moe::Element;

struct Shape {
  Element element;
  ScalarType wide;
  int64_t rows, width, tokens, k, grain;
};

// matrix: x or a gradient of it [N, d], or y or a gradient of it [R, d].
Shape check(const char* op, const Tensor& matrix, bool of_tokens, const Tensor& src, const Tensor& slot) {
  const auto whole = [op](const char* name, const Tensor& tensor) {
    STD_TORCH_CHECK(tensor.is_contiguous(), op, ": ", name, " must be contiguous");
  };
  check_shape(op, "slot", slot, {-1, -1});
  check_shape(op, "src", src, {-1});
  check_type(op, "slot", slot, ScalarType::Int);
  check_type(op, "src", src, ScalarType::Int);
  whole("slot", slot), whole("src", src), whole("the matrix of rows", matrix);
  const int64_t rows = src.size(0), tokens = slot.size(0), k = slot.size(1);
  check_shape(op, "the matrix of rows", matrix, {of_tokens ? tokens : rows, -1});
  const int32_t* const to = static_cast<const int32_t*>(slot.const_data_ptr());
  const int32_t* const from = static_cast<const int32_t*>(src.const_data_ptr());
  STD_TORCH_CHECK(std::all_of(to, to + tokens * k, [=](int32_t row) { return row < rows; }), op,
                  ": slot names a row beyond the ", rows, " of src");
  STD_TORCH_CHECK(std::all_of(from, from + rows, [=](int32_t choice) { return choice < tokens * k; }), op,
                  ": src names a token beyond the ", tokens, " of slot");
  const ScalarType type = matrix.scalar_type();
  const Element element = type == ScalarType::Float      ? Element::f32
                          : type == ScalarType::BFloat16 ? Element::bf16
                          : type == ScalarType::Half     ? Element::f16
                                                         : Element::f64;
  STD_TORCH_CHECK(element != Element::f64 || type == ScalarType::Double, op, ": fp32, bf16, fp16 or fp64 is expected");
  const int64_t width = matrix.size(1);
  return {element, element == Element::f64 ? ScalarType::Double : ScalarType::Float, rows, width, tokens, k,
          1 + (1 << 14) / std::max<int64_t>(1, width)};
}

Tensor make(const Tensor& like, int64_t rows, int64_t width) {
  const int64_t sizes[] = {rows, width};
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes, 2));
}

Tensor moe_permute(const Tensor& x, const Tensor& src, const Tensor& slot) {
  const Shape shape = check("moe_permute", x, true, src, slot);
  Tensor out = make(x, shape.rows, shape.width);
  const size_t bytes = shape.width * x.element_size();
  const char* const from = static_cast<const char*>(x.const_data_ptr());
  const int32_t* const choice = static_cast<const int32_t*>(src.const_data_ptr());
  char* const to = static_cast<char*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, shape.rows, shape.grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (choice[row] < 0)
        std::memset(to + row * bytes, 0, bytes);
      else
        std::memcpy(to + row * bytes, from + choice[row] / shape.k * bytes, bytes);
    }
  });
  return out;
}

// weight null = 1.
Tensor gather(const Shape& shape, const Tensor& y, const void* weight, const Tensor& slot) {
  Tensor out = make(y, shape.tokens, shape.width);
  const void* const from = y.const_data_ptr();
  const int32_t* const rows = static_cast<const int32_t*>(slot.const_data_ptr());
  void* const to = out.mutable_data_ptr();
  torch::stable::parallel_for(0, shape.tokens, shape.grain, [&](int64_t begin, int64_t end) {
    DSVLM_CALL_SIMD(moe_gather_sum, shape.element, from, weight, rows, to, shape.k, shape.width, begin, end);
  });
  return out;
}

Tensor moe_permute_backward(const Tensor& grad_out, const Tensor& src, const Tensor& slot) {
  return gather(check("moe_permute_backward", grad_out, false, src, slot), grad_out, nullptr, slot);
}

const void* check_weight(const char* op, const Shape& shape, const Tensor& weight) {
  check_shape(op, "weight", weight, {shape.tokens, shape.k});
  check_type(op, "weight", weight, shape.wide);
  STD_TORCH_CHECK(weight.is_contiguous(), op, ": weight must be contiguous");
  return weight.const_data_ptr();
}

Tensor moe_combine(const Tensor& y, const Tensor& weight, const Tensor& slot, const Tensor& src) {
  const Shape shape = check("moe_combine", y, false, src, slot);
  return gather(shape, y, check_weight("moe_combine", shape, weight), slot);
}

std::tuple<Tensor, Tensor> moe_combine_backward(const Tensor& grad_out, const Tensor& y, const Tensor& weight,
                                                const Tensor& slot, const Tensor& src) {
  const char* const op = "moe_combine_backward";
  const Shape shape = check(op, y, false, src, slot);
  check_shape(op, "grad_out", grad_out, {shape.tokens, shape.width});
  check_type(op, "grad_out", grad_out, y.scalar_type());
  STD_TORCH_CHECK(grad_out.is_contiguous(), op, ": grad_out must be contiguous");
  const void* const weights = check_weight(op, shape, weight);
  Tensor grad_y = make(y, shape.rows, shape.width), grad_weight = make(weight, shape.tokens, shape.k);
  const int32_t* const choices = static_cast<const int32_t*>(src.const_data_ptr());
  const void *const upstream = grad_out.const_data_ptr(), *const rows = y.const_data_ptr();
  void *const to_rows = grad_y.mutable_data_ptr(), *const to_weights = grad_weight.mutable_data_ptr();
  std::memset(to_weights, 0, shape.tokens * shape.k * weight.element_size());  // dropped choices
  torch::stable::parallel_for(0, shape.rows, shape.grain, [&](int64_t begin, int64_t end) {
    DSVLM_CALL_SIMD(moe_scatter_product, shape.element, upstream, rows, weights, choices, to_rows, to_weights, shape.k,
                    shape.width, begin, end);
  });
  return {grad_y, grad_weight};
}

}  // namespace
}  // namespace dsvlm

STABLE_TORCH_LIBRARY_IMPL(dsvlm, CPU, m) {
  m.impl("moe_permute", TORCH_BOX(&dsvlm::moe_permute));
  m.impl("moe_permute_backward", TORCH_BOX(&dsvlm::moe_permute_backward));
  m.impl("moe_combine", TORCH_BOX(&dsvlm::moe_combine));
  m.impl("moe_combine_backward", TORCH_BOX(&dsvlm::moe_combine_backward));
}
