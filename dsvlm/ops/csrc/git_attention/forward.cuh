// Forward: a block owns 64 R queries of one head, 16 R a warp, and walks over the keys that its intervals reach.
//
// Scores and output stay in registers (online softmax, base 2); keys and values come in tiles of N through two stages.
// A warp skips tiles that none of its own rows sees and masks only those that are not wholly allowed.
#pragma once

#include "intervals.cuh"

namespace dsvlm::attention {

template <int D, int R>
struct ForwardShape {
  static constexpr int kRows = 16 * R * kWarps;
  static constexpr int kKeys = D < (R == 1 ? 80 : 96) ? 64 : 32;  // what fits in registers and shared memory
  static constexpr int kBlocks = R == 1 ? 4 : 2;                       // per multiprocessor

  static constexpr size_t kTiles = (kRows + 4 * kKeys) * kPitch<D> * 2;
  static size_t shared_bytes(int keys) { return kTiles + kRows * sizeof(Row) + (keys + 63) / 64 * 8; }
};

// Weights of a tile of scores, in place; earlier sums and outputs are brought to the new maxima.
template <int R, int N, int D>
__device__ __forceinline__ void softmax_step(float (&s)[R][N / 8][4], float factor, float (&top)[R][2],
                                             float (&sum)[R][2], float (&out)[R][D / 8][4]) {
  float correction[R][2];
  bool changed = false;
#pragma unroll
  for (int r = 0; r < R; ++r) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float most = top[r][i];
#pragma unroll
      for (int n = 0; n < N / 8; ++n) most = fmaxf(most, fmaxf(s[r][n][2 * i], s[r][n][2 * i + 1]));
      most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
      most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2));
      const float reference = most == -kInfinity ? 0 : most * factor;  // no key so far: -inf minus -inf is NaN
      correction[r][i] = device::fast_exp2(top[r][i] * factor - reference);
      changed = changed || most != top[r][i];
      top[r][i] = most;
      float total = 0;
#pragma unroll
      for (int n = 0; n < N / 8; ++n) {
#pragma unroll
        for (int e = 2 * i; e < 2 * i + 2; ++e) {
          s[r][n][e] = device::fast_exp2(s[r][n][e] * factor - reference);
          total += s[r][n][e];
        }
      }
      sum[r][i] = sum[r][i] * correction[r][i] + total;
    }
  }
  if (!__any_sync(kAllLanes, changed)) return;
#pragma unroll
  for (int r = 0; r < R; ++r) {
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) out[r][n][e] *= correction[r][e / 2];
    }
  }
}

template <class T, int D, int R>
__global__ void __launch_bounds__(kThreads, ForwardShape<D, R>::kBlocks) forward_kernel(Forward p) {
  using Shape = ForwardShape<D, R>;
  constexpr int kRows = Shape::kRows, N = Shape::kKeys, kTile = N * kPitch<D>;
  DSVLM_DYNAMIC_SHARED(shared);
  T* q_tile = reinterpret_cast<T*>(shared);
  T* k_tiles = q_tile + kRows * kPitch<D>;
  T* v_tiles = k_tiles + 2 * kTile;
  Row* intervals = reinterpret_cast<Row*>(v_tiles + 2 * kTile);
  uint32_t* live = reinterpret_cast<uint32_t*>(intervals + kRows);

  // last queries first: under a causal mask they have most to do
  const int first_query = (gridDim.x - 1 - blockIdx.x) * kRows, head = blockIdx.y, batch = blockIdx.z;
  const int kv_head = head / (p.heads / p.kv_heads), own = 16 * R * warp_index();
  load_intervals<kRows>(intervals, p.rows + batch * p.rows_batch, first_query, p.queries, p.keys);
  __syncthreads();
  copy_tile<D, kRows>(q_tile, p.q.at(batch, head), p.q.position, first_query,
                      [&](int row) { return intervals[row].live(); });
  const QueryTile block_rows = summarise(intervals, kRows), warp_rows = summarise(intervals + own, 16 * R);
  const int begin = block_rows.first < block_rows.last ? block_rows.first / N * N : 0;
  mark_live(live + begin / 32, begin / 32, (block_rows.last + N - 1) / N * N / 32, p.key_rows(batch), block_rows.first,
            block_rows.last);
  __syncthreads();

  const uint4 *k = p.k.at(batch, kv_head), *v = p.v.at(batch, kv_head);
  const auto load_keys = [&](int key, int stage) {
    const LiveRows<N> alive(live + key / 32);
    copy_tile<D, N>(k_tiles + stage * kTile, k, p.k.position, key, alive);
    copy_tile<D, N>(v_tiles + stage * kTile, v, p.v.position, key, alive);
  };

  float out[R][D / 8][4] = {}, sum[R][2] = {}, top[R][2];
#pragma unroll
  for (int r = 0; r < R; ++r) top[r][0] = top[r][1] = -kInfinity;
  const float factor = p.slopes != nullptr ? 1 : p.scale * kLog2E;  // what is left to multiply scores with
  const Walk<N> walk{live, block_rows.last};
  int key = walk.from(begin), stage = 0;
  if (key < walk.last) load_keys(key, stage);
  device::copy_async_commit();
  while (key < walk.last) {
    device::copy_async_wait<0>();
    __syncthreads();  // this tile is there for all, and all are done with the one before
    const int next = walk.from(key + N);
    if (next < walk.last) load_keys(next, 1 - stage);
    device::copy_async_commit();

    const Visit visit = decide(warp_rows, key_tile<N>(live, key), key, key + N);
    if (visit != Visit::skip) {
      float s[R][N / 8][4] = {};
      multiply_transposed<D, R, N>(s, q_tile + own * kPitch<D>, k_tiles + stage * kTile);
      if (p.slopes != nullptr) add_alibi<R, N>(s, p, head, key, first_query + own);
      if (visit == Visit::partial) mask_scores<R, N>(s, intervals + own, live + key / 32, key);
      softmax_step<R, N, D>(s, factor, top, sum, out);
      uint32_t weights[R][N / 16][4];
      fragments<T, R, N>(weights, s);
      multiply<D, R, N>(out, weights, v_tiles + stage * kTile);
    }
    key = next, stage = 1 - stage;
  }
  device::copy_async_wait<0>();
  __syncthreads();  // the queries' tile may be overwritten, also where no key was visited

  const int lane = lane_index();
  float inverse[R][2];
#pragma unroll
  for (int r = 0; r < R; ++r) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = own + 16 * r + 8 * i + lane / 4;
      float total = sum[r][i];
      total += __shfl_xor_sync(kAllLanes, total, 1);
      total += __shfl_xor_sync(kAllLanes, total, 2);
      const bool empty = !intervals[row].live() || total == 0;
      inverse[r][i] = empty ? 0 : 1 / total;
      if (lane % 4 == 0 && first_query + row < p.queries) {
        const int64_t at = (int64_t(batch) * p.heads + head) * p.queries + first_query + row;
        p.lse[at] = empty ? -kInfinity : (top[r][i] * factor + log2f(total)) * kLn2;
      }
    }
  }
  const int64_t stride = int64_t(p.heads) * D;
  T* to = static_cast<T*>(p.out) + (int64_t(batch) * p.queries + first_query + own) * stride + head * D;
  store_rows<D, R>(to, stride, p.queries - first_query - own, q_tile + own * kPitch<D>, out, inverse);
}

template <class T, int D, int R>
cudaError_t start_forward(const Forward& p, cudaStream_t stream) {
  using Shape = ForwardShape<D, R>;
  return start_blocks(forward_kernel<T, D, R>, p.queries, Shape::kRows, p.heads, Shape::shared_bytes(p.keys), stream,
                      p);
}

// Tiles of 64 queries lose least at the mask's edges, tiles of 128 read keys and values half as often.
template <class T, int D>
cudaError_t start_forward(const Forward& p, cudaStream_t stream) {
  return p.queries < 512 ? start_forward<T, D, 1>(p, stream) : start_forward<T, D, 2>(p, stream);
}

template <class T>
cudaError_t forward(const Forward& p, int head_dim, cudaStream_t stream) {
  switch (head_dim) {
    case 64: return start_forward<T, 64>(p, stream);
    case 80: return start_forward<T, 80>(p, stream);
    case 96: return start_forward<T, 96>(p, stream);
    case 128: return start_forward<T, 128>(p, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace dsvlm::attention
