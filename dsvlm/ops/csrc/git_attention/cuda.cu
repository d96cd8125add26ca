// The GIT attention on CUDA: checks, results and workspace, torch's stream. The kernels are in *.cuh.
#ifndef __CUDA_ARCH__  // host code only: the passes for devices need not read torch's headers
#include <algorithm>
#include <tuple>
#include <utility>

#include "cuda/stream.h"
#include "problem.h"
#include "tensor.h"

namespace dsvlm {
namespace {

using attention::Backward;
using attention::Forward;
using attention::Problem;
using attention::Strided;

constexpr int64_t kMostBlocks = 65535;          // of a grid in y and z
constexpr int64_t kMostPositions = (1u << 31) - 256;  // positions are counted in int32

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows of 16-bit values as kernels read them, 16 bytes at a time: the tensor itself, or a copy where it lies otherwise.
Tensor readable(const Tensor& x) {
  bool fits = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0 && (x.size(3) == 1 || x.stride(3) == 1);
  for (int64_t i = 0; i < 3; ++i) fits = fits && (x.size(i) <= 1 || x.stride(i) % 8 == 0);
  if (fits) return x;
  Tensor copy = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2), x.size(3)});
  torch::stable::copy_(copy, x);
  return copy;
}

Strided strided(const char* op, const Tensor& x) {
  const int64_t position = x.size(1) > 1 ? x.stride(1) / 8 : 0;
  STD_TORCH_CHECK(position * x.size(1) <= 0xffffffff, op, ": ", shape_of(x), " with a stride of ", x.stride(1),
                  " from one position to the next; expected positions within 64 GiB of each other");
  return {x.const_data_ptr(), x.stride(0) / 8, x.stride(2) / 8, static_cast<uint32_t>(position)};
}

void check_device(const char* op, const char* name, const Tensor& x, const Tensor& q) {
  STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == q.get_device_index(), op, ": ", name,
                  " is not on q's device, CUDA device ", q.get_device_index(), "; move it there");
}

void check_inputs(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& rows,
                  const std::optional<Tensor>& slopes, double scale) {
  check_shape(op, "q", q, {-1, -1, -1, -1});
  check_shape(op, "k", k, {q.size(0), -1, -1, q.size(3)});
  check_shape(op, "v", v, {k.size(0), k.size(1), k.size(2), k.size(3)});
  check_shape(op, "rows", rows, {-1, q.size(1), 2});
  const int64_t batch = q.size(0), heads = q.size(2), kv_heads = k.size(2), dim = q.size(3);
  STD_TORCH_CHECK(dim == 64 || dim == 80 || dim == 96 || dim == 128, op, ": head size ", dim,
                  ", expected 64, 80, 96 or 128 on CUDA; other backends take any");
  STD_TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0, op, ": q has ", heads,
                  " heads, which is not a multiple of the ", kv_heads, " of k");
  STD_TORCH_CHECK(rows.size(0) == 1 || rows.size(0) == batch, op, ": rows is ", shape_of(rows), ", expected 1 or ",
                  batch, " in its first dimension");
  STD_TORCH_CHECK(batch <= kMostBlocks && heads <= kMostBlocks, op, ": batch ", batch, " and ", heads,
                  " heads, expected at most ", kMostBlocks, " of each; split the batch");
  STD_TORCH_CHECK(std::max(q.size(1), k.size(1)) <= kMostPositions, op, ": ", q.size(1), " queries and ", k.size(1),
                  " keys, expected at most ", kMostPositions);
  STD_TORCH_CHECK(scale > 0, op, ": scale is ", scale, ", expected above 0; a sign belongs into q");
  STD_TORCH_CHECK(q.scalar_type() == ScalarType::BFloat16 || q.scalar_type() == ScalarType::Half, op,
                  ": on CUDA q is bfloat16 or float16, not dtype number ", static_cast<int>(q.scalar_type()),
                  " of torch's ScalarType; cast it, or take another backend");
  check_type(op, "k", k, q.scalar_type());
  check_type(op, "v", v, q.scalar_type());
  check_type(op, "rows", rows, ScalarType::Int);
  for (const auto& [name, x] : {std::pair("k", &k), std::pair("v", &v), std::pair("rows", &rows)})
    check_device(op, name, *x, q);
  if (slopes) {
    check_shape(op, "alibi_slopes", *slopes, {heads});
    check_type(op, "alibi_slopes", *slopes, ScalarType::Float);
    check_device(op, "alibi_slopes", *slopes, q);
  }
}

// The parts that both directions share; every tensor as the kernels read it.
struct Inputs {
  Tensor q, k, v, rows;
  std::optional<Tensor> slopes;

  Inputs(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& rows, const std::optional<Tensor>& slopes)
      : q(readable(q)), k(readable(k)), v(readable(v)), rows(torch::stable::contiguous(rows)) {
    if (reinterpret_cast<uintptr_t>(this->rows.const_data_ptr()) % sizeof(Row) != 0)
      this->rows = torch::stable::clone(this->rows);
    if (slopes) this->slopes = torch::stable::contiguous(*slopes);
  }

  void fill(const char* op, Problem& p, double scale) const {
    p.batch = q.size(0), p.queries = q.size(1), p.keys = k.size(1), p.heads = q.size(2), p.kv_heads = k.size(2);
    p.q = strided(op, q), p.k = strided(op, k), p.v = strided(op, v);
    p.rows = static_cast<const Row*>(rows.const_data_ptr());
    p.rows_batch = rows.size(0) == 1 ? 0 : q.size(1);
    p.slopes = slopes ? static_cast<const float*>(slopes->const_data_ptr()) : nullptr;
    p.scale = static_cast<float>(scale);
  }
};

// Starts `bf16` or `f16` as q says.
template <class Work>
void start(const char* op, const Work& work, const Tensor& q, cudaError_t (*bf16)(const Work&, int, cudaStream_t),
           cudaError_t (*f16)(const Work&, int, cudaStream_t)) {
  const bool brain = q.scalar_type() == ScalarType::BFloat16;
  const cudaStream_t stream = current_stream(q.get_device_index());
  const cudaError_t error = (brain ? bf16 : f16)(work, static_cast<int>(q.size(3)), stream);
  if (error != cudaSuccess) cudaGetLastError();  // told here, not again at the next call
  STD_TORCH_CHECK(error == cudaSuccess, op, ": ", told(error), " for q ", shape_of(q),
                  " and ", work.keys, " keys");
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& rows,
                                   const std::optional<Tensor>& slopes, double scale) {
  const char* op = "git_attention_forward";
  check_inputs(op, q, k, v, rows, slopes, scale);
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const Inputs inputs(q, k, v, rows, slopes);
  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2), q.size(3)});
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(2), q.size(1)}, ScalarType::Float);
  Forward p{};
  inputs.fill(op, p, scale);
  p.out = out.mutable_data_ptr(), p.lse = static_cast<float*>(lse.mutable_data_ptr());
  start(op, p, q, attention::forward_bf16, attention::forward_f16);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Tensor& out, const Tensor& lse, const Tensor& rows,
                                            const std::optional<Tensor>& slopes, double scale) {
  const char* op = "git_attention_backward";
  check_inputs(op, q, k, v, rows, slopes, scale);
  for (const auto& [name, x] : {std::pair("grad_out", &grad_out), std::pair("out", &out)}) {
    check_shape(op, name, *x, {q.size(0), q.size(1), q.size(2), q.size(3)});
    check_type(op, name, *x, q.scalar_type());
    check_device(op, name, *x, q);
  }
  check_shape(op, "lse", lse, {q.size(0), q.size(2), q.size(1)});
  check_type(op, "lse", lse, ScalarType::Float);
  check_device(op, "lse", lse, q);
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const Inputs inputs(q, k, v, rows, slopes);
  const Tensor grad = readable(grad_out), result = readable(out), sums = torch::stable::contiguous(lse);
  Tensor grad_q = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2), q.size(3)});
  Tensor grad_k = torch::stable::new_empty(k, {k.size(0), k.size(1), k.size(2), k.size(3)});
  Tensor grad_v = torch::stable::new_empty(k, {k.size(0), k.size(1), k.size(2), k.size(3)});
  Tensor statistics = torch::stable::new_empty(q, {q.size(0), q.size(2), q.size(1), 2}, ScalarType::Float);
  Tensor summaries = torch::stable::new_empty(rows, {rows.size(0), ceil_div(q.size(1), 32), 8}, ScalarType::Int);
  Backward p{};
  inputs.fill(op, p, scale);
  p.grad_out = strided(op, grad), p.out = strided(op, result), p.lse = static_cast<const float*>(sums.const_data_ptr());
  p.grad_q = grad_q.mutable_data_ptr(), p.grad_k = grad_k.mutable_data_ptr(), p.grad_v = grad_v.mutable_data_ptr();
  p.statistics = static_cast<attention::Statistic*>(statistics.mutable_data_ptr());
  p.summaries = static_cast<attention::Summary*>(summaries.mutable_data_ptr());
  start(op, p, q, attention::backward_bf16, attention::backward_f16);
  return {grad_q, grad_k, grad_v};
}

}  // namespace
}  // namespace dsvlm

STABLE_TORCH_LIBRARY_IMPL(dsvlm, CUDA, m) {
  m.impl("git_attention_forward", TORCH_BOX(&dsvlm::forward));
  m.impl("git_attention_backward", TORCH_BOX(&dsvlm::backward));
}
#endif
