// Gradient of the queries: a block owns 64 queries of one head and walks over keys as the forward does.
//
// It also leaves what the kernel for keys and values wants per query and per tile of queries, as it holds that anyway.
#pragma once

#include "intervals.cuh"

namespace dsvlm::attention {

template <int D>
struct BackwardShape {
  static constexpr int kRows = 16 * kWarps;       // queries of a block here, keys of a block there
  static constexpr int kKeys = D < 80 ? 64 : 32;  // a tile of the walk here
  static constexpr int kQueries = 32;             // a tile of the walk there
  static constexpr int kBlocks = D == 80 ? 4 : 3, kKeyBlocks = D < 128 ? 3 : 2;  // per multiprocessor

  static DSVLM_HOST_DEVICE int summaries(int queries) { return (queries + kQueries - 1) / kQueries; }
  static size_t query_bytes(int keys) {
    return (2 * kRows + 4 * kKeys) * kPitch<D> * 2 + kRows * (sizeof(Row) + sizeof(float)) + (keys + 63) / 64 * 8;
  }
  static size_t key_bytes(int queries) {
    const size_t tiles = (2 * kRows + 4 * kQueries) * kPitch<D> * 2;
    return tiles + 2 * kQueries * (sizeof(Statistic) + sizeof(Row)) +
           (summaries(queries) + 31) / 32 * (32 * (sizeof(QueryTile) + 4) + 4);
  }
};

// delta[row] = sum of grad_out * out, two threads a row; grad_out's tile is in shared memory, out_row this thread's.
template <int D, class T>
__device__ __forceinline__ void row_products(float* delta, const T* grad_tile, const uint4* out_row, bool live) {
  const int row = threadIdx.x / 2;
  float total = 0;
  if (live) {
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
      const int column = 2 * i + threadIdx.x % 2;
      const uint4 a = *reinterpret_cast<const uint4*>(grad_tile + row * kPitch<D> + 8 * column);
      const uint4 b = out_row[column];
      const uint32_t pairs[2][4] = {{a.x, a.y, a.z, a.w}, {b.x, b.y, b.z, b.w}};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 x = device::unpack<T>(pairs[0][j]), y = device::unpack<T>(pairs[1][j]);
        total += x.x * y.x + x.y * y.y;
      }
    }
  }
  total += __shfl_xor_sync(kAllLanes, total, 1);
  if (threadIdx.x % 2 == 0) delta[row] = total;
}

// By one warp, of 32 queries.
__device__ __forceinline__ void leave_summary(Summary* to, const Row* intervals) {
  Summary summary{};
  summary.tile = summarise(intervals, 32);
  summary.live = __ballot_sync(kAllLanes, intervals[lane_index()].live());
  if (lane_index() == 0) *to = summary;
}

template <class T, int D>
__global__ void __launch_bounds__(kThreads, BackwardShape<D>::kBlocks) backward_queries_kernel(Backward p) {
  using Shape = BackwardShape<D>;
  constexpr int kRows = Shape::kRows, N = Shape::kKeys, kTile = N * kPitch<D>, kQueries = Shape::kQueries;
  DSVLM_DYNAMIC_SHARED(shared);
  T* q_tile = reinterpret_cast<T*>(shared);
  T* grad_tile = q_tile + kRows * kPitch<D>;
  T* k_tiles = grad_tile + kRows * kPitch<D>;
  T* v_tiles = k_tiles + 2 * kTile;
  Row* intervals = reinterpret_cast<Row*>(v_tiles + 2 * kTile);
  float* deltas = reinterpret_cast<float*>(intervals + kRows);
  uint32_t* live = reinterpret_cast<uint32_t*>(deltas + kRows);

  const int tile = gridDim.x - 1 - blockIdx.x, first_query = tile * kRows, head = blockIdx.y, batch = blockIdx.z;
  const int kv_head = head / (p.heads / p.kv_heads), own = 16 * warp_index(), lane = lane_index();
  load_intervals<kRows>(intervals, p.rows + batch * p.rows_batch, first_query, p.queries, p.keys);
  __syncthreads();
  const auto live_query = [&](int row) { return intervals[row].live(); };
  copy_tile<D, kRows>(q_tile, p.q.at(batch, head), p.q.position, first_query, live_query);
  copy_tile<D, kRows>(grad_tile, p.grad_out.at(batch, head), p.grad_out.position, first_query, live_query);
  device::copy_async_commit();
  const QueryTile block_rows = summarise(intervals, kRows), warp_rows = summarise(intervals + own, 16);
  const int begin = block_rows.first < block_rows.last ? block_rows.first / N * N : 0;
  mark_live(live + begin / 32, begin / 32, (block_rows.last + N - 1) / N * N / 32, p.key_rows(batch), block_rows.first,
            block_rows.last);
  const int summaries = Shape::summaries(p.queries), summary = tile * (kRows / kQueries) + warp_index();
  if (head == 0 && (batch == 0 || p.rows_batch != 0) && warp_index() < kRows / kQueries && summary < summaries)
    leave_summary(p.summaries + int64_t(batch) * summaries + summary, intervals + kQueries * warp_index());
  __syncthreads();

  const uint4 *k = p.k.at(batch, kv_head), *v = p.v.at(batch, kv_head);
  const auto load_keys = [&](int key, int stage) {
    const LiveRows<N> alive(live + key / 32);
    copy_tile<D, N>(k_tiles + stage * kTile, k, p.k.position, key, alive);
    copy_tile<D, N>(v_tiles + stage * kTile, v, p.v.position, key, alive);
  };
  const Walk<N> walk{live, block_rows.last};
  int key = walk.from(begin), stage = 0;
  if (key < walk.last) load_keys(key, stage);
  device::copy_async_commit();

  device::copy_async_wait<1>();
  __syncthreads();
  const uint4* out_row = p.out.at(batch, head) + uint32_t(first_query + threadIdx.x / 2) * p.out.position;
  row_products<D>(deltas, grad_tile, out_row, live_query(threadIdx.x / 2));
  __syncthreads();
  float lse[2], delta[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = own + 8 * i + lane / 4, query = first_query + row;
    const int64_t at = (int64_t(batch) * p.heads + head) * p.queries + query;
    const float natural = intervals[row].live() ? p.lse[at] : -kInfinity;
    lse[i] = natural == -kInfinity ? kInfinity : natural * kLog2E;  // so that all weights of such a row are 0
    delta[i] = deltas[row];
    if (lane % 4 == 0 && query < p.queries) p.statistics[at] = Statistic{lse[i], delta[i]};
  }

  float grad_q[1][D / 8][4] = {};
  const float factor = p.slopes != nullptr ? 1 : p.scale * kLog2E;
  while (key < walk.last) {
    device::copy_async_wait<0>();
    __syncthreads();
    const int next = walk.from(key + N);
    if (next < walk.last) load_keys(next, 1 - stage);
    device::copy_async_commit();

    const Visit visit = decide(warp_rows, key_tile<N>(live, key), key, key + N);
    if (visit != Visit::skip) {
      float s[1][N / 8][4] = {}, grad_weights[1][N / 8][4] = {};
      multiply_transposed<D, 1, N>(s, q_tile + own * kPitch<D>, k_tiles + stage * kTile);
      multiply_transposed<D, 1, N>(grad_weights, grad_tile + own * kPitch<D>, v_tiles + stage * kTile);
      if (p.slopes != nullptr) add_alibi<1, N>(s, p, head, key, first_query + own);
      if (visit == Visit::partial) mask_scores<1, N>(s, intervals + own, live + key / 32, key);
#pragma unroll
      for (int n = 0; n < N / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float weight = device::fast_exp2(s[0][n][e] * factor - lse[e / 2]);
          s[0][n][e] = weight * (grad_weights[0][n][e] - delta[e / 2]);
        }
      }
      uint32_t grad_scores[1][N / 16][4];
      fragments<T, 1, N>(grad_scores, s);
      multiply<D, 1, N>(grad_q, grad_scores, k_tiles + stage * kTile);
    }
    key = next, stage = 1 - stage;
  }
  device::copy_async_wait<0>();
  __syncthreads();

  float kept[1][2];
#pragma unroll
  for (int i = 0; i < 2; ++i) kept[0][i] = intervals[own + 8 * i + lane / 4].live() ? p.scale : 0;
  const int64_t stride = int64_t(p.heads) * D;
  T* to = static_cast<T*>(p.grad_q) + (int64_t(batch) * p.queries + first_query + own) * stride + head * D;
  store_rows<D, 1>(to, stride, p.queries - first_query - own, q_tile + own * kPitch<D>, grad_q, kept);
}

}  // namespace dsvlm::attention
