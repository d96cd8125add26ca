// What the two sides of the CPU implementation share: plain structures, and the functions compiled per instruction set.
// The meaning of every value is in library.cpp.
#pragma once

#include "simd/simd.h"

#include <cstdint>

namespace dsvlm::moe {

enum class Element : int { f32, bf16, f16, f64 };  // the gate computes in fp64 for f64, else in fp32
enum class Policy : int { bpr, position, probs };

// Tokens are dealt in blocks of fixed size, so that sums do not depend on the number of threads.
constexpr int64_t kBlock = 512;
constexpr int64_t kVectorBytes = 64;  // of the widest instruction set

struct Router {
  const void* logits;
  const void* noise;  // null = none, as the next two
  const uint8_t* modality;
  const bool* valid;
  int64_t tokens, experts, k, modalities;
  Element element;
  bool renormalize;
  double load_sigma;
};

// key: order among those who ask, smaller first: uint32 (uint64), kBad for bad rows, kAsksNothing for no request.
struct GateForward {
  Router router;
  Policy policy;
  void* weight;
  int32_t* index;
  void* key;
  void* lse;
  void* partial;  // per block: prob [M, E], loadp [M, E], ent [M], z2 [M]
  int32_t* bad;   // per block
};

struct GateBackward {
  Router router;
  const int32_t* index;
  const void *lse, *grad_weight, *grad_prob, *grad_ent, *grad_z2, *grad_loadp;  // gradients: null = none
  void* grad_logits;
};

// Largest key of a real score: scores lie in [0, 1], whose bits are below this and grow with the score.
template <class Key>
constexpr Key kZeroScore = static_cast<Key>(~Key{0}) >> 1;
template <class Key>
constexpr Key kAsksNothing = kZeroScore<Key> + 1;
template <class Key>
constexpr Key kBad = static_cast<Key>(~Key{0});

// Inlined wherever it is called: see simd.h.
[[gnu::always_inline]] inline int64_t partial_size(const Router& r) { return r.modalities * (2 * r.experts + 2); }

// Scratch of one thread: four tables of a group's rows in whole vectors, two vectors per choice, two rows and two vectors
// per modality.
inline int64_t scratch_bytes(const Router& r) {
  const int64_t row = r.experts * 8 + kVectorBytes, group_of_rows = kVectorBytes * (r.experts + 16);
  return 4 * group_of_rows + kVectorBytes * 2 * r.k + r.modalities * 2 * (row + kVectorBytes);
}

}  // namespace dsvlm::moe

// One block of tokens; scratch: scratch_bytes, aligned to kVectorBytes.
DSVLM_DECLARE_SIMD(void moe_gate_forward(const moe::GateForward& call, int64_t block, void* scratch))
DSVLM_DECLARE_SIMD(void moe_gate_backward(const moe::GateBackward& call, int64_t block, void* scratch))

// out[n] = sum over k of weight[n, k] * y[slot[n, k]] for tokens [begin, end); weight null = 1.
DSVLM_DECLARE_SIMD(void moe_gather_sum(moe::Element element, const void* y, const void* weight, const int32_t* slot,
                                       void* out, int64_t k, int64_t width, int64_t begin, int64_t end))
// For rows [begin, end): grad_y = weight * grad_out[token], grad_weight = <grad_out[token], y>; empty rows get 0.
DSVLM_DECLARE_SIMD(void moe_scatter_product(moe::Element element, const void* grad_out, const void* y,
                                            const void* weight, const int32_t* src, void* grad_y, void* grad_weight,
                                            int64_t k, int64_t width, int64_t begin, int64_t end))
