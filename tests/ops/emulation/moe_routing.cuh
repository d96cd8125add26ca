// The routing kernels as plain C functions, for the emulator. type: 0 fp32, 1 bf16, 2 fp16; sizes as they are named.
#include "moe_routing/gate.cuh"
#include "moe_routing/gate_backward.cuh"
#include "moe_routing/rows.cuh"
#include "moe_routing/select.cuh"

namespace dsvlm::moe::cuda {

struct Sizes {
  int64_t type, tokens, experts, k, modalities, renormalize, vectors, pools, align, max_rows, policy, by_priority;
};

inline Logits logits_of(const Sizes& sizes, const void* values, const float* noise, const uint8_t* modality,
                        const uint8_t* valid, float load_sigma) {
  return Logits{values, noise, modality, valid, Scalar(sizes.type), int(sizes.tokens), int(sizes.experts), int(sizes.k),
                int(sizes.modalities), load_sigma, sizes.renormalize != 0, sizes.vectors != 0};
}

inline Route route_of(const Sizes& sizes, const int64_t* capacity) {
  Route route{};
  route.pools = int(sizes.pools), route.align = int(sizes.align), route.max_rows = int(sizes.max_rows);
  route.policy = Policy(sizes.policy), route.by_priority = sizes.by_priority != 0;
  for (int i = 0; capacity && i < route.pools; ++i) route.capacity[i] = int(capacity[i]);
  return route;
}

// sizes: type, rows, tokens, k, width
inline Rows rows_of(const int64_t* sizes, const void* from, const void* other, void* to, const int* src,
                    const int* slot, const float* weight, float* grad_weight) {
  return Rows{from, other, to, src, slot, weight, grad_weight, sizes[1], sizes[2], int(sizes[3]), int(sizes[4])};
}

}  // namespace dsvlm::moe::cuda

extern "C" int64_t workspace_bytes(const dsvlm::moe::cuda::Sizes* sizes, float load_sigma) {
  dsvlm::moe::cuda::Route route = dsvlm::moe::cuda::route_of(*sizes, nullptr);
  route.logits = dsvlm::moe::cuda::logits_of(*sizes, nullptr, nullptr, nullptr, nullptr, load_sigma);
  return int64_t(place(route, nullptr));
}

extern "C" cudaError_t route(const dsvlm::moe::cuda::Sizes* sizes, const int64_t* capacity, float load_sigma,
                             const void* logits, const float* noise, const uint8_t* modality, const uint8_t* valid,
                             const uint8_t* pool, void* workspace, float* weight, int* index, int* slot, int* src,
                             int* offs, int* load, int* kept, float* prob_sum, float* ent_sum, float* z2_sum,
                             float* loadp_sum, float* lse, int* bad_rows) {
  using namespace dsvlm::moe::cuda;
  Route route = route_of(*sizes, capacity);
  route.logits = logits_of(*sizes, logits, noise, modality, valid, load_sigma);
  route.pool = pool;
  route.weight = weight, route.index = index, route.slot = slot, route.src = src, route.offs = offs;
  route.load = load, route.kept = kept, route.prob_sum = prob_sum, route.ent_sum = ent_sum, route.z2_sum = z2_sum;
  route.loadp_sum = loadp_sum, route.lse = lse, route.bad_rows = bad_rows;
  place(route, workspace);
  if (const cudaError_t error = launch_gate(route, nullptr); error != cudaSuccess) return error;
  return launch_select(route, nullptr);
}

extern "C" cudaError_t route_backward(const dsvlm::moe::cuda::Sizes* sizes, float load_sigma, const void* logits,
                                      const float* noise, const uint8_t* modality, const uint8_t* valid,
                                      const int* index, const float* lse, const float* grad_weight,
                                      const float* grad_prob_sum, const float* grad_ent_sum, const float* grad_z2_sum,
                                      const float* grad_loadp_sum, void* grad_logits) {
  using namespace dsvlm::moe::cuda;
  const Logits given = logits_of(*sizes, logits, noise, modality, valid, load_sigma);
  return launch_gate_backward({given, grad_weight, grad_prob_sum, grad_ent_sum, grad_z2_sum, grad_loadp_sum, index, lse,
                               grad_logits},
                              nullptr);
}

extern "C" cudaError_t permute_rows(const int64_t* sizes, const void* x, const int* src, void* out) {
  using namespace dsvlm::moe::cuda;
  return launch_permute(rows_of(sizes, x, nullptr, out, src, nullptr, nullptr, nullptr), Scalar(sizes[0]), nullptr);
}

// weight null: the backward of permute_rows
extern "C" cudaError_t combine_rows(const int64_t* sizes, const void* y, const float* weight, const int* slot,
                                    void* out) {
  using namespace dsvlm::moe::cuda;
  const Rows rows = rows_of(sizes, y, nullptr, out, nullptr, slot, weight, nullptr);
  return launch_combine(rows, Scalar(sizes[0]), false, nullptr);
}

extern "C" cudaError_t combine_rows_backward(const int64_t* sizes, const void* grad_out, const void* y,
                                             const float* weight, const int* slot, const int* src, void* grad_y,
                                             float* grad_weight) {
  using namespace dsvlm::moe::cuda;
  const Rows rows = rows_of(sizes, grad_out, y, grad_y, src, slot, weight, grad_weight);
  return launch_combine(rows, Scalar(sizes[0]), true, nullptr);
}
