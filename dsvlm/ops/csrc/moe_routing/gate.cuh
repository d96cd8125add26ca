// The gate: softmax, the k best experts, what the selection needs, and sums by block, in one pass over the logits.
#pragma once
#include "route.cuh"

namespace dsvlm::moe::cuda {

constexpr int kGateThreads = 256;
constexpr size_t kGateShared = 96 * 1024;  // two blocks on an SM; fewer threads where sums are wider

// The order of the policy as one number: smaller is earlier. `best` and `own`: weights of the token's first choice and
// of this one. A best weight is at least 1 / 1024, so 27 bits tell them all apart.
__device__ __forceinline__ uint32_t priority_key(Policy policy, int rank, float best, float own, bool bad) {
  constexpr uint32_t one = 0x3f800000u;
  if (policy == Policy::position) return uint32_t(rank) * 2 + bad;
  if (policy == Policy::probs) return bad ? one + 1 : one - __float_as_uint(own);
  constexpr uint32_t last = (1u << 27) - 1;
  return uint32_t(rank) << 27 | (bad ? last : one - __float_as_uint(best));
}

// Chooses the k largest keys of a row, equal ones by lower expert, and writes all that concerns single choices; `keys`
// are used up. weight of a value: exp(value - peak) * scale. Returns the k-th largest value.
template <class R>
__device__ float choose(const Route& r, uint32_t (&keys)[R::kValues], int token, float peak, float scale, bool write,
                        bool valid, bool bad, int* counts) {
  const int k = r.logits.k, lane = int(threadIdx.x) % R::kLanes;
  const int pool = r.pool && write ? min(int(r.pool[token]), r.pools - 1) : 0;
  const int64_t first = int64_t(token) * k;
  float best = 0, total = 0, value = 0;
  for (int rank = 0; rank < k; ++rank) {
    uint32_t top = 0;
    int expert = r.logits.experts;
#pragma unroll
    for (int i = 0; i < R::kValues; ++i)
      if (keys[i] > top) top = keys[i], expert = R::expert(i);
#pragma unroll
    for (int step = R::kLanes / 2; step > 0; step /= 2) {
      const uint32_t other = __shfl_xor_sync(kAllLanes, top, step);
      const int other_expert = __shfl_xor_sync(kAllLanes, expert, step);
      if (other > top || (other == top && other_expert < expert)) top = other, expert = other_expert;
    }
#pragma unroll
    for (int i = 0; i < R::kValues; ++i)
      if (R::expert(i) == expert) keys[i] = 0;

    value = from_ordered(top);
    const float weight = expf(value - peak) * scale;
    if (rank == 0) best = weight;
    total += weight;
    if (!write || lane != rank % R::kLanes) continue;
    const bool asks = valid && value > -INFINITY;
    const int segment = expert * r.pools + pool;
    r.index[first + rank] = expert;
    r.weight[first + rank] = !valid ? 0.0f : bad ? NAN : weight;
    r.segment[first + rank] = asks ? uint16_t(segment) : kNoSegment;
    r.key[first + rank] = priority_key(r.policy, rank, best, weight, bad);
    if (asks)
      atomicAdd(&counts[segment], 1);
    else
      r.slot[first + rank] = -1;
  }
  if (r.logits.renormalize && write && valid)
    for (int rank = lane; rank < k; rank += R::kLanes) r.weight[first + rank] /= total;  // this lane wrote it
  return value;
}

// Adds four probabilities to a row of sums that belongs to this lane alone; in a bad row NaN.
__device__ __forceinline__ void add_four(float* sums, const float* values, bool bad) {
  float4 four = *reinterpret_cast<float4*>(sums);
  four.x += bad ? NAN : values[0], four.y += bad ? NAN : values[1];
  four.z += bad ? NAN : values[2], four.w += bad ? NAN : values[3];
  *reinterpret_cast<float4*>(sums) = four;
}

// kLanes lanes take a token at a time. Each such group has sums of its own in shared memory, which are added in a fixed
// order at the end: equal inputs give equal bits.
template <class R>
__global__ void __launch_bounds__(kGateThreads, R::kValues > 8 ? 1 : 3) gate_forward(const Route r) {
  DSVLM_DYNAMIC_SHARED(shared);
  const Logits& logits = r.logits;
  const int columns = r.columns(), groups = int(blockDim.x) / R::kLanes, segments = r.segments();
  float* const all_sums = reinterpret_cast<float*>(shared);                 // [groups, columns], columns in fours
  int* const counts = reinterpret_cast<int*>(all_sums + groups * columns);  // [segments + 1]
  for (int i = threadIdx.x; i < groups * columns / 4; i += blockDim.x)
    reinterpret_cast<float4*>(all_sums)[i] = make_float4(0, 0, 0, 0);
  for (int i = threadIdx.x; i <= segments; i += blockDim.x) counts[i] = 0;
  __syncthreads();

  const int group = int(threadIdx.x) / R::kLanes, lane = int(threadIdx.x) % R::kLanes;
  float* const sums = all_sums + group * columns;
  const int table = logits.modalities * r.padded_experts();
  for (int i = group; i < kTokensPerBlock; i += groups) {
    const int token = int(blockIdx.x) * kTokensPerBlock + i;
    const bool write = token < logits.tokens, valid = write && (!logits.valid || logits.valid[token]);
    float clean[R::kValues], p[R::kValues];  // p: first the noise
    uint32_t keys[R::kValues];
#pragma unroll
    for (int j = 0; j < R::kValues; ++j) {
      clean[j] = R::expert(j) < logits.experts ? 0.0f : -INFINITY;
      p[j] = 0;
    }
    if (valid) R::load(clean, logits, token);
    if (valid && logits.noise)
      R::load(p, logits.noise + int64_t(token) * logits.experts, logits.experts, logits.vectors);

    // NaN and +inf count as +inf, so that one maximum finds the rows that no softmax can take
    float peak = -INFINITY;
#pragma unroll
    for (int j = 0; j < R::kValues; ++j) {
      const float noisy = clean[j] + p[j];
      peak = fmaxf(peak, noisy == noisy ? noisy : INFINITY);
    }
    peak = group_max<R::kLanes>(peak);
    const bool bad = valid && !(fabsf(peak) < INFINITY);
    if (bad) peak = 0;
    float noisy_total = 0;
#pragma unroll
    for (int j = 0; j < R::kValues; ++j) {
      const bool exists = R::expert(j) < logits.experts;
      if (bad) clean[j] = exists ? 0.0f : -INFINITY, p[j] = 0;
      const float noisy = clean[j] + p[j];
      keys[j] = exists ? ordered(noisy + 0.0f) : 0;  // -0 + 0 = 0
      noisy_total += expf(noisy - peak);
    }
    noisy_total = group_sum<R::kLanes>(noisy_total);
    const float eta = choose<R>(r, keys, token, peak, 1.0f / noisy_total, write, valid, bad, counts);

    float total = 0, moment = 0;  // sums of exp(x) and of x exp(x), x = logit - peak
    if (logits.noise) {
      peak = clean[0];
#pragma unroll
      for (int j = 1; j < R::kValues; ++j) peak = fmaxf(peak, clean[j]);
      peak = group_max<R::kLanes>(peak);
    }
#pragma unroll
    for (int j = 0; j < R::kValues; ++j) {
      const float x = clean[j] - peak;
      p[j] = expf(x);
      total += p[j];
      if (x > -INFINITY) moment += x * p[j];
    }
    total = group_sum<R::kLanes>(total);
    moment = group_sum<R::kLanes>(moment);
    const float log_total = logf(total), scale = 1.0f / total;
    const float lse = bad ? NAN : peak + log_total, entropy = bad ? NAN : log_total - moment * scale;
    if (write && lane == 0) r.lse[token] = valid ? lse : 0.0f;
    if (!valid) continue;
    const int modality = logits.modality_of(token);
#pragma unroll
    for (int j = 0; j < R::kValues; ++j) p[j] *= scale;
#pragma unroll
    for (int j = 0; j < R::kValues; j += 4)
      if (R::expert(j) < logits.experts)
        add_four(sums + modality * r.padded_experts() + R::expert(j), p + j, bad);
    if (logits.load_sigma > 0) {
#pragma unroll
      for (int j = 0; j < R::kValues; ++j)  // Phi((logit - eta) / sigma)
        p[j] = clean[j] > -INFINITY ? 0.5f * erfcf((eta - clean[j]) * (0.70710678f / logits.load_sigma)) : 0.0f;
#pragma unroll
      for (int j = 0; j < R::kValues; j += 4)
        if (R::expert(j) < logits.experts)
          add_four(sums + table + modality * r.padded_experts() + R::expert(j), p + j, bad);
    }
    if (lane == 0) {
      sums[r.entropy_column() + modality] += entropy;
      sums[r.entropy_column() + logits.modalities + modality] += lse * lse;
      if (bad) atomicAdd(&counts[segments], 1);
    }
  }
  __syncthreads();

  for (int column = threadIdx.x; column < columns; column += blockDim.x) {
    float sum = 0;
#pragma unroll 8
    for (int i = 0; i < groups; ++i) sum += all_sums[i * columns + column];
    r.sums[int64_t(blockIdx.x) * columns + column] = sum;
  }
  const bool last = blockIdx.x == gridDim.x - 1;  // it also clears the end of each row of counts
  for (int i = threadIdx.x; i <= segments; i += blockDim.x) {
    uint8_t* const row = r.counts + int64_t(i) * r.stride();
    row[blockIdx.x] = uint8_t(counts[i]);
    if (last)
      for (int j = gridDim.x; j < r.stride(); ++j) row[j] = 0;
  }
}

// The widest block whose sums fit; 0: not even one warp's do.
inline int gate_threads(const Route& route, int lanes, size_t& shared_bytes) {
  constexpr size_t most = 160 * 1024;  // of a block on compute capability 8.0
  for (int threads = kGateThreads; threads >= 32; threads /= 2) {
    shared_bytes = (size_t(threads / lanes) * route.columns() + route.segments() + 1) * sizeof(float);
    if (shared_bytes <= (threads > 32 ? kGateShared : most)) return threads;
  }
  return 0;
}

inline bool sums_fit(const Route& route) {
  return with_row(route.logits.experts, [&](auto row) {
    size_t bytes = 0;
    return gate_threads(route, decltype(row)::kLanes, bytes) > 0;
  });
}

inline cudaError_t launch_gate(const Route& route, cudaStream_t stream) {
  if (route.logits.tokens == 0) return cudaSuccess;
  return with_row(route.logits.experts, [&](auto row) {
    using R = decltype(row);
    size_t bytes = 0;
    const int threads = gate_threads(route, R::kLanes, bytes);
    if (threads == 0) return cudaErrorInvalidValue;
    return device::launch(gate_forward<R>, dim3(route.blocks()), dim3(threads), bytes, stream, route);
  });
}

}  // namespace dsvlm::moe::cuda
