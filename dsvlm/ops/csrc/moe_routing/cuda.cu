// The routing on CUDA: checks, results, workspace, torch's stream. Nothing here waits for the device, so checks concern
// shapes and types only. The kernels are in *.cuh; meanings are in library.cpp.
#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda/stream.h"
#include "gate.cuh"
#include "gate_backward.cuh"
#include "rows.cuh"
#include "select.cuh"
#include "tensor.h"

namespace dsvlm {
namespace {

using namespace moe::cuda;
using MaybeTensor = std::optional<Tensor>;
using torch::stable::accelerator::DeviceGuard;

Scalar scalar_of(const char* op, const char* name, const Tensor& x) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, op, ": ", name,
                  " has dtype number ", static_cast<int>(type), " (of torch's ScalarType), expected float32, bfloat16 ",
                  "or float16 on CUDA; cast it");
  return type == ScalarType::Float ? Scalar::f32 : type == ScalarType::BFloat16 ? Scalar::bf16 : Scalar::f16;
}

void expect(const char* op, const char* name, const MaybeTensor& x, std::initializer_list<int64_t> sizes,
            ScalarType type, const Tensor& like) {
  if (!x) return;
  check_shape(op, name, *x, sizes);
  check_type(op, name, *x, type);
  STD_TORCH_CHECK(x->is_contiguous(), op, ": ", name, " must be contiguous");
  STD_TORCH_CHECK(x->is_cuda() && x->get_device_index() == like.get_device_index(), op, ": ", name,
                  " is not on CUDA device ", like.get_device_index(), " as the first tensor; move it there");
}

Tensor make(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes), type);
}

template <class T>
const T* given(const MaybeTensor& x) {
  return x ? static_cast<const T*>(x->const_data_ptr()) : nullptr;
}

template <class T>
T* place_of(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

bool aligned(const MaybeTensor& x) { return reinterpret_cast<uintptr_t>(given<void>(x)) % 16 == 0; }

cudaStream_t stream_of(const Tensor& x) { return current_stream(x.get_device_index()); }

void check_started(const char* op, cudaError_t error, const Tensor& x) {
  if (error != cudaSuccess) cudaGetLastError();  // told here, not again at the next call
  STD_TORCH_CHECK(error == cudaSuccess, op, ": ", told(error), " for ", shape_of(x));
}

Logits make_logits(const char* op, const Tensor& logits, const MaybeTensor& noise, const MaybeTensor& modality,
                   const MaybeTensor& valid, int64_t k, int64_t modalities, bool renormalize, double load_sigma) {
  const Scalar type = scalar_of(op, "logits", logits);
  expect(op, "logits", logits, {-1, -1}, logits.scalar_type(), logits);
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  expect(op, "noise", noise, {tokens, experts}, ScalarType::Float, logits);
  expect(op, "modality", modality, {tokens}, ScalarType::Byte, logits);
  expect(op, "valid", valid, {tokens}, ScalarType::Bool, logits);
  const int64_t most = std::min<int64_t>(experts, kMaxChoices);
  STD_TORCH_CHECK(experts <= kMaxExperts, op, ": ", experts, " experts, expected at most ", kMaxExperts);
  STD_TORCH_CHECK(1 <= k && k <= most, op, ": k is ", k, ", expected 1 to ", most, " on CUDA");
  STD_TORCH_CHECK(1 <= modalities && modalities <= 256, op, ": ", modalities, " modalities, expected 1 to 256");
  STD_TORCH_CHECK(tokens * k <= INT32_MAX - kMaxExperts * 1024, op, ": ", tokens, " tokens of ", k,
                  " choices, which are counted in 32 bits; split the batch");
  return {logits.const_data_ptr(), given<float>(noise), given<uint8_t>(modality), given<uint8_t>(valid), type,
          static_cast<int>(tokens), static_cast<int>(experts), static_cast<int>(k), static_cast<int>(modalities),
          static_cast<float>(load_sigma), renormalize, experts % 4 == 0 && aligned(logits) && aligned(noise)};
}

// As dsvlm.ops.moe_routing.rows_bound.
int64_t rows_bound(const Logits& x, const std::vector<int64_t>& capacity, int64_t align) {
  int64_t one = 0;
  for (int64_t limit : capacity) one = limit < 0 || one < 0 ? -1 : std::min<int64_t>(one + limit, x.tokens);
  if (one < 0) one = x.tokens;
  return std::min(x.experts * ((one + align - 1) / align * align),
                  (int64_t(x.tokens) * x.k + x.experts * (align - 1)) / align * align);
}

template <class Name>
Name chosen(const char* op, const char* what, const std::string& word,
            std::initializer_list<std::pair<const char*, Name>> names) {
  for (const auto& [name, value] : names)
    if (word == name) return value;
  STD_TORCH_CHECK(false, op, ": unknown ", what, " ", word);
}

using Routed = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                          Tensor, Tensor>;

Routed moe_route(const Tensor& logits, const MaybeTensor& noise, const MaybeTensor& modality, const MaybeTensor& valid,
                 const MaybeTensor& pool, int64_t k, std::vector<int64_t> capacity, int64_t max_rows, int64_t align,
                 std::string policy, std::string slot_order, bool renormalize, int64_t num_modalities,
                 double load_sigma) {
  const char* const op = "moe_route";
  Route route{};
  route.logits = make_logits(op, logits, noise, modality, valid, k, num_modalities, renormalize, load_sigma);
  const int64_t n = logits.size(0), experts = logits.size(1), pools = static_cast<int64_t>(capacity.size());
  expect(op, "pool", pool, {n}, ScalarType::Byte, logits);
  STD_TORCH_CHECK(1 <= pools && pools <= kMaxPools && pools * experts <= kMaxSegments, op, ": ", pools, " pools of ",
                  experts, " experts, expected 1 to ", kMaxPools, " pools, and at most ", kMaxSegments,
                  " pools * experts on CUDA");
  STD_TORCH_CHECK(1 <= align && align <= INT32_MAX / kMaxExperts, op, ": align is ", align);
  const int64_t bound = rows_bound(route.logits, capacity, align);
  STD_TORCH_CHECK(bound <= max_rows && max_rows <= INT32_MAX, op, ": max_rows is ", max_rows, ", expected at least ",
                  bound, " (rows_bound) and less than 2^31");
  route.pool = given<uint8_t>(pool);
  route.policy = chosen<Policy>(op, "policy", policy,
                                {{"bpr", Policy::bpr}, {"position", Policy::position}, {"probs", Policy::probs}});
  route.by_priority = chosen<bool>(op, "slot_order", slot_order, {{"token", false}, {"priority", true}});
  route.pools = static_cast<int>(pools), route.align = static_cast<int>(align);
  route.max_rows = static_cast<int>(max_rows);
  STD_TORCH_CHECK(sums_fit(route), op, ": the sums of ", num_modalities, " modalities and ", experts,
                  " experts do not fit into the memory of a block; use fewer modalities, or backend='torch'");
  for (int64_t i = 0; i < pools; ++i) route.capacity[i] = static_cast<int>(std::min<int64_t>(capacity[i], INT32_MAX));

  const DeviceGuard guard(logits.get_device_index());
  const ScalarType real = ScalarType::Float, integer = ScalarType::Int;
  const Tensor weight = make(logits, {n, k}, real), lse = make(logits, {n}, real);
  const Tensor index = make(logits, {n, k}, integer), slot = make(logits, {n, k}, integer);
  const Tensor src = make(logits, {max_rows}, integer), offs = make(logits, {experts}, integer);
  const Tensor load = make(logits, {experts, pools}, integer), kept = make(logits, {experts, pools}, integer);
  const Tensor prob_sum = make(logits, {num_modalities, experts}, real);
  const Tensor loadp_sum = make(logits, {num_modalities, experts}, real);
  const Tensor ent_sum = make(logits, {num_modalities}, real), z2_sum = make(logits, {num_modalities}, real);
  const Tensor bad_rows = make(logits, {}, integer);
  route.weight = place_of<float>(weight), route.lse = place_of<float>(lse);
  route.prob_sum = place_of<float>(prob_sum), route.loadp_sum = place_of<float>(loadp_sum);
  route.ent_sum = place_of<float>(ent_sum), route.z2_sum = place_of<float>(z2_sum);
  route.index = place_of<int>(index), route.slot = place_of<int>(slot), route.src = place_of<int>(src);
  route.offs = place_of<int>(offs), route.load = place_of<int>(load), route.kept = place_of<int>(kept);
  route.bad_rows = place_of<int>(bad_rows);
  const Tensor workspace = make(logits, {static_cast<int64_t>(place(route, nullptr))}, ScalarType::Byte);
  place(route, workspace.mutable_data_ptr());

  const cudaStream_t stream = stream_of(logits);
  check_started(op, launch_gate(route, stream), logits);
  check_started(op, launch_select(route, stream), logits);
  return {weight, index, slot, src, offs, load, kept, prob_sum, ent_sum, z2_sum, loadp_sum, lse, bad_rows};
}

Tensor moe_route_backward(const MaybeTensor& grad_weight, const MaybeTensor& grad_prob_sum,
                          const MaybeTensor& grad_ent_sum, const MaybeTensor& grad_z2_sum,
                          const MaybeTensor& grad_loadp_sum, const Tensor& logits, const MaybeTensor& noise,
                          const MaybeTensor& modality, const MaybeTensor& valid, const Tensor& index, const Tensor& lse,
                          bool renormalize, double load_sigma) {
  const char* const op = "moe_route_backward";
  int64_t modalities = 256;  // where no gradient says how many there are, and none is read by modality
  for (const MaybeTensor* grad : {&grad_prob_sum, &grad_ent_sum, &grad_z2_sum, &grad_loadp_sum})
    if (*grad) modalities = (*grad)->size(0);
  check_shape(op, "index", index, {-1, -1});
  GateBackward work{};
  work.logits =
      make_logits(op, logits, noise, modality, valid, index.size(1), modalities, renormalize, load_sigma);
  const int64_t n = logits.size(0), experts = logits.size(1);
  expect(op, "index", index, {n, -1}, ScalarType::Int, logits);
  expect(op, "lse", lse, {n}, ScalarType::Float, logits);
  expect(op, "grad_weight", grad_weight, {n, index.size(1)}, ScalarType::Float, logits);
  expect(op, "grad_prob_sum", grad_prob_sum, {modalities, experts}, ScalarType::Float, logits);
  expect(op, "grad_ent_sum", grad_ent_sum, {modalities}, ScalarType::Float, logits);
  expect(op, "grad_z2_sum", grad_z2_sum, {modalities}, ScalarType::Float, logits);
  expect(op, "grad_loadp_sum", grad_loadp_sum, {modalities, experts}, ScalarType::Float, logits);
  work.logits.vectors = work.logits.vectors && aligned(grad_prob_sum) && aligned(grad_loadp_sum);
  work.grad_weight = given<float>(grad_weight), work.grad_prob_sum = given<float>(grad_prob_sum);
  work.grad_ent_sum = given<float>(grad_ent_sum), work.grad_z2_sum = given<float>(grad_z2_sum);
  work.grad_loadp_sum = given<float>(grad_loadp_sum);
  work.index = given<int>(index), work.lse = given<float>(lse);
  const DeviceGuard guard(logits.get_device_index());
  const Tensor grad_logits = make(logits, {n, experts}, logits.scalar_type());
  work.grad_logits = grad_logits.mutable_data_ptr();
  check_started(op, launch_gate_backward(work, stream_of(logits)), logits);
  return grad_logits;
}

// x: the matrix that decides type and device; of_tokens: its rows are tokens, else rows of the experts.
Rows make_rows(const char* op, const Tensor& x, bool of_tokens, const Tensor& src, const Tensor& slot) {
  check_shape(op, "slot", slot, {-1, -1});
  expect(op, "slot", slot, {-1, -1}, ScalarType::Int, x);
  expect(op, "src", src, {-1}, ScalarType::Int, x);
  Rows rows{};
  rows.rows = src.size(0), rows.tokens = slot.size(0), rows.k = static_cast<int>(slot.size(1));
  expect(op, of_tokens ? "the matrix of tokens" : "the matrix of rows", x, {of_tokens ? rows.tokens : rows.rows, -1},
         x.scalar_type(), x);
  STD_TORCH_CHECK(x.size(1) < INT32_MAX / 2, op, ": ", shape_of(x), " has too many columns");
  rows.width = static_cast<int>(x.size(1));
  rows.src = given<int>(src), rows.slot = given<int>(slot), rows.from = x.const_data_ptr();
  return rows;
}

Tensor moe_permute(const Tensor& x, const Tensor& src, const Tensor& slot) {
  const char* const op = "moe_permute";
  const Scalar type = scalar_of(op, "x", x);
  Rows rows = make_rows(op, x, true, src, slot);
  const DeviceGuard guard(x.get_device_index());
  const Tensor out = make(x, {rows.rows, x.size(1)}, x.scalar_type());
  rows.to = out.mutable_data_ptr();
  check_started(op, launch_permute(rows, type, stream_of(x)), x);
  return out;
}

// weight: none = 1.
Tensor combined(const char* op, const Tensor& y, const MaybeTensor& weight, const Tensor& slot, const Tensor& src) {
  const Scalar type = scalar_of(op, "y", y);
  Rows rows = make_rows(op, y, false, src, slot);
  expect(op, "weight", weight, {rows.tokens, rows.k}, ScalarType::Float, y);
  rows.weight = given<float>(weight);
  const DeviceGuard guard(y.get_device_index());
  const Tensor out = make(y, {rows.tokens, y.size(1)}, y.scalar_type());
  rows.to = out.mutable_data_ptr();
  check_started(op, launch_combine(rows, type, false, stream_of(y)), y);
  return out;
}

Tensor moe_permute_backward(const Tensor& grad_out, const Tensor& src, const Tensor& slot) {
  return combined("moe_permute_backward", grad_out, std::nullopt, slot, src);
}

Tensor moe_combine(const Tensor& y, const Tensor& weight, const Tensor& slot, const Tensor& src) {
  return combined("moe_combine", y, weight, slot, src);
}

std::tuple<Tensor, Tensor> moe_combine_backward(const Tensor& grad_out, const Tensor& y, const Tensor& weight,
                                                const Tensor& slot, const Tensor& src) {
  const char* const op = "moe_combine_backward";
  const Scalar type = scalar_of(op, "grad_out", grad_out);
  Rows rows = make_rows(op, grad_out, true, src, slot);
  expect(op, "y", y, {rows.rows, grad_out.size(1)}, grad_out.scalar_type(), grad_out);
  expect(op, "weight", weight, {rows.tokens, rows.k}, ScalarType::Float, grad_out);
  const DeviceGuard guard(grad_out.get_device_index());
  const Tensor grad_y = make(y, {rows.rows, y.size(1)}, y.scalar_type());
  const Tensor grad_weight = make(weight, {rows.tokens, rows.k}, ScalarType::Float);
  rows.other = y.const_data_ptr(), rows.to = grad_y.mutable_data_ptr();
  rows.weight = given<float>(weight), rows.grad_weight = place_of<float>(grad_weight);
  check_started(op, launch_combine(rows, type, true, stream_of(grad_out)), grad_out);
  return {grad_y, grad_weight};
}

}  // namespace
}  // namespace dsvlm

STABLE_TORCH_LIBRARY_IMPL(dsvlm, CUDA, m) {
  m.impl("moe_route", TORCH_BOX(&dsvlm::moe_route));
  m.impl("moe_route_backward", TORCH_BOX(&dsvlm::moe_route_backward));
  m.impl("moe_permute", TORCH_BOX(&dsvlm::moe_permute));
  m.impl("moe_permute_backward", TORCH_BOX(&dsvlm::moe_permute_backward));
  m.impl("moe_combine", TORCH_BOX(&dsvlm::moe_combine));
  m.impl("moe_combine_backward", TORCH_BOX(&dsvlm::moe_combine_backward));
}
