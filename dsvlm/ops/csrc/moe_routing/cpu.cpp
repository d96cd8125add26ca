// The CPU implementation of the schemas in library.cpp: checks, memory, and the fixed division of work among threads.
#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <tuple>

#include "moe_routing/route.h"
#include "moe_routing/select.h"
#include "tensor.h"

namespace dsvlm {
namespace {

using moe::Element;
using MaybeTensor = std::optional<Tensor>;

Element element_of(const char* op, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Element::f32;
    case ScalarType::BFloat16: return Element::bf16;
    case ScalarType::Half: return Element::f16;
    case ScalarType::Double: return Element::f64;
    default: STD_TORCH_CHECK(false, op, ": fp32, bf16, fp16 or fp64 is expected");
  }
}

ScalarType wide(Element element) { return element == Element::f64 ? ScalarType::Double : ScalarType::Float; }

// Contiguous. By torch's C functions: its new_empty goes through the dispatcher, 13 times for a routing.
Tensor make(std::initializer_list<int64_t> sizes, ScalarType type) {
  int64_t strides[2] = {1, 1};
  if (sizes.size() == 2) strides[0] = sizes.begin()[1];
  AtenTensorHandle made;
  STD_TORCH_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides,
                                           static_cast<int32_t>(type), aoti_torch_device_type_cpu(), 0, &made) == 0,
                  "memory for a result could not be had");
  return Tensor(made);
}

const void* data(const MaybeTensor& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

// Checked so that nothing is read that is not there; `index`, which the forward pass gave, is taken at its word.
void expect(const char* op, const char* name, const MaybeTensor& tensor, std::initializer_list<int64_t> sizes,
            ScalarType type) {
  if (!tensor) return;
  check_shape(op, name, *tensor, sizes);
  check_type(op, name, *tensor, type);
  STD_TORCH_CHECK(tensor->is_contiguous(), op, ": ", name, " must be contiguous");
}

void expect_below(const char* op, const char* name, const MaybeTensor& tensor, int64_t limit) {
  if (!tensor) return;
  const uint8_t* const values = static_cast<const uint8_t*>(tensor->const_data_ptr());
  const uint8_t* const largest = std::max_element(values, values + tensor->numel());
  STD_TORCH_CHECK(tensor->numel() == 0 || *largest < limit, op, ": ", name, " of token ", largest - values, " is ",
                  static_cast<int>(*largest), ", expected less than ", limit);
}

moe::Router make_router(const char* op, const Tensor& logits, const MaybeTensor& noise, const MaybeTensor& modality,
                        const MaybeTensor& valid, int64_t k, int64_t modalities, bool renormalize, double load_sigma) {
  const Element element = element_of(op, logits);
  expect(op, "logits", logits, {-1, -1}, logits.scalar_type());
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  expect(op, "noise", noise, {tokens, experts}, wide(element));
  expect(op, "modality", modality, {tokens}, ScalarType::Byte);
  expect(op, "valid", valid, {tokens}, ScalarType::Bool);
  STD_TORCH_CHECK(1 <= k && k <= experts, op, ": k is ", k, ", expected 1 to ", experts);
  expect_below(op, "modality", modality, modalities);
  return {logits.const_data_ptr(), data(noise), static_cast<const uint8_t*>(data(modality)),
          static_cast<const bool*>(data(valid)), tokens, experts, k, modalities, element, renormalize, load_sigma};
}

// A row of few experts fills the vectors of a lesser set better.
InstructionSet instructions_for(const moe::Router& r) {
  return r.experts <= 8 ? std::min(instruction_set(), InstructionSet::avx2) : instruction_set();
}

// body(chunk, block, scratch) for each block of tokens; chunks of them are dealt to threads.
template <class Body>
void for_each_chunk(const moe::Router& r, int64_t chunk_tokens, Body body) {
  const int64_t blocks = (r.tokens + moe::kBlock - 1) / moe::kBlock, each = chunk_tokens / moe::kBlock;
  torch::stable::parallel_for(0, (blocks + each - 1) / each, 1, [&](int64_t begin, int64_t end) {
    constexpr std::align_val_t alignment{moe::kVectorBytes};
    void* const scratch = ::operator new(moe::scratch_bytes(r), alignment);
    for (int64_t block = begin * each; block < std::min(blocks, end * each); ++block)
      body(block / each, block, scratch);
    ::operator delete(scratch, alignment);
  });
}

// The sums of all blocks, in fp64 and in their order.
template <class Real>
void reduce(const moe::Router& r, const void* partial, int64_t blocks, std::initializer_list<Tensor> outputs) {
  const int64_t size = moe::partial_size(r);
  std::vector<double> total(size);
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t i = 0; i < size; ++i) total[i] += static_cast<const Real*>(partial)[block * size + i];
  const double* from = total.data();
  for (const Tensor& output : outputs) {
    Real* const to = static_cast<Real*>(output.mutable_data_ptr());
    for (int64_t i = 0; i < output.numel(); ++i) to[i] = static_cast<Real>(*from++);
  }
}

using Routed = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                          Tensor, Tensor>;

Routed moe_route(const Tensor& logits, const MaybeTensor& noise, const MaybeTensor& modality, const MaybeTensor& valid,
                 const MaybeTensor& pool, int64_t k, std::vector<int64_t> capacity, int64_t max_rows, int64_t align,
                 std::string policy, std::string slot_order, bool renormalize, int64_t num_modalities,
                 double load_sigma) {
  const char* const op = "moe_route";
  const moe::Router r =
      make_router(op, logits, noise, modality, valid, k, num_modalities, renormalize, load_sigma);
  const int64_t n = r.tokens, pools = static_cast<int64_t>(capacity.size());
  expect(op, "pool", pool, {n}, ScalarType::Byte);
  expect_below(op, "pool", pool, pools);
  STD_TORCH_CHECK(policy == "bpr" || policy == "position" || policy == "probs", op, ": unknown policy ", policy);
  STD_TORCH_CHECK(slot_order == "token" || slot_order == "priority", op, ": unknown slot_order ", slot_order);
  STD_TORCH_CHECK(pools >= 1 && align >= 1 && max_rows >= 0 && num_modalities >= 1, op,
                  ": capacity, align, max_rows and num_modalities must be positive");
  STD_TORCH_CHECK(n * k < INT32_MAX && max_rows < INT32_MAX, op, ": ", n, " tokens of ", k, " choices, ", max_rows,
                  " rows: rows and choices are numbered in 32 bits");
  const ScalarType real = wide(r.element), integer = ScalarType::Int;
  const Tensor weight = make({n, k}, real), index = make({n, k}, integer);
  const Tensor slot = make({n, k}, integer), src = make({max_rows}, integer);
  const Tensor offs = make({r.experts}, integer), load = make({r.experts, pools}, integer);
  const Tensor kept = make({r.experts, pools}, integer), lse = make({n}, real);
  const Tensor prob_sum = make({num_modalities, r.experts}, real), ent_sum = make({num_modalities}, real);
  const Tensor z2_sum = make({num_modalities}, real);
  const Tensor loadp_sum = make({num_modalities, r.experts}, real), bad_rows = make({}, integer);

  const bool is_wide = r.element == Element::f64;
  const int64_t blocks = (n + moe::kBlock - 1) / moe::kBlock, real_bytes = is_wide ? 8 : 4;
  const std::unique_ptr<char[]> key(new char[n * k * real_bytes]);
  const std::unique_ptr<char[]> partial(new char[blocks * moe::partial_size(r) * real_bytes]);
  std::vector<int32_t> bad(blocks);
  const moe::Policy by = policy == "bpr"        ? moe::Policy::bpr
                         : policy == "position" ? moe::Policy::position
                                                : moe::Policy::probs;
  const moe::GateForward gate{r,         by, weight.mutable_data_ptr(), static_cast<int32_t*>(index.mutable_data_ptr()),
                              key.get(), lse.mutable_data_ptr(), partial.get(), bad.data()};
  const auto ints = [](const Tensor& tensor) { return static_cast<int32_t*>(tensor.mutable_data_ptr()); };
  moe::Selection selection{ints(index), key.get(), static_cast<const uint8_t*>(data(pool)), is_wide, policy != "probs",
                           slot_order == "priority", n, r.experts, k, max_rows, align, std::move(capacity), ints(slot),
                           ints(src), ints(offs), ints(load), ints(kept)};
  moe::divide(selection, moe::kBlock);
  const InstructionSet set = instructions_for(r);
  for_each_chunk(r, selection.chunk_tokens, [&](int64_t chunk, int64_t block, void* scratch) {
    DSVLM_CALL_SIMD_OF(set, moe_gate_forward, gate, block, scratch);
    moe::count(selection, chunk, block * moe::kBlock, std::min(n, (block + 1) * moe::kBlock));
  });
  is_wide ? reduce<double>(r, partial.get(), blocks, {prob_sum, loadp_sum, ent_sum, z2_sum})
          : reduce<float>(r, partial.get(), blocks, {prob_sum, loadp_sum, ent_sum, z2_sum});
  int32_t& bad_count = *static_cast<int32_t*>(bad_rows.mutable_data_ptr());
  bad_count = 0;
  for (int32_t count : bad) bad_count += count;

  moe::select(selection);
  return {weight, index, slot, src, offs, load, kept, prob_sum, ent_sum, z2_sum, loadp_sum, lse, bad_rows};
}

Tensor moe_route_backward(const MaybeTensor& grad_weight, const MaybeTensor& grad_prob_sum,
                          const MaybeTensor& grad_ent_sum, const MaybeTensor& grad_z2_sum,
                          const MaybeTensor& grad_loadp_sum, const Tensor& logits, const MaybeTensor& noise,
                          const MaybeTensor& modality, const MaybeTensor& valid, const Tensor& index, const Tensor& lse,
                          bool renormalize, double load_sigma) {
  const char* const op = "moe_route_backward";
  int64_t modalities = 0;
  for (const MaybeTensor* grad : {&grad_prob_sum, &grad_ent_sum, &grad_z2_sum, &grad_loadp_sum})
    if (*grad) modalities = (*grad)->size(0);
  const MaybeTensor told_apart = modalities > 0 ? modality : MaybeTensor{};  // only sums are one per modality
  modalities = std::max<int64_t>(modalities, 1);
  const int64_t k = index.size(1);
  const moe::Router r = make_router(op, logits, noise, told_apart, valid, k, modalities, renormalize, load_sigma);
  const ScalarType real = wide(r.element);
  expect(op, "index", index, {r.tokens, k}, ScalarType::Int);
  expect(op, "lse", lse, {r.tokens}, real);
  expect(op, "grad_weight", grad_weight, {r.tokens, k}, real);
  expect(op, "grad_prob_sum", grad_prob_sum, {modalities, r.experts}, real);
  expect(op, "grad_ent_sum", grad_ent_sum, {modalities}, real);
  expect(op, "grad_z2_sum", grad_z2_sum, {modalities}, real);
  expect(op, "grad_loadp_sum", grad_loadp_sum, {modalities, r.experts}, real);
  const std::vector<double> zeros(modalities * r.experts);
  const auto or_zeros = [&](const MaybeTensor& grad) { return grad ? grad->const_data_ptr() : zeros.data(); };
  const Tensor grad_logits = make({r.tokens, r.experts}, logits.scalar_type());
  const moe::GateBackward gate{r,
                               static_cast<const int32_t*>(index.const_data_ptr()),
                               lse.const_data_ptr(),
                               data(grad_weight),
                               or_zeros(grad_prob_sum),
                               data(grad_ent_sum),
                               or_zeros(grad_z2_sum),
                               load_sigma > 0 ? data(grad_loadp_sum) : nullptr,
                               grad_logits.mutable_data_ptr()};
  const InstructionSet set = instructions_for(r);
  for_each_chunk(r, moe::kBlock, [&](int64_t, int64_t block, void* scratch) {
    DSVLM_CALL_SIMD_OF(set, moe_gate_backward, gate, block, scratch);
  });
  return grad_logits;
}

}  // namespace
}  // namespace dsvlm

STABLE_TORCH_LIBRARY_IMPL(dsvlm, CPU, m) {
  m.impl("moe_route", TORCH_BOX(&dsvlm::moe_route));
  m.impl("moe_route_backward", TORCH_BOX(&dsvlm::moe_route_backward));
}
