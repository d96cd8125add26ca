// The routing kernels as plain C functions, for the emulator. type: 0 fp32, 1 bf16, 2 fp16; sizes as they are named.
#include "moe_routing/gate.cuh"
#include "moe_routing/select.cuh"

namespace dsvlm::moe {

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

}  // namespace dsvlm::moe

extern "C" int64_t workspace_bytes(const dsvlm::moe::Sizes* sizes, float load_sigma) {
  dsvlm::moe::Route route = dsvlm::moe::route_of(*sizes, nullptr);
  route.logits = dsvlm::moe::logits_of(*sizes, nullptr, nullptr, nullptr, nullptr, load_sigma);
  return int64_t(place(route, nullptr));
}

extern "C" cudaError_t route(const dsvlm::moe::Sizes* sizes, const int64_t* capacity, float load_sigma, const void* logits,
                             const float* noise, const uint8_t* modality, const uint8_t* valid, const uint8_t* pool,
                             void* workspace, float* weight, int* index, int* slot, int* src, int* offs, int* load,
                             int* kept, float* prob_sum, float* ent_sum, float* z2_sum, float* loadp_sum, float* lse,
                             int* bad_rows) {
  using namespace dsvlm::moe;
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
