// The gradient of all that the gate gives, in one pass over the logits: nothing of size [tokens, experts] was kept.
#pragma once
#include "route.cuh"

namespace dsvlm::moe::cuda {

// Gradients are null where none came; index and lse are what the forward pass gave.
struct GateBackward {
  Logits logits;
  const float *grad_weight, *grad_prob_sum, *grad_ent_sum, *grad_z2_sum, *grad_loadp_sum;
  const int* index;
  const float* lse;
  void* grad_logits;
};

__device__ __forceinline__ float noisy_logit(const Logits& logits, int token, int expert) {
  const int64_t i = int64_t(token) * logits.experts + expert;
  const float noise = logits.noise ? logits.noise[i] : 0.0f;
  if (logits.type == Scalar::f32) return static_cast<const float*>(logits.values)[i] + noise;
  if (logits.type == Scalar::bf16) return device::to_float(static_cast<const device::bf16*>(logits.values)[i]) + noise;
  return device::to_float(static_cast<const device::f16*>(logits.values)[i]) + noise;
}

// Adds the gradient that comes through the weights of the chosen experts.
template <class R>
__device__ __forceinline__ void add_weights(const GateBackward& b, int token, bool live,
                                            const float (&clean)[R::kValues], float (&grad)[R::kValues]) {
  const Logits& logits = b.logits;
  const int64_t first = int64_t(token) * logits.k;
  const float peak = live ? noisy_logit(logits, token, b.index[first]) : 0.0f;  // the first choice is the largest
  float p[R::kValues] = {}, total = 0;
  if (live && logits.noise)
    R::load(p, logits.noise + int64_t(token) * logits.experts, logits.experts, logits.vectors);
#pragma unroll
  for (int i = 0; i < R::kValues; ++i) total += p[i] = expf(clean[i] + p[i] - peak);
  total = group_sum<R::kLanes>(total);
  if (!live) return;
  float chosen = 0, dot = 0;
  for (int rank = 0; rank < logits.k; ++rank) {
    const float weight = expf(noisy_logit(logits, token, b.index[first + rank]) - peak);
    chosen += weight;
    dot += weight * b.grad_weight[first + rank];
  }
  const float scale = 1.0f / (logits.renormalize ? chosen : total);
  dot *= scale;
  for (int rank = 0; rank < logits.k; ++rank) {
    const int expert = b.index[first + rank];
    const float weight = expf(noisy_logit(logits, token, expert) - peak) * scale;
    const float share = weight * (b.grad_weight[first + rank] - (logits.renormalize ? dot : 0.0f));
#pragma unroll
    for (int i = 0; i < R::kValues; ++i)
      if (R::expert(i) == expert) grad[i] += share;
  }
  if (logits.renormalize) return;
#pragma unroll
  for (int i = 0; i < R::kValues; ++i) grad[i] -= p[i] * scale * dot;
}

template <class R>
__global__ void __launch_bounds__(256, R::kValues > 8 ? 1 : 3) gate_backward(const GateBackward b) {
  const Logits& logits = b.logits;
  const int token = int((int64_t(blockIdx.x) * 256 + threadIdx.x) / R::kLanes);
  const bool write = token < logits.tokens, valid = write && (!logits.valid || logits.valid[token]);
  const float lse = valid ? b.lse[token] : 0.0f;
  const bool live = valid && lse == lse;  // a bad row's is NaN
  const int modality = live ? logits.modality_of(token) : 0;
  const int64_t table = int64_t(modality) * logits.experts;
  float clean[R::kValues], grad[R::kValues];
#pragma unroll
  for (int i = 0; i < R::kValues; ++i) clean[i] = -INFINITY, grad[i] = 0;
  if (live) R::load(clean, logits, token);

  // p (g - <p, g>) with g = grad_prob_sum - grad_ent_sum log p + 2 grad_z2_sum lse: the last needs no <p, g>.
  // lse has an error of its own, that of its size: p is divided by its sum, and log p may be off by a constant.
  if (live && b.grad_prob_sum) R::load(grad, b.grad_prob_sum + table, logits.experts, logits.vectors);
  const float of_entropy = live && b.grad_ent_sum ? b.grad_ent_sum[modality] : 0.0f;
  const float of_z2 = live && b.grad_z2_sum ? 2 * lse * b.grad_z2_sum[modality] : 0.0f;
  float dot = 0, total = 0;
#pragma unroll
  for (int i = 0; i < R::kValues; ++i) {
    const float log_p = clean[i] - lse, p = expf(log_p);
    grad[i] = p > 0 ? grad[i] - of_entropy * log_p : 0.0f;
    dot += p * grad[i];
    total += p;
  }
  const float scale = 1.0f / group_sum<R::kLanes>(total);
  dot = group_sum<R::kLanes>(dot) * scale - of_z2;
#pragma unroll
  for (int i = 0; i < R::kValues; ++i) grad[i] = expf(clean[i] - lse) * scale * (grad[i] - dot);

  if (b.grad_weight) add_weights<R>(b, token, live, clean, grad);

  if (b.grad_loadp_sum && logits.load_sigma > 0) {  // Phi((logit - eta) / sigma): to each logit, and to eta's
    const int last = live ? b.index[int64_t(token) * logits.k + logits.k - 1] : 0;
    const float eta = live ? noisy_logit(logits, token, last) : 0.0f, inverse = 1.0f / logits.load_sigma;
    float outer[R::kValues] = {}, sum = 0;
    if (live) R::load(outer, b.grad_loadp_sum + table, logits.experts, logits.vectors);
#pragma unroll
    for (int i = 0; i < R::kValues; ++i) {
      if (!(clean[i] > -INFINITY)) continue;
      const float x = (clean[i] - eta) * inverse, share = outer[i] * inverse * 0.39894228f * expf(-0.5f * x * x);
      grad[i] += share;
      sum += share;
    }
    sum = group_sum<R::kLanes>(sum);
#pragma unroll
    for (int i = 0; i < R::kValues; ++i)
      if (R::expert(i) == last) grad[i] -= sum;
  }
  if (!write) return;
#pragma unroll
  for (int i = 0; i < R::kValues; ++i) grad[i] = live ? grad[i] : valid ? NAN : 0.0f;
  R::store(b.grad_logits, logits, token, grad);
}

inline cudaError_t launch_gate_backward(const GateBackward& b, cudaStream_t stream) {
  if (b.logits.tokens == 0) return cudaSuccess;
  return with_row(b.logits.experts, [&](auto row) {
    using R = decltype(row);
    const int64_t blocks = (int64_t(b.logits.tokens) * R::kLanes + 255) / 256;
    return device::launch(gate_backward<R>, dim3(unsigned(blocks)), dim3(256), 0, stream, b);
  });
}

}  // namespace dsvlm::moe::cuda
